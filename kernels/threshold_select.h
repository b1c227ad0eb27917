// The thresholds that the k largest magnitudes of tensors reach, exactly, of tensors that need not
// be in memory.
//
// A sample tells about where a threshold lies. One pass then counts what lies above that window and
// collects what lies in it, and the threshold is selected among the collected. Where the sample
// misleads or too much lies in the window, and for F64, a radix descent finds the same threshold
// with one histogram pass a level and one more for ties, which counts them.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/backend.h"

namespace pewter::kernels {

// The elements with a magnitude > value, and those equal to it with an index < ties_end, are k.
struct Threshold {
  double value = 0;
  int64_t ties_end = 0;
};

// What Sift found in one run of elements, from `first` on. Indices of candidates count from there.
struct SiftedRun {
  int64_t first = 0;
  int64_t common = 0;
  std::vector<SiftCandidate> candidates;
};
struct Sifted {
  // Zero, with what was found until then dropped, when more candidates were found than allowed.
  bool complete = true;
  int64_t above = 0;
  std::vector<SiftedRun> runs;  // in any order
};

// Passes over tensors of one size whose magnitudes are wanted. `tensors` are those that a pass is
// about, by number; other arguments have one entry for each of them, in their order.
class MagnitudeScan {
 public:
  virtual ~MagnitudeScan() = default;
  using Tensors = absl::Span<const int>;

  virtual int64_t elements() const = 0;
  // Whether magnitudes are doubles. If so, Sample is not called and Sift has no candidates.
  virtual bool f64() const = 0;

  // Appends the magnitudes of elements [first, first + count).
  virtual absl::Status Sample(Tensors tensors, int64_t first, int64_t count,
                              absl::Span<std::vector<float>> magnitudes) = 0;
  // Gives up on a tensor that has more than `limit` candidates, or for want of memory.
  virtual absl::Status Sift(Tensors tensors, absl::Span<const SiftWindow> windows, int64_t limit,
                            absl::Span<Sifted> sifted) = 0;
  // Adds counts of each tensor's digit (Backend::Histogram).
  virtual absl::Status Histogram(Tensors tensors, absl::Span<const RadixLevel> levels,
                                 absl::Span<std::vector<uint64_t>> bins) = 0;
  // Index of the nth (from 1) magnitude among elements [first, first + count) that equals `value`.
  // DataLoss when there are fewer: the tensor changed between the passes.
  virtual absl::StatusOr<int64_t> FindEqual(int tensor, int64_t first, int64_t count, double value,
                                            int64_t nth) = 0;
};

// Candidates of a tensor that Sift is asked to collect, at most.
int64_t MostCandidates(int64_t elements);

// For each tensor, the threshold of its ks[i] largest magnitudes; 1 <= ks[i] <= elements, else
// Internal. The same for any window: whatever the sample said.
absl::StatusOr<std::vector<Threshold>> SelectThresholds(MagnitudeScan& scan,
                                                        absl::Span<const int64_t> ks);

}  // namespace pewter::kernels
