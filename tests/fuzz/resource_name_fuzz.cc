// Names of artifacts and of ByteStream's resources, on any bytes: no crash, every refusal is
// InvalidArgument, and what is accepted has one spelling and names nothing above its folder.
#include <cstddef>
#include <cstdint>

#include "absl/strings/string_view.h"
#include "store/artifact_store.h"
#include "store/object_key.h"
#include "store/resource_name.h"
#include "tests/fuzz/memory_store.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using pewter::fuzz::Require;
  using Kind = pewter::ResourceName::Kind;
  const absl::string_view text(reinterpret_cast<const char*>(data), size);

  const auto name = pewter::ParseResourceName(text);
  Require(name.ok() || absl::IsInvalidArgument(name.status()));
  if (name.ok()) {
    Require(name->ToString() == text);
    if (name->kind == Kind::kUpload || name->kind == Kind::kBlob) {
      Require(pewter::IsSha256(name->sha256) && name->size >= 0);
      Require(pewter::ValidateKey(pewter::BlobKey(name->sha256)).ok());
    } else {
      Require(pewter::ValidateKey(name->path).ok());
    }
    if (name->kind == Kind::kOutput) {
      Require(pewter::ValidateKey(pewter::OutputKey(name->id, name->path)).ok());
    }
  }

  const auto uri = pewter::ParseArtifactUri(text);
  Require(uri.ok() || absl::IsInvalidArgument(uri.status()));
  if (uri.ok()) Require(uri->ToString() == text);

  const auto files = pewter::ParseFileSet(text);
  Require(files.ok() || absl::IsDataLoss(files.status()));
  if (files.ok()) {
    for (const pewter::ArtifactFile& file : *files) {
      Require(pewter::ValidateKey(file.path).ok() && pewter::IsSha256(file.sha256));
    }
    Require(pewter::ParseFileSet(pewter::FormatFileSet(*files)).ok());
  }
  return 0;
}
