#include "merge/engine/shard_writer.h"

#include <utility>

#include "base/status.h"

namespace pewter {

ShardWriter::ShardWriter(const PlanShard& shard, std::unique_ptr<ObjectWriter> object,
                         Options options)
    : total_(shard.bytes),
      window_(options.window_bytes),
      header_(shard.header),
      object_(std::move(object)),
      options_(std::move(options)),
      thread_([this] { Main(); }) {}

ShardWriter::~ShardWriter() {
  std::lock_guard lock(mutex_);
  abandoned_ = true;
  changed_.notify_all();
}

void ShardWriter::Submit(int64_t offset, PooledBuffer buffer, int64_t bytes) {
  if (bytes == 0) return;
  std::lock_guard lock(mutex_);
  waiting_.emplace(offset, Piece{std::move(buffer), bytes});
  if (offset == written_.load(std::memory_order_relaxed)) changed_.notify_all();
}

absl::Status ShardWriter::Append(absl::Span<const std::byte> bytes) {
  if (options_.hash) sha_.Update(bytes);
  RETURN_IF_ERROR(object_->Append(bytes));
  written_.fetch_add(static_cast<int64_t>(bytes.size()), std::memory_order_release);
  options_.advanced(static_cast<int64_t>(bytes.size()));
  return absl::OkStatus();
}

void ShardWriter::Main() {
  absl::Status status =
      Append({reinterpret_cast<const std::byte*>(header_.data()), header_.size()});
  while (status.ok() && written_.load(std::memory_order_relaxed) < total_) {
    Piece piece;
    {
      std::unique_lock lock(mutex_);
      const auto ready = [this] {
        return !waiting_.empty() &&
               waiting_.begin()->first == written_.load(std::memory_order_relaxed);
      };
      changed_.wait(lock, [&] { return abandoned_ || ready(); });
      if (abandoned_) return;
      piece = std::move(waiting_.begin()->second);
      waiting_.erase(waiting_.begin());
    }
    status = Append(
        {static_cast<const std::byte*>(piece.buffer.data()), static_cast<size_t>(piece.bytes)});
  }
  if (!status.ok()) options_.failed(status);
  std::lock_guard lock(mutex_);
  status_ = status;
}

absl::StatusOr<std::string> ShardWriter::Finish() {
  thread_.join();
  {
    std::lock_guard lock(mutex_);
    RETURN_IF_ERROR(status_);
  }
  RETURN_IF_ERROR(object_->Commit());
  return options_.hash ? sha_.Finish() : std::string();
}

}  // namespace pewter
