// BufferPool: host buffers for output tiles, reused by size class, so a long merge neither faults
// pages in again and again nor grows. Buffers come from the backend (pinned where the device is a
// GPU).
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "base/status.h"
#include "kernels/backend.h"

namespace pewter {

class BufferPool;

// A buffer on loan; goes back when destroyed. The pool must outlive it.
class PooledBuffer {
 public:
  PooledBuffer() = default;
  PooledBuffer(BufferPool* pool, std::unique_ptr<kernels::Buffer> buffer)
      : pool_(pool), buffer_(std::move(buffer)) {}
  PooledBuffer(PooledBuffer&&) noexcept = default;
  PooledBuffer& operator=(PooledBuffer&& other) noexcept {
    std::swap(pool_, other.pool_);
    std::swap(buffer_, other.buffer_);
    return *this;
  }
  inline ~PooledBuffer();
  void* data() const { return buffer_->data(); }

 private:
  BufferPool* pool_ = nullptr;
  std::unique_ptr<kernels::Buffer> buffer_;
};

class BufferPool {
 public:
  // Keeps at most `keep_bytes` of unused buffers.
  BufferPool(std::unique_ptr<kernels::Backend> backend, int64_t keep_bytes)
      : backend_(std::move(backend)), keep_bytes_(keep_bytes) {}

  // At least `bytes`. Thread-safe.
  absl::StatusOr<PooledBuffer> Acquire(int64_t bytes) {
    const int size_class = ClassOf(bytes);
    std::lock_guard lock(mutex_);
    auto& free = free_[size_class];
    if (!free.empty()) {
      std::unique_ptr<kernels::Buffer> buffer = std::move(free.back());
      free.pop_back();
      kept_ -= buffer->bytes();
      return PooledBuffer(this, std::move(buffer));
    }
    ASSIGN_OR_RETURN(std::unique_ptr<kernels::Buffer> buffer,
                     backend_->AllocateHost(int64_t{1} << size_class));
    return PooledBuffer(this, std::move(buffer));
  }

 private:
  friend class PooledBuffer;
  static int ClassOf(int64_t bytes) {
    constexpr int kSmallest = 12;
    return std::max(kSmallest, static_cast<int>(std::bit_width(static_cast<uint64_t>(bytes - 1))));
  }
  void Return(std::unique_ptr<kernels::Buffer> buffer) {
    std::lock_guard lock(mutex_);
    if (kept_ + buffer->bytes() > keep_bytes_) return;
    kept_ += buffer->bytes();
    free_[ClassOf(buffer->bytes())].push_back(std::move(buffer));
  }

  std::unique_ptr<kernels::Backend> backend_;
  const int64_t keep_bytes_;
  std::mutex mutex_;
  std::array<std::vector<std::unique_ptr<kernels::Buffer>>, 64> free_;  // guarded by mutex_
  int64_t kept_ = 0;                                                    // guarded by mutex_
};

PooledBuffer::~PooledBuffer() {
  if (buffer_ != nullptr) pool_->Return(std::move(buffer_));
}

}  // namespace pewter
