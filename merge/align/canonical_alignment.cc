#include "merge/align/canonical_alignment.h"

#include <algorithm>
#include <numeric>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "merge/align/linear_maps.h"
#include "merge/align/moments.h"

namespace pewter {
namespace {

// Of the reference with itself, of the model with itself, and of both.
struct Covariances {
  DenseMatrix first, second, cross;
};

absl::StatusOr<Covariances> CovariancesOf(const SiteMoments& site, int model) {
  Covariances result;
  ASSIGN_OR_RETURN(result.first, OwnCovariance(site, 0));
  ASSIGN_OR_RETURN(result.second, OwnCovariance(site, model));
  ASSIGN_OR_RETURN(FeatureCovariance both, CovarianceOf(site, 0, model));
  result.cross = std::move(both.cross);
  return result;
}

// What of rows and columns belongs to a block, those by an order where there is one.
DenseMatrix Block(const DenseMatrix& m, int64_t begin, int64_t dim, absl::Span<const int32_t> rows,
                  absl::Span<const int32_t> columns) {
  DenseMatrix block(dim, dim);
  for (int64_t i = 0; i < dim; ++i) {
    for (int64_t j = 0; j < dim; ++j) {
      block(i, j) = m(rows.empty() ? begin + i : rows[begin + i],
                      columns.empty() ? begin + j : columns[begin + j]);
    }
  }
  return block;
}

class Mapper {
 public:
  Mapper(const Symmetry& symmetry, const MomentsLookup& moments, const CanonicalOptions& options,
         kernels::LinearAlgebra& algebra, Alignment& alignment,
         std::map<std::string, double>& correlations)
      : symmetry_(symmetry),
        moments_(moments),
        options_(options),
        algebra_(algebra),
        alignment_(alignment),
        correlations_(correlations) {}

  absl::Status Map() {
    for (const SymmetryGroup& group : symmetry_.groups()) {
      if (WithoutSites(group.name)) continue;
      if (options_.feed_forward && group.kind == GroupKind::kFfn) {
        ASSIGN_OR_RETURN(const SiteMoments site, FeedForwardMoments(group, moments_));
        ASSIGN_OR_RETURN(const Covariances of, CovariancesOf(site, options_.model));
        RETURN_IF_ERROR(MapWhole(group, of));
      }
      if (options_.residual && group.kind == GroupKind::kResidual) {
        ASSIGN_OR_RETURN(const Covariances of, OfResidual());
        RETURN_IF_ERROR(MapWhole(group, of));
      }
    }
    if (!options_.heads) return absl::OkStatus();
    for (const Attention& attention : symmetry_.attentions()) {
      if (WithoutSites(attention.name)) continue;
      RETURN_IF_ERROR(Annotate(MapHeads(attention), attention.name));
    }
    return absl::OkStatus();
  }

 private:
  absl::Status CheckWidth(const Covariances& of, const SymmetryGroup& group) const {
    if (of.cross.rows == group.width && of.cross.columns == group.width) return absl::OkStatus();
    return absl::FailedPreconditionError(absl::StrCat("statistics are of ", of.cross.rows, " and ",
                                                      of.cross.columns, " features, and group ",
                                                      group.name, " has ", group.width));
  }

  absl::Status MapWhole(const SymmetryGroup& group, const Covariances& of) {
    alignment_.groups[group.name].permutation.clear();
    alignment_.inexact.push_back(group.name);
    return MapBlocks(group, of, group.width);
  }

  // Maps each run of `dim` features, in the order that the group has.
  absl::Status MapBlocks(const SymmetryGroup& group, const Covariances& of, int64_t dim) {
    RETURN_IF_ERROR(CheckWidth(of, group));
    GroupAlignment& result = alignment_.groups[group.name];
    BlockTransform maps{.blocks = group.width / dim, .dim = dim};
    const std::vector<int32_t>& order = result.permutation;
    double sum = 0;
    for (int64_t block = 0; block < maps.blocks; ++block) {
      const int64_t begin = block * dim;
      ASSIGN_OR_RETURN(const CanonicalMap map,
                       CanonicalMapOf(algebra_, Block(of.first, begin, dim, {}, {}),
                                      Block(of.second, begin, dim, order, order),
                                      Block(of.cross, begin, dim, {}, order), options_.gamma));
      maps.forward.insert(maps.forward.end(), map.forward.values.begin(), map.forward.values.end());
      maps.inverse.insert(maps.inverse.end(), map.inverse.values.begin(), map.inverse.values.end());
      sum += std::accumulate(map.correlations.begin(), map.correlations.end(), 0.0);
    }
    result.transform = std::move(maps);
    correlations_[group.name] = sum / static_cast<double>(group.width);
    return absl::OkStatus();
  }

