// PLeaS (arXiv 2407.02447): merges two aligned models group by group, as far as their features are
// alike, and fits every layer to what both models' layers give.
//
// Of a group's matched pairs those below a quantile of similarity stay apart: the merged group has
// the merged pairs first, then what the first model keeps to itself, then the second. A layer
// between two groups has the weights
//
//                  inputs: merged      first's alone   second's alone
//   merged outputs   (W_a + W_b) / 2      W_a / 2          W_b / 2
//   first's            W_a                W_a              0
//   second's           W_b                0                W_b
//
// and the least-squares weights that keep the two zeros: of features X = [merged means | first's |
// second's], taken where the models themselves have them, W = argmin |X W^T + b - Y|^2, with a
// ridge. Only second moments are needed.
//
// Matrices are host memory, `algebra` is the CPU's.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/linear_algebra.h"
#include "merge/align/dense_matrix.h"

namespace pewter {

// Which features of two models share a place in a group.
struct PartialMatch {
  std::vector<int32_t> first, second;  // merged: feature first[k] with second[k]
  std::vector<int32_t> first_alone, second_alone;

  int64_t width() const {
    return static_cast<int64_t>(first.size() + first_alone.size() + second_alone.size());
  }
};
// All pairs i, q[i].
PartialMatch WholeMatch(absl::Span<const int32_t> q);
// Pairs of which `similarity` is at least the quantile `apart` of all (interpolated linearly);
// 0: all, 1: none. In the order of the first model's features.
PartialMatch MatchAbove(absl::Span<const int32_t> q, absl::Span<const double> similarity,
                        double apart);
// All pairs but the `apart` least similar ones, whatever ties; for where the width is fixed before
// similarities are known. In the order of the first model's features.
PartialMatch MatchAllBut(int64_t apart, absl::Span<const int32_t> q,
                         absl::Span<const double> similarity);

// A linear layer y = W x + b; the bias may be empty.
struct LinearLayer {
  DenseMatrix weight;  // [outputs, inputs]
  std::vector<double> bias;
};
// The table above; biases are averaged where outputs are merged. Both layers have a bias or none.
LinearLayer AverageLayers(const LinearLayer& first, const LinearLayer& second,
                          const PartialMatch& outputs, const PartialMatch& inputs);

// Second moments of the inputs of a layer in both models, over the same rows.
struct JointInputs {
  double rows = 0;
  std::vector<double> first_sum, second_sum;
  DenseMatrix first, cross, second;  // X_a^T X_a, X_a^T X_b, X_b^T X_b
};
// What is added to the mean square error: strength |W - target|^2.
struct Ridge {
  double strength = 0;        // >= 0
  bool relative = true;       // times the mean variance of the inputs
  bool towards_zero = false;  // the target, else the average of the layers
};
// The least-squares layer. FailedPrecondition when it is not determined: a ridge above
// 0 is needed then.
absl::StatusOr<LinearLayer> FitLayer(kernels::LinearAlgebra& algebra, const LinearLayer& first,
                                     const LinearLayer& second, const PartialMatch& outputs,
                                     const PartialMatch& inputs, JointInputs moments,
                                     const Ridge& ridge);
// Host memory that it takes at most, moments and layers included: of layers from `inputs` to
// `outputs` features, merged to `merged_inputs` and `merged_outputs`.
int64_t FitLayerBytes(int64_t outputs, int64_t inputs, int64_t merged_outputs,
                      int64_t merged_inputs);

// How much of each group stays apart for a budget of work.
struct BudgetTerm {
  double cost = 1;          // of a layer, for each product of an input and an output
  std::vector<int> groups;  // none (both sides are fixed), one, or two
};
struct BudgetProblem {
  std::vector<double> sizes;    // features of each group
  std::vector<double> weights;  // what keeping it apart is worth
  std::vector<BudgetTerm> terms;
};
// Work of layers whose groups stay apart by those ratios: the cost without a group, cost s (1 + r)
// with one, cost s t (1 + r + u - r u) with two.
double BudgetCost(const BudgetProblem& problem, absl::Span<const double> ratios);
// Ratios that make sum_i weight_i r_i largest where the work is at most `budget` times that of none
// apart, 0 <= r <= 1. The work is bilinear; groups that meet no others once a few are fixed are
// solved exactly, those few on a grid that is refined (their best values to 1e-4). InvalidArgument
// when more than three groups would have to be fixed.
absl::StatusOr<std::vector<double>> SolveBudget(const BudgetProblem& problem, double budget);

}  // namespace pewter
