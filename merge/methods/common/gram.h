// Inner products of the models of a tensor. Methods whose result is a combination of their inputs,
// with coefficients that depend on angles and norms, need nothing else of the tensors: one pass for
// the Gram matrix, arithmetic on a few numbers in double, and one pass for the combination.
#pragma once

#include <vector>

#include "absl/types/span.h"
#include "merge/methods/method.h"

namespace pewter::methods {

// Symmetric, positive semi-definite.
class GramMatrix {
 public:
  explicit GramMatrix(int size) : size_(size), values_(size * size) {}
  int size() const { return size_; }
  double& operator()(int i, int j) { return values_[i * size_ + j]; }
  double operator()(int i, int j) const { return values_[i * size_ + j]; }

  // <v_i, sum_j c_j v_j>
  double DotWith(int i, absl::Span<const double> coefficients) const;
  // |sum_j c_j v_j|
  double Norm(absl::Span<const double> coefficients) const;

 private:
  int size_;
  std::vector<double> values_;
};

// Of the inputs of the context, or of their task vectors.
absl::StatusOr<GramMatrix> InputGram(MethodContext& context, bool from_base);

// Writes base + sum_i c_i (x_i - base), or sum_i c_i x_i where the context has no base.
absl::Status MapCombination(MethodContext& context, absl::Span<const double> coefficients);

// The same for each row, or each column, with the coefficients that `coefficients` gives for the
// Gram matrix of its vectors: of the task vectors where the context has a base.
enum class Axis { kRows, kColumns };
absl::Status MapCombinationOfAxis(
    MethodContext& context, Axis axis,
    absl::FunctionRef<std::vector<double>(const GramMatrix& gram)> coefficients);

}  // namespace pewter::methods
