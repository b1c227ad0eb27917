#include "client/transfer.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <functional>
#include <stop_token>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "base/digest.h"
#include "base/status.h"
#include "base/units.h"
#include "client/interrupt.h"
#include "client/progress.h"
#include "merge/checkpoint/checkpoint.h"
#include "store/artifact_store.h"
#include "store/object_key.h"

namespace pewter::client {

namespace {

namespace fs = std::filesystem;
using std::chrono::steady_clock;

constexpr int kMostBlobs = 1000;  // in a request
constexpr int64_t kPieceBytes = int64_t{8} << 20;
constexpr int64_t kLargestSmallFile = int64_t{256} << 20;
// Of files that describe a model: configurations, tokenizers, templates.
constexpr absl::string_view kSmallFiles[] = {".json", ".txt",   ".model", ".jinja",
                                             ".spm",  ".vocab", ".bpe",   ".tiktoken"};

using Stop = std::stop_token;

absl::Status Interrupted() { return absl::CancelledError("interrupted"); }

absl::Status FileError(absl::string_view action, absl::string_view path) {
  const std::string message = absl::StrCat("cannot ", action, " ", path, ": ", strerror(errno));
  switch (errno) {
    case ENOENT:
    case ENOTDIR:
      return absl::NotFoundError(message);
    case ENOSPC:
    case EDQUOT:
      return absl::ResourceExhaustedError(message);
    default:
      return absl::PermissionDeniedError(message);
  }
}

// One bar for several files.
class Meter {
 public:
  Meter(Output& out, absl::string_view title, int64_t total)
      : display_(ChooseProgressStyle(out, stderr), /*print_warnings=*/false, stderr, title),
        total_(total),
        begin_(steady_clock::now()) {}

  // `done` bytes of what is being moved; `moved` of them in this run.
  void Show(int64_t done, int64_t moved) {
    const double seconds = std::chrono::duration<double>(steady_clock::now() - begin_).count();
    Progress progress{.phase = Phase::kMerging, .bytes_written = done, .bytes_total = total_};
    if (seconds > 0.5 && moved > 0) {
      progress.bytes_per_second = moved / seconds;
      progress.seconds_left = (total_ - done) / progress.bytes_per_second;
    }
    display_.OnProgress(progress);
  }

