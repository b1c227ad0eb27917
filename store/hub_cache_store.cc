#include "store/hub_cache_store.h"

#include <cstdlib>
#include <filesystem>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "base/status.h"
#include "store/object_key.h"

namespace pewter {
namespace {

namespace fs = std::filesystem;

std::string Environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

std::string ExpandHome(std::string path) {
  if (path == "~" || absl::StartsWith(path, "~/")) path.replace(0, 1, Environment("HOME"));
  return path;
}

bool IsHex(absl::string_view text) {
  return text.find_first_not_of("0123456789abcdef") == absl::string_view::npos;
}

// The commit of `revision`, or empty when the cache has none.
absl::StatusOr<std::string> FindCommit(const std::string& model_folder,
                                       absl::string_view revision) {
  FileStore files(model_folder);
  const std::string ref = absl::StrCat("refs/", revision);
  if (files.Stat(ref).ok()) {
    ASSIGN_OR_RETURN(const std::string text, ReadText(files, ref, 1024));
    std::string commit(absl::StripAsciiWhitespace(text));
    if (commit.empty() || !IsHex(commit)) {
      return absl::DataLossError(
          absl::StrCat(files.Describe(ref), " does not hold a commit; download the model again"));
    }
    return commit;
  }
  if (revision.size() < 4 || !IsHex(revision)) return std::string();
  std::vector<std::string> commits;
  std::error_code error;
  for (fs::directory_iterator walk(absl::StrCat(model_folder, "/snapshots"), error), end;
       !error && walk != end; walk.increment(error)) {
    std::string commit = walk->path().filename().string();
    if (commit == revision) return commit;
    if (absl::StartsWith(commit, revision)) commits.push_back(std::move(commit));
  }
  if (commits.size() > 1) {
    return absl::InvalidArgumentError(absl::StrCat("revision ", revision, " is ambiguous in ",
                                                   model_folder,
                                                   "/snapshots: ", absl::StrJoin(commits, ", ")));
  }
  return commits.empty() ? std::string() : commits.front();
}

}  // namespace

std::string HubCacheStore::CacheFolder() {
  if (std::string hub = Environment("HF_HUB_CACHE"); !hub.empty()) return ExpandHome(hub);
  if (std::string home = Environment("HF_HOME"); !home.empty()) {
    return absl::StrCat(ExpandHome(home), "/hub");
  }
  std::string cache = Environment("XDG_CACHE_HOME");
  if (cache.empty()) cache = "~/.cache";
  return absl::StrCat(ExpandHome(cache), "/huggingface/hub");
}

bool HubCacheStore::IsModelId(absl::string_view text) {
  int slashes = 0;
  char previous = '/';
  for (char c : text) {
    if (c == '/' && (previous == '/' || ++slashes > 1)) return false;
    if (c != '/' && !absl::ascii_isalnum(c) && c != '-' && c != '_' && c != '.') return false;
    if (previous == '/' && !absl::ascii_isalnum(c) && c != '_') return false;
    previous = c;
  }
  return previous != '/';
}

absl::StatusOr<std::shared_ptr<ObjectStore>> HubCacheStore::Open(absl::string_view model,
                                                                 absl::string_view revision) {
  if (!IsModelId(model)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "hf://", model, " is not a model on the hub; write hf://org/model[@revision]"));
  }
  if (revision.empty()) revision = "main";
  if (!ValidateKey(revision).ok()) {
    return absl::InvalidArgumentError(
        absl::StrCat("hf://", model, ": \"", revision, "\" is not a revision"));
  }
  const std::string folder =
      absl::StrCat(CacheFolder(), "/models--", absl::StrReplaceAll(model, {{"/", "--"}}));
  ASSIGN_OR_RETURN(const std::string commit, FindCommit(folder, revision));
  const std::string snapshot = absl::StrCat(folder, "/snapshots/", commit);
  std::error_code error;
  if (commit.empty() || !fs::is_directory(snapshot, error)) {
    return absl::NotFoundError(absl::StrCat(
        "model ", model, ", revision ", revision, ", is not in the hub cache (searched ", folder,
        "); download it with: hf download ", model,
        revision == "main" ? "" : absl::StrCat(" --revision ", revision),
        ", or set HF_ENDPOINT=https://huggingface.co to read it from the hub"));
  }
  return std::shared_ptr<ObjectStore>(
      new HubCacheStore(absl::StrCat("hf://", model, "@", commit), snapshot));
}

HubCacheStore::HubCacheStore(std::string name, const std::string& snapshot)
    : name_(std::move(name)), files_(snapshot) {}

std::string HubCacheStore::Describe(absl::string_view key) const {
  return absl::StrCat(name_, "/", key);
}

std::string HubCacheStore::Etag(absl::string_view key) const {
  std::error_code error;
  const fs::path blob = fs::read_symlink(files_.Describe(key), error);
  // A cache on a file system without links holds plain files, which say nothing of their content.
  return error ? std::string() : blob.filename().string();
}

absl::StatusOr<ObjectStat> HubCacheStore::Stat(absl::string_view key) {
  ASSIGN_OR_RETURN(ObjectStat stat, files_.Stat(key));
  stat.etag = Etag(key);
  return stat;
}

absl::Status HubCacheStore::ReadInto(absl::string_view key, int64_t offset,
                                     absl::Span<std::byte> out) {
  return files_.ReadInto(key, offset, out);
}

absl::StatusOr<std::vector<ObjectEntry>> HubCacheStore::List(absl::string_view prefix) {
  ASSIGN_OR_RETURN(std::vector<ObjectEntry> entries, files_.List(prefix));
  for (ObjectEntry& entry : entries) entry.stat.etag = Etag(entry.key);
  return entries;
}

absl::Status HubCacheStore::ReadOnly() const {
  return absl::UnimplementedError(
      absl::StrCat(name_, " is read-only: a hub cache is not written to"));
}

}  // namespace pewter
