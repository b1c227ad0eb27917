// DELLA's draws (arXiv 2406.11617, "MagPrune"): an element stays with a probability that rises with
// the rank of its magnitude in its row, evenly from that of the smallest to that of the largest.
//
// No rank is computed. Of the n - 1 others in its row an element of rank r outranks r - 1, so it
// outranks one that is drawn at random with probability (r - 1) / (n - 1), which is all that the
// rank is for. The element's Philox word u says both: below `low` it stays, from `high` on it goes,
// and between them u's place in the interval, uniform there, picks the rival that it has to
// outrank. Of equal magnitudes the earlier one has the higher rank.
#pragma once

#include <cmath>
#include <cstdint>

#include "base/host_device.h"
#include "base/random.h"

namespace pewter::kernels {

struct RankedDraw {
  PhiloxKey key;
  int64_t row = 0;    // elements of a row: at least 2, below 2^32
  uint64_t low = 0;   // probability of the smallest * 2^32
  uint64_t high = 0;  // of the largest
  uint64_t step = 0;  // others in the row * 2^32 / (high - low)

  // Place in the row of the rival of the element at `place`; low <= word < high.
  PEWTER_HD int64_t Rival(uint32_t word, int64_t place) const {
    const auto other = static_cast<int64_t>((word - low) * step >> 32);
    return other + (other >= place ? 1 : 0);
  }

  // Whether the element at `place`, of magnitude `own`, stays; `magnitude` gives those of its row
  // by their place.
  template <class T, class Magnitude>
  PEWTER_HD bool Stays(uint32_t word, int64_t place, T own, const Magnitude& magnitude) const {
    if (word < low || word >= high) return word < low;
    const int64_t rival = Rival(word, place);
    const T other = magnitude(rival);
    // No branches: which way they go would be a matter of chance.
    return (own > other) | ((own == other) & (place < rival));
  }
};

// Probabilities within [0, 1], low <= high.
inline RankedDraw MakeRankedDraw(PhiloxKey key, int64_t row, double low, double high) {
  RankedDraw draw = {.key = key,
                     .row = row,
                     .low = static_cast<uint64_t>(std::llround(low * 0x1p32)),
                     .high = static_cast<uint64_t>(std::llround(high * 0x1p32))};
  if (draw.high > draw.low) {
    draw.step = (static_cast<uint64_t>(row - 1) << 32) / (draw.high - draw.low);
  }
  return draw;
}

}  // namespace pewter::kernels
