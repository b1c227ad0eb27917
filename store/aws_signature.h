// Signature Version 4 of AWS, in the header form.
//
//   Authorization: AWS4-HMAC-SHA256 Credential=KEY/DATE/REGION/SERVICE/aws4_request,
//                  SignedHeaders=NAMES, Signature=HEX
//
// Specified in https://docs.aws.amazon.com/IAM/latest/UserGuide/create-signed-request.html, and
// for S3 in .../AmazonS3/latest/API/sig-v4-header-based-auth.html. Pure functions.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "store/secret.h"

namespace pewter {

struct AwsCredentials {
  std::string access_key;
  Secret secret_key;
  Secret session_token;                         // empty for long-lived keys
  absl::Time expires = absl::InfiniteFuture();  // of the session
};

struct AwsRequest {
  std::string method;
  std::string path;                                          // encoded as in the URL, from '/' on
  std::vector<std::pair<std::string, std::string>> query;    // decoded, in any order
  std::vector<std::pair<std::string, std::string>> headers;  // all are signed; in any order
  std::string payload_hash;  // SHA-256 in hex, or "UNSIGNED-PAYLOAD"
};

struct AwsScope {
  std::string region;
  std::string service;  // "s3"
  absl::Time time;
};

// "20130524T000000Z": the x-amz-date header of a request signed for `time`.
std::string AwsDate(absl::Time time);
// "a=1&b=%2F", sorted: the query of the URL, too, so that what is sent is what was signed.
std::string AwsQuery(const std::vector<std::pair<std::string, std::string>>& query);
// What is hashed: exposed to be compared with the published examples.
std::string AwsCanonicalRequest(const AwsRequest& request);
// The value of the Authorization header. Host, x-amz-date and x-amz-security-token must be among
// the headers.
std::string AwsAuthorization(const AwsRequest& request, const AwsCredentials& credentials,
                             const AwsScope& scope);

}  // namespace pewter
