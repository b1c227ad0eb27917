// InputAudit: what was read, while it is read: CRC32C of every input byte range, and values that
// are not finite.
//
// Passes after the first read the same bytes again and are not audited. Thread-safe.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "absl/types/span.h"
#include "base/digest.h"
#include "merge/checkpoint/tensor_source.h"

namespace pewter {

// A run of bytes of one input file (an index into Plan::files).
struct ReadRange {
  int file = 0;
  int64_t offset = 0;
  int64_t bytes = 0;
  uint32_t crc32c = 0;
};

// Collects the ranges of one tile.
class TileAudit : public ReadObserver {
 public:
  void OnRead(int file, int64_t offset, absl::Span<const std::byte> bytes) override {
    ranges_.push_back({file, offset, static_cast<int64_t>(bytes.size()), Crc32c(bytes)});
  }
  std::vector<ReadRange> Take() { return std::move(ranges_); }

 private:
  std::vector<ReadRange> ranges_;
};

// Sorts ranges and joins neighbours, so that a tensor that was read tile by tile is one range.
// Ranges that were read twice count once.
std::vector<ReadRange> JoinRanges(std::vector<ReadRange> ranges);

}  // namespace pewter