 private:
  ProgressDisplay display_;
  const int64_t total_;
  const steady_clock::time_point begin_;
};

bool IsSmallFile(const fs::path& path) {
  const std::string name = path.filename().string();
  return name[0] != '.' &&
         std::any_of(std::begin(kSmallFiles), std::end(kSmallFiles),
                     [&](absl::string_view ending) { return absl::EndsWith(name, ending); });
}

// Adds the regular file at FOLDER/PATH.
absl::Status AddFile(const std::string& folder, const std::string& path,
                     std::vector<ModelFile>& files) {
  const std::string file = absl::StrCat(folder, "/", path);
  struct stat found;
  if (stat(file.c_str(), &found) != 0) return FileError("open", file);
  if (!S_ISREG(found.st_mode)) {
    return absl::FailedPreconditionError(absl::StrCat(file, " is not a regular file"));
  }
  files.push_back({path, file, found.st_size});
  return absl::OkStatus();
}

// The folders of modules.json: "1_Pooling".
std::vector<std::string> ModuleFolders(const std::string& folder) {
  std::vector<std::string> folders;
  const auto store = OpenStore(folder);
  if (!store.ok()) return folders;
  const absl::StatusOr<std::string> text = ReadText(**store, "modules.json", int64_t{1} << 20);
  if (!text.ok()) return folders;
  const Json modules = Json::parse(*text, nullptr, /*allow_exceptions=*/false);
  if (!modules.is_array()) return folders;
  for (const Json& module : modules) {
    if (!module.is_object()) continue;
    const auto path = module.find("path");
    if (path == module.end() || !path->is_string()) continue;
    if (ValidateKey(path->get<std::string>()).ok()) folders.push_back(path->get<std::string>());
  }
  return folders;
}

// The weights: of a model or an adapter.
absl::StatusOr<std::vector<std::string>> WeightsOf(const std::string& folder) {
  const ModelRef ref{.path = folder};
  std::error_code error;
  const bool adapter = fs::exists(absl::StrCat(folder, "/adapter_config.json"), error) &&
                       !fs::exists(absl::StrCat(folder, "/config.json"), error);
  ASSIGN_OR_RETURN(const std::shared_ptr<const Checkpoint> checkpoint,
                   adapter ? Checkpoint::OpenAdapter(ref) : Checkpoint::Open(ref));
  std::vector<std::string> keys;
  for (const InputFile& file : checkpoint->files()) keys.push_back(file.key);
  return keys;
}

// Calls `take` with the file's bytes from its beginning, `size` of them.
absl::Status ReadPieces(int fd, const std::string& path, int64_t size, const Stop& stop,
                        const std::function<void(absl::Span<const std::byte>)>& take) {
  std::vector<std::byte> piece(std::min(size, kPieceBytes));
  for (int64_t offset = 0; offset < size;) {
    if (stop.stop_requested()) return Interrupted();
    const ssize_t got =
        pread(fd, piece.data(), std::min<int64_t>(piece.size(), size - offset), offset);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return FileError("read", path);
    if (got == 0) {
      return absl::FailedPreconditionError(
          absl::StrCat(path, " has become shorter while it was read"));
    }
    take(absl::MakeConstSpan(piece).subspan(0, got));
    offset += got;
  }
  return absl::OkStatus();
}

absl::StatusOr<std::string> Sha256OfFile(const std::string& path, int64_t size, const Stop& stop,
                                         const std::function<void(int64_t bytes)>& on_bytes) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return FileError("open", path);
  const absl::Cleanup close_file = [fd] { close(fd); };
  Sha256 sha;
  RETURN_IF_ERROR(ReadPieces(fd, path, size, stop, [&](absl::Span<const std::byte> piece) {
    sha.Update(piece);
    on_bytes(piece.size());
  }));
  return sha.Finish();
}

// A model with the digests of its files.
struct NamedModel {
  std::string path;
  std::string suffix;  // of the URI: "/FILE" for a bare file
  v1::CreateArtifactRequest request;
};

// What is to be sent: each blob once.
struct Blobs {
  std::map<std::string, v1::BlobDigest> digests;  // by SHA-256
  std::map<std::string, std::string> files;       // where they are
  int64_t bytes = 0;
};

absl::StatusOr<std::vector<NamedModel>> HashModels(absl::Span<const std::string> paths,
                                                   Blobs& blobs, const Stop& stop, Output& out) {
  std::vector<std::vector<ModelFile>> files;
  int64_t total = 0;
  for (const std::string& path : paths) {
    ASSIGN_OR_RETURN(std::vector<ModelFile> found, FilesOfModel(path));
    for (const ModelFile& file : found) total += file.size;
    files.push_back(std::move(found));
  }
  Meter meter(out, "hashing", total);
  int64_t done = 0;
  std::vector<NamedModel> models;
  for (size_t i = 0; i < paths.size(); ++i) {
    NamedModel model{.path = paths[i]};
    std::error_code error;
    if (!fs::is_directory(std::string(absl::StripPrefix(paths[i], "file://")), error)) {
      model.suffix = absl::StrCat("/", files[i].front().path);
    }
    for (const ModelFile& file : files[i]) {
      ASSIGN_OR_RETURN(std::string sha256,
                       Sha256OfFile(file.file, file.size, stop, [&](int64_t bytes) {
                         done += bytes;
                         meter.Show(done, done);
                       }));
      v1::ArtifactFile& named = *model.request.add_files();
      named.set_path(file.path);
      named.mutable_digest()->set_sha256(sha256);
      named.mutable_digest()->set_size_bytes(file.size);
      if (blobs.digests.emplace(sha256, named.digest()).second) {
        blobs.bytes += file.size;
        blobs.files[sha256] = file.file;
      }
    }
    models.push_back(std::move(model));
  }
  return models;
}

// Sends what the server does not have, and gives its size.
absl::StatusOr<int64_t> SendMissing(Remote& remote, const Blobs& blobs, const Stop& stop,
                                    Output& out) {
  std::vector<v1::BlobDigest> missing;
  int64_t total = 0;
  for (auto it = blobs.digests.begin(); it != blobs.digests.end();) {
    v1::FindMissingBlobsRequest request;
    for (; it != blobs.digests.end() && request.blobs_size() < kMostBlobs; ++it) {
      *request.add_blobs() = it->second;
    }
    ASSIGN_OR_RETURN(const v1::FindMissingBlobsResponse response, remote.FindMissingBlobs(request));
    for (const v1::BlobDigest& digest : response.missing()) {
      if (!blobs.files.contains(digest.sha256())) continue;
      missing.push_back(digest);
      total += digest.size_bytes();
    }
  }
  Meter meter(out, "uploading", total);
  int64_t done = 0, found = 0;
  for (const v1::BlobDigest& digest : missing) {
    bool first = true;
    RETURN_IF_ERROR(remote.Upload(
        blobs.files.at(digest.sha256()), digest,
        [&](int64_t committed) {
          if (first) found += committed;  // of an interrupted upload
          first = false;
          meter.Show(done + committed, done + committed - found);
        },
        stop));
    done += digest.size_bytes();
  }
  return total - found;
}

absl::StatusOr<UploadResult> Upload(Remote& remote, absl::Span<const std::string> paths,
                                    const Stop& stop, Output& out) {
  Blobs blobs;
  ASSIGN_OR_RETURN(const std::vector<NamedModel> models, HashModels(paths, blobs, stop, out));
  UploadResult result{.bytes = blobs.bytes};
  for (bool again = false;; again = true) {
    ASSIGN_OR_RETURN(const int64_t sent, SendMissing(remote, blobs, stop, out));
    result.sent_bytes += sent;
    absl::Status gone;
    for (const NamedModel& model : models) {
      const absl::StatusOr<v1::Artifact> artifact = remote.CreateArtifact(model.request);
      if (!artifact.ok()) {
        gone = artifact.status();
        break;
      }
      result.uris[model.path] = absl::StrCat(artifact->uri(), model.suffix);
    }
    // What was there a moment ago may have been tidied up.
    if (gone.ok()) return result;
    if (again || !absl::IsFailedPrecondition(gone)) return gone;
  }
}

// Downloads.

// A file that is to be brought here.
struct Wanted {
  const v1::ArtifactFile* file = nullptr;
  std::string path;     // where it goes
  std::string partial;  // while it comes
};

absl::Status CheckFile(const v1::ArtifactFile& file) {
  const absl::Status key = ValidateKey(file.path());
  if (!key.ok()) return Annotate(key, "the server's list of files");
  if (file.digest().size_bytes() >= 0 && IsSha256(file.digest().sha256())) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat(file.path(), " has no SHA-256 that it could be checked by"));
}

