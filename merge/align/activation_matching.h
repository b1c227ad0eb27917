// Alignment by activations (Verma and Elbayad, arXiv 2403.00986): features of two models pair where
// their activations on the same data are correlated most. Feed-forward units by one assignment,
// attention features by assignments inside heads and one over heads, query and key features by
// their own, the residual stream by one order for all of its sites.
//
// Only second moments are read, one site at a time. Errors: FailedPrecondition for statistics that
// do not fit the symmetry, naming the site.
#pragma once

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/linear_algebra.h"
#include "merge/align/alignment.h"
#include "merge/align/dense_matrix.h"
#include "merge/align/feature_matching.h"
#include "merge/align/symmetry.h"
#include "merge/forward/statistics.h"

namespace pewter {

// Moments of a site by name: StatisticsReader::Read.
using MomentsLookup = std::function<absl::StatusOr<SiteMoments>(absl::string_view site)>;

// Which of the residual stream's sites its order is matched by.
enum class ResidualEvidence {
  kNone,   // it keeps its order
  kFirst,  // what the embedding gives
  kLast,
  kAll,  // the mean of the covariances of all
};

struct ActivationMatchingOptions {
  bool feed_forward = true;
  bool attention = true;
  HeadMatching heads = HeadMatching::kPermute;
  // Query and key features have an order of their own, where positions do not fix it; else that of
  // the values.
  bool own_query_key = true;
  ResidualEvidence residual = ResidualEvidence::kNone;
  bool pooler = false;       // by the classifier's input
  bool output_head = false;  // by the head's input, where it is not tied to the embeddings
  int threads = 1;
};

struct ActivationMatch {
  Alignment alignment;  // its groups and its family
  // Groups that no forward pass has sites for (decoders of encoder-decoders): they keep their
  // order.
  std::vector<std::string> unmatched;
  // Mean correlation of paired features by group, before and after.
  std::map<std::string, std::pair<double, double>> correlations;
};

// Of model `model` of the statistics with model 0.
absl::StatusOr<ActivationMatch> MatchByActivations(const Symmetry& symmetry,
                                                   const MomentsLookup& moments, int model,
                                                   const ActivationMatchingOptions& options);

// The correlation matrix that a residual order is matched by.
absl::StatusOr<DenseMatrix> ResidualCorrelation(const MomentsLookup& moments, int model,
                                                ResidualEvidence evidence);

// The moments of a feed-forward block's units, of an attention's values (of the concatenated heads'
// contexts, or where query heads share them of the values themselves), and of its queries.
absl::StatusOr<SiteMoments> FeedForwardMoments(const SymmetryGroup& group,
                                               const MomentsLookup& moments);
absl::StatusOr<SiteMoments> ValueMoments(const Attention& attention, const MomentsLookup& moments);
absl::StatusOr<SiteMoments> QueryMoments(const Attention& attention, const MomentsLookup& moments);

// Whether the forward pass has no sites for a group or an attention: it runs the encoder of an
// encoder-decoder.
bool WithoutSites(absl::string_view name);

// What an attention's features have in common, E[x y^T] less the means', in the models' own order:
// of its value and output features, and of its queries and keys together.
absl::StatusOr<DenseMatrix> ValueCovariance(const Attention& attention,
                                            const MomentsLookup& moments, int model);
absl::StatusOr<DenseMatrix> QueryKeyCovariance(const Attention& attention,
                                               const MomentsLookup& moments, int model);

}  // namespace pewter
