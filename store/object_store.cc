#include "store/object_store.h"

#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "base/status.h"
#include "base/units.h"
#include "store/artifact_store.h"
#include "store/file_store.h"
#include "store/hub_store.h"
#include "store/object_key.h"
#include "store/s3_store.h"

namespace pewter {

absl::Status ValidateKey(absl::string_view key) {
  bool good = key.find('\0') == absl::string_view::npos;
  for (absl::string_view part : absl::StrSplit(key, '/')) {
    good = good && !part.empty() && part != "." && part != "..";
  }
  if (good) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("\"", absl::Utf8SafeCHexEscape(key),
                                                 "\" is not a relative path below its folder"));
}

absl::StatusOr<std::string> ReadText(ObjectStore& store, absl::string_view key, int64_t limit) {
  ASSIGN_OR_RETURN(const ObjectStat stat, store.Stat(key));
  if (stat.size > limit) {
    return absl::FailedPreconditionError(absl::StrCat(store.Describe(key), " has ",
                                                      FormatBytes(stat.size), "; at most ",
                                                      FormatBytes(limit), " are expected"));
  }
  std::string text(stat.size, '\0');
  RETURN_IF_ERROR(store.ReadInto(
      key, 0, absl::MakeSpan(reinterpret_cast<std::byte*>(text.data()), text.size())));
  return text;
}

namespace {

absl::Status WriteAndCommit(ObjectWriter& writer, absl::string_view text) {
  RETURN_IF_ERROR(writer.Append(
      absl::MakeConstSpan(reinterpret_cast<const std::byte*>(text.data()), text.size())));
  return writer.Commit();
}

}  // namespace

absl::Status WriteText(ObjectStore& store, absl::string_view key, absl::string_view text) {
  ASSIGN_OR_RETURN(const std::unique_ptr<ObjectWriter> writer, store.Create(key));
  return WriteAndCommit(*writer, text);
}

absl::Status WriteNewText(ObjectStore& store, absl::string_view key, absl::string_view text) {
  ASSIGN_OR_RETURN(const std::unique_ptr<ObjectWriter> writer, store.CreateNew(key));
  return WriteAndCommit(*writer, text);
}

absl::StatusOr<std::shared_ptr<ObjectStore>> OpenStore(absl::string_view uri) {
  if (absl::ConsumePrefix(&uri, "hf://")) {
    const size_t at = uri.find('@');
    return OpenHub(uri.substr(0, at),
                   at == absl::string_view::npos ? absl::string_view() : uri.substr(at + 1));
  }
  if (absl::StartsWith(uri, "s3://")) return S3Store::Open(uri);
  if (absl::ConsumePrefix(&uri, kArtifactScheme)) return OpenArtifact(uri);
  if (absl::ConsumePrefix(&uri, "file://")) {
    if (!absl::StartsWith(uri, "/")) {
      return absl::InvalidArgumentError(
          absl::StrCat("file://", uri, " must be an absolute path: file:///folder"));
    }
  } else if (absl::StrContains(uri, "://")) {
    return absl::InvalidArgumentError(
        absl::StrCat(uri,
                     ": unknown kind of store; use a path, file:///path, s3://bucket/prefix, "
                     "hf://org/model[@revision] or, on a server, artifact://name"));
  }
  if (uri.empty()) return absl::InvalidArgumentError("empty path");
  return std::make_shared<FileStore>(std::string(uri));
}

}  // namespace pewter
