// RadixSelect: the exact k-th largest magnitude by radix descent, one histogram a level
// (Backend::Histogram). The caller supplies each level's counts over the whole tensor, however it
// gathers them, so a tensor need not be in memory.
//
//   for (RadixSelect select(k, f64); !select.done();) { bins = counts at select.level();
//   select.Descend(bins); }
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kernels/backend.h"

namespace pewter::kernels {

class RadixSelect {
 public:
  // 1 <= k <= number of elements. `f64`: keys are F64 (4 levels), else F32 (2 levels).
  RadixSelect(int64_t k, bool f64) : remaining_(k), f64_(f64) {}

  bool done() const { return level_.level == (f64_ ? 4 : 2); }
  RadixLevel level() const { return level_; }
  // `bins`: kRadixBins counts of the digit at level(). Internal when they hold fewer elements than
  // k asks for.
  absl::Status Descend(absl::Span<const uint64_t> bins);

  // Once done: the magnitude, how many elements equal it, and how many of those belong to the k
  // largest.
  double value() const;
  int64_t equal() const { return equal_; }
  int64_t ties() const { return remaining_; }

 private:
  int64_t remaining_;
  bool f64_;
  RadixLevel level_;
  int64_t equal_ = 0;
};

}  // namespace pewter::kernels
