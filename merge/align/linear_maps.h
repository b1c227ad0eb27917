// Linear maps between the features of two models, where more than an order is a symmetry: value and
// output features of a head, query and key features where positions do not rotate them.
//
// Matrices are host memory and `algebra` is the CPU's.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/linear_algebra.h"
#include "merge/align/alignment.h"
#include "merge/align/dense_matrix.h"

namespace pewter {

// For each run of `dim` features the orthogonal T that brings the second model's features nearest
// to the first's, x ~ T y: the polar factor of that block of `similarity`, E[x y^T] or what stands
// for it, with the second model's features in the aligned order (orthogonal Procrustes).
// `affinity`: the sum of the singular values of all blocks, which is what is gained.
struct OrthogonalMaps {
  BlockTransform transform;
  double affinity = 0;
};
absl::StatusOr<OrthogonalMaps> OrthogonalMapsOf(kernels::LinearAlgebra& algebra,
                                                const DenseMatrix& similarity, int64_t dim);
// CCA-Merge (arXiv 2407.05385): with S_xx + g I, S_yy + g I and U S V^T = svd(S_xx^-1/2 S_xy
// S_yy^-1/2),
//
//   T = S_xx^1/2 U V^T S_yy^-1/2,  T^-1 = S_yy^1/2 V U^T S_xx^-1/2
//
// maps the second model's features y to the first's x. FailedPrecondition when a covariance has
// directions without variance: g must be above 0 then.
struct CanonicalMap {
  DenseMatrix forward, inverse;
  std::vector<double> correlations;  // canonical ones, largest first
};
absl::StatusOr<CanonicalMap> CanonicalMapOf(kernels::LinearAlgebra& algebra, DenseMatrix xx,
                                            DenseMatrix yy, const DenseMatrix& xy, double g);

// Many models to the first: the map of each of the others, by pairs.
// `own[i]` is the covariance of model i, `cross[i]` that of model 0 with model i + 1.
absl::StatusOr<std::vector<CanonicalMap>> CanonicalMapsOf(kernels::LinearAlgebra& algebra,
                                                          absl::Span<const DenseMatrix> own,
                                                          absl::Span<const DenseMatrix> cross,
                                                          double g);

}  // namespace pewter
