#include "store/write_behind.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

namespace pewter {
namespace {

// Enough for a disk to reach its full rate with one write at a time.
constexpr int64_t kBlock = int64_t{4} << 20;
// What O_DIRECT asks of addresses, offsets and sizes on any common disk.
constexpr size_t kAlignment = 4096;

bool SetDirect(int file, bool on) {
  const int flags = fcntl(file, F_GETFL);
  return flags >= 0 && fcntl(file, F_SETFL, on ? flags | O_DIRECT : flags & ~O_DIRECT) == 0;
}

}  // namespace

WriteBehind::~WriteBehind() {
  std::lock_guard lock(mutex_);
  closing_ = true;
  changed_.notify_all();
}

int WriteBehind::Append(absl::Span<const std::byte> bytes) {
  while (!bytes.empty()) {
    if (filling_ == nullptr) {
      filling_.reset(static_cast<std::byte*>(std::aligned_alloc(kAlignment, kBlock)));
      if (filling_ == nullptr) return ENOMEM;
    }
    const auto part = bytes.subspan(0, kBlock - filled_);
    std::memcpy(filling_.get() + filled_, part.data(), part.size());
    filled_ += static_cast<int64_t>(part.size());
    bytes.remove_prefix(part.size());
    if (filled_ < kBlock) break;
    if (const int error = HandOver(); error != 0) return error;
  }
  return 0;
}

int WriteBehind::HandOver() {
  if (!thread_.joinable()) {
    direct_ = SetDirect(file_, true);
    thread_ = std::jthread([this] { Main(); });
  }
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return !busy_; });
  if (error_ != 0) return error_;
  std::swap(filling_, writing_);
  filled_ = 0;
  busy_ = true;
  changed_.notify_all();
  return 0;
}

void WriteBehind::Main() {
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [this] { return busy_ || closing_; });
    if (closing_) return;
    lock.unlock();
    Write(writing_.get(), kBlock);
    lock.lock();
    busy_ = false;
    changed_.notify_all();
  }
}

void WriteBehind::Write(const std::byte* data, int64_t size) {
  int error = 0;
  while (size > 0 && error == 0) {
    const ssize_t put = write(file_, data, size);
    if (put >= 0) {
      data += put;
      size -= put;
      std::lock_guard lock(mutex_);
      written_ += put;
    } else if (errno == EINVAL && direct_) {
      // The file system takes the flag and not the write, or only part of a block was written.
      direct_ = !SetDirect(file_, false);
      if (direct_) error = EINVAL;
    } else if (errno != EINTR) {
      error = errno;
    }
  }
  std::lock_guard lock(mutex_);
  error_ = error;
}

int WriteBehind::Sync() {
  {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return !busy_; });
    if (error_ != 0) return error_;
  }
  // The last bytes are no whole block. The thread waits for a block, so the file is ours.
  if (direct_) direct_ = !SetDirect(file_, false);
  Write(filling_.get(), std::exchange(filled_, 0));
  {
    std::lock_guard lock(mutex_);
    if (error_ != 0) return error_;
  }
  return fsync(file_) == 0 ? 0 : errno;
}

int64_t WriteBehind::written() const {
  std::lock_guard lock(mutex_);
  return written_;
}

}  // namespace pewter
