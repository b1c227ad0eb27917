#include "store/file_store.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <list>
#include <mutex>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/failpoint.h"
#include "base/reason.h"
#include "base/status.h"
#include "base/units.h"
#include "store/object_key.h"
#include "store/write_behind.h"

namespace pewter {
namespace {

constexpr absl::string_view kTemporarySuffix = ".pewter-tmp";

absl::Status ErrnoStatus(int error, absl::string_view action, absl::string_view path) {
  const std::string message =
      absl::StrCat("cannot ", action, " ", path, ": ", std::generic_category().message(error));
  switch (error) {
    case ENOENT:
    case ENOTDIR:
      return absl::NotFoundError(message);
    case EACCES:
    case EPERM:
    case EROFS:
      return absl::PermissionDeniedError(message);
    case ENOSPC:
    case EDQUOT:
      return WithReason(absl::ResourceExhaustedError(message), kDiskFull);
    case EFBIG:
    case EMFILE:
    case ENFILE:
    case ENOMEM:
      return absl::ResourceExhaustedError(message);
    case EISDIR:
    case ELOOP:
    case ENAMETOOLONG:
      return absl::FailedPreconditionError(message);
    case EAGAIN:
    case EBUSY:
    case ESTALE:
      return absl::UnavailableError(message);
    case EIO:
      return absl::DataLossError(message);
    default:
      return absl::InternalError(message);
  }
}

class Descriptor {
 public:
  Descriptor() = default;
  explicit Descriptor(int fd) : fd_(fd) {}
  Descriptor(Descriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Descriptor& operator=(Descriptor&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Descriptor() {
    if (fd_ >= 0) close(fd_);
  }
  int get() const { return fd_; }
  bool valid() const { return fd_ >= 0; }

 private:
  int fd_ = -1;
};

int OpenRetry(const char* path, int flags, mode_t mode = 0) {
  int fd;
  do {
    fd = open(path, flags | O_CLOEXEC, mode);
  } while (fd < 0 && errno == EINTR);
  return fd;
}

ObjectStat FromStat(const struct stat& st) {
  return {.size = st.st_size,
          .mtime_ns = int64_t{st.st_mtim.tv_sec} * 1'000'000'000 + st.st_mtim.tv_nsec};
}

absl::Status NotRegular(absl::string_view path) {
  return absl::FailedPreconditionError(absl::StrCat(path, " is not a regular file"));
}

absl::Status SyncFolder(const std::string& folder) {
  const Descriptor descriptor(OpenRetry(folder.c_str(), O_RDONLY | O_DIRECTORY));
  if (!descriptor.valid() || fsync(descriptor.get()) != 0) {
    return ErrnoStatus(errno, "sync folder", folder);
  }
  return absl::OkStatus();
}

std::string FolderOf(const std::string& path) {
  const std::string folder = std::filesystem::path(path).parent_path().string();
  return folder.empty() ? "." : folder;
}

// mkdir -p; every new folder's entry is made durable.
absl::Status MakeFolders(const std::string& folder) {
  if (mkdir(folder.c_str(), 0777) == 0) return SyncFolder(FolderOf(folder));
  if (errno == EEXIST) {
    struct stat st;
    if (stat(folder.c_str(), &st) == 0 && S_ISDIR(st.st_mode)) return absl::OkStatus();
    return absl::FailedPreconditionError(absl::StrCat(folder, " exists and is not a folder"));
  }
  if (errno != ENOENT) return ErrnoStatus(errno, "make folder", folder);
  RETURN_IF_ERROR(MakeFolders(FolderOf(folder)));
  if (mkdir(folder.c_str(), 0777) != 0 && errno != EEXIST) {
    return ErrnoStatus(errno, "make folder", folder);
  }
  return SyncFolder(FolderOf(folder));
}

bool IsTemporary(absl::string_view name) {
  return absl::StartsWith(name, ".") && absl::EndsWith(name, kTemporarySuffix);
}

// rename that fails with EEXIST where something is.
int MoveToNew(const char* from, const char* to) {
  if (renameat2(AT_FDCWD, from, AT_FDCWD, to, RENAME_NOREPLACE) == 0) return 0;
  // Not every file system (NFS) knows the flag.
  if (errno != EINVAL && errno != ENOSYS) return -1;
  if (link(from, to) != 0) return -1;
  unlink(from);
  return 0;
}

// Whether nobody held the lock of the temporary, and it is gone.
bool RemoveIfStale(const std::string& path) {
  const Descriptor stale(OpenRetry(path.c_str(), O_RDWR | O_NOFOLLOW | O_NONBLOCK));
  return stale.valid() && flock(stale.get(), LOCK_EX | LOCK_NB) == 0 && unlink(path.c_str()) == 0;
}

// Removes temporaries of `name` that no living writer holds the lock of. Best effort: a leftover
// costs space, not correctness.
void RemoveStaleTemporaries(const std::string& folder, absl::string_view name) {
  DIR* entries = opendir(folder.c_str());
  if (entries == nullptr) return;
  const std::string prefix = absl::StrCat(".", name, ".");
  while (const dirent* entry = readdir(entries)) {
    const absl::string_view found = entry->d_name;
    if (!absl::StartsWith(found, prefix) || !IsTemporary(found)) continue;
    RemoveIfStale(absl::StrCat(folder, "/", found));
  }
  closedir(entries);
}

}  // namespace

// The most recently used descriptors, by key. Getting one is a map lookup under a short lock; reads
// happen outside it and keep their descriptor open through the shared pointer.
class FileStore::DescriptorCache {
 public:
  absl::StatusOr<std::shared_ptr<const Descriptor>> Get(absl::string_view key,
                                                        const std::string& root) {
    {
      std::lock_guard lock(mutex_);
      if (auto found = entries_.find(key); found != entries_.end()) {
        order_.splice(order_.begin(), order_, found->second);
        return found->second->descriptor;
      }
    }
    const std::string path = absl::StrCat(root, "/", key);
    // O_NONBLOCK: opening a named pipe must not hang.
    Descriptor opened(OpenRetry(path.c_str(), O_RDONLY | O_NONBLOCK));
    if (!opened.valid()) return ErrnoStatus(errno, "open", path);
    struct stat st;
    if (fstat(opened.get(), &st) != 0) return ErrnoStatus(errno, "open", path);
    if (!S_ISREG(st.st_mode)) return NotRegular(path);
    auto descriptor = std::make_shared<const Descriptor>(std::move(opened));
    std::lock_guard lock(mutex_);
    if (auto found = entries_.find(key); found != entries_.end()) return found->second->descriptor;
    order_.push_front({std::string(key), descriptor});
    entries_[key] = order_.begin();
    if (entries_.size() > kCapacity) {
      entries_.erase(order_.back().key);
      order_.pop_back();
    }
    return descriptor;
  }

  void Forget(absl::string_view key) {
    std::lock_guard lock(mutex_);
    if (auto found = entries_.find(key); found != entries_.end()) {
      order_.erase(found->second);
      entries_.erase(found);
    }
  }

 private:
  // A merge of ten models must stay well below the customary limit of 1024 descriptors.
  static constexpr size_t kCapacity = 32;

  struct Entry {
    std::string key;
    std::shared_ptr<const Descriptor> descriptor;
  };
  std::mutex mutex_;
  std::list<Entry> order_;  // most recent first; guarded by mutex_
  absl::flat_hash_map<std::string, std::list<Entry>::iterator> entries_;  // guarded by mutex_
};

class FileStore::Writer final : public ObjectWriter {
 public:
  static absl::StatusOr<std::unique_ptr<ObjectWriter>> Open(
      std::string key, std::string path, bool only_new,
      std::shared_ptr<DescriptorCache> descriptors) {
    const std::string folder = FolderOf(path);
    RETURN_IF_ERROR(MakeFolders(folder));
    struct stat st;
    if (stat(path.c_str(), &st) == 0 && S_ISDIR(st.st_mode)) {
      return absl::FailedPreconditionError(absl::StrCat("cannot write ", path, ": it is a folder"));
    }
    const std::string name = std::filesystem::path(path).filename().string();
    RemoveStaleTemporaries(folder, name);
    static std::atomic<int64_t> counter{0};
    for (;;) {
      std::string temporary =
          absl::StrCat(folder, "/.", name, ".", getpid(), "-", ++counter, kTemporarySuffix);
      Descriptor descriptor(OpenRetry(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL, 0666));
      if (!descriptor.valid()) {
        if (errno == EEXIST) continue;
        return ErrnoStatus(errno, "create", path);
      }
      // Where files cannot be locked, nobody can take this one for a stale one.
      while (flock(descriptor.get(), LOCK_EX) != 0 && errno == EINTR) {
      }
      if (fstat(descriptor.get(), &st) != 0) return ErrnoStatus(errno, "create", path);
      if (st.st_nlink == 0) continue;  // another writer did so before the lock
      return std::unique_ptr<ObjectWriter>(
          new Writer(std::move(key), std::move(path), std::move(temporary), only_new,
                     std::move(descriptor), std::move(descriptors)));
    }
  }

  ~Writer() override {
    if (!committed_) unlink(temporary_.c_str());
  }

  absl::Status Append(absl::Span<const std::byte> bytes) override {
    RETURN_IF_ERROR(failure_);
    appended_ += static_cast<int64_t>(bytes.size());
    const int error = file_.Append(bytes);
    failure_ = error != 0 ? WriteError(error) : Reach(Failpoint::kPartSent);
    return failure_;
  }

  absl::Status Commit() override {
    RETURN_IF_ERROR(failure_);
    failure_ = absl::FailedPreconditionError(absl::StrCat(path_, " was committed already"));
    if (const int error = file_.Sync(); error != 0) return failure_ = WriteError(error);
    if (absl::Status stop = Reach(Failpoint::kObjectSynced); !stop.ok()) return failure_ = stop;
    const int moved = only_new_ ? MoveToNew(temporary_.c_str(), path_.c_str())
                                : rename(temporary_.c_str(), path_.c_str());
    if (moved != 0) {
      return failure_ = errno == EEXIST
                            ? absl::AlreadyExistsError(absl::StrCat(path_, " exists already"))
                            : ErrnoStatus(errno, "write", path_);
    }
    committed_ = true;
    descriptors_->Forget(key_);
    return SyncFolder(FolderOf(path_));
  }

 private:
  Writer(std::string key, std::string path, std::string temporary, bool only_new,
         Descriptor descriptor, std::shared_ptr<DescriptorCache> descriptors)
      : key_(std::move(key)),
        path_(std::move(path)),
        temporary_(std::move(temporary)),
        only_new_(only_new),
        descriptor_(std::move(descriptor)),
        descriptors_(std::move(descriptors)) {}

  absl::Status WriteError(int error) const {
    if (error != ENOSPC && error != EDQUOT && error != EFBIG) {
      return ErrnoStatus(error, "write", path_);
    }
    const absl::string_view reason = error == ENOSPC   ? "the disk is full"
                                     : error == EDQUOT ? "the disk quota is used up"
                                                       : "the file size limit is reached";
    std::string free;
    if (struct statvfs fs; error == ENOSPC && fstatvfs(descriptor_.get(), &fs) == 0) {
      free = absl::StrCat(" (", FormatBytes(static_cast<int64_t>(fs.f_bavail) * fs.f_frsize),
                          " free)");
    }
    const int64_t written = file_.written();
    const absl::Status status = absl::ResourceExhaustedError(
        absl::StrCat("cannot write ", path_, ": ", reason, free, "; ", written,
                     " bytes are written, at least ", appended_ - written, " more are needed"));
    return error == EFBIG ? status : WithReason(status, kDiskFull);
  }

  const std::string key_;
  const std::string path_;
  const std::string temporary_;
  const bool only_new_;
  const Descriptor descriptor_;
  const std::shared_ptr<DescriptorCache> descriptors_;
  absl::Status failure_;  // of the first failure: a damaged object is never committed
  int64_t appended_ = 0;
  bool committed_ = false;
  WriteBehind file_{descriptor_.get()};
};

FileStore::FileStore(std::string root)
    : root_(std::move(root)), descriptors_(std::make_shared<DescriptorCache>()) {}
FileStore::~FileStore() = default;

std::string FileStore::Describe(absl::string_view key) const {
  return absl::StrCat(root_, absl::EndsWith(root_, "/") ? "" : "/", key);
}

absl::StatusOr<ObjectStat> FileStore::Stat(absl::string_view key) {
  RETURN_IF_ERROR(ValidateKey(key));
  const std::string path = Describe(key);
  struct stat st;
  if (stat(path.c_str(), &st) != 0) return ErrnoStatus(errno, "open", path);
  if (S_ISDIR(st.st_mode)) {
    return absl::NotFoundError(absl::StrCat(path, " is a folder, not a file"));
  }
  if (!S_ISREG(st.st_mode)) return NotRegular(path);
  return FromStat(st);
}

absl::Status FileStore::ReadInto(absl::string_view key, int64_t offset, absl::Span<std::byte> out) {
  RETURN_IF_ERROR(ValidateKey(key));
  if (offset < 0) {
    return absl::InvalidArgumentError(absl::StrCat("negative offset ", offset, " in ", key));
  }
  ASSIGN_OR_RETURN(const std::shared_ptr<const Descriptor> descriptor,
                   descriptors_->Get(key, root_));
  const size_t wanted = out.size();
  while (!out.empty()) {
    const ssize_t got = pread(descriptor->get(), out.data(), out.size(),
                              offset + static_cast<int64_t>(wanted - out.size()));
    if (got < 0) {
      if (errno == EINTR) continue;
      return ErrnoStatus(errno, "read", Describe(key));
    }
    if (got == 0) {
      return absl::DataLossError(absl::StrCat(Describe(key), " ends too early: ", wanted,
                                              " bytes at offset ", offset, " are needed, only ",
                                              wanted - out.size(), " are there"));
    }
    out.remove_prefix(got);
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<ObjectEntry>> FileStore::List(absl::string_view prefix) {
  if (!prefix.empty()) {
    RETURN_IF_ERROR(
        ValidateKey(absl::EndsWith(prefix, "/") ? prefix.substr(0, prefix.size() - 1) : prefix));
  }
  // Only the folder that the prefix names needs walking.
  const size_t slash = prefix.rfind('/');
  const absl::string_view folder_key =
      slash == absl::string_view::npos ? absl::string_view() : prefix.substr(0, slash + 1);
  const std::string folder = Describe(folder_key);
  std::vector<ObjectEntry> entries;
  std::error_code error;
  std::filesystem::recursive_directory_iterator walk(folder, error), end;
  for (; !error && walk != end; walk.increment(error)) {
    const std::string path = walk->path().string();
    std::string key = absl::StrCat(
        folder_key, walk->path().lexically_relative(std::filesystem::path(folder)).string());
    struct stat st;
    if (!absl::StartsWith(key, prefix) || IsTemporary(walk->path().filename().string()) ||
        stat(path.c_str(), &st) != 0 || !S_ISREG(st.st_mode)) {
      continue;
    }
    entries.push_back({std::move(key), FromStat(st)});
  }
  if (error && error.value() != ENOENT && error.value() != ENOTDIR) {
    return ErrnoStatus(error.value(), "list", folder);
  }
  std::sort(entries.begin(), entries.end(),
            [](const ObjectEntry& a, const ObjectEntry& b) { return a.key < b.key; });
  return entries;
}

absl::Status FileStore::Remove(absl::string_view key) {
  RETURN_IF_ERROR(ValidateKey(key));
  const std::string path = Describe(key);
  descriptors_->Forget(key);
  if (unlink(path.c_str()) != 0) {
    if (errno == ENOENT || errno == ENOTDIR) return absl::OkStatus();
    return ErrnoStatus(errno, "remove", path);
  }
  // Folders are only how keys with '/' are kept: they go with their last object.
  std::string folder = FolderOf(path);
  for (size_t slash = key.rfind('/');
       slash != absl::string_view::npos && rmdir(folder.c_str()) == 0;
       slash = key.substr(0, slash).rfind('/')) {
    folder = FolderOf(folder);
  }
  return SyncFolder(folder);
}

std::optional<int64_t> FileStore::FreeBytes() const {
  std::string folder = root_;
  struct statvfs fs;
  while (statvfs(folder.c_str(), &fs) != 0) {
    if (errno != ENOENT || folder == "." || folder == "/") return std::nullopt;
    folder = FolderOf(folder);
  }
  return static_cast<int64_t>(fs.f_bavail) * static_cast<int64_t>(fs.f_frsize);
}

absl::StatusOr<int64_t> FileStore::RemoveTemporaries(absl::Time before) {
  int64_t removed = 0;
  std::error_code error;
  std::filesystem::recursive_directory_iterator walk(root_, error), end;
  for (; !error && walk != end; walk.increment(error)) {
    if (!IsTemporary(walk->path().filename().string())) continue;
    const std::string path = walk->path().string();
    struct stat st;
    if (lstat(path.c_str(), &st) == 0 && S_ISREG(st.st_mode) &&
        absl::TimeFromTimespec(st.st_mtim) < before && RemoveIfStale(path)) {
      ++removed;
    }
  }
  if (error && error.value() != ENOENT && error.value() != ENOTDIR) {
    return ErrnoStatus(error.value(), "list", root_);
  }
  return removed;
}

absl::StatusOr<std::unique_ptr<ObjectWriter>> FileStore::Create(absl::string_view key) {
  RETURN_IF_ERROR(ValidateKey(key));
  return Writer::Open(std::string(key), Describe(key), /*only_new=*/false, descriptors_);
}

absl::StatusOr<std::unique_ptr<ObjectWriter>> FileStore::CreateNew(absl::string_view key) {
  RETURN_IF_ERROR(ValidateKey(key));
  return Writer::Open(std::string(key), Describe(key), /*only_new=*/true, descriptors_);
}

}  // namespace pewter
