#include "merge/engine/tensor_scan.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "kernels/cpu/cpu_backend.h"

namespace pewter {
namespace {

using kernels::ConstView;
using kernels::kRadixBins;
using kernels::SiftCandidate;
using kernels::SiftCounts;

std::vector<ConstView> At(absl::Span<const ConstView> views, const std::vector<size_t>& places) {
  std::vector<ConstView> chosen;
  for (size_t place : places) chosen.push_back(views[place]);
  return chosen;
}

}  // namespace

TensorScan::TensorScan(TensorRun& run, absl::Span<const MethodContext::MagnitudeRank> ranks)
    : run_(run),
      ranks_(ranks),
      host_(kernels::cpu::MakeBackend(*kernels::cpu::Tables()[0], /*threads=*/1)) {}

TensorScan::Operands TensorScan::OperandsOf(Tensors tensors) const {
  Operands operands;
  for (int tensor : tensors) {
    std::vector<size_t>& places = operands.places.emplace_back();
    for (int operand : ranks_[tensor].operands) {
      const auto found = std::find(operands.read.begin(), operands.read.end(), operand);
      places.push_back(found - operands.read.begin());
      if (found == operands.read.end()) operands.read.push_back(operand);
    }
  }
  return operands;
}

absl::StatusOr<TensorScan::Elements> TensorScan::Read(const Operands& operands, int64_t first,
                                                      int64_t count) const {
  Elements elements;
  for (int operand : operands.read) {
    const TensorSource& from = run_.source(operand);
    std::vector<std::byte>& bytes = elements.bytes.emplace_back(count * ByteWidth(from.dtype()));
    RETURN_IF_ERROR(from.Read(first, count, absl::MakeSpan(bytes), nullptr));
    elements.views.push_back({bytes.data(), from.dtype(), count});
  }
  return elements;
}

absl::Status TensorScan::Sample(Tensors tensors, int64_t first, int64_t count,
                                absl::Span<std::vector<float>> magnitudes) {
  const Operands operands = OperandsOf(tensors);
  ASSIGN_OR_RETURN(const Elements elements, Read(operands, first, count));
  const kernels::SiftWindow all{.low = 0, .high = std::numeric_limits<double>::infinity()};
  std::vector<SiftCandidate> candidates(count);
  for (size_t i = 0; i < tensors.size(); ++i) {
    ASSIGN_OR_RETURN(const SiftCounts counts,
                     host_->Sift(ranks_[tensors[i]].op, At(elements.views, operands.places[i]),
                                 first, all, absl::MakeSpan(candidates)));
    for (int64_t c = 0; c < counts.candidates; ++c) {
      magnitudes[i].push_back(candidates[c].magnitude);
    }
    magnitudes[i].insert(magnitudes[i].end(), counts.above,
                         std::numeric_limits<float>::quiet_NaN());
  }
  return absl::OkStatus();
}

bool TensorScan::Reserve(int64_t candidates) {
  if (candidates == 0) return true;
  const int64_t bytes = candidates * static_cast<int64_t>(sizeof(SiftCandidate));
  if (run_.environment_.candidate_bytes.fetch_sub(bytes) < bytes) {
    run_.environment_.candidate_bytes += bytes;
    return false;
  }
  reserved_ += bytes;
  return true;
}

absl::Status TensorScan::Sift(Tensors tensors, absl::Span<const kernels::SiftWindow> windows,
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
      ASSIGN_OR_RETURN(const kernels::MagnitudeOp op,
                       run_.Placed(tile, ranks_[tensors[i]].op, views.size()));
      ASSIGN_OR_RETURN(const SiftCounts counts,
                       tile.lane.backend().Sift(op, At(views, operands.places[i]), tile.first,
                                                windows[i], candidates));
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

absl::Status TensorScan::Histogram(Tensors tensors, absl::Span<const kernels::RadixLevel> levels,
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
      ASSIGN_OR_RETURN(const kernels::MagnitudeOp op,
                       run_.Placed(tile, ranks_[tensors[i]].op, views.size()));
      RETURN_IF_ERROR(tile.lane.backend().Histogram(op, At(views, operands.places[i]), tile.first,
                                                    levels[i], absl::MakeSpan(mine)));
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

absl::StatusOr<int64_t> TensorScan::FindEqual(int tensor, int64_t first, int64_t count,
                                              double value, int64_t nth) {
  const Operands operands = OperandsOf({&tensor, 1});
  ASSIGN_OR_RETURN(const Elements elements, Read(operands, first, count));
  std::vector<SiftCandidate> equal(count);
  ASSIGN_OR_RETURN(const SiftCounts counts,
                   host_->Sift(ranks_[tensor].op, At(elements.views, operands.places[0]), first,
                               {.low = value, .high = value}, absl::MakeSpan(equal)));
  if (counts.candidates < nth) {
    return absl::DataLossError(absl::StrCat(run_.source(ranks_[tensor].operands.back()).name(),
                                            " changed while it was being merged"));
  }
  equal.resize(counts.candidates);
  std::nth_element(
      equal.begin(), equal.begin() + (nth - 1), equal.end(),
      [](const SiftCandidate& a, const SiftCandidate& b) { return a.index < b.index; });
  return first + equal[nth - 1].index;
}

}  // namespace pewter
