#include "merge/engine/tile_scheduler.h"

#include <exception>
#include <functional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status.h"

namespace pewter {
namespace {

using BufferList = std::vector<std::unique_ptr<kernels::Buffer>>;

template <class Allocate>
absl::StatusOr<void*> Scratch(BufferList& buffers, int slot, int64_t bytes, Allocate allocate) {
  if (buffers.size() <= static_cast<size_t>(slot)) buffers.resize(slot + 1);
  std::unique_ptr<kernels::Buffer>& buffer = buffers[slot];
  if (buffer == nullptr || buffer->bytes() < bytes) {
    buffer.reset();
    ASSIGN_OR_RETURN(buffer, allocate(bytes));
  }
  return buffer->data();
}

}  // namespace

absl::StatusOr<void*> Lane::Host(int slot, int64_t bytes) {
  return Scratch(host_, slot, bytes, [this](int64_t size) { return backend_->AllocateHost(size); });
}

absl::StatusOr<void*> Lane::Device(int slot, int64_t bytes) {
  return Scratch(device_, slot, bytes, [this](int64_t size) { return backend_->Allocate(size); });
}

struct TileScheduler::Batch {
  int64_t tiles;
  absl::FunctionRef<absl::Status(Lane&, int64_t)> tile;
  absl::FunctionRef<bool(int64_t)> admit;
  int64_t next = 0;
  int running = 0;
  absl::Status status;
  std::condition_variable done;

  bool open() const { return status.ok() && next < tiles; }
  bool finished() const { return !open() && running == 0; }
};

absl::StatusOr<std::unique_ptr<TileScheduler>> TileScheduler::Create(const kernels::Device& device,
                                                                     int lanes,
                                                                     std::stop_token stop) {
  std::unique_ptr<TileScheduler> scheduler(new TileScheduler(stop));
  scheduler->pool_ = kernels::ThreadPool::OfLent(lanes);
  for (int i = 0; i < lanes; ++i) {
    ASSIGN_OR_RETURN(std::unique_ptr<kernels::Backend> backend,
                     kernels::OpenBackend(device, scheduler->pool_));
    scheduler->lanes_.push_back(std::make_unique<Lane>(i, std::move(backend)));
  }
  for (std::unique_ptr<Lane>& lane : scheduler->lanes_) {
    scheduler->threads_.emplace_back(
        [scheduler = scheduler.get(), lane = lane.get()] { scheduler->LaneMain(*lane); });
  }
  scheduler->on_stop_ = std::make_unique<std::stop_callback<std::function<void()>>>(
      std::move(stop), [scheduler = scheduler.get()] {
        scheduler->Abort(absl::CancelledError("the merge was stopped"));
      });
  return scheduler;
}

TileScheduler::~TileScheduler() {
  on_stop_.reset();
  {
    std::lock_guard lock(mutex_);
    closing_ = true;
  }
  pool_->Wake();
}

absl::Status TileScheduler::Run(int64_t order, int64_t tiles,
                                absl::FunctionRef<absl::Status(Lane&, int64_t)> tile,
                                absl::FunctionRef<bool(int64_t)> admit) {
  Batch batch{.tiles = tiles, .tile = tile, .admit = admit};
  {
    std::lock_guard lock(mutex_);
    RETURN_IF_ERROR(aborted_);
    batches_.emplace(order, &batch);
  }
  pool_->Wake();
  std::unique_lock lock(mutex_);
  batch.done.wait(lock, [&] { return batch.finished(); });
  batches_.erase(order);
  return batch.status;
}

void TileScheduler::Wake() { pool_->Wake(); }

void TileScheduler::Abort(const absl::Status& status) {
  std::lock_guard lock(mutex_);
  if (aborted_.ok()) aborted_ = status;
  for (auto& [order, batch] : batches_) {
    if (batch->status.ok()) batch->status = aborted_;
    if (batch->finished()) batch->done.notify_all();
  }
}

TileScheduler::Batch* TileScheduler::TakeTile(int64_t* tile) {
  for (auto& [order, batch] : batches_) {
    if (!batch->open() || !batch->admit(batch->next)) continue;
    *tile = batch->next++;
    ++batch->running;
    return batch;
  }
  return nullptr;
}

void TileScheduler::LaneMain(Lane& lane) {
  while (true) {
    Batch* batch = nullptr;
    int64_t tile = 0;
    pool_->HelpUntil([&] {
      std::lock_guard lock(mutex_);
      return closing_ || (batch = TakeTile(&tile)) != nullptr;
    });
    if (batch == nullptr) return;
    absl::Status status;
    try {
      status = batch->tile(lane, tile);
    } catch (const std::bad_alloc&) {
      status = absl::ResourceExhaustedError("out of memory; lower --memory or --threads");
    } catch (const std::exception& error) {
      status = absl::InternalError(absl::StrCat("unexpected: ", error.what()));
    }
    std::lock_guard lock(mutex_);
    --batch->running;
    if (!status.ok() && batch->status.ok()) batch->status = status;
    if (batch->finished()) batch->done.notify_all();
  }
}

}  // namespace pewter