// Those that are not there yet.
absl::StatusOr<std::vector<Wanted>> FindWanted(const v1::Artifact& artifact,
                                               const std::string& folder, bool overwrite,
                                               const Stop& stop) {
  std::vector<Wanted> wanted;
  for (const v1::ArtifactFile& file : artifact.files()) {
    RETURN_IF_ERROR(CheckFile(file));
    const fs::path path = fs::path(folder) / file.path();
    struct stat found;
    if (stat(path.c_str(), &found) == 0) {
      if (S_ISREG(found.st_mode) && found.st_size == file.digest().size_bytes()) {
        ASSIGN_OR_RETURN(const std::string sha256,
                         Sha256OfFile(path.string(), found.st_size, stop, [](int64_t) {}));
        if (sha256 == file.digest().sha256()) continue;
      }
      if (!overwrite || !S_ISREG(found.st_mode)) {
        return absl::AlreadyExistsError(absl::StrCat(
            path.string(), " is there and is another file; choose another folder or --overwrite"));
      }
    }
    wanted.push_back(
        {&file, path.string(),
         (path.parent_path() / absl::StrCat(".", path.filename().string(), ".pewter-part"))
             .string()});
  }
  return wanted;
}

int64_t SizeOf(const std::string& path) {
  struct stat found;
  return stat(path.c_str(), &found) == 0 ? found.st_size : 0;
}

