// The XML that S3 and STS speak, as far as it is used here. Names are matched without their
// namespace, which stores write differently; elements that nobody reads are skipped. DataLoss when
// a text is no such document. Bounded by the size of the text: pugixml expands no entities of the
// document's own.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "store/aws_signature.h"

namespace pewter {

struct S3Error {
  std::string code;  // "SlowDown"; empty when the text is no error document
  std::string message;
};
// Of any text: a proxy in front of a store answers what it likes.
S3Error ParseS3Error(absl::string_view text);

struct S3Object {
  std::string key;
  int64_t size = 0;
  std::string etag;  // without quotes
};
struct S3ObjectPage {
  std::vector<S3Object> objects;
  std::string next;  // continuation token; empty: the last page
};
absl::StatusOr<S3ObjectPage> ParseListObjects(absl::string_view text);

struct S3Upload {
  std::string key;
  std::string id;
  absl::Time initiated = absl::InfiniteFuture();  // where the store does not say
};
struct S3UploadPage {
  std::vector<S3Upload> uploads;
  std::string next_key, next_id;  // markers; empty: the last page
};
absl::StatusOr<S3UploadPage> ParseListUploads(absl::string_view text);

absl::StatusOr<std::string> ParseUploadId(absl::string_view text);

struct S3Part {
  int number = 0;
  std::string etag;    // as the store gave it
  std::string crc32c;  // base64; empty: not sent
};
std::string CompleteUploadXml(absl::Span<const S3Part> parts);
// A complete may answer 200 and an error: then its code.
absl::StatusOr<S3Error> ParseCompleteUpload(absl::string_view text);

// Of STS's AssumeRoleWithWebIdentity.
absl::StatusOr<AwsCredentials> ParseAssumedRole(absl::string_view text);

// Without quotes and the mark of a weak one.
std::string BareEtag(absl::string_view etag);

}  // namespace pewter
