#include "merge/engine/delta_scan.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status.h"

namespace pewter {
namespace {

using kernels::ConstView;
using kernels::DeltaMagnitude;
using kernels::kRadixBins;
using kernels::SiftCandidate;
using kernels::SiftCounts;

}  // namespace

DeltaScan::Operands DeltaScan::OperandsOf(Tensors tensors) const {
  Operands operands = {.read = {MethodContext::kBase}, .place = {}};
  for (int tensor : tensors) {
    const auto found = std::find(operands.read.begin(), operands.read.end(), inputs_[tensor]);
    operands.place.push_back(found - operands.read.begin());
    if (found == operands.read.end()) operands.read.push_back(inputs_[tensor]);
  }
  return operands;
}

template <class T>
absl::StatusOr<std::vector<T>> DeltaScan::Read(int operand, int64_t first, int64_t count) const {
  const TensorSource& from = run_.source(operand);
  std::vector<std::byte> stored(count * ByteWidth(from.dtype()));
  RETURN_IF_ERROR(from.Read(first, count, absl::MakeSpan(stored), nullptr));
  std::vector<T> values(count);
  kernels::Convert({stored.data(), from.dtype(), count},
                   {values.data(), sizeof(T) == 8 ? DType::kF64 : DType::kF32, count});
  return values;
}

absl::Status DeltaScan::Sample(Tensors tensors, int64_t first, int64_t count,
                               absl::Span<std::vector<float>> magnitudes) {
  ASSIGN_OR_RETURN(const std::vector<float> base, Read<float>(MethodContext::kBase, first, count));
  for (size_t i = 0; i < tensors.size(); ++i) {
    ASSIGN_OR_RETURN(const std::vector<float> model,
                     Read<float>(inputs_[tensors[i]], first, count));
    for (int64_t j = 0; j < count; ++j) magnitudes[i].push_back(std::abs(model[j] - base[j]));
  }
  return absl::OkStatus();
}

bool DeltaScan::Reserve(int64_t candidates) {
  const int64_t bytes = candidates * static_cast<int64_t>(sizeof(SiftCandidate));
  if (run_.environment_.candidate_bytes.fetch_sub(bytes) < bytes) {
    run_.environment_.candidate_bytes += bytes;
    return false;
  }
  reserved_ += bytes;
  return true;
}

absl::Status DeltaScan::Sift(Tensors tensors, absl::Span<const kernels::SiftWindow> windows,
                             int64_t limit, absl::Span<kernels::Sifted> sifted) {
  const Operands operands = OperandsOf(tensors);
  std::vector<int64_t> found(tensors.size());
  const int candidates_slot = static_cast<int>(operands.read.size());
  const auto sift = [&](const TensorRun::Tile& tile,
                        absl::Span<const ConstView> views) -> absl::Status {
    ASSIGN_OR_RETURN(
        void* const room,
        tile.lane.Host(candidates_slot, tile.count * static_cast<int64_t>(sizeof(SiftCandidate))));
    const absl::Span<SiftCandidate> candidates(static_cast<SiftCandidate*>(room), tile.count);
    for (size_t i = 0; i < tensors.size(); ++i) {
      {
        std::lock_guard lock(mutex_);
        if (!sifted[i].complete) continue;
      }
      const std::array<ConstView, 2> pair = {views[0], views[operands.place[i]]};
      ASSIGN_OR_RETURN(const SiftCounts counts,
                       tile.lane.backend().Sift(DeltaMagnitude{}, pair, windows[i], candidates));
      std::vector<SiftCandidate> kept(candidates.begin(), candidates.begin() + counts.candidates);
      std::lock_guard lock(mutex_);
      found[i] += counts.candidates;
      if (found[i] > limit || !Reserve(counts.candidates)) {
        sifted[i] = {.complete = false};
        continue;
      }
      sifted[i].above += counts.above;
      sifted[i].runs.push_back(
          {.first = tile.first, .common = counts.common, .candidates = std::move(kept)});
    }
    return absl::OkStatus();
  };
  return run_.Pass(operands.read, /*writes_output=*/false, sift);
}

absl::Status DeltaScan::Histogram(Tensors tensors, absl::Span<const kernels::RadixLevel> levels,
                                  absl::Span<std::vector<uint64_t>> bins) {
  const Operands operands = OperandsOf(tensors);
  // Each lane counts for itself; the sums do not depend on who counted.
  const size_t lanes = run_.environment_.scheduler.lanes();
  std::vector<std::vector<uint64_t>> counted(lanes * tensors.size());
  const auto count = [&](const TensorRun::Tile& tile,
                         absl::Span<const ConstView> views) -> absl::Status {
    for (size_t i = 0; i < tensors.size(); ++i) {
      std::vector<uint64_t>& mine = counted[tile.lane.index() * tensors.size() + i];
      mine.resize(kRadixBins);
      const std::array<ConstView, 2> pair = {views[0], views[operands.place[i]]};
      RETURN_IF_ERROR(
          tile.lane.backend().Histogram(DeltaMagnitude{}, pair, levels[i], absl::MakeSpan(mine)));
    }
    return absl::OkStatus();
  };
  RETURN_IF_ERROR(run_.Pass(operands.read, /*writes_output=*/false, count));
  for (size_t at = 0; at < counted.size(); ++at) {
    std::vector<uint64_t>& total = bins[at % tensors.size()];
    for (size_t bin = 0; bin < counted[at].size(); ++bin) total[bin] += counted[at][bin];
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<double>> DeltaScan::CountEqual(Tensors tensors,
                                                          absl::Span<const double> values) {
  kernels::CountEqualMagnitude count;
  count.task.count = static_cast<int>(tensors.size());
  std::vector<int> operands = {MethodContext::kBase};
  for (size_t i = 0; i < tensors.size(); ++i) {
    count.task.model[i].threshold = values[i];
    operands.push_back(inputs_[tensors[i]]);
  }
  return run_.ReduceBlocks(count, operands);
}

template <class T>
absl::StatusOr<int64_t> DeltaScan::FindEqualAs(int input, int64_t first, int64_t count, T value,
                                               int64_t nth) const {
  ASSIGN_OR_RETURN(const std::vector<T> base, Read<T>(MethodContext::kBase, first, count));
  ASSIGN_OR_RETURN(const std::vector<T> model, Read<T>(input, first, count));
  for (int64_t j = 0; j < count; ++j) {
    if (std::abs(model[j] - base[j]) == value && --nth == 0) return first + j;
  }
  return absl::DataLossError(
      absl::StrCat(run_.source(input).name(), " changed while it was being merged"));
}

absl::StatusOr<int64_t> DeltaScan::FindEqual(int tensor, int64_t first, int64_t count, double value,
                                             int64_t nth) {
  const int input = inputs_[tensor];
  return f64() ? FindEqualAs<double>(input, first, count, value, nth)
               : FindEqualAs<float>(input, first, count, static_cast<float>(value), nth);
}

}  // namespace pewter
