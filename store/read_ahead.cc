#include "store/read_ahead.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "absl/cleanup/cleanup.h"
#include "base/status.h"

namespace pewter {
namespace {

constexpr int kWorkers = 32;
// Blocks of an announced range that are worth having before those of a later range.
constexpr int64_t kAheadBytes = 2 * ReadAhead::kBlockBytes;

}  // namespace

struct ReadAhead::Block {
  enum class State { kAbsent, kFetching, kThere } state = State::kAbsent;
  std::unique_ptr<std::byte[]> bytes;
  int64_t unread = 0;
  int readers = 0;          // that wait for it or copy from it
  bool among_read = false;  // in read_, at `place`
  std::list<std::pair<Intent*, size_t>>::iterator place;
};

struct ReadAhead::Intent {
  std::string object;
  int64_t offset = 0;
  int64_t bytes = 0;
  Fetch fetch;
  std::vector<Block> blocks;
  size_t position = 0;  // the block that was asked for last
  int fetching = 0;     // blocks
  int readers = 0;      // calls of Read, from any thread: not all are the announcer's
  bool failed = false;  // nothing more is fetched ahead; a read gets the error

  int64_t SizeOf(size_t index) const {
    return std::min(kBlockBytes, bytes - static_cast<int64_t>(index) * kBlockBytes);
  }
  // The first block from `position` on that nobody fetches; blocks.size() when there is none.
  size_t NextAbsent() const {
    if (failed) return blocks.size();
    size_t index = position;
    while (index < blocks.size() && blocks[index].state != Block::State::kAbsent) ++index;
    return index;
  }
};

ReadAhead& ReadAhead::Shared() {
  static auto& shared = *new ReadAhead(kStandardCapacity, kWorkers);
  return shared;
}

ReadAhead::ReadAhead(int64_t capacity, int workers) : capacity_(capacity), workers_(workers) {}
ReadAhead::~ReadAhead() = default;

void ReadAhead::SetCapacity(int64_t bytes) {
  std::lock_guard lock(mutex_);
  capacity_ = bytes;
}

int64_t ReadAhead::used() const {
  std::lock_guard lock(mutex_);
  return used_;
}

std::shared_ptr<void> ReadAhead::Announce(std::string object, int64_t offset, int64_t bytes,
                                          Fetch fetch) {
  if (bytes <= 0) return nullptr;
  auto intent = std::make_shared<Intent>();
  intent->object = std::move(object);
  intent->offset = offset;
  intent->bytes = bytes;
  intent->fetch = std::move(fetch);
  intent->blocks.resize((bytes + kBlockBytes - 1) / kBlockBytes);
  {
    std::lock_guard lock(mutex_);
    intents_.push_back(intent);
    by_object_.emplace(intent->object, intent);
    FetchMore();
  }
  // Not null, which would say that nothing was announced.
  return std::shared_ptr<void>(intent.get(), [this, intent](void*) { Close(intent); });
}

void ReadAhead::Close(const std::shared_ptr<Intent>& intent) {
  Lock lock(mutex_);
  const auto [first, last] = by_object_.equal_range(intent->object);
  by_object_.erase(
      std::find_if(first, last, [&](const auto& entry) { return entry.second == intent; }));
  intents_.remove(intent);
  changed_.wait(lock, [&] { return intent->fetching == 0 && intent->readers == 0; });
  for (size_t i = 0; i < intent->blocks.size(); ++i) {
    if (intent->blocks[i].state == Block::State::kThere) Drop(*intent, i);
  }
  FetchMore();
}

void ReadAhead::Drop(Intent& intent, size_t index) {
  Block& block = intent.blocks[index];
  if (std::exchange(block.among_read, false)) read_.erase(block.place);
  used_ -= intent.SizeOf(index);
  block.state = Block::State::kAbsent;
  block.bytes.reset();
}

// Lets blocks go that were read, the oldest first.
bool ReadAhead::MakeRoom(int64_t bytes) {
  auto oldest = read_.begin();
  while (used_ + bytes > capacity_ && oldest != read_.end()) {
    const auto [intent, index] = *oldest++;
    if (intent->blocks[index].readers == 0) Drop(*intent, index);
  }
  return used_ + bytes <= capacity_;
}

// Starts what should be under way: of the ranges that come next, as many as the memory holds two
// blocks of; the one that has the least ahead goes first.
void ReadAhead::FetchMore() {
  while (true) {
    Intent* best = nullptr;
    size_t best_ahead = 0;
    int64_t reserved = 0;
    for (const std::shared_ptr<Intent>& intent : intents_) {
      if (reserved >= capacity_) break;
      reserved += std::min(kAheadBytes,
                           intent->bytes - static_cast<int64_t>(intent->position) * kBlockBytes);
      const size_t next = intent->NextAbsent();
      if (next == intent->blocks.size()) continue;
      const size_t ahead = next - intent->position;
      if (best == nullptr || ahead < best_ahead) {
        best = intent.get();
        best_ahead = ahead;
      }
    }
    if (best == nullptr) return;
    const size_t index = best->NextAbsent();
    if (!MakeRoom(best->SizeOf(index))) return;
    FetchBlock(*best, index);
  }
}

void ReadAhead::FetchBlock(Intent& intent, size_t index) {
  Block& block = intent.blocks[index];
  const int64_t size = intent.SizeOf(index);
  block.state = Block::State::kFetching;
  block.unread = size;
  used_ += size;
  ++intent.fetching;
  workers_.Run([this, &intent, &block, index, size] {
    auto bytes = std::make_unique_for_overwrite<std::byte[]>(size);
    const absl::Status fetched =
        intent.fetch(intent.offset + static_cast<int64_t>(index) * kBlockBytes,
                     absl::MakeSpan(bytes.get(), size));
    std::lock_guard lock(mutex_);
    if (fetched.ok()) {
      block.bytes = std::move(bytes);
      block.state = Block::State::kThere;
    } else {
      used_ -= size;
      block.state = Block::State::kAbsent;
      intent.failed = true;
    }
    --intent.fetching;  // Close may free the intent as soon as the lock is given back
    changed_.notify_all();
  });
}

absl::StatusOr<bool> ReadAhead::Read(absl::string_view object, int64_t offset,
                                     absl::Span<std::byte> out) {
  const int64_t end = offset + static_cast<int64_t>(out.size());
  Lock lock(mutex_);
  std::shared_ptr<Intent> intent;
  const auto [first, last] = by_object_.equal_range(object);
  for (auto entry = first; entry != last && intent == nullptr; ++entry) {
    const Intent& candidate = *entry->second;
    if (offset >= candidate.offset && end <= candidate.offset + candidate.bytes) {
      intent = entry->second;
    }
  }
  if (intent == nullptr) return false;
  ++intent->readers;
  const absl::Cleanup leave = [&] {  // the lock is held wherever this returns
    if (--intent->readers == 0) changed_.notify_all();
  };
  while (!out.empty()) {
    const int64_t at = offset - intent->offset;
    const size_t index = at / kBlockBytes;
    const int64_t within = at % kBlockBytes;
    Block& block = intent->blocks[index];
    const auto part = out.subspan(0, intent->SizeOf(index) - within);
    intent->position = index;
    ++block.readers;
    if (block.state == Block::State::kAbsent && !intent->failed &&
        MakeRoom(intent->SizeOf(index))) {
      FetchBlock(*intent, index);
    }
    FetchMore();
    changed_.wait(lock, [&] { return block.state != Block::State::kFetching; });
    const bool there = block.state == Block::State::kThere;
    lock.unlock();
    absl::Status status;
    if (there) {
      std::memcpy(part.data(), block.bytes.get() + within, part.size());
    } else {  // no room, or it could not be fetched
      status = intent->fetch(offset, part);
    }
    lock.lock();
    --block.readers;
    RETURN_IF_ERROR(status);
    if (there) {
      block.unread -= static_cast<int64_t>(part.size());
      if (block.among_read) {
        read_.splice(read_.end(), read_, block.place);
      } else if (block.unread <= 0) {
        block.place = read_.insert(read_.end(), {intent.get(), index});
        block.among_read = true;
      }
      FetchMore();
    }
    offset += static_cast<int64_t>(part.size());
    out.remove_prefix(part.size());
  }
  return true;
}

}  // namespace pewter
