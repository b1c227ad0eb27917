#include "merge/methods/common/low_rank.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "base/status.h"
#include "kernels/linear_algebra.h"

namespace pewter {
namespace {

using kernels::ConstMatrix;
using kernels::Matrix;

kernels::ConstMatrix Difference(const void* a, const void* b, MatrixShape shape, DType dtype) {
  return {a, dtype, shape.rows, shape.columns, shape.columns, b};
}

absl::StatusOr<std::vector<double>> Fetch(kernels::Backend& backend, const Matrix& m) {
  std::vector<double> values(m.rows * m.columns);
  RETURN_IF_ERROR(backend.Download(m.data, values.data(),
                                   static_cast<int64_t>(values.size() * sizeof(double))));
  RETURN_IF_ERROR(backend.Synchronize());
  return values;
}

double Norm(const double* row, int64_t size) {
  double sum = 0;
  for (int64_t i = 0; i < size; ++i) sum += row[i] * row[i];
  return std::sqrt(sum);
}

class ExtractTask : public TensorTask {
 public:
  ExtractTask(MatrixShape shape, DType dtype, const LowRankLayout& layout)
      : shape_(shape), dtype_(dtype), layout_(layout) {}

  const char* name() const override { return "extract_lora"; }

  int64_t bytes() const override {
    const int64_t factors = layout_.rank * (shape_.rows + shape_.columns);
    return 2 * shape_.rows * shape_.columns * ByteWidth(dtype_) +
           kernels::FactorLowRankBytes(shape_.rows, shape_.columns, layout_.rank) +
           factors * static_cast<int64_t>(sizeof(double) + sizeof(float));
  }

  absl::Status Run(TaskContext& context, kernels::View result) const override {
    ASSIGN_OR_RETURN(const auto tuned, context.Load(0, TaskContext::Where::kBackend));
    ASSIGN_OR_RETURN(const auto base,
                     context.Load(TaskContext::kBase, TaskContext::Where::kBackend));
    ASSIGN_OR_RETURN(const kernels::LowRankFactors factors,
                     kernels::FactorLeading(context.backend(),
                                            Difference(tuned->data(), base->data(), shape_, dtype_),
                                            layout_.rank));
    ASSIGN_OR_RETURN(std::vector<double> left, Fetch(context.backend(), factors.left));
    ASSIGN_OR_RETURN(std::vector<double> right, Fetch(context.backend(), factors.right));

    // B^T is the factor on the side of the outputs.
    const int64_t out = layout_.transposed ? shape_.columns : shape_.rows;
    const int64_t in = layout_.transposed ? shape_.rows : shape_.columns;
    const std::vector<double>& a = layout_.transposed ? left : right;
    const std::vector<double>& b = layout_.transposed ? right : left;
    // One of the two has rows of norm 1, the other the singular values' norms.
    const bool a_is_unit = layout_.transposed == (shape_.rows <= shape_.columns);
    auto* const to_a = static_cast<float*>(result.data);
    float* const to_b = to_a + layout_.rank * in;
    for (int64_t k = 0; k < layout_.rank; ++k) {
      const double* const row_a = a.data() + k * in;
      const double* const row_b = b.data() + k * out;
      const double value = a_is_unit ? Norm(row_b, out) : Norm(row_a, in);
      const double of_a = layout_.distribute_scale ? std::sqrt(value) : value;
      const double of_b = layout_.distribute_scale ? std::sqrt(value) : 1;
      // A value of zero leaves nothing on either side.
      const double scale_a = value == 0 ? 0 : of_a / (a_is_unit ? 1 : value);
      const double scale_b = value == 0 ? 0 : of_b / (a_is_unit ? value : 1);
      for (int64_t j = 0; j < in; ++j) to_a[k * in + j] = static_cast<float>(row_a[j] * scale_a);
      for (int64_t i = 0; i < out; ++i) {
        to_b[i * layout_.rank + k] = static_cast<float>(row_b[i] * scale_b);
      }
    }
    return absl::OkStatus();
  }

 private:
  const MatrixShape shape_;
  const DType dtype_;
  const LowRankLayout layout_;
};

class DifferenceTask : public TensorTask {
 public:
  DifferenceTask(int64_t elements, DType dtype) : elements_(elements), dtype_(dtype) {}

  const char* name() const override { return "difference"; }
  int64_t bytes() const override {
    return elements_ *
           (2 * ByteWidth(dtype_) + 2 * int64_t{sizeof(double)} + int64_t{sizeof(float)});
  }

  absl::Status Run(TaskContext& context, kernels::View result) const override {
    std::vector<double> values[2] = {std::vector<double>(elements_),
                                     std::vector<double>(elements_)};
    for (const int operand : {0, TaskContext::kBase}) {
      ASSIGN_OR_RETURN(const auto stored, context.Load(operand, TaskContext::Where::kHost));
      kernels::Convert({stored->data(), dtype_, elements_},
                       {values[operand == 0 ? 0 : 1].data(), DType::kF64, elements_});
    }
    auto* const to = static_cast<float*>(result.data);
    for (int64_t i = 0; i < elements_; ++i) {
      to[i] = static_cast<float>(values[0][i] - values[1][i]);
    }
    return absl::OkStatus();
  }

 private:
  const int64_t elements_;
  const DType dtype_;
};

}  // namespace

MatrixShape AsMatrix(const Shape& shape) {
  const int64_t rows = shape.rank() == 0 ? 1 : shape[0];
  return {rows, rows == 0 ? 0 : shape.elements() / rows};
}

std::shared_ptr<const TensorTask> MakeExtractTask(MatrixShape shape, DType dtype,
                                                  const LowRankLayout& layout) {
  return std::make_shared<const ExtractTask>(shape, dtype, layout);
}

std::shared_ptr<const TensorTask> MakeDifferenceTask(int64_t elements, DType dtype) {
  return std::make_shared<const DifferenceTask>(elements, dtype);
}

int64_t SpectrumBytes(MatrixShape shape, DType dtype) {
  return 2 * shape.rows * shape.columns * ByteWidth(dtype) +
         kernels::FactorLowRankBytes(shape.rows, shape.columns, 0);
}

absl::StatusOr<std::vector<double>> Spectrum(kernels::Backend& backend, const void* a,
                                             const void* b, MatrixShape shape, DType dtype) {
  ASSIGN_OR_RETURN(kernels::LowRankFactors factors,
                   kernels::FactorLowRank(backend, Difference(a, b, shape, dtype), 0));
  return std::move(factors.values);
}

}  // namespace pewter
