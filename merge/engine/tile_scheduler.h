// TileScheduler: the lanes that do a merge's work, tile by tile, in plan order.
//
// A tensor is merged in passes; a pass is a batch of tiles. Each lane is a thread with a Backend of
// its own. A free lane takes the next tile of the earliest batch that admits one, so early tensors
// finish first, and lanes never idle while another tensor in flight has work; those that find no
// tile help others with the loops of theirs, as of a matrix that is merged whole. Batches are run
// from coordinator threads (one a tensor in flight), which block until theirs is done.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <stop_token>
#include <thread>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/backends.h"

namespace pewter {

// What one lane owns. Used by its thread alone.
class Lane {
 public:
  Lane(int index, std::unique_ptr<kernels::Backend> backend)
      : index_(index), backend_(std::move(backend)) {}

  int index() const { return index_; }
  kernels::Backend& backend() { return *backend_; }
  // Scratch number `slot` of at least `bytes`, kept for the next tile: host memory (pinned for a
  // GPU), device memory.
  absl::StatusOr<void*> Host(int slot, int64_t bytes);
  absl::StatusOr<void*> Device(int slot, int64_t bytes);

 private:
  int index_;
  std::unique_ptr<kernels::Backend> backend_;
  std::vector<std::unique_ptr<kernels::Buffer>> host_;
  std::vector<std::unique_ptr<kernels::Buffer>> device_;
};

class TileScheduler {
 public:
  // `stop` cancels: running batches end with Cancelled.
  static absl::StatusOr<std::unique_ptr<TileScheduler>> Create(const kernels::Device& device,
                                                               int lanes, std::stop_token stop);
  ~TileScheduler();

  int lanes() const { return static_cast<int>(lanes_.size()); }

  // Runs tile(lane, i) for i in [0, tiles) and waits. Tiles start in order of i. Lower `order` goes
  // first; no two batches at a time share one. `admit(i)` says whether tile i may start now; it is
  // called under a lock, must be cheap, and for the lowest order that is running must become true
  // without that batch's help. The first error ends the batch and is returned.
  absl::Status Run(int64_t order, int64_t tiles,
                   absl::FunctionRef<absl::Status(Lane& lane, int64_t tile)> tile,
                   absl::FunctionRef<bool(int64_t tile)> admit);
  // Something that an `admit` looks at has changed.
  void Wake();
  // Ends all batches, running and to come, with `status`.
  void Abort(const absl::Status& status);

 private:
  struct Batch;
  explicit TileScheduler(std::stop_token stop) : stop_(std::move(stop)) {}
  void LaneMain(Lane& lane);
  // Takes the next tile; null when there is none now.
  Batch* TakeTile(int64_t* tile);

  std::stop_token stop_;
  std::shared_ptr<kernels::ThreadPool> pool_;  // lanes wait in it for tiles
  std::vector<std::unique_ptr<Lane>> lanes_;
  std::mutex mutex_;                   // may be taken under the pool's, not the other way round
  std::map<int64_t, Batch*> batches_;  // by order; guarded by mutex_
  absl::Status aborted_;               // guarded by mutex_
  bool closing_ = false;               // guarded by mutex_
  std::vector<std::jthread> threads_;
  std::unique_ptr<std::stop_callback<std::function<void()>>> on_stop_;
};

}  // namespace pewter
