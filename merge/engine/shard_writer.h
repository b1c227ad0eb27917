// ShardWriter: one output shard, written front to back while its tensors are merged in parallel.
//
// The plan fixes where every byte goes, so the header is written first and tiles follow in file
// order, whatever order they are finished in. Tiles that come early wait in memory; `Admits` keeps
// what waits below a window. A thread of the writer's own hashes and appends.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/digest.h"
#include "merge/engine/buffer_pool.h"
#include "merge/plan/plan.h"
#include "store/object_store.h"

namespace pewter {

class ShardWriter {
 public:
  struct Options {
    int64_t window_bytes = 0;
    bool hash = true;
    std::function<void(int64_t bytes)>
        advanced;  // that many more bytes were written; from the writer's thread
    std::function<void(const absl::Status&)> failed;  // the store refused; from the writer's thread
  };
  ShardWriter(const PlanShard& shard, std::unique_ptr<ObjectWriter> object, Options options);
  ~ShardWriter();

  // True when a tile that ends at `end` (an offset in the file) is near enough to what is written.
  bool Admits(int64_t end) const {
    return end <= written_.load(std::memory_order_acquire) + window_;
  }
  // `bytes` of `buffer` go to `offset`. Thread-safe. Every byte of the shard is submitted exactly
  // once.
  void Submit(int64_t offset, PooledBuffer buffer, int64_t bytes);
  // Waits for all bytes, makes the shard durable and visible. Returns its SHA-256 (empty without
  // hashing).
  absl::StatusOr<std::string> Finish();

 private:
  struct Piece {
    PooledBuffer buffer;
    int64_t bytes;
  };
  void Main();
  absl::Status Append(absl::Span<const std::byte> bytes);

  const int64_t total_;
  const int64_t window_;
  const std::string header_;
  std::unique_ptr<ObjectWriter> object_;
  Options options_;
  Sha256 sha_;
  std::atomic<int64_t> written_{0};
  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<int64_t, Piece> waiting_;  // by offset; guarded by mutex_
  absl::Status status_;               // guarded by mutex_
  bool abandoned_ = false;            // guarded by mutex_
  std::jthread thread_;
};

}  // namespace pewter
