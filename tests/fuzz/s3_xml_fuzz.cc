// What a store, a proxy or STS answers, on any bytes: no crash, and every refusal is DataLoss.
#include <cstddef>
#include <cstdint>

#include "absl/strings/string_view.h"
#include "store/http.h"
#include "store/s3_xml.h"
#include "tests/fuzz/memory_store.h"

namespace {

using pewter::fuzz::Require;

template <class T>
void RequireDataLoss(const absl::StatusOr<T>& parsed) {
  Require(parsed.ok() || absl::IsDataLoss(parsed.status()));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const absl::string_view text(reinterpret_cast<const char*>(data), size);
  pewter::ParseS3Error(text);
  const auto objects = pewter::ParseListObjects(text);
  RequireDataLoss(objects);
  if (objects.ok()) {
    for (const pewter::S3Object& object : objects->objects) {
      Require(!object.key.empty() && object.size >= 0);
    }
  }
  const auto uploads = pewter::ParseListUploads(text);
  RequireDataLoss(uploads);
  if (uploads.ok()) {
    for (const pewter::S3Upload& upload : uploads->uploads) {
      Require(!upload.key.empty() && !upload.id.empty());
    }
  }
  const auto id = pewter::ParseUploadId(text);
  RequireDataLoss(id);
  Require(!id.ok() || !id->empty());
  RequireDataLoss(pewter::ParseCompleteUpload(text));
  const auto role = pewter::ParseAssumedRole(text);
  RequireDataLoss(role);
  Require(!role.ok() || !(role->access_key.empty() || role->secret_key.empty()));
  pewter::BareEtag(text);
  Require(pewter::PercentDecode(pewter::PercentEncode(text, /*keep_slash=*/false)) == text);
  pewter::SplitUrl(text);
  return 0;
}
