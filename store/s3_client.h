// S3Client: signed requests to one S3 endpoint, retried.
//
// Shared by all stores of the endpoint: they have one set of connections, one retry budget and one
// limit of requests at a time. Errors carry the object's name, the verb, the HTTP status, the
// store's error code and the number of attempts: Unavailable after the last retry,
// PermissionDenied, Unauthenticated, NotFound, FailedPrecondition (a condition of the request does
// not hold), Aborted (409), DataLoss (not what was asked for). Thread-safe; calls block.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/types/span.h"
#include "store/adaptive_limit.h"
#include "store/aws_credentials.h"
#include "store/http.h"
#include "store/retry.h"
#include "store/s3_xml.h"
#include "store/worker_pool.h"

namespace pewter {

struct S3Options {
  std::string endpoint;  // "https://host:port[/path]"; empty: AWS's of the region
  std::string region = "us-east-1";
  bool path_style = false;  // http://endpoint/bucket/key, not http://bucket.endpoint/key
  bool checksums = true;    // CRC32C of what is written, for the store to check
  Environment environment = ProcessEnvironment();  // of the credentials
  RetryPolicy retry;
  HttpOptions http;
};

// AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, AWS_REGION or AWS_DEFAULT_REGION, and
// AWS_REQUEST_CHECKSUM_CALCULATION (when_required: none), else what the profile says (endpoint_url,
// region). With an endpoint of its own a store is addressed in path style, unless
// PEWTER_S3_ADDRESSING is "virtual". InvalidArgument for an endpoint that is no http(s) URL.
absl::StatusOr<S3Options> S3OptionsFrom(const Environment& environment);

struct S3Request {
  std::string method = "GET";
  std::string bucket;
  std::string key;  // empty: the bucket itself
  std::vector<std::pair<std::string, std::string>> query;
  std::vector<std::pair<std::string, std::string>> headers;
  absl::Span<const std::byte> body;
  // With `into`, a GET of the bytes from `offset` on that fill it, of the version `if_match` (an
  // ETag without quotes) when that is given. What is cut short is gone on with where it ended.
  absl::Span<std::byte> into;
  int64_t offset = 0;
  std::string if_match;
  bool patient = false;  // the store may work for minutes before it answers
  bool once = false;     // a refusal (4xx) is the answer that is wanted, and not tried again
};

struct S3Reply {
  HttpResponse http;
  S3Error error;  // of an answer that is one
  int attempts = 0;
};

class S3Client {
 public:
  explicit S3Client(S3Options options);

  // OK for 2xx. `reply` is the last answer also when it is not.
  absl::Status Send(S3Request request, S3Reply& reply);

  const S3Options& options() const { return options_; }
  WorkerPool& workers() { return workers_; }
  // At most so many requests of a kind (reading, writing) are under way.
  static constexpr int kMostRequests = 32;

 private:
  absl::Status SendOnce(const S3Request& request, const AwsCredentials& credentials,
                        S3Reply& reply);
  std::string RegionOf(const std::string& bucket);
  bool LearnRegion(const std::string& bucket, const HttpResponse& response);
  bool LearnTime(const HttpResponse& response);

  const S3Options options_;
  std::atomic<bool> answered_ = false;  // there is a server
  HttpClient http_;
  AwsCredentialChain credentials_;
  RetryBudget budget_;
  AdaptiveLimit reads_{4, kMostRequests};
  AdaptiveLimit writes_{4, kMostRequests};
  std::mutex mutex_;
  absl::flat_hash_map<std::string, std::string>
      regions_;                            // of buckets elsewhere; guarded by mutex_
  absl::Duration clock_offset_;            // the store's clock minus ours; guarded by mutex_
  WorkerPool workers_{2 * kMostRequests};  // last, so that its tasks end first
};

}  // namespace pewter
