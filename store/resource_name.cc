#include "store/resource_name.h"

#include <algorithm>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "store/artifact_store.h"
#include "store/object_key.h"

namespace pewter {
namespace {

constexpr size_t kMaxName = 1024;
constexpr size_t kMaxJobId = 63;

// The part before the next '/', taken off `rest` with it; all of `rest` where there is none.
absl::string_view TakePart(absl::string_view& rest) {
  const size_t slash = rest.find('/');
  const absl::string_view part = rest.substr(0, slash);
  rest = slash == absl::string_view::npos ? absl::string_view() : rest.substr(slash + 1);
  return part;
}

bool IsLowerHex(char c) { return absl::ascii_isdigit(c) || (c >= 'a' && c <= 'f'); }

// "123e4567-e89b-12d3-a456-426614174000"
bool IsUuid(absl::string_view text) {
  if (text.size() != 36) return false;
  for (size_t i = 0; i < text.size(); ++i) {
    const bool dash = i == 8 || i == 13 || i == 18 || i == 23;
    if (dash ? text[i] != '-' : !IsLowerHex(text[i])) return false;
  }
  return true;
}

bool IsJobId(absl::string_view text) {
  return !text.empty() && text.size() <= kMaxJobId &&
         std::all_of(text.begin(), text.end(),
                     [](char c) { return absl::ascii_isalnum(c) || c == '-'; });
}

// blobs/sha256/DIGEST/SIZE
bool ParseBlob(absl::string_view rest, ResourceName& name) {
  if (!absl::ConsumePrefix(&rest, "blobs/sha256/")) return false;
  name.sha256 = std::string(TakePart(rest));
  return IsSha256(name.sha256) && absl::SimpleAtoi(rest, &name.size) && name.size >= 0 &&
         absl::StrCat(name.size) == rest;
}

bool Parse(absl::string_view text, ResourceName& name) {
  if (text.size() > kMaxName) return false;
  absl::string_view rest = text;
  if (absl::ConsumePrefix(&rest, "uploads/")) {
    name.kind = ResourceName::Kind::kUpload;
    name.id = std::string(TakePart(rest));
    return IsUuid(name.id) && ParseBlob(rest, name);
  }
  if (absl::ConsumePrefix(&rest, "outputs/")) {
    name.kind = ResourceName::Kind::kOutput;
    name.id = std::string(TakePart(rest));
    name.path = std::string(rest);
    return IsArtifactName(name.id) && ValidateKey(name.path).ok();
  }
  if (absl::ConsumePrefix(&rest, "jobs/")) {
    name.kind = ResourceName::Kind::kJobFile;
    name.id = std::string(TakePart(rest));
    name.path = std::string(rest);
    return IsJobId(name.id) && ValidateKey(name.path).ok();
  }
  name.kind = ResourceName::Kind::kBlob;
  return ParseBlob(rest, name);
}

}  // namespace

std::string ResourceName::ToString() const {
  switch (kind) {
    case Kind::kUpload:
      return absl::StrCat("uploads/", id, "/blobs/sha256/", sha256, "/", size);
    case Kind::kBlob:
      return absl::StrCat("blobs/sha256/", sha256, "/", size);
    case Kind::kOutput:
      return absl::StrCat("outputs/", id, "/", path);
    case Kind::kJobFile:
      return absl::StrCat("jobs/", id, "/", path);
  }
  return "";
}

absl::StatusOr<ResourceName> ParseResourceName(absl::string_view text) {
  ResourceName name;
  if (Parse(text, name)) return name;
  return absl::InvalidArgumentError(
      absl::StrCat("\"", absl::Utf8SafeCHexEscape(text.substr(0, 200)),
                   "\" is none of uploads/UUID/blobs/sha256/DIGEST/SIZE, "
                   "blobs/sha256/DIGEST/SIZE, outputs/NAME/PATH and jobs/JOB/PATH"));
}

}  // namespace pewter
