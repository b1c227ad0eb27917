// DenseMatrix: a matrix of doubles in host memory, for what is made from statistics of features:
// one site at a time, a few thousand features wide.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/linear_algebra.h"

namespace pewter {

// Row-major, without gaps.
struct DenseMatrix {
  int64_t rows = 0;
  int64_t columns = 0;
  std::vector<double> values;

  DenseMatrix() = default;
  DenseMatrix(int64_t r, int64_t c) : rows(r), columns(c), values(r * c) {}
  DenseMatrix(int64_t r, int64_t c, std::vector<double> v)
      : rows(r), columns(c), values(std::move(v)) {}

  double& operator()(int64_t i, int64_t j) { return values[i * columns + j]; }
  double operator()(int64_t i, int64_t j) const { return values[i * columns + j]; }
  double* row(int64_t i) { return values.data() + i * columns; }
  const double* row(int64_t i) const { return values.data() + i * columns; }

  // For a LinearAlgebra of the CPU.
  kernels::Matrix view() { return {values.data(), rows, columns, columns}; }
  kernels::ConstMatrix view() const { return {values.data(), DType::kF64, rows, columns, columns}; }
  // Of `r` by `c` elements from (i, j) on.
  kernels::ConstMatrix block(int64_t i, int64_t j, int64_t r, int64_t c) const {
    return {row(i) + j, DType::kF64, r, c, columns};
  }
};

// op(a) op(b).
absl::StatusOr<DenseMatrix> Product(kernels::LinearAlgebra& algebra, kernels::Transpose transpose_a,
                                    const DenseMatrix& a, kernels::Transpose transpose_b,
                                    const DenseMatrix& b);

}  // namespace pewter
