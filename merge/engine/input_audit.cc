#include "merge/engine/input_audit.h"

#include <algorithm>
#include <tuple>

namespace pewter {

std::vector<ReadRange> JoinRanges(std::vector<ReadRange> ranges) {
  std::sort(ranges.begin(), ranges.end(), [](const ReadRange& a, const ReadRange& b) {
    return std::tie(a.file, a.offset, a.bytes) < std::tie(b.file, b.offset, b.bytes);
  });
  // Nearly all lengths are that of a full tile; making a shift costs more than applying it.
  std::map<int64_t, Crc32cShift> shifts;
  std::vector<ReadRange> joined;
  for (const ReadRange& range : ranges) {
    if (!joined.empty() && joined.back().file == range.file) {
      ReadRange& last = joined.back();
      if (range.offset + range.bytes <= last.offset + last.bytes) continue;  // read twice
      if (range.offset == last.offset + last.bytes) {
        const Crc32cShift& shift = shifts.try_emplace(range.bytes, range.bytes).first->second;
        last.crc32c = shift(last.crc32c) ^ range.crc32c;
        last.bytes += range.bytes;
        continue;
      }
    }
    joined.push_back(range);
  }
  return joined;
}

}  // namespace pewter
