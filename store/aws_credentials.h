// AwsCredentialChain: where the keys of an S3 store come from.
//
// In order: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (AWS_SESSION_TOKEN), unless AWS_PROFILE
// names a profile; the profile in AWS_SHARED_CREDENTIALS_FILE and AWS_CONFIG_FILE
// (~/.aws/credentials, ~/.aws/config); AWS_WEB_IDENTITY_TOKEN_FILE with AWS_ROLE_ARN, exchanged at
// STS; AWS_CONTAINER_CREDENTIALS_FULL_URI or _RELATIVE_URI. The first that is configured is used,
// and its failure is final: a job must never go on with a stronger identity than its own. The
// instance's role is not asked. Sessions are renewed five minutes before they end, and token files
// are read again for that. No error holds a secret. Thread-safe.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "store/aws_signature.h"
#include "store/http.h"

namespace pewter {

// name -> value; empty values are as good as none.
using Environment = std::function<std::string(const char* name)>;
Environment ProcessEnvironment();

// Of one profile: the section of the credentials file over that of the config file.
using AwsProfile = std::map<std::string, std::string>;
// The settings of section `section` in a file of "[section]" and "name = value" lines.
AwsProfile ParseAwsProfile(absl::string_view text, absl::string_view section);
// Empty when no file has it. `name` empty: what the environment says, else "default".
AwsProfile ReadAwsProfile(const Environment& environment, std::string name);

class AwsCredentialChain {
 public:
  // `region` is for STS.
  AwsCredentialChain(Environment environment, std::string region, HttpOptions http = {});

  // Unauthenticated when nothing is configured; Unavailable when a source does not answer.
  absl::StatusOr<AwsCredentials> Get();
  // The store has called these expired: the next Get asks again.
  void Expired(const AwsCredentials& credentials);

 private:
  absl::StatusOr<AwsCredentials> Ask();
  absl::StatusOr<AwsCredentials> FromWebIdentity(const std::string& token_file,
                                                 const std::string& role,
                                                 const std::string& session);
  absl::StatusOr<AwsCredentials> FromContainer(const std::string& url);

  const Environment environment_;
  const std::string region_;
  HttpClient http_;
  std::mutex mutex_;                           // held while a source is asked: one asks for all
  std::optional<AwsCredentials> credentials_;  // guarded by mutex_
};

// {"AccessKeyId", "SecretAccessKey", "Token", "Expiration"}.
absl::StatusOr<AwsCredentials> ParseContainerCredentials(absl::string_view json);

}  // namespace pewter
