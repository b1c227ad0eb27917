// TensorScan: passes over magnitudes of the elements of a TensorRun, to select thresholds.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "kernels/threshold_select.h"
#include "merge/engine/tensor_run.h"

namespace pewter {

class TensorScan final : public kernels::MagnitudeScan {
 public:
  // Tensor i of the scan has the magnitudes of ranks[i]. Both must outlive the scan.
  TensorScan(TensorRun& run, absl::Span<const MethodContext::MagnitudeRank> ranks);
  ~TensorScan() override { run_.environment_.candidate_bytes += reserved_; }

  int64_t elements() const override { return run_.shape().elements(); }
  bool f64() const override { return run_.f64(); }
  absl::Status Sample(Tensors tensors, int64_t first, int64_t count,
                      absl::Span<std::vector<float>> magnitudes) override;
  absl::Status Sift(Tensors tensors, absl::Span<const kernels::SiftWindow> windows, int64_t limit,
                    absl::Span<kernels::Sifted> sifted) override;
  absl::Status Histogram(Tensors tensors, absl::Span<const kernels::RadixLevel> levels,
                         absl::Span<std::vector<uint64_t>> bins) override;
  absl::StatusOr<int64_t> FindEqual(int tensor, int64_t first, int64_t count, double value,
                                    int64_t nth) override;

 private:
  // What a pass over some tensors reads: each operand once. Those of tensor i are at places[i].
  struct Operands {
    std::vector<int> read;
    std::vector<std::vector<size_t>> places;
  };
  Operands OperandsOf(Tensors tensors) const;
  // Elements that are looked at outside of passes, in host memory.
  struct Elements {
    std::vector<std::vector<std::byte>> bytes;
    std::vector<kernels::ConstView> views;
  };
  absl::StatusOr<Elements> Read(const Operands& operands, int64_t first, int64_t count) const;
  // Takes memory for a tensor's candidates; false when there is none left.
  bool Reserve(int64_t candidates);

  TensorRun& run_;
  const absl::Span<const MethodContext::MagnitudeRank> ranks_;
  const std::unique_ptr<kernels::Backend> host_;
  std::mutex mutex_;
  int64_t reserved_ = 0;  // guarded by mutex_
};

}  // namespace pewter
