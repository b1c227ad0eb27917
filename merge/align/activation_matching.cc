#include "merge/align/activation_matching.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "base/status.h"
#include "merge/align/moments.h"

namespace pewter {
namespace {

// "ffn.3" for "ff.3" and "ff.enc.3"; "attention.3" for "attn.3".
std::string SiteOf(absl::string_view site, absl::string_view name) {
  return absl::StrCat(site, name.substr(name.rfind('.')));
}

std::vector<int32_t> Identity(int64_t size) {
  std::vector<int32_t> q(size);
  std::iota(q.begin(), q.end(), 0);
  return q;
}

class Matcher {
 public:
  Matcher(const Symmetry& symmetry, const MomentsLookup& moments, int model,
          const ActivationMatchingOptions& options)
      : symmetry_(symmetry), moments_(moments), model_(model), options_(options) {
    match_.alignment.family = symmetry.family();
  }

  absl::StatusOr<ActivationMatch> Match() {
    for (const SymmetryGroup& group : symmetry_.groups()) {
      if (WithoutSites(group.name)) {
        match_.unmatched.push_back(group.name);
        continue;
      }
      switch (group.kind) {
        case GroupKind::kFfn:
          if (options_.feed_forward) {
            RETURN_IF_ERROR(MatchGroup(group, SiteOf("ffn", group.name)));
          }
          break;
        case GroupKind::kPooler:
          if (options_.pooler) RETURN_IF_ERROR(MatchGroup(group, "classifier_input"));
          break;
        case GroupKind::kHead:
          if (options_.output_head) RETURN_IF_ERROR(MatchGroup(group, "head_input"));
          break;
        case GroupKind::kResidual:
          if (options_.residual != ResidualEvidence::kNone) {
            ASSIGN_OR_RETURN(const DenseMatrix correlation,
                             ResidualCorrelation(moments_, model_, options_.residual));
            RETURN_IF_ERROR(MatchBy(group, correlation));
          }
          break;
        default:
          break;  // of attentions
      }
    }
    if (options_.attention) RETURN_IF_ERROR(MatchAttentions());
    return std::move(match_);
  }

 private:
  absl::StatusOr<DenseMatrix> Correlation(const std::string& site) const {
    ASSIGN_OR_RETURN(const SiteMoments moments, moments_(site));
    ASSIGN_OR_RETURN(const FeatureCovariance covariance, CovarianceOf(moments, 0, model_));
    return CorrelationOf(covariance);
  }

  absl::Status MatchGroup(const SymmetryGroup& group, const std::string& site) {
    ASSIGN_OR_RETURN(const DenseMatrix correlation, Correlation(site));
    return Annotate(MatchBy(group, correlation), absl::StrCat("statistics of ", site));
  }

  absl::Status MatchBy(const SymmetryGroup& group, const DenseMatrix& correlation) {
    RETURN_IF_ERROR(CheckWidth(correlation, group.width, group.name));
    ASSIGN_OR_RETURN(std::vector<int32_t> q, MatchFeatures(correlation));
    Record(group, correlation, q);
    Set(group, std::move(q));
    return absl::OkStatus();
  }

  static absl::Status CheckWidth(const DenseMatrix& correlation, int64_t width,
                                 absl::string_view what) {
    if (correlation.rows == width && correlation.columns == width) return absl::OkStatus();
    return absl::FailedPreconditionError(absl::StrCat("they are of ", correlation.rows, " and ",
                                                      correlation.columns, " features, and ", what,
                                                      " has ", width));
  }

  void Set(const SymmetryGroup& group, std::vector<int32_t> q) {
    match_.alignment.groups[group.name].permutation = std::move(q);
  }
  void Record(const SymmetryGroup& group, const DenseMatrix& correlation,
              const std::vector<int32_t>& q) {
    match_.correlations[group.name] = {MeanOfMatched(correlation, Identity(correlation.rows)),
                                       MeanOfMatched(correlation, q)};
  }

  // --- Attentions -------------------------------------------------------------------------------

  // What the features of values say: of the concatenated heads' contexts, or where query heads
  // share them of the values themselves.
  struct Values {
    DenseMatrix correlation;
    BlockMatches matches;
  };
  absl::StatusOr<Values> ValuesOf(const Attention& attention) const {
    const bool shared = attention.heads != attention.kv_heads;
    const std::string site = SiteOf(shared ? "value" : "attention", attention.name);
    Values values;
    ASSIGN_OR_RETURN(values.correlation, Correlation(site));
    RETURN_IF_ERROR(Annotate(
        CheckWidth(values.correlation, attention.kv_heads * attention.head_dim, attention.name),
        absl::StrCat("statistics of ", site)));
    ASSIGN_OR_RETURN(values.matches,
                     MatchBlocks(values.correlation, attention.head_dim, options_.threads));
    return values;
  }

