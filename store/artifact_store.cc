#include "store/artifact_store.h"

#include <algorithm>
#include <cstdlib>
#include <map>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "base/digest.h"
#include "base/status.h"
#include "nlohmann/json.hpp"
#include "store/object_key.h"

namespace pewter {
namespace {

using nlohmann::ordered_json;

constexpr absl::string_view kUploadedPrefix = "sha256/";
constexpr size_t kMaxName = 63;
constexpr int64_t kMaxSetBytes = int64_t{16} << 20;

// A set of files over the blobs of a root.
class FileSetStore final : public ReadOnlyStore {
 public:
  FileSetStore(std::string name, std::shared_ptr<ObjectStore> root, std::vector<ArtifactFile> files)
      : name_(std::move(name)), root_(std::move(root)) {
    for (ArtifactFile& file : files) {
      std::string path = file.path;
      files_.emplace(std::move(path), std::move(file));
    }
  }

  absl::StatusOr<ObjectStat> Stat(absl::string_view key) override {
    ASSIGN_OR_RETURN(const ArtifactFile* file, Find(key));
    return StatOf(*file);
  }

  absl::Status ReadInto(absl::string_view key, int64_t offset, absl::Span<std::byte> out) override {
    ASSIGN_OR_RETURN(const ArtifactFile* file, Find(key));
    if (offset < 0) {
      return absl::InvalidArgumentError(absl::StrCat("negative offset ", offset, " in ", key));
    }
    if (offset > file->size || static_cast<int64_t>(out.size()) > file->size - offset) {
      return absl::DataLossError(absl::StrCat(Describe(key), " ends too early: ", out.size(),
                                              " bytes at offset ", offset, " are needed, of ",
                                              file->size));
    }
    return Annotate(root_->ReadInto(BlobKey(file->sha256), offset, out), Describe(key));
  }

  std::shared_ptr<void> WillRead(absl::string_view key, int64_t offset, int64_t bytes) override {
    const absl::StatusOr<const ArtifactFile*> file = Find(key);
    return file.ok() ? root_->WillRead(BlobKey((*file)->sha256), offset, bytes) : nullptr;
  }

  absl::StatusOr<std::vector<ObjectEntry>> List(absl::string_view prefix) override {
    std::vector<ObjectEntry> entries;
    for (auto it = files_.lower_bound(prefix);
         it != files_.end() && absl::StartsWith(it->first, prefix); ++it) {
      entries.push_back({it->first, StatOf(it->second)});
    }
    return entries;
  }

  bool distant() const override { return root_->distant(); }
  std::string Describe(absl::string_view key) const override {
    return absl::StrCat(name_, "/", key);
  }

 private:
  absl::StatusOr<const ArtifactFile*> Find(absl::string_view key) const {
    RETURN_IF_ERROR(ValidateKey(key));
    const auto it = files_.find(key);
    if (it != files_.end()) return &it->second;
    return absl::NotFoundError(absl::StrCat(Describe(key), " is not among the uploaded files"));
  }
  // The digest is what identifies the content.
  static ObjectStat StatOf(const ArtifactFile& file) {
    return {.size = file.size, .etag = file.sha256};
  }
  absl::Status ReadOnly() const override {
    return absl::UnimplementedError(
        absl::StrCat(name_, " is read-only: it is named by its content"));
  }

  const std::string name_;
  const std::shared_ptr<ObjectStore> root_;
  std::map<std::string, ArtifactFile, std::less<>> files_;
};

}  // namespace

std::string ArtifactUri::ToString() const {
  return absl::StrCat(kArtifactScheme, uploaded ? kUploadedPrefix : "", name);
}

absl::StatusOr<ArtifactUri> ParseArtifactUri(absl::string_view uri) {
  absl::string_view rest = uri;
  if (absl::ConsumePrefix(&rest, kArtifactScheme)) {
    if (absl::ConsumePrefix(&rest, kUploadedPrefix)) {
      if (IsSha256(rest)) return ArtifactUri{.uploaded = true, .name = std::string(rest)};
    } else if (IsArtifactName(rest)) {
      return ArtifactUri{.name = std::string(rest)};
    }
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "\"", absl::Utf8SafeCHexEscape(uri.substr(0, 200)),
      "\" is neither artifact://sha256/DIGEST, of 64 hex digits, nor artifact://NAME, of 1 to ",
      kMaxName, " letters, digits, '.', '_' and '-'"));
}

bool IsSha256(absl::string_view text) {
  return text.size() == 64 && std::all_of(text.begin(), text.end(), [](char c) {
           return absl::ascii_isdigit(c) || (c >= 'a' && c <= 'f');
         });
}

