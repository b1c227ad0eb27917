// MagnitudeScan over tensors in a backend's memory, for tests and benchmarks.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "base/status.h"
#include "kernels/threshold_select.h"

namespace pewter::kernels {

class ViewScan : public MagnitudeScan {
 public:
  // Each tensor is the views that DeltaMagnitude takes: one, or base and model; all have one size.
  // Passes take `tile` elements at a time.
  ViewScan(Backend& backend, std::vector<std::vector<ConstView>> tensors, int64_t tile)
      : backend_(backend), tensors_(std::move(tensors)), tile_(tile) {}

  int64_t elements() const override { return tensors_[0][0].size; }
  bool f64() const override { return tensors_[0][0].dtype == DType::kF64; }

  absl::Status Sample(Tensors tensors, int64_t first, int64_t count,
                      absl::Span<std::vector<float>> magnitudes) override {
    for (size_t i = 0; i < tensors.size(); ++i) {
      ASSIGN_OR_RETURN(const std::vector<float> values,
                       Magnitudes<float>(tensors[i], first, count));
      magnitudes[i].insert(magnitudes[i].end(), values.begin(), values.end());
    }
    return absl::OkStatus();
  }

  absl::Status Sift(Tensors tensors, absl::Span<const SiftWindow> windows, int64_t limit,
                    absl::Span<Sifted> sifted) override {
    ++sifts;
    std::vector<SiftCandidate> candidates(std::min(tile_, elements()));
    for (size_t i = 0; i < tensors.size(); ++i) {
      int64_t found = 0;
      for (int64_t at = 0; at < elements() && sifted[i].complete; at += tile_) {
        ASSIGN_OR_RETURN(const SiftCounts counts,
                         backend_.Sift(Op(tensors[i]), Tile(tensors[i], at), at, windows[i],
                                       absl::MakeSpan(candidates)));
        found += counts.candidates;
        if (found > limit) {
          sifted[i] = {.complete = false};
          break;
        }
        sifted[i].above += counts.above;
        sifted[i].runs.push_back(
            {.first = at,
             .common = counts.common,
             .candidates = {candidates.begin(), candidates.begin() + counts.candidates}});
      }
    }
    return absl::OkStatus();
  }

  absl::Status Histogram(Tensors tensors, absl::Span<const RadixLevel> levels,
                         absl::Span<std::vector<uint64_t>> bins) override {
    ++histograms;
    for (size_t i = 0; i < tensors.size(); ++i) {
      for (int64_t at = 0; at < elements(); at += tile_) {
        RETURN_IF_ERROR(backend_.Histogram(Op(tensors[i]), Tile(tensors[i], at), at, levels[i],
                                           absl::MakeSpan(bins[i])));
      }
    }
    return absl::OkStatus();
  }

  absl::StatusOr<int64_t> FindEqual(int tensor, int64_t first, int64_t count, double value,
                                    int64_t nth) override {
    ASSIGN_OR_RETURN(const std::vector<double> magnitudes,
                     Magnitudes<double>(tensor, first, count));
    for (int64_t j = 0; j < count; ++j) {
      if (magnitudes[j] == value && --nth == 0) return first + j;
    }
    return absl::DataLossError("fewer are equal");
  }

  int sifts = 0, histograms = 0;  // passes so far

 private:
  DeltaMagnitude Op(int tensor) const {
    return {.count = static_cast<int>(tensors_[tensor].size())};
  }
  std::vector<ConstView> Part(int tensor, int64_t at, int64_t count) const {
    std::vector<ConstView> views = tensors_[tensor];
    for (ConstView& view : views) {
      view.data = static_cast<const char*>(view.data) + at * ByteWidth(view.dtype);
      view.size = count;
    }
    return views;
  }
  std::vector<ConstView> Tile(int tensor, int64_t at) const {
    return Part(tensor, at, std::min(tile_, elements() - at));
  }
  // In the compute type, then as T.
  template <class T>
  absl::StatusOr<std::vector<T>> Magnitudes(int tensor, int64_t first, int64_t count) const {
    const DType compute = f64() ? DType::kF64 : DType::kF32;
    std::vector<std::vector<double>> operands;
    for (const ConstView& view : Part(tensor, first, count)) {
      std::vector<std::byte> stored(count * ByteWidth(view.dtype));
      RETURN_IF_ERROR(
          backend_.Download(view.data, stored.data(), static_cast<int64_t>(stored.size())));
      RETURN_IF_ERROR(backend_.Synchronize());
      Convert({stored.data(), view.dtype, count},
              {operands.emplace_back(count).data(), DType::kF64, count});
    }
    std::vector<T> magnitudes(count);
    for (int64_t j = 0; j < count; ++j) {
      const double delta = operands.size() == 1 ? operands[0][j] : operands[1][j] - operands[0][j];
      magnitudes[j] = static_cast<T>(std::abs(
          compute == DType::kF32 ? static_cast<double>(static_cast<float>(delta)) : delta));
    }
    return magnitudes;
  }

  Backend& backend_;
  const std::vector<std::vector<ConstView>> tensors_;
  const int64_t tile_;
};

}  // namespace pewter::kernels