  absl::Status MapHeads(const Attention& attention) {
    const auto& groups = symmetry_.groups();
    ASSIGN_OR_RETURN(const SiteMoments values, ValueMoments(attention, moments_));
    ASSIGN_OR_RETURN(const Covariances of_values, CovariancesOf(values, options_.model));
    RETURN_IF_ERROR(MapBlocks(groups[attention.value], of_values, attention.head_dim));
    if (attention.output != attention.value) Repeat(attention);
    if (CanonicalMapWidth(symmetry_, groups[attention.query], options_) == 0) {
      return absl::OkStatus();
    }
    ASSIGN_OR_RETURN(const SiteMoments queries, QueryMoments(attention, moments_));
    ASSIGN_OR_RETURN(const Covariances of_queries, CovariancesOf(queries, options_.model));
    return MapBlocks(groups[attention.query], of_queries, attention.head_dim);
  }

  // Each query head's output features have the map of the values that it reads.
  void Repeat(const Attention& attention) {
    const BlockTransform& of_values =
        alignment_.groups[symmetry_.groups()[attention.value].name].transform;
    const int64_t size = of_values.dim * of_values.dim;
    BlockTransform maps{.blocks = attention.heads, .dim = of_values.dim};
    for (int64_t head = 0; head < attention.heads; ++head) {
      const int64_t from = head / (attention.heads / attention.kv_heads) * size;
      const auto append = [&](const std::vector<double>& of, std::vector<double>& to) {
        to.insert(to.end(), of.begin() + from, of.begin() + from + size);
      };
      append(of_values.forward, maps.forward);
      append(of_values.inverse, maps.inverse);
    }
    alignment_.groups[symmetry_.groups()[attention.output].name].transform = std::move(maps);
  }

  absl::StatusOr<Covariances> OfResidual() const {
    Covariances sum;
    int64_t sites = 0;
    while (true) {
      const absl::StatusOr<SiteMoments> site = moments_(absl::StrCat("residual.", sites));
      if (absl::IsNotFound(site.status()) && sites > 0) break;
      RETURN_IF_ERROR(site.status());
      ASSIGN_OR_RETURN(Covariances of, CovariancesOf(*site, options_.model));
      if (sites++ == 0) {
        sum = std::move(of);
        continue;
      }
      for (const auto& [from, to] :
           {std::pair{&of.first, &sum.first}, {&of.second, &sum.second}, {&of.cross, &sum.cross}}) {
        if (from->values.size() != to->values.size()) {
          return absl::FailedPreconditionError("sites of different width have no common map");
        }
        for (size_t i = 0; i < to->values.size(); ++i) to->values[i] += from->values[i];
      }
    }
    for (DenseMatrix* matrix : {&sum.first, &sum.second, &sum.cross}) {
      for (double& value : matrix->values) value /= static_cast<double>(sites);
    }
    return sum;
  }

  const Symmetry& symmetry_;
  const MomentsLookup& moments_;
  const CanonicalOptions& options_;
  kernels::LinearAlgebra& algebra_;
  Alignment& alignment_;
  std::map<std::string, double>& correlations_;
};

}  // namespace

int64_t CanonicalMapWidth(const Symmetry& symmetry, const SymmetryGroup& group,
                          const CanonicalOptions& options) {
  if (WithoutSites(group.name)) return 0;
  if (group.kind == GroupKind::kFfn) return options.feed_forward ? group.width : 0;
  if (group.kind == GroupKind::kResidual) return options.residual ? group.width : 0;
  if (!options.heads || group.attention < 0) return 0;
  const Attention& attention = symmetry.attentions()[group.attention];
  const auto is = [&](int index) {
    return index >= 0 && symmetry.groups()[index].name == group.name;
  };
  if (is(attention.value) || is(attention.output)) return attention.head_dim;
  const bool free = !attention.rotary && !attention.normed && attention.query == attention.key;
  return free && is(attention.query) ? attention.head_dim : 0;
}

absl::Status AddCanonicalMaps(const Symmetry& symmetry, const MomentsLookup& moments,
                              const CanonicalOptions& options, kernels::LinearAlgebra& algebra,
                              Alignment& alignment, std::map<std::string, double>& correlations) {
  RETURN_IF_ERROR(Mapper(symmetry, moments, options, algebra, alignment, correlations).Map());
  return CheckAlignment(symmetry, alignment);
}

}  // namespace pewter
