// Which features of two models pair, by how alike they are: the assignments that make the sum of a
// similarity largest, alone and within what an attention allows.
//
// Similarities are [features of the reference, features of the model], correlations or inner
// products of weights alike. Results are gathers (symmetry.h). Errors are the assignment's:
// FailedPrecondition for values that are not finite.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "merge/align/dense_matrix.h"
#include "merge/align/symmetry.h"

namespace pewter {

absl::StatusOr<std::vector<int32_t>> MatchFeatures(const DenseMatrix& similarity);

// Every pair of blocks of `dim` features, matched by themselves.
struct BlockMatches {
  int64_t blocks = 0;
  DenseMatrix totals;                        // [blocks, blocks]: sums of what is matched
  std::vector<std::vector<int32_t>> orders;  // [i * blocks + j]: inside a block, in [0, dim)

  // The orders of the pairs i and assigned[i], one after the other: still inside blocks.
  std::vector<int32_t> OrdersOf(absl::Span<const int32_t> assigned) const;
};
absl::StatusOr<BlockMatches> MatchBlocks(const DenseMatrix& similarity, int64_t dim, int threads);

// The matches of the pairs i and assigned[i] only.
absl::StatusOr<std::vector<int32_t>> MatchInside(const DenseMatrix& similarity, int64_t dim,
                                                 absl::Span<const int32_t> assigned);

// How the heads of two models pair.
enum class HeadMatching {
  kPermute,    // as their features match best, one assignment over the best ones inside
  kMonotonic,  // head i with head i
};
absl::StatusOr<std::vector<int32_t>> AssignHeads(const DenseMatrix& totals, HeadMatching matching);

// Where the r query heads of each key/value head are to be paired inside their group: `similarity`
// is of the inputs of the output projection, `kv_heads` and `inside` (as
// AttentionOrder::value_output) are known. Gives AttentionOrder::heads.
absl::StatusOr<std::vector<int32_t>> MatchHeadsOfGroups(const DenseMatrix& similarity,
                                                        const Attention& attention,
                                                        absl::Span<const int32_t> kv_heads,
                                                        absl::Span<const int32_t> inside);

}  // namespace pewter