  absl::Status MatchAttentions() {
    const std::vector<Attention>& attentions = symmetry_.attentions();
    // Heads that share a table have one order: the one that is best for all of their attentions.
    std::map<int, DenseMatrix> shared;
    for (const Attention& attention : attentions) {
      if (attention.head_order < 0 || WithoutSites(attention.name)) continue;
      ASSIGN_OR_RETURN(const Values values, ValuesOf(attention));
      const auto [known, added] = shared.try_emplace(attention.head_order, values.matches.totals);
      if (added) continue;
      for (size_t i = 0; i < known->second.values.size(); ++i) {
        known->second.values[i] += values.matches.totals.values[i];
      }
    }
    std::map<int, std::vector<int32_t>> orders;
    for (const auto& [group, totals] : shared) {
      ASSIGN_OR_RETURN(orders[group], AssignHeads(totals, options_.heads));
      Set(symmetry_.groups()[group], orders[group]);
    }
    for (const Attention& attention : attentions) {
      if (WithoutSites(attention.name)) continue;
      ASSIGN_OR_RETURN(const Values values, ValuesOf(attention));
      AttentionOrder order;
      if (attention.head_order >= 0) {
        order.kv_heads = orders[attention.head_order];
      } else {
        ASSIGN_OR_RETURN(order.kv_heads, AssignHeads(values.matches.totals, options_.heads));
      }
      order.value_output = values.matches.OrdersOf(order.kv_heads);
      RETURN_IF_ERROR(OrderQueryHeads(attention, order));
      RETURN_IF_ERROR(OrderQueryKey(attention, order));
      const AttentionPermutations q = Expand(attention, order);
      const auto& groups = symmetry_.groups();
      Record(groups[attention.value], values.correlation, q.value);
      Set(groups[attention.query], q.query);
      Set(groups[attention.key], q.key);
      Set(groups[attention.value], q.value);
      Set(groups[attention.output], q.output);
    }
    return absl::OkStatus();
  }

  absl::Status OrderQueryHeads(const Attention& attention, AttentionOrder& order) const {
    if (attention.heads == attention.kv_heads) {
      order.heads = order.kv_heads;
      return absl::OkStatus();
    }
    const std::string site = SiteOf("attention", attention.name);
    ASSIGN_OR_RETURN(const DenseMatrix correlation, Correlation(site));
    RETURN_IF_ERROR(Annotate(
        CheckWidth(correlation, attention.heads * attention.head_dim, attention.name), site));
    ASSIGN_OR_RETURN(order.heads, MatchHeadsOfGroups(correlation, attention, order.kv_heads,
                                                     order.value_output));
    return absl::OkStatus();
  }

  absl::Status OrderQueryKey(const Attention& attention, AttentionOrder& order) const {
    const int64_t dim = attention.head_dim;
    if (attention.rotary) {
      for (int64_t i = 0; i < attention.kv_heads * dim; ++i) {
        order.query_key.push_back(static_cast<int32_t>(i % dim));
      }
      return absl::OkStatus();
    }
    if (!options_.own_query_key) {
      order.query_key = order.value_output;
      return absl::OkStatus();
    }
    const std::string of_queries = SiteOf("query", attention.name);
    const std::string of_keys = SiteOf("key", attention.name);
    if (attention.heads == attention.kv_heads) {
      ASSIGN_OR_RETURN(const SiteMoments queries, moments_(of_queries));
      ASSIGN_OR_RETURN(const SiteMoments keys, moments_(of_keys));
      ASSIGN_OR_RETURN(const SiteMoments both, Pooled(queries, keys));
      ASSIGN_OR_RETURN(const FeatureCovariance covariance, CovarianceOf(both, 0, model_));
      const DenseMatrix correlation = CorrelationOf(covariance);
      RETURN_IF_ERROR(Annotate(CheckWidth(correlation, attention.heads * dim, attention.name),
                               absl::StrCat("statistics of ", both.site)));
      ASSIGN_OR_RETURN(order.query_key, MatchInside(correlation, dim, order.kv_heads));
      return absl::OkStatus();
    }
    // Keys and the queries that read them, in the order of heads that is known.
    ASSIGN_OR_RETURN(DenseMatrix similarity, Correlation(of_keys));
    ASSIGN_OR_RETURN(const DenseMatrix queries, Correlation(of_queries));
    RETURN_IF_ERROR(Annotate(CheckWidth(similarity, attention.kv_heads * dim, attention.name),
                             absl::StrCat("statistics of ", of_keys)));
    RETURN_IF_ERROR(Annotate(CheckWidth(queries, attention.heads * dim, attention.name),
                             absl::StrCat("statistics of ", of_queries)));
    const int64_t r = attention.heads / attention.kv_heads;
    for (int64_t h = 0; h < attention.heads; ++h) {
      for (int64_t i = 0; i < dim; ++i) {
        for (int64_t j = 0; j < dim; ++j) {
          similarity(h / r * dim + i, order.kv_heads[h / r] * dim + j) +=
              queries(h * dim + i, order.heads[h] * dim + j);
        }
      }
    }
    ASSIGN_OR_RETURN(order.query_key, MatchInside(similarity, dim, order.kv_heads));
    return absl::OkStatus();
  }

