// Covariances and correlations of two models' features, from the second moments of a site
// (merge/forward/statistics.h), as Verma and Elbayad (arXiv 2403.00986) define them:
//
//   cov = sum x y^T / n - (sum x)(sum y)^T / n^2,  corr_ij = cov_ij / max(sd_i sd_j, 1e-7)
//
// Errors: FailedPrecondition, naming the site, where the matrices that are asked for were not
// collected or do not fit together.
#pragma once

#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "merge/align/dense_matrix.h"
#include "merge/forward/statistics.h"

namespace pewter {

// Rows are features of the first model, columns those of the second.
struct FeatureCovariance {
  DenseMatrix cross;
  std::vector<double> first, second;  // variances
};

// Of models i and j of the site.
absl::StatusOr<FeatureCovariance> CovarianceOf(const SiteMoments& moments, int i, int j);
// Of one model with itself, [features, features].
absl::StatusOr<DenseMatrix> OwnCovariance(const SiteMoments& moments, int model);

// Adds that of another site of the same width: the residual stream has one order at all of its
// sites.
absl::Status AddTo(FeatureCovariance& sum, const FeatureCovariance& term);

DenseMatrix CorrelationOf(const FeatureCovariance& covariance);

// The moments of the rows of both sites: queries and keys, which share an order.
absl::StatusOr<SiteMoments> Pooled(const SiteMoments& a, const SiteMoments& b);

// Mean of similarity(i, q[i]).
double MeanOfMatched(const DenseMatrix& similarity, absl::Span<const int32_t> q);

}  // namespace pewter
