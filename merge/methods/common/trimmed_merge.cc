#include "merge/methods/common/trimmed_merge.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "kernels/radix_select.h"

namespace pewter::methods {
namespace {

using kernels::ElectedMean;

// Row norms below this share of the largest singular value are noise.
constexpr double kDeadRow = 1e-10;
// The smallest of the `survivors` largest |entry| * scale of all blocks.
absl::StatusOr<double> Threshold(kernels::Backend& backend, const JointBlocks& blocks,
                                 const kernels::AxisValues& scales, int64_t survivors) {
  kernels::RadixSelect select(survivors, /*f64=*/true);
  std::vector<uint64_t> bins;
  while (!select.done()) {
    bins.assign(kernels::kRadixBins, 0);
    for (int t = 0; t < blocks.count; ++t) {
      RETURN_IF_ERROR(backend.Histogram(kernels::ScaledMagnitude{scales, t}, {blocks.View(t)}, 0,
                                        select.level(), absl::MakeSpan(bins)));
    }
    RETURN_IF_ERROR(select.Descend(bins));
  }
  return select.value();
}

}  // namespace

double Sign(double x) { return x > 0 ? 1 : x < 0 ? -1 : 0; }

int64_t Survivors(int64_t n, double density) {
  const auto kept = static_cast<int64_t>(std::nearbyint(static_cast<double>(n) * density));
  return std::min(n, n - std::max<int64_t>(n - kept, 1) + 1);
}

absl::Status MergeTrimmed(kernels::Backend& backend, const JointBlocks& blocks, double largest,
                          const TrimmedMerge& options, const TrimmedMergeReport& report) {
  ASSIGN_OR_RETURN(std::vector<double> scales, RowNorms(backend, blocks));
  if (report.context != nullptr) ReportTasks(*report.context, report.part, scales, report.squares);
  for (double& value : scales) value = value > kDeadRow * largest ? 1 / value : 0;
  ASSIGN_OR_RETURN(const PlacedValues placed, PlacedValues::Make(backend, std::move(scales)));

  ElectedMean op;
  op.count = blocks.count;
  op.scaled = true;
  op.disjoint = options.disjoint;
  op.axis = {.row = blocks.length, .count = blocks.count, .values = placed.data()};
  std::copy(options.weights.begin(), options.weights.end(), op.weight);
  const int64_t entries = blocks.count * blocks.rank * blocks.length;
  ASSIGN_OR_RETURN(const double threshold,
                   Threshold(backend, blocks, op.axis, Survivors(entries, options.density)));
  std::fill_n(op.threshold, op.count, threshold);
  if (report.context != nullptr) {
    std::vector<double> kept;
    for (int t = 0; t < blocks.count; ++t) {
      ElectedMean one = op;
      one.count = 1;
      one.elect = one.disjoint = false;
      one.weight[0] = 1;
      one.axis.values = placed.data() + t;
      ASSIGN_OR_RETURN(const double square, KeptSquare(backend, blocks, t, one));
      kept.push_back(report.squares[t] > 0 ? square / report.squares[t] : 0);
    }
    report.context->Report(absl::StrCat(report.part, "kept"), std::move(kept));
  }

  const std::vector<kernels::ConstView> views = blocks.Views();
  ASSIGN_OR_RETURN(const std::vector<double> signs,
                   backend.Reduce(kernels::ElectedSigns{op}, views, 0));
  double sum = 0;
  for (double of_block : signs) sum += of_block;
  op.sign_of_zero = Sign(sum);
  RETURN_IF_ERROR(
      backend.Map(op, views, {blocks.Of(0).data, DType::kF64, blocks.rank * blocks.length}, 0));
  return backend.Synchronize();  // before the scales go
}

}  // namespace pewter::methods