// What has come of a file, from its beginning; DataLoss, and the partial file is gone, when it is
// whole and not what it should be.
absl::Status Receive(Remote& remote, const Wanted& wanted,
                     const std::function<void(int64_t bytes)>& on_bytes, const Stop& stop) {
  const v1::BlobDigest& digest = wanted.file->digest();
  const int fd = open(wanted.partial.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0666);
  if (fd < 0) return FileError("write", wanted.partial);
  const absl::Cleanup close_file = [fd] { close(fd); };
  int64_t offset = SizeOf(wanted.partial);
  if (offset > digest.size_bytes()) {
    if (ftruncate(fd, 0) != 0) return FileError("write", wanted.partial);
    offset = 0;
  }
  Sha256 sha;
  RETURN_IF_ERROR(ReadPieces(fd, wanted.partial, offset, stop,
                             [&](absl::Span<const std::byte> piece) { sha.Update(piece); }));
  const auto sink = [&](absl::string_view bytes) {
    for (absl::string_view rest = bytes; !rest.empty();) {
      const ssize_t written = pwrite(fd, rest.data(), rest.size(), offset);
      if (written < 0 && errno == EINTR) continue;
      if (written < 0) return FileError("write", wanted.partial);
      offset += written;
      rest.remove_prefix(written);
    }
    sha.Update(bytes);
    on_bytes(bytes.size());
    return absl::OkStatus();
  };
  RETURN_IF_ERROR(
      remote.Download(wanted.file->resource_name(), offset, digest.size_bytes(), sink, stop));
  if (sha.Finish() != digest.sha256()) {
    unlink(wanted.partial.c_str());
    return absl::DataLossError(
        absl::StrCat(wanted.path,
                     ": what has come is not what the server's manifest says: it was damaged on "
                     "the way, or changed since"));
  }
  if (fsync(fd) != 0 || rename(wanted.partial.c_str(), wanted.path.c_str()) != 0) {
    return FileError("write", wanted.path);
  }
  return absl::OkStatus();
}

absl::Status CheckSpace(const std::string& folder, int64_t bytes) {
  struct statvfs disk;
  if (statvfs(folder.c_str(), &disk) != 0) return FileError("look at", folder);
  const int64_t free = static_cast<int64_t>(disk.f_bavail) * static_cast<int64_t>(disk.f_frsize);
  if (bytes <= free) return absl::OkStatus();
  return absl::ResourceExhaustedError(absl::StrCat(folder, " has ", FormatBytes(free), " free, ",
                                                   FormatBytes(bytes), " are needed"));
}