bool IsArtifactName(absl::string_view text) {
  return !text.empty() && text.size() <= kMaxName && absl::ascii_isalnum(text[0]) &&
         text != "sha256" && std::all_of(text.begin(), text.end(), [](char c) {
           return absl::ascii_isalnum(c) || c == '.' || c == '_' || c == '-';
         });
}

std::string BlobKey(absl::string_view sha256) {
  return absl::StrCat("blobs/sha256/", sha256.substr(0, 2), "/", sha256);
}
std::string SetKey(absl::string_view sha256) { return absl::StrCat("sets/", sha256); }
std::string OutputKey(absl::string_view name, absl::string_view path) {
  return absl::StrCat("outputs/", name, "/", path);
}

std::string FormatFileSet(std::vector<ArtifactFile> files) {
  std::sort(files.begin(), files.end(),
            [](const ArtifactFile& a, const ArtifactFile& b) { return a.path < b.path; });
  ordered_json list = ordered_json::array();
  for (const ArtifactFile& file : files) {
    list.push_back({{"path", file.path}, {"bytes", file.size}, {"sha256", file.sha256}});
  }
  return ordered_json{{"format", 1}, {"files", std::move(list)}}.dump(
      -1, ' ', /*ensure_ascii=*/false, ordered_json::error_handler_t::replace);
}

absl::StatusOr<std::vector<ArtifactFile>> ParseFileSet(absl::string_view text) {
  std::vector<ArtifactFile> files;
  try {
    const ordered_json json = ordered_json::parse(text.begin(), text.end());
    if (json.at("format") != 1) return absl::DataLossError("is no set of files of format 1");
    for (const ordered_json& item : json.at("files")) {
      files.push_back({item.at("path"), item.at("bytes"), item.at("sha256")});
      const ArtifactFile& file = files.back();
      if (!ValidateKey(file.path).ok() || file.size < 0 || !IsSha256(file.sha256)) {
        return absl::DataLossError("is a damaged set of files");
      }
    }
  } catch (const nlohmann::json::exception& error) {
    return absl::DataLossError(absl::StrCat("is a damaged set of files (", error.what(), ")"));
  }
  return files;
}

absl::StatusOr<std::vector<ArtifactFile>> ReadFileSet(ObjectStore& root, absl::string_view sha256) {
  const std::string name = ArtifactUri{.uploaded = true, .name = std::string(sha256)}.ToString();
  const absl::StatusOr<std::string> text = ReadText(root, SetKey(sha256), kMaxSetBytes);
  if (absl::IsNotFound(text.status())) {
    return absl::NotFoundError(absl::StrCat(name, " is not on this server; upload it again"));
  }
  RETURN_IF_ERROR(text.status());
  if (Sha256::Of(*text) != sha256) {
    return absl::DataLossError(absl::StrCat(name, " is damaged: its digest is another"));
  }
  absl::StatusOr<std::vector<ArtifactFile>> files = ParseFileSet(*text);
  RETURN_IF_ERROR(Annotate(files.status(), name));
  return files;
}

absl::StatusOr<std::shared_ptr<ObjectStore>> OpenArtifact(absl::string_view rest) {
  const std::string uri = absl::StrCat(kArtifactScheme, rest);
  const char* const root_uri = std::getenv(kArtifactRootVariable);
  if (root_uri == nullptr || *root_uri == '\0') {
    return absl::FailedPreconditionError(absl::StrCat(
        uri, " is on a server: pewter submit merges it there, pewter download brings it here (",
        kArtifactRootVariable, " says where a server keeps artifacts)"));
  }
  rest = absl::StripSuffix(rest, "/");
  absl::string_view digest = rest;
  if (absl::ConsumePrefix(&digest, kUploadedPrefix)) {
    RETURN_IF_ERROR(ParseArtifactUri(absl::StripSuffix(uri, "/")).status());
    ASSIGN_OR_RETURN(std::shared_ptr<ObjectStore> root, OpenStore(root_uri));
    ASSIGN_OR_RETURN(std::vector<ArtifactFile> files, ReadFileSet(*root, digest));
    return std::make_shared<FileSetStore>(std::string(absl::StripSuffix(uri, "/")), std::move(root),
                                          std::move(files));
  }
  const absl::string_view base = absl::StripSuffix(root_uri, "/");
  if (rest.empty()) return OpenStore(absl::StrCat(base, "/outputs"));
  RETURN_IF_ERROR(ValidateKey(rest));
  return OpenStore(absl::StrCat(base, "/outputs/", rest));
}

}  // namespace pewter
