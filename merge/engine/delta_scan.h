// DeltaScan: passes over |input - base| of some inputs of a TensorRun, to select thresholds.
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

#include "kernels/threshold_select.h"
#include "merge/engine/tensor_run.h"

namespace pewter {

class DeltaScan final : public kernels::MagnitudeScan {
 public:
  // Tensor i of the scan is input inputs[i] of the run; an input may be there more than once.
  DeltaScan(TensorRun& run, std::vector<int> inputs) : run_(run), inputs_(std::move(inputs)) {}
  ~DeltaScan() override { run_.environment_.candidate_bytes += reserved_; }

  int64_t elements() const override { return run_.shape().elements(); }
  bool f64() const override { return run_.f64(); }
  absl::Status Sample(Tensors tensors, int64_t first, int64_t count,
                      absl::Span<std::vector<float>> magnitudes) override;
  absl::Status Sift(Tensors tensors, absl::Span<const kernels::SiftWindow> windows, int64_t limit,
                    absl::Span<kernels::Sifted> sifted) override;
  absl::Status Histogram(Tensors tensors, absl::Span<const kernels::RadixLevel> levels,
                         absl::Span<std::vector<uint64_t>> bins) override;
  absl::StatusOr<std::vector<double>> CountEqual(Tensors tensors,
                                                 absl::Span<const double> values) override;
  absl::StatusOr<int64_t> FindEqual(int tensor, int64_t first, int64_t count, double value,
                                    int64_t nth) override;

 private:
  // What a pass over some tensors reads: the base and each input once. Tensor i is that at
  // place[i].
  struct Operands {
    std::vector<int> read;
    std::vector<size_t> place;
  };
  Operands OperandsOf(Tensors tensors) const;
  // Elements of an operand in the compute type, as the kernels widen them.
  template <class T>
  absl::StatusOr<std::vector<T>> Read(int operand, int64_t first, int64_t count) const;
  template <class T>
  absl::StatusOr<int64_t> FindEqualAs(int input, int64_t first, int64_t count, T value,
                                      int64_t nth) const;
  // Takes memory for a tensor's candidates; false when there is none left.
  bool Reserve(int64_t candidates);

  TensorRun& run_;
  const std::vector<int> inputs_;
  std::mutex mutex_;
  int64_t reserved_ = 0;  // guarded by mutex_
};

}  // namespace pewter
