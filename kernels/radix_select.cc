#include "kernels/radix_select.h"

#include <bit>

namespace pewter::kernels {

absl::Status RadixSelect::Descend(absl::Span<const uint64_t> bins) {
  for (int64_t digit = kRadixBins - 1; digit >= 0; --digit) {
    const int64_t count = static_cast<int64_t>(bins[digit]);
    if (count >= remaining_) {
      level_.prefix = level_.prefix << 16 | static_cast<uint64_t>(digit);
      ++level_.level;
      equal_ = count;
      return absl::OkStatus();
    }
    remaining_ -= count;
  }
  return absl::InternalError("a histogram holds fewer elements than the selection asks for");
}

double RadixSelect::value() const {
  return f64_ ? std::bit_cast<double>(level_.prefix)
              : std::bit_cast<float>(static_cast<uint32_t>(level_.prefix));
}

}  // namespace pewter::kernels
