// Tasks that give the two factors of a LoRA, A [r, in] and B [out, r].
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "base/dtype.h"
#include "base/shape.h"
#include "merge/methods/tensor_task.h"

namespace pewter {

// A weight seen as a matrix: rows by all the rest.
struct MatrixShape {
  int64_t rows = 0;
  int64_t columns = 0;
};
MatrixShape AsMatrix(const Shape& shape);

struct LowRankLayout {
  int64_t rank = 0;
  // The weight is stored [in, out]: it is (B A)^T.
  bool transposed = false;
  // sqrt(S) goes into both factors; else all of S into A.
  bool distribute_scale = true;
};

// The factors of input 0 minus the base, of the given rank: B A is the best approximation. Both
// have one dtype.
std::shared_ptr<const TensorTask> MakeExtractTask(MatrixShape shape, DType dtype,
                                                  const LowRankLayout& layout);

// Input 0 minus the base, of one dtype: small tensors.
std::shared_ptr<const TensorTask> MakeDifferenceTask(int64_t elements, DType dtype);

// What finding the singular values of `a` - `b` alone holds; and finding them, largest first.
int64_t SpectrumBytes(MatrixShape shape, DType dtype);
absl::StatusOr<std::vector<double>> Spectrum(kernels::Backend& backend, const void* a,
                                             const void* b, MatrixShape shape, DType dtype);

}  // namespace pewter
