// WriteBehind: appends to a file from a thread of its own, past the page cache where the file
// system allows it (O_DIRECT).
//
// A merged model is written once, is larger than most other files, and must be durable before it
// counts. Through the page cache its bytes are copied into fresh pages that push out the inputs
// being read, and reach the disk only later; past it the disk works while the next bytes are made.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <thread>

#include "absl/types/span.h"

namespace pewter {

class WriteBehind {
 public:
  // `file`: a descriptor open for writing at its start; must outlive this object.
  explicit WriteBehind(int file) : file_(file) {}
  ~WriteBehind();
  WriteBehind(const WriteBehind&) = delete;
  WriteBehind& operator=(const WriteBehind&) = delete;

  // Both return 0 or an errno: of this call, or of a write that an earlier Append began. After an
  // error nothing more is written.
  int Append(absl::Span<const std::byte> bytes);
  // Waits until all that was appended is in the file, and durable.
  int Sync();

  int64_t written() const;  // bytes that reached the file

 private:
  struct Free {
    void operator()(std::byte* block) const { std::free(block); }
  };
  using Block = std::unique_ptr<std::byte, Free>;

  void Main();
  void Write(const std::byte* data, int64_t size);
  int HandOver();  // the full block to the thread

  const int file_;
  Block filling_;
  int64_t filled_ = 0;
  bool direct_ = false;  // used by the thread, and without it

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  Block writing_;      // with bytes to write while busy_
  bool busy_ = false;  // the thread has a block to write
  bool closing_ = false;
  int error_ = 0;
  int64_t written_ = 0;
  std::jthread thread_;  // started with the first full block; last, so that it ends first
};

}  // namespace pewter
