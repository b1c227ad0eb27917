// ReadAhead: bytes of remote objects are fetched before they are read.
//
// A merge reads a tensor in tiles, much smaller than what is worth a request to a distant store,
// and it knows which tensors come next. So it announces ranges, in the order in which it will read
// them; blocks of them are fetched in parallel, as far as the memory goes, and tiles are copied out
// of them. What has been read stays while there is room, for methods of several passes. A read of
// bytes that have not come yet waits for them, or fetches itself what it asks for.
//
// One object a process, so that the memory is bounded whatever the number of stores. Thread-safe.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "store/worker_pool.h"

namespace pewter {

class ReadAhead {
 public:
  static ReadAhead& Shared();

  ReadAhead(int64_t capacity, int workers);
  ~ReadAhead();

  using Fetch = std::function<absl::Status(int64_t offset, absl::Span<std::byte> out)>;
  // Bytes [offset, offset + bytes) of `object` (any name that is its own) will be read. Until the
  // returned object goes, which waits for what is being fetched or read, `fetch` may be called from
  // other threads.
  std::shared_ptr<void> Announce(std::string object, int64_t offset, int64_t bytes, Fetch fetch);

  // True when the bytes are announced, and now in `out`; false when the caller must fetch them.
  absl::StatusOr<bool> Read(absl::string_view object, int64_t offset, absl::Span<std::byte> out);

  // What blocks may take, those that are being read included.
  void SetCapacity(int64_t bytes);
  int64_t used() const;

  static constexpr int64_t kBlockBytes = int64_t{4} << 20;
  static constexpr int64_t kStandardCapacity = int64_t{128} << 20;

 private:
  struct Block;
  struct Intent;
  using Lock = std::unique_lock<std::mutex>;

  bool MakeRoom(int64_t bytes);
  void FetchMore();
  void FetchBlock(Intent& intent, size_t index);
  void Drop(Intent& intent, size_t index);
  void Close(const std::shared_ptr<Intent>& intent);

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  int64_t capacity_;  // all below guarded by mutex_
  int64_t used_ = 0;
  std::list<std::shared_ptr<Intent>> intents_;  // as announced
  std::multimap<std::string, std::shared_ptr<Intent>, std::less<>> by_object_;
  std::list<std::pair<Intent*, size_t>> read_;  // blocks that were read, the oldest first
  WorkerPool workers_;                          // last, so that its tasks end first
};

}  // namespace pewter