absl::StatusOr<int64_t> Download(Remote& remote, const v1::Artifact& artifact,
                                 const std::string& folder, bool overwrite, const Stop& stop,
                                 Output& out) {
  ASSIGN_OR_RETURN(const std::vector<Wanted> wanted, FindWanted(artifact, folder, overwrite, stop));
  int64_t total = 0, done = 0;
  for (const Wanted& file : wanted) {
    std::error_code error;
    fs::create_directories(fs::path(file.path).parent_path(), error);
    if (error) {
      return absl::PermissionDeniedError(
          absl::StrCat("cannot make the folder of ", file.path, ": ", error.message()));
    }
    total += file.file->digest().size_bytes();
    done += std::min(SizeOf(file.partial), file.file->digest().size_bytes());
  }
  if (!wanted.empty()) RETURN_IF_ERROR(CheckSpace(folder, total - done));
  Meter meter(out, "downloading", total);
  const int64_t found = done;
  int64_t received = 0;
  const auto on_bytes = [&](int64_t bytes) {
    received += bytes;
    meter.Show(std::min(total, found + received), received);
  };
  for (const Wanted& file : wanted) {
    const bool begun = SizeOf(file.partial) > 0;
    absl::Status status = Receive(remote, file, on_bytes, stop);
    // What an interrupted download has left may be of another model.
    if (absl::IsDataLoss(status) && begun) status = Receive(remote, file, on_bytes, stop);
    RETURN_IF_ERROR(status);
  }
  return received;
}

}  // namespace

absl::StatusOr<std::vector<ModelFile>> FilesOfModel(const std::string& path) {
  const std::string place(absl::StripPrefix(path, "file://"));
  std::vector<ModelFile> files;
  std::error_code error;
  if (!fs::is_directory(place, error)) {
    const fs::path file(place);
    RETURN_IF_ERROR(AddFile(file.parent_path().string(), file.filename().string(), files));
    return files;
  }
  std::vector<std::string> folders = ModuleFolders(place);
  folders.insert(folders.begin(), "");
  for (const std::string& folder : folders) {
    std::vector<std::string> names;
    for (fs::directory_iterator it(fs::path(place) / folder, error), end; !error && it != end;
         it.increment(error)) {
      // A module's weights are copied with it.
      const bool module_weights = !folder.empty() && IsTensorFile(it->path().filename().string());
      std::error_code ignored;
      if ((!IsSmallFile(it->path()) && !module_weights) || !it->is_regular_file(ignored) ||
          (!module_weights && it->file_size(ignored) > kLargestSmallFile)) {
        continue;
      }
      names.push_back(it->path().filename().string());
    }
    if (error && folder.empty()) {
      return absl::PermissionDeniedError(
          absl::StrCat("cannot read ", place, ": ", error.message()));
    }
    error.clear();
    for (const std::string& name : names) {
      RETURN_IF_ERROR(
          AddFile(place, folder.empty() ? name : absl::StrCat(folder, "/", name), files));
    }
  }
  const absl::StatusOr<std::vector<std::string>> weights = WeightsOf(place);
  // A folder of a tokenizer has none.
  if (!weights.ok() && (!absl::IsNotFound(weights.status()) || files.empty())) {
    return weights.status();
  }
  if (weights.ok()) {
    for (const std::string& key : *weights) {
      const bool there = std::any_of(files.begin(), files.end(),
                                     [&](const ModelFile& file) { return file.path == key; });
      if (!there) RETURN_IF_ERROR(AddFile(place, key, files));
    }
  }
  std::sort(files.begin(), files.end(),
            [](const ModelFile& a, const ModelFile& b) { return a.path < b.path; });
  return files;
}

absl::StatusOr<UploadResult> UploadModels(Remote& remote, absl::Span<const std::string> paths,
                                          Output& out) {
  Interrupt interrupt([] {});
  absl::StatusOr<UploadResult> result = Upload(remote, paths, interrupt.token(), out);
  if (!absl::IsCancelled(result.status())) return result;
  return absl::CancelledError(
      "interrupted; the server keeps what has come for a day: the same command goes on");
}

absl::StatusOr<int64_t> DownloadArtifact(Remote& remote, const v1::Artifact& artifact,
                                         const std::string& folder, bool overwrite, Output& out) {
  Interrupt interrupt([] {});
  absl::StatusOr<int64_t> received =
      Download(remote, artifact, folder, overwrite, interrupt.token(), out);
  if (!absl::IsCancelled(received.status())) return received;
  return absl::CancelledError(
      absl::StrCat("interrupted; what has come stays in ", folder, ": the same command goes on"));
}

}  // namespace pewter::client