  const Symmetry& symmetry_;
  const MomentsLookup& moments_;
  const int model_;
  const ActivationMatchingOptions& options_;
  ActivationMatch match_;
};

}  // namespace

absl::StatusOr<ActivationMatch> MatchByActivations(const Symmetry& symmetry,
                                                   const MomentsLookup& moments, int model,
                                                   const ActivationMatchingOptions& options) {
  ASSIGN_OR_RETURN(ActivationMatch match, Matcher(symmetry, moments, model, options).Match());
  RETURN_IF_ERROR(CheckAlignment(symmetry, match.alignment));
  return match;
}

absl::StatusOr<DenseMatrix> ResidualCorrelation(const MomentsLookup& moments, int model,
                                                ResidualEvidence evidence) {
  // One at a time: their sum is all that is kept.
  FeatureCovariance sum;
  int64_t sites = 0;
  while (true) {
    const absl::StatusOr<SiteMoments> site = moments(absl::StrCat("residual.", sites));
    if (absl::IsNotFound(site.status()) && sites > 0) break;
    RETURN_IF_ERROR(site.status());
    ASSIGN_OR_RETURN(FeatureCovariance covariance, CovarianceOf(*site, 0, model));
    if (sites++ == 0 || evidence == ResidualEvidence::kLast) {
      sum = std::move(covariance);
    } else {
      RETURN_IF_ERROR(AddTo(sum, covariance));
    }
    if (evidence == ResidualEvidence::kFirst) break;
  }
  // A common factor of all covariances changes no correlation.
  return CorrelationOf(sum);
}

bool WithoutSites(absl::string_view name) {
  return absl::StrContains(name, ".dec") || absl::StrContains(name, ".x.");
}

absl::StatusOr<SiteMoments> FeedForwardMoments(const SymmetryGroup& group,
                                               const MomentsLookup& moments) {
  return moments(SiteOf("ffn", group.name));
}

absl::StatusOr<SiteMoments> ValueMoments(const Attention& attention, const MomentsLookup& moments) {
  const bool shared = attention.heads != attention.kv_heads;
  return moments(SiteOf(shared ? "value" : "attention", attention.name));
}

absl::StatusOr<SiteMoments> QueryMoments(const Attention& attention, const MomentsLookup& moments) {
  return moments(SiteOf("query", attention.name));
}

absl::StatusOr<DenseMatrix> ValueCovariance(const Attention& attention,
                                            const MomentsLookup& moments, int model) {
  ASSIGN_OR_RETURN(const SiteMoments site, ValueMoments(attention, moments));
  ASSIGN_OR_RETURN(FeatureCovariance covariance, CovarianceOf(site, 0, model));
  return std::move(covariance.cross);
}

absl::StatusOr<DenseMatrix> QueryKeyCovariance(const Attention& attention,
                                               const MomentsLookup& moments, int model) {
  ASSIGN_OR_RETURN(const SiteMoments queries, QueryMoments(attention, moments));
  ASSIGN_OR_RETURN(const SiteMoments keys, moments(SiteOf("key", attention.name)));
  ASSIGN_OR_RETURN(FeatureCovariance covariance, CovarianceOf(queries, 0, model));
  ASSIGN_OR_RETURN(const FeatureCovariance of_keys, CovarianceOf(keys, 0, model));
  RETURN_IF_ERROR(AddTo(covariance, of_keys));
  return std::move(covariance.cross);
}

}  // namespace pewter
