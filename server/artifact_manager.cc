#include "server/artifact_manager.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <set>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "absl/time/clock.h"
#include "base/digest.h"
#include "base/failpoint.h"
#include "base/status.h"
#include "base/units.h"
#include "merge/engine/manifest.h"
#include "server/collector.h"
#include "server/digest.h"
#include "server/errors.h"
#include "server/log.h"
#include "store/artifact_store.h"
#include "store/housekeeping.h"
#include "store/object_key.h"

namespace pewter::server {
namespace {

namespace fs = std::filesystem;

constexpr int kMaxBlobsInRequest = 1000;
constexpr int kMaxFiles = 10'000;
constexpr size_t kMaxPath = 512;
constexpr int kDefaultPage = 50;
constexpr int kMaxPage = 1000;
constexpr int64_t kMaxManifest = int64_t{256} << 20;
constexpr int64_t kCopyBytes = int64_t{8} << 20;
constexpr absl::Duration kTakeOverLimit = absl::Seconds(10);

// The path of a folder, nothing for another URI.
std::string FolderOf(absl::string_view uri) {
  absl::ConsumePrefix(&uri, "file://");
  return absl::StrContains(uri, "://") ? "" : std::string(uri);
}

absl::Status DiskFull(absl::string_view message, int64_t needed) {
  return MakeError(absl::StatusCode::kResourceExhausted, "DISK_FULL", message,
                   {{"needed", absl::StrCat(needed)}});
}

absl::Status FileError(absl::string_view action, absl::string_view path, int error) {
  const std::string message = absl::StrCat("cannot ", action, " ", path, ": ", strerror(error));
  if (error == ENOSPC || error == EDQUOT) return DiskFull(message, 0);
  if (error == EACCES || error == EPERM || error == EROFS) {
    return absl::PermissionDeniedError(message);
  }
  return absl::InternalError(message);
}

absl::Status MakeFolder(const std::string& path) {
  std::error_code error;
  fs::create_directories(path, error);
  return error ? FileError("make", path, error.value()) : absl::OkStatus();
}

absl::Status SyncFolder(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return FileError("open", path, errno);
  const int failed = fsync(fd) == 0 ? 0 : errno;
  close(fd);
  return failed == 0 ? absl::OkStatus() : FileError("sync", path, failed);
}

// Calls `take` with the file's bytes, a piece at a time.
absl::Status ReadFile(int fd, const std::string& path, int64_t size,
                      const std::function<absl::Status(absl::Span<const std::byte>)>& take) {
  std::vector<std::byte> piece(std::min(size, kCopyBytes));
  for (int64_t offset = 0; offset < size;) {
    const int64_t wanted = std::min<int64_t>(size - offset, piece.size());
    const ssize_t got = pread(fd, piece.data(), wanted, offset);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return FileError("read", path, errno);
    if (got == 0) return absl::DataLossError(absl::StrCat(path, " has become shorter"));
    RETURN_IF_ERROR(take(absl::MakeConstSpan(piece).subspan(0, got)));
    offset += got;
  }
  return absl::OkStatus();
}

absl::Status NotFound(absl::string_view uri) {
  return MakeError(absl::StatusCode::kNotFound, "ARTIFACT_NOT_FOUND",
                   absl::StrCat(uri, " is not on this server"), {{"uri", std::string(uri)}});
}

absl::StatusOr<ArtifactUri> ParseUri(absl::string_view uri) {
  absl::StatusOr<ArtifactUri> parsed = ParseArtifactUri(uri);
  if (parsed.ok()) return parsed;
  return BadRequestError("FIELD_INVALID", {{"uri", std::string(parsed.status().message())}});
}

std::string BlobName(const v1::BlobDigest& digest) {
  return ResourceName{.sha256 = digest.sha256(), .size = digest.size_bytes()}.ToString();
}

bool IsGood(const v1::BlobDigest& digest) {
  return IsSha256(digest.sha256()) && digest.size_bytes() >= 0;
}

void AddFile(v1::Artifact& artifact, const std::string& path, const std::string& sha256,
             int64_t size, const ResourceName& resource) {
  v1::ArtifactFile& file = *artifact.add_files();
  file.set_path(path);
  file.mutable_digest()->set_sha256(sha256);
  file.mutable_digest()->set_size_bytes(size);
  file.set_resource_name(resource.ToString());
  artifact.set_size_bytes(artifact.size_bytes() + size);
}

v1::Artifact DescribeSet(const ArtifactUri& uri, const std::vector<ArtifactFile>& files) {
  v1::Artifact artifact;
  artifact.set_uri(uri.ToString());
  for (const ArtifactFile& file : files) {
    AddFile(artifact, file.path, file.sha256, file.size,
            {.sha256 = file.sha256, .size = file.size});
  }
  return artifact;
}

// The files that a manifest lists, and itself. `name` names them when its path is set.
absl::StatusOr<v1::Artifact> DescribeManifest(absl::string_view uri, const std::string& manifest,
                                              ResourceName name) {
  ASSIGN_OR_RETURN(std::vector<OutputFile> files, OutputFilesOf(manifest));
  std::sort(files.begin(), files.end(),
            [](const OutputFile& a, const OutputFile& b) { return a.name < b.name; });
  v1::Artifact artifact;
  artifact.set_uri(std::string(uri));
  for (const OutputFile& file : files) {
    RETURN_IF_ERROR(ValidateKey(file.name));
    name.path = file.name;
    AddFile(artifact, file.name, file.sha256, file.bytes, name);
  }
  name.path = kManifestFile;
  AddFile(artifact, kManifestFile, Sha256::Of(manifest), manifest.size(), name);
  return artifact;
}

absl::StatusOr<std::vector<ArtifactFile>> CheckFiles(const v1::CreateArtifactRequest& request) {
  std::vector<FieldViolation> violations;
  const auto add = [&](int i, absl::string_view what) {
    violations.push_back({absl::StrCat("files[", i, "]"), std::string(what)});
  };
  if (request.files().empty() || request.files_size() > kMaxFiles) {
    return BadRequestError("FIELD_INVALID", {{"files", absl::StrCat("must be 1 to ", kMaxFiles)}});
  }
  std::vector<ArtifactFile> files;
  std::set<std::string, std::less<>> paths;
  for (int i = 0; i < request.files_size(); ++i) {
    const v1::ArtifactFile& file = request.files(i);
    if (!ValidateKey(file.path()).ok() || file.path().size() > kMaxPath) {
      add(i, absl::StrCat("path is no relative path of 1 to ", kMaxPath, " bytes"));
    } else if (!paths.insert(file.path()).second) {
      add(i, absl::StrCat("path \"", file.path(), "\" is there twice"));
    }
    if (!IsGood(file.digest())) add(i, "digest is no 64 lower-case hex digits with a size");
    files.push_back({file.path(), file.digest().size_bytes(), file.digest().sha256()});
  }
  // What is a file cannot be a folder too, wherever the artifact is downloaded to.
  for (const std::string& path : paths) {
    const auto below = paths.lower_bound(absl::StrCat(path, "/"));
    if (below != paths.end() && absl::StartsWith(*below, absl::StrCat(path, "/"))) {
      violations.push_back({"files", absl::StrCat("\"", path, "\" is both a file and a folder")});
    }
  }
  if (!violations.empty()) return BadRequestError("FIELD_INVALID", violations);
  return files;
}

}  // namespace

absl::StatusOr<std::unique_ptr<ArtifactManager>> ArtifactManager::Open(ArtifactOptions options) {
  const std::string folder = FolderOf(options.root);
  if (!folder.empty()) options.partial = absl::StrCat(folder, "/partial");
  RETURN_IF_ERROR(MakeFolder(options.partial));
  ASSIGN_OR_RETURN(std::shared_ptr<ObjectStore> root, OpenStore(options.root));
  auto manager =
      std::unique_ptr<ArtifactManager>(new ArtifactManager(std::move(options), std::move(root)));
  ArtifactManager* const self = manager.get();
  // Also shows that the root can be read.
  ASSIGN_OR_RETURN(const std::vector<ObjectEntry> blobs, self->root_->List("blobs/"));
  {
    absl::MutexLock lock(&self->mutex_);
    for (const ObjectEntry& blob : blobs) self->blob_bytes_ += blob.stat.size;
  }
  self->sweeper_ = std::thread([self] {
    while (true) {
      const absl::Status swept = self->Sweep(absl::Now());
      if (!swept.ok()) {
        Log(LogLevel::kWarning, "cannot sweep artifacts",
            {{"error", std::string(swept.message())}});
      }
      absl::MutexLock lock(&self->mutex_);
      if (!self->stopping_)
        self->stop_.WaitWithTimeout(&self->mutex_, SweepInterval(self->options_.retention));
      if (self->stopping_) return;
    }
  });
  return manager;
}

ArtifactManager::ArtifactManager(ArtifactOptions options, std::shared_ptr<ObjectStore> root)
    : options_(std::move(options)), root_(std::move(root)), folder_(FolderOf(options_.root)) {}

ArtifactManager::~ArtifactManager() {
  {
    absl::MutexLock lock(&mutex_);
    stopping_ = true;
    stop_.SignalAll();
  }
  if (sweeper_.joinable()) sweeper_.join();
}

absl::StatusOr<bool> ArtifactManager::HasBlob(absl::string_view sha256, int64_t size) {
  const absl::StatusOr<ObjectStat> stat = root_->Stat(BlobKey(sha256));
  if (absl::IsNotFound(stat.status())) return false;
  RETURN_IF_ERROR(stat.status());
  return stat->size == size;
}

void ArtifactManager::Touch(absl::string_view sha256) {
  absl::MutexLock lock(&mutex_);
  unnamed_.erase(sha256);
}

absl::StatusOr<v1::FindMissingBlobsResponse> ArtifactManager::FindMissing(
    const v1::FindMissingBlobsRequest& request) {
  if (request.blobs_size() > kMaxBlobsInRequest) {
    return BadRequestError("FIELD_INVALID",
                           {{"blobs", absl::StrCat("must be at most ", kMaxBlobsInRequest)}});
  }
  for (int i = 0; i < request.blobs_size(); ++i) {
    if (IsGood(request.blobs(i))) continue;
    return BadRequestError("FIELD_INVALID", {{absl::StrCat("blobs[", i, "]"),
                                              "is no 64 lower-case hex digits with a size"}});
  }
  absl::ReaderMutexLock lock(&sets_mutex_);
  v1::FindMissingBlobsResponse response;
  absl::flat_hash_set<std::string> seen;
  for (const v1::BlobDigest& blob : request.blobs()) {
    if (!seen.insert(BlobName(blob)).second) continue;
    ASSIGN_OR_RETURN(const bool there, HasBlob(blob.sha256(), blob.size_bytes()));
    if (there) {
      Touch(blob.sha256());
    } else {
      *response.add_missing() = blob;
    }
  }
  return response;
}

absl::StatusOr<v1::Artifact> ArtifactManager::Create(const v1::CreateArtifactRequest& request) {
  ASSIGN_OR_RETURN(std::vector<ArtifactFile> files, CheckFiles(request));
  const std::string text = FormatFileSet(files);
  const ArtifactUri uri{.uploaded = true, .name = Sha256::Of(text)};
  // In the order in which it is stored.
  ASSIGN_OR_RETURN(files, ParseFileSet(text));

  absl::ReaderMutexLock lock(&sets_mutex_);
  const absl::StatusOr<ObjectStat> before = root_->Stat(SetKey(uri.name));
  if (!before.ok()) {
    if (!absl::IsNotFound(before.status())) return before.status();
    RETURN_IF_ERROR(WriteText(*root_, SetKey(uri.name), text));
    RETURN_IF_ERROR(Reach(Failpoint::kSetWritten));
  }
  // After the set was written, so that no other server's sweep comes between.
  std::vector<std::string> missing;
  for (const ArtifactFile& file : files) {
    ASSIGN_OR_RETURN(const bool there, HasBlob(file.sha256, file.size));
    if (!there) {
      missing.push_back(ResourceName{.sha256 = file.sha256, .size = file.size}.ToString());
    }
  }
  if (!missing.empty()) {
    if (!before.ok()) RETURN_IF_ERROR(root_->Remove(SetKey(uri.name)));
    return MissingError("BLOB_MISSING", missing, "is not on this server; upload it");
  }
  Log(LogLevel::kInfo, "artifact created", {{"uri", uri.ToString()}});
  return DescribeSet(uri, files);
}

absl::StatusOr<v1::Artifact> ArtifactManager::DescribeOutput(const std::string& name) {
  const std::string uri = ArtifactUri{.name = name}.ToString();
  const absl::StatusOr<std::string> manifest =
      ReadText(*root_, OutputKey(name, kManifestFile), kMaxManifest);
  if (absl::IsNotFound(manifest.status())) return NotFound(uri);
  RETURN_IF_ERROR(manifest.status());
  return DescribeManifest(uri, *manifest, {.kind = ResourceName::Kind::kOutput, .id = name});
}

absl::StatusOr<v1::Artifact> ArtifactManager::Get(absl::string_view text) {
  ASSIGN_OR_RETURN(const ArtifactUri uri, ParseUri(text));
  if (!uri.uploaded) return DescribeOutput(uri.name);
  const absl::StatusOr<std::vector<ArtifactFile>> files = ReadFileSet(*root_, uri.name);
  if (absl::IsNotFound(files.status())) return NotFound(text);
  RETURN_IF_ERROR(files.status());
  return DescribeSet(uri, *files);
}

absl::StatusOr<v1::ListArtifactsResponse> ArtifactManager::List(
    const v1::ListArtifactsRequest& request) {
  if (request.page_size() < 0) {
    return BadRequestError("FIELD_INVALID", {{"page_size", "must not be negative"}});
  }
  const std::string digest = DigestOf(v1::ListArtifactsRequest());
  ASSIGN_OR_RETURN(const PageToken token, ParsePageToken(request.page_token(), digest));
  const int64_t size =
      request.page_size() == 0 ? kDefaultPage : std::min(request.page_size(), kMaxPage);

  std::vector<std::string> uris;
  ASSIGN_OR_RETURN(const std::vector<ObjectEntry> outputs, root_->List("outputs/"));
  for (const ObjectEntry& entry : outputs) {
    absl::string_view name = entry.key;
    if (absl::ConsumePrefix(&name, "outputs/") &&
        absl::ConsumeSuffix(&name, absl::StrCat("/", kManifestFile)) && IsArtifactName(name)) {
      uris.push_back(ArtifactUri{.name = std::string(name)}.ToString());
    }
  }
  ASSIGN_OR_RETURN(const std::vector<ObjectEntry> sets, root_->List("sets/"));
  for (const ObjectEntry& entry : sets) {
    const absl::string_view name = absl::StripPrefix(entry.key, "sets/");
    if (IsSha256(name)) {
      uris.push_back(ArtifactUri{.uploaded = true, .name = std::string(name)}.ToString());
    }
  }
  std::sort(uris.begin(), uris.end());

  v1::ListArtifactsResponse response;
  int64_t next = token.position;
  for (; next < static_cast<int64_t>(uris.size()) && response.artifacts_size() < size; ++next) {
    absl::StatusOr<v1::Artifact> artifact = Get(uris[next]);
    if (absl::IsNotFound(artifact.status())) continue;  // deleted meanwhile
    RETURN_IF_ERROR(artifact.status());
    artifact->clear_files();
    *response.add_artifacts() = *std::move(artifact);
  }
  if (next < static_cast<int64_t>(uris.size())) {
    response.set_next_page_token(FormatPageToken({.position = next, .version = ""}, digest));
  }
  return response;
}

absl::Status ArtifactManager::Delete(absl::string_view text) {
  ASSIGN_OR_RETURN(const ArtifactUri uri, ParseUri(text));
  if (uri.uploaded) {
    const absl::Status there = root_->Stat(SetKey(uri.name)).status();
    if (absl::IsNotFound(there)) return NotFound(text);
    RETURN_IF_ERROR(there);
    RETURN_IF_ERROR(root_->Remove(SetKey(uri.name)));
  } else {
    ASSIGN_OR_RETURN(const std::vector<ObjectEntry> files, root_->List(OutputKey(uri.name, "")));
    if (files.empty()) return NotFound(text);
    // First what makes it a model.
    RETURN_IF_ERROR(root_->Remove(OutputKey(uri.name, kManifestFile)));
    for (const ObjectEntry& file : files) RETURN_IF_ERROR(root_->Remove(file.key));
  }
  Log(LogLevel::kInfo, "artifact deleted", {{"uri", std::string(text)}});
  return absl::OkStatus();
}

absl::StatusOr<ArtifactManager::Object> ArtifactManager::Find(const ResourceName& name) {
  if (name.kind == ResourceName::Kind::kOutput) {
    ASSIGN_OR_RETURN(const v1::Artifact artifact, DescribeOutput(name.id));
    for (const v1::ArtifactFile& file : artifact.files()) {
      if (file.path() == name.path) {
        return Object{root_, OutputKey(name.id, name.path), file.digest().size_bytes()};
      }
    }
    return NotFound(name.ToString());
  }
  ASSIGN_OR_RETURN(const bool there, HasBlob(name.sha256, name.size));
  if (name.kind == ResourceName::Kind::kBlob && there) {
    return Object{root_, BlobKey(name.sha256), name.size};
  }
  return MakeError(absl::StatusCode::kNotFound, "BLOB_NOT_FOUND",
                   absl::StrCat(name.ToString(), " is not on this server"));
}

// Uploads.

std::string ArtifactManager::PartialPath(const ResourceName& name) const {
  return absl::StrCat(options_.partial, "/", name.sha256, "-", name.size, "-", name.id);
}

absl::Status ArtifactManager::CheckSpace(int64_t bytes) {
  int64_t coming = 0;
  for (const auto& [partial, active] : active_) coming += active.missing_bytes;
  struct statvfs fs;
  if (statvfs(options_.partial.c_str(), &fs) != 0) {
    return FileError("look at", options_.partial, errno);
  }
  const int64_t free = static_cast<int64_t>(fs.f_bavail) * static_cast<int64_t>(fs.f_frsize);
  if (bytes > free - coming - options_.min_free_bytes) {
    return DiskFull(absl::StrCat("the server's disk has no room for ", FormatBytes(bytes),
                                 " more: ", FormatBytes(free), " are free, ", FormatBytes(coming),
                                 " of them promised to other uploads, and ",
                                 FormatBytes(options_.min_free_bytes), " stay free"),
                    bytes);
  }
  if (options_.quota_bytes > 0 && bytes > options_.quota_bytes - blob_bytes_ - coming) {
    return MakeError(
        absl::StatusCode::kResourceExhausted, "QUOTA_BYTES",
        absl::StrCat("the server keeps ", FormatBytes(options_.quota_bytes),
                     " of uploads at most and has ", FormatBytes(blob_bytes_),
                     "; delete artifacts that are not needed"),
        {{"limit", absl::StrCat(options_.quota_bytes)}, {"used", absl::StrCat(blob_bytes_)}});
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<ArtifactManager::Upload>> ArtifactManager::Begin(
    const ResourceName& name, std::function<void()> cancel) {
  auto upload = std::unique_ptr<Upload>(new Upload(this, name));
  {
    absl::MutexLock lock(&mutex_);
    const absl::Time limit = absl::Now() + kTakeOverLimit;
    for (auto it = active_.find(upload->partial_); it != active_.end();
         it = active_.find(upload->partial_)) {
      it->second.cancel();
      if (released_.WaitWithDeadline(&mutex_, limit)) {
        return MakeError(absl::StatusCode::kAborted, "UPLOAD_TAKEN_OVER",
                         absl::StrCat("another stream writes ", name.ToString()));
      }
    }
    active_.emplace(upload->partial_, Active{.cancel = std::move(cancel)});
    upload->held_ = true;
  }
  ASSIGN_OR_RETURN(upload->complete_, HasBlob(name.sha256, name.size));
  if (upload->complete_) {
    Touch(name.sha256);
    upload->committed_ = name.size;
    unlink(upload->partial_.c_str());  // of another upload of the same bytes
    return upload;
  }
  RETURN_IF_ERROR(upload->Open());
  absl::MutexLock lock(&mutex_);
  const int64_t missing = name.size - upload->committed_;
  RETURN_IF_ERROR(CheckSpace(missing));
  active_[upload->partial_].missing_bytes = missing;
  return upload;
}

absl::StatusOr<ArtifactManager::UploadStatus> ArtifactManager::Status(const ResourceName& name) {
  ASSIGN_OR_RETURN(const bool there, HasBlob(name.sha256, name.size));
  if (there) return UploadStatus{.committed = name.size, .complete = true};
  struct stat file;
  if (name.kind == ResourceName::Kind::kUpload && stat(PartialPath(name).c_str(), &file) == 0) {
    return UploadStatus{.committed = file.st_size};
  }
  return MakeError(absl::StatusCode::kNotFound, "UPLOAD_NOT_FOUND",
                   absl::StrCat("nothing of ", name.ToString(), " has come"));
}

void ArtifactManager::Release(const std::string& partial) {
  absl::MutexLock lock(&mutex_);
  active_.erase(partial);
  released_.SignalAll();
}

absl::Status ArtifactManager::Publish(int fd, const std::string& partial,
                                      const ResourceName& name) {
  const std::string key = BlobKey(name.sha256);
  if (folder_.empty()) {
    ASSIGN_OR_RETURN(const std::unique_ptr<ObjectWriter> writer, root_->Create(key));
    RETURN_IF_ERROR(ReadFile(fd, partial, name.size, [&](absl::Span<const std::byte> piece) {
      return writer->Append(piece);
    }));
    RETURN_IF_ERROR(writer->Commit());
    unlink(partial.c_str());
  } else {
    const std::string path = absl::StrCat(folder_, "/", key);
    const std::string folder = fs::path(path).parent_path().string();
    RETURN_IF_ERROR(MakeFolder(folder));
    if (fsync(fd) != 0) {
      // What the kernel has of it cannot be trusted any more.
      const absl::Status failure = FileError("sync", partial, errno);
      unlink(partial.c_str());
      return failure;
    }
    RETURN_IF_ERROR(Reach(Failpoint::kBlobSynced));
    if (rename(partial.c_str(), path.c_str()) != 0) return FileError("make", path, errno);
    RETURN_IF_ERROR(SyncFolder(folder));
  }
  RETURN_IF_ERROR(Reach(Failpoint::kBlobPublished));
  absl::MutexLock lock(&mutex_);
  unnamed_.erase(name.sha256);
  blob_bytes_ += name.size;
  active_[partial].missing_bytes = 0;
  return absl::OkStatus();
}

struct ArtifactManager::Upload::Hash {
  Sha256 sha;
};

ArtifactManager::Upload::Upload(ArtifactManager* manager, ResourceName name)
    : manager_(*manager),
      name_(std::move(name)),
      partial_(manager->PartialPath(name_)),
      hash_(std::make_unique<Hash>()) {}

ArtifactManager::Upload::~Upload() {
  if (fd_ >= 0) close(fd_);
  if (held_) manager_.Release(partial_);
}

absl::Status ArtifactManager::Upload::Open() {
  fd_ = open(partial_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
  if (fd_ < 0) return FileError("make", partial_, errno);
  // Another server on the same folder has it.
  if (flock(fd_, LOCK_EX | LOCK_NB) != 0) {
    return MakeError(absl::StatusCode::kAborted, "UPLOAD_TAKEN_OVER",
                     absl::StrCat("another server takes ", name_.ToString()));
  }
  struct stat file;
  if (fstat(fd_, &file) != 0) return FileError("look at", partial_, errno);
  committed_ = file.st_size;
  return ReadFile(fd_, partial_, committed_, [&](absl::Span<const std::byte> piece) {
    hash_->sha.Update(piece);
    return absl::OkStatus();
  });
}

absl::Status ArtifactManager::Upload::Append(int64_t offset, absl::string_view bytes) {
  if (offset != committed_) {
    return MakeError(absl::StatusCode::kOutOfRange, "OFFSET_MISMATCH",
                     absl::StrCat("the next byte is ", committed_, ", not ", offset),
                     {{"committed_size", absl::StrCat(committed_)}});
  }
  if (static_cast<int64_t>(bytes.size()) > name_.size - committed_) {
    unlink(partial_.c_str());
    return MakeError(absl::StatusCode::kInvalidArgument, "SIZE_MISMATCH",
                     absl::StrCat("more bytes have come than the ", name_.size, " of ",
                                  name_.ToString(), "; begin anew"),
                     {{"expected", absl::StrCat(name_.size)}});
  }
  absl::string_view rest = bytes;
  while (!rest.empty()) {
    const ssize_t written = pwrite(fd_, rest.data(), rest.size(), committed_);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return FileError("write", partial_, errno);
    hash_->sha.Update(rest.substr(0, written));
    committed_ += written;
    rest.remove_prefix(written);
  }
  absl::MutexLock lock(&manager_.mutex_);
  manager_.active_[partial_].missing_bytes = name_.size - committed_;
  return absl::OkStatus();
}

absl::Status ArtifactManager::Upload::Finish() {
  if (committed_ != name_.size) {
    return MakeError(
        absl::StatusCode::kInvalidArgument, "SIZE_MISMATCH",
        absl::StrCat("only ", committed_, " of ", name_.size, " bytes have come"),
        {{"expected", absl::StrCat(name_.size)}, {"actual", absl::StrCat(committed_)}});
  }
  const std::string actual = hash_->sha.Finish();
  if (actual != name_.sha256) {
    unlink(partial_.c_str());
    return MakeError(absl::StatusCode::kInvalidArgument, "DIGEST_MISMATCH",
                     absl::StrCat("what has come of ", name_.ToString(), " has the digest ", actual,
                                  " and is thrown away; begin anew"),
                     {{"expected", name_.sha256}, {"actual", actual}});
  }
  RETURN_IF_ERROR(manager_.Publish(fd_, partial_, name_));
  complete_ = true;
  return absl::OkStatus();
}

// Sweeping.

absl::Status ArtifactManager::Sweep(absl::Time now) {
  RETURN_IF_ERROR(SweepPartial(now));
  RETURN_IF_ERROR(RemoveUnfinished(*root_, now - options_.retention).status());
  return SweepBlobs(now);
}

absl::Status ArtifactManager::SweepPartial(absl::Time now) {
  std::error_code error;
  for (fs::directory_iterator it(options_.partial, error), end; !error && it != end;
       it.increment(error)) {
    const std::string path = it->path().string();
    // Held all the way, so that no stream begins meanwhile.
    absl::MutexLock lock(&mutex_);
    struct stat file;
    if (active_.contains(path) || lstat(path.c_str(), &file) != 0 || !S_ISREG(file.st_mode) ||
        now - absl::TimeFromTimespec(file.st_mtim) < options_.retention) {
      continue;
    }
    unlink(path.c_str());
    Log(LogLevel::kInfo, "unfinished upload removed", {{"file", path}});
  }
  return error ? FileError("list", options_.partial, error.value()) : absl::OkStatus();
}

absl::Status ArtifactManager::SweepBlobs(absl::Time now) {
  absl::MutexLock sets_lock(&sets_mutex_);
  ASSIGN_OR_RETURN(const std::vector<ObjectEntry> blobs, root_->List("blobs/sha256/"));
  absl::flat_hash_set<std::string> named;
  ASSIGN_OR_RETURN(const std::vector<ObjectEntry> sets, root_->List("sets/"));
  for (const ObjectEntry& set : sets) {
    const absl::string_view name = absl::StripPrefix(set.key, "sets/");
    if (!IsSha256(name)) continue;
    const absl::StatusOr<std::vector<ArtifactFile>> files = ReadFileSet(*root_, name);
    if (absl::IsNotFound(files.status())) continue;
    // One that cannot be read may name any blob: nothing goes.
    RETURN_IF_ERROR(files.status());
    for (const ArtifactFile& file : *files) named.insert(file.sha256);
  }

  std::vector<const ObjectEntry*> unused;
  {
    absl::MutexLock lock(&mutex_);
    absl::flat_hash_map<std::string, absl::Time> unnamed;
    blob_bytes_ = 0;
    for (const ObjectEntry& blob : blobs) {
      blob_bytes_ += blob.stat.size;
      const std::string sha256 = blob.key.substr(blob.key.rfind('/') + 1);
      if (!IsSha256(sha256) || named.contains(sha256)) continue;
      const auto seen = unnamed_.find(sha256);
      const absl::Time since = seen == unnamed_.end() ? now : seen->second;
      if (now - since >= options_.retention) unused.push_back(&blob);
      unnamed.emplace(sha256, since);
    }
    unnamed_ = std::move(unnamed);
  }
  for (const ObjectEntry* blob : unused) {
    RETURN_IF_ERROR(root_->Remove(blob->key));
    Log(LogLevel::kInfo, "unused blob removed", {{"key", blob->key}});
    absl::MutexLock lock(&mutex_);
    blob_bytes_ -= blob->stat.size;
  }
  return absl::OkStatus();
}

// Outputs of jobs.

absl::StatusOr<v1::Artifact> DescribeJobOutput(const v1::Job& job) {
  if (job.state() != v1::JOB_STATE_SUCCEEDED) {
    return MakeError(absl::StatusCode::kFailedPrecondition, "JOB_NOT_SUCCEEDED",
                     absl::StrCat("job ", job.id(), " has no output: it has not succeeded"),
                     {{"job_id", job.id()}});
  }
  return DescribeManifest(job.output().uri(), job.output().manifest_json(),
                          {.kind = ResourceName::Kind::kJobFile, .id = job.id()});
}

absl::StatusOr<ArtifactManager::Object> FindJobFile(const v1::Job& job, absl::string_view path) {
  ASSIGN_OR_RETURN(const v1::Artifact artifact, DescribeJobOutput(job));
  // Only what the job has written: its destination may hold other files.
  for (const v1::ArtifactFile& file : artifact.files()) {
    if (file.path() != path) continue;
    ASSIGN_OR_RETURN(std::shared_ptr<ObjectStore> store, OpenStore(job.output().uri()));
    return ArtifactManager::Object{std::move(store), std::string(path), file.digest().size_bytes()};
  }
  return MakeError(absl::StatusCode::kNotFound, "ARTIFACT_NOT_FOUND",
                   absl::StrCat("job ", job.id(), " has written no ", path),
                   {{"job_id", job.id()}});
}

absl::Status DeleteJobOutput(const v1::Job& job) {
  const v1::JobOutput& output = job.output();
  ASSIGN_OR_RETURN(const std::shared_ptr<ObjectStore> store, OpenStore(output.uri()));
  const absl::StatusOr<ModelOrigin> there = OriginOfModel(*store);
  bool changed = there.ok() && there->fingerprint != output.fingerprint();
  if (absl::IsNotFound(there.status())) {
    // Perhaps a deletion was interrupted after the manifest; or a run has begun to replace it.
    const absl::StatusOr<ObjectStat> unfinished = store->Stat(kStateFile);
    if (!unfinished.ok() && !absl::IsNotFound(unfinished.status())) return unfinished.status();
    changed = unfinished.ok();
  } else {
    RETURN_IF_ERROR(there.status());
  }
  if (changed) {
    return WithPrecondition(
        MakeError(absl::StatusCode::kFailedPrecondition, "OUTPUT_CHANGED",
                  absl::StrCat(output.uri(), " does not hold the model of job ", job.id(),
                               " any more; delete the job without its output"),
                  {{"job_id", job.id()}, {"uri", output.uri()}}),
        "OUTPUT", output.uri());
  }
  return RemoveModel(*store, output.manifest_json());
}

}  // namespace pewter::server
