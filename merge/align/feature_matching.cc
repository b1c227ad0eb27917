#include "merge/align/feature_matching.h"

#include <numeric>
#include <utility>

#include "base/status.h"
#include "kernels/assignment.h"

namespace pewter {

absl::StatusOr<std::vector<int32_t>> MatchFeatures(const DenseMatrix& similarity) {
  ASSIGN_OR_RETURN(kernels::Assignment best,
                   kernels::SolveAssignment({.costs = similarity.view(), .maximize = true}));
  return std::move(best.columns);
}

std::vector<int32_t> BlockMatches::OrdersOf(absl::Span<const int32_t> assigned) const {
  std::vector<int32_t> result;
  for (int64_t i = 0; i < blocks; ++i) {
    const std::vector<int32_t>& order = orders[i * blocks + assigned[i]];
    result.insert(result.end(), order.begin(), order.end());
  }
  return result;
}

absl::StatusOr<BlockMatches> MatchBlocks(const DenseMatrix& similarity, int64_t dim, int threads) {
  if (dim <= 0 || similarity.rows != similarity.columns || similarity.rows % dim != 0) {
    return absl::InternalError("blocks of features do not fit their similarities");
  }
  BlockMatches matches;
  matches.blocks = similarity.rows / dim;
  std::vector<kernels::AssignmentProblem> problems;
  for (int64_t i = 0; i < matches.blocks; ++i) {
    for (int64_t j = 0; j < matches.blocks; ++j) {
      problems.push_back({.costs = similarity.block(i * dim, j * dim, dim, dim), .maximize = true});
    }
  }
  ASSIGN_OR_RETURN(std::vector<kernels::Assignment> solved,
                   kernels::SolveAssignments(problems, threads));
  matches.totals = DenseMatrix(matches.blocks, matches.blocks);
  for (size_t pair = 0; pair < solved.size(); ++pair) {
    matches.totals.values[pair] = solved[pair].total;
    matches.orders.push_back(std::move(solved[pair].columns));
  }
  return matches;
}

absl::StatusOr<std::vector<int32_t>> MatchInside(const DenseMatrix& similarity, int64_t dim,
                                                 absl::Span<const int32_t> assigned) {
  std::vector<int32_t> result;
  for (size_t i = 0; i < assigned.size(); ++i) {
    ASSIGN_OR_RETURN(
        const kernels::Assignment best,
        kernels::SolveAssignment(
            {.costs = similarity.block(static_cast<int64_t>(i) * dim, assigned[i] * dim, dim, dim),
             .maximize = true}));
    result.insert(result.end(), best.columns.begin(), best.columns.end());
  }
  return result;
}

absl::StatusOr<std::vector<int32_t>> AssignHeads(const DenseMatrix& totals, HeadMatching matching) {
  if (matching == HeadMatching::kPermute) return MatchFeatures(totals);
  std::vector<int32_t> identity(totals.rows);
  std::iota(identity.begin(), identity.end(), 0);
  return identity;
}

absl::StatusOr<std::vector<int32_t>> MatchHeadsOfGroups(const DenseMatrix& similarity,
                                                        const Attention& attention,
                                                        absl::Span<const int32_t> kv_heads,
                                                        absl::Span<const int32_t> inside) {
  const int64_t r = attention.heads / attention.kv_heads, dim = attention.head_dim;
  std::vector<int32_t> heads;
  for (int64_t g = 0; g < attention.kv_heads; ++g) {
    DenseMatrix totals(r, r);
    for (int64_t u = 0; u < r; ++u) {
      for (int64_t v = 0; v < r; ++v) {
        const int64_t row = (g * r + u) * dim, column = (kv_heads[g] * r + v) * dim;
        for (int64_t i = 0; i < dim; ++i) {
          totals(u, v) += similarity(row + i, column + inside[g * dim + i]);
        }
      }
    }
    ASSIGN_OR_RETURN(const std::vector<int32_t> order, MatchFeatures(totals));
    for (int32_t v : order) heads.push_back(static_cast<int32_t>(kv_heads[g] * r + v));
  }
  return heads;
}

}  // namespace pewter
