#include "merge/align/moments.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "base/status.h"

namespace pewter {
namespace {

absl::Status Unfit(const SiteMoments& moments, absl::string_view why) {
  return absl::FailedPreconditionError(absl::StrCat("statistics of ", moments.site, ": ", why));
}

// That there are rows, and sums and squares of the model.
absl::Status CheckModel(const SiteMoments& moments, int model) {
  const auto count = static_cast<int>(moments.sums.size());
  if (model < 0 || model >= count || moments.squares.size() != moments.sums.size()) {
    return Unfit(moments, absl::StrCat("model ", model, " of ", count, " was asked for"));
  }
  if (moments.count <= 0) return Unfit(moments, "they are of no rows");
  if (moments.squares[model].size() != moments.sums[model].size()) {
    return Unfit(moments, "sums and squares differ in width");
  }
  return absl::OkStatus();
}

absl::StatusOr<const std::vector<double>*> GramOf(const SiteMoments& moments, int i, int j) {
  const size_t width = moments.sums[i].size() * moments.sums[j].size();
  const bool there = i < static_cast<int>(moments.grams.size()) &&
                     j < static_cast<int>(moments.grams[i].size()) && !moments.grams[i][j].empty();
  if (!there) {
    return Unfit(moments, absl::StrCat("products of the features of models ", i, " and ", j,
                                       " were not collected"));
  }
  if (moments.grams[i][j].size() != width) return Unfit(moments, "the products' width is wrong");
  return &moments.grams[i][j];
}

}  // namespace

absl::StatusOr<FeatureCovariance> CovarianceOf(const SiteMoments& moments, int i, int j) {
  RETURN_IF_ERROR(CheckModel(moments, i));
  RETURN_IF_ERROR(CheckModel(moments, j));
  ASSIGN_OR_RETURN(const std::vector<double>* const gram,
                   GramOf(moments, std::min(i, j), std::max(i, j)));
  const auto n = static_cast<double>(moments.count);
  const auto variances = [&](int model) {
    std::vector<double> result(moments.sums[model].size());
    for (size_t f = 0; f < result.size(); ++f) {
      const double mean = moments.sums[model][f] / n;
      result[f] = std::max(0.0, moments.squares[model][f] / n - mean * mean);
    }
    return result;
  };
  FeatureCovariance covariance{.first = variances(i), .second = variances(j)};
  const auto rows = static_cast<int64_t>(covariance.first.size());
  const auto columns = static_cast<int64_t>(covariance.second.size());
  covariance.cross = DenseMatrix(rows, columns);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      const double product = i <= j ? (*gram)[r * columns + c] : (*gram)[c * rows + r];
      covariance.cross(r, c) = product / n - moments.sums[i][r] / n * (moments.sums[j][c] / n);
    }
  }
  return covariance;
}

absl::StatusOr<DenseMatrix> OwnCovariance(const SiteMoments& moments, int model) {
  ASSIGN_OR_RETURN(FeatureCovariance covariance, CovarianceOf(moments, model, model));
  return std::move(covariance.cross);
}

absl::Status AddTo(FeatureCovariance& sum, const FeatureCovariance& term) {
  if (term.first.size() != sum.first.size() || term.second.size() != sum.second.size()) {
    return absl::FailedPreconditionError("sites of different width have no common order");
  }
  const auto add = [](const std::vector<double>& from, std::vector<double>& to) {
    for (size_t i = 0; i < to.size(); ++i) to[i] += from[i];
  };
  add(term.cross.values, sum.cross.values);
  add(term.first, sum.first);
  add(term.second, sum.second);
  return absl::OkStatus();
}

DenseMatrix CorrelationOf(const FeatureCovariance& covariance) {
  constexpr double kLeastScale = 1e-7;
  DenseMatrix correlation = covariance.cross;
  for (int64_t i = 0; i < correlation.rows; ++i) {
    const double deviation = std::sqrt(covariance.first[i]);
    for (int64_t j = 0; j < correlation.columns; ++j) {
      correlation(i, j) /= std::max(deviation * std::sqrt(covariance.second[j]), kLeastScale);
    }
  }
  return correlation;
}

absl::StatusOr<SiteMoments> Pooled(const SiteMoments& a, const SiteMoments& b) {
  SiteMoments sum = a;
  sum.site = absl::StrCat(a.site, " and ", b.site);
  sum.count += b.count;
  bool fits = a.sums.size() == b.sums.size() && a.squares.size() == b.squares.size() &&
              a.grams.size() == b.grams.size();
  const auto add = [&fits](const std::vector<double>& from, std::vector<double>& to) {
    fits = fits && from.size() == to.size();
    for (size_t i = 0; fits && i < to.size(); ++i) to[i] += from[i];
  };
  for (size_t i = 0; fits && i < sum.sums.size(); ++i) add(b.sums[i], sum.sums[i]);
  for (size_t i = 0; fits && i < sum.squares.size(); ++i) add(b.squares[i], sum.squares[i]);
  for (size_t i = 0; fits && i < sum.grams.size(); ++i) {
    fits = a.grams[i].size() == b.grams[i].size();
    for (size_t j = 0; fits && j < sum.grams[i].size(); ++j) add(b.grams[i][j], sum.grams[i][j]);
  }
  if (!fits) return Unfit(sum, "the two sites were not collected alike");
  return sum;
}

double MeanOfMatched(const DenseMatrix& similarity, absl::Span<const int32_t> q) {
  double sum = 0;
  for (int64_t i = 0; i < similarity.rows; ++i) sum += similarity(i, q[i]);
  return similarity.rows == 0 ? 0 : sum / static_cast<double>(similarity.rows);
}

}  // namespace pewter
