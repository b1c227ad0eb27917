#include "merge/align/pleas.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status.h"

namespace pewter {
namespace {

using kernels::Transpose;

// The merged group's features as combinations of both models' features side by side: row k has
// weight[k] at first[k] and second[k], -1 for none.
struct Combination {
  struct Row {
    int32_t first, second;
  };
  std::vector<Row> rows;

  double weight(int64_t k) const { return rows[k].first >= 0 && rows[k].second >= 0 ? 0.5 : 1; }
  // Of values of both models.
  double Of(int64_t k, absl::Span<const double> first, absl::Span<const double> second) const {
    double sum = 0;
    if (rows[k].first >= 0) sum += first[rows[k].first];
    if (rows[k].second >= 0) sum += second[rows[k].second];
    return weight(k) * sum;
  }
};

Combination CombinationOf(const PartialMatch& match) {
  Combination result;
  for (size_t k = 0; k < match.first.size(); ++k) {
    result.rows.push_back({match.first[k], match.second[k]});
  }
  for (int32_t feature : match.first_alone) result.rows.push_back({feature, -1});
  for (int32_t feature : match.second_alone) result.rows.push_back({-1, feature});
  return result;
}

// The runs of a merged group: merged, first's, second's.
struct Runs {
  int64_t begin[4];
};
Runs RunsOf(const PartialMatch& match) {
  const auto merged = static_cast<int64_t>(match.first.size());
  const auto first = static_cast<int64_t>(match.first_alone.size());
  return {{0, merged, merged + first, match.width()}};
}

std::vector<double> RowOf(const DenseMatrix& m, int64_t i) {
  return {m.row(i), m.row(i) + m.columns};
}

// Covariances of merged features with the two models' own: [rows of `of`, width of each].
struct MergedCovariance {
  DenseMatrix with_first, with_second;
};
MergedCovariance MergeRows(const Combination& of, const DenseMatrix& first,
                           const DenseMatrix& cross, const DenseMatrix& second) {
  const auto rows = static_cast<int64_t>(of.rows.size());
  MergedCovariance merged{DenseMatrix(rows, first.columns), DenseMatrix(rows, second.columns)};
  for (int64_t k = 0; k < rows; ++k) {
    const double weight = of.weight(k);
    if (const int32_t a = of.rows[k].first; a >= 0) {
      for (int64_t j = 0; j < first.columns; ++j) merged.with_first(k, j) += weight * first(a, j);
      for (int64_t j = 0; j < second.columns; ++j) merged.with_second(k, j) += weight * cross(a, j);
    }
    if (const int32_t b = of.rows[k].second; b >= 0) {
      for (int64_t j = 0; j < first.columns; ++j) merged.with_first(k, j) += weight * cross(j, b);
      for (int64_t j = 0; j < second.columns; ++j) {
        merged.with_second(k, j) += weight * second(b, j);
      }
    }
  }
  return merged;
}

// sum x y^T becomes sum x y^T - (sum x)(sum y)^T / n.
void Centre(absl::Span<const double> x, absl::Span<const double> y, double n,
            DenseMatrix& products) {
  for (int64_t i = 0; i < products.rows; ++i) {
    for (int64_t j = 0; j < products.columns; ++j) products(i, j) -= x[i] * (y[j] / n);
  }
}

// Pairs of which `merged` holds, and those apart, in the order of the first model's features.
template <class Merged>
PartialMatch Split(absl::Span<const int32_t> q, const Merged& merged) {
  PartialMatch match;
  for (size_t i = 0; i < q.size(); ++i) {
    const bool together = merged(i);
    (together ? match.first : match.first_alone).push_back(static_cast<int32_t>(i));
    (together ? match.second : match.second_alone).push_back(q[i]);
  }
  return match;
}

}  // namespace

PartialMatch WholeMatch(absl::Span<const int32_t> q) {
  PartialMatch match;
  match.first.resize(q.size());
  std::iota(match.first.begin(), match.first.end(), 0);
  match.second.assign(q.begin(), q.end());
  return match;
}

PartialMatch MatchAbove(absl::Span<const int32_t> q, absl::Span<const double> similarity,
                        double apart) {
  if (apart <= 0 || q.empty()) return WholeMatch(q);
  std::vector<double> sorted(similarity.begin(), similarity.end());
  std::sort(sorted.begin(), sorted.end());
  const double place = std::min(apart, 1.0) * static_cast<double>(sorted.size() - 1);
  const auto below = static_cast<size_t>(place);
  const double share = place - static_cast<double>(below);
  double least = sorted[below];
  if (share > 0) least += share * (sorted[below + 1] - sorted[below]);
  return Split(q, [&](size_t i) { return apart < 1 && similarity[i] >= least; });
}

PartialMatch MatchAllBut(int64_t apart, absl::Span<const int32_t> q,
                         absl::Span<const double> similarity) {
  std::vector<size_t> order(q.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return similarity[a] < similarity[b]; });
  std::vector<bool> alone(q.size());
  for (int64_t k = 0; k < apart; ++k) alone[order[k]] = true;
  return Split(q, [&](size_t i) { return !alone[i]; });
}

LinearLayer AverageLayers(const LinearLayer& first, const LinearLayer& second,
                          const PartialMatch& outputs, const PartialMatch& inputs) {
  const Combination rows = CombinationOf(outputs), columns = CombinationOf(inputs);
  LinearLayer merged;
  merged.weight = DenseMatrix(outputs.width(), inputs.width());
  for (int64_t o = 0; o < merged.weight.rows; ++o) {
    const Combination::Row row = rows.rows[o];
    for (int64_t i = 0; i < merged.weight.columns; ++i) {
      const Combination::Row column = columns.rows[i];
      double sum = 0;
      if (row.first >= 0 && column.first >= 0) sum += first.weight(row.first, column.first);
      if (row.second >= 0 && column.second >= 0) sum += second.weight(row.second, column.second);
      merged.weight(o, i) = rows.weight(o) * sum;
    }
    if (!first.bias.empty()) merged.bias.push_back(rows.Of(o, first.bias, second.bias));
  }
  return merged;
}

absl::StatusOr<LinearLayer> FitLayer(kernels::LinearAlgebra& algebra, const LinearLayer& first,
                                     const LinearLayer& second, const PartialMatch& outputs,
                                     const PartialMatch& inputs, JointInputs moments,
                                     const Ridge& ridge) {
  const Combination rows = CombinationOf(outputs), columns = CombinationOf(inputs);
  LinearLayer layer = AverageLayers(first, second, outputs, inputs);
  const bool biased = !layer.bias.empty();
  // Without a bias the layer goes through the origin.
  if (biased) {
    Centre(moments.first_sum, moments.first_sum, moments.rows, moments.first);
    Centre(moments.first_sum, moments.second_sum, moments.rows, moments.cross);
    Centre(moments.second_sum, moments.second_sum, moments.rows, moments.second);
  }

  // X^T [x_a x_b], then X^T X and X^T Y with Y = the combination of W_a x_a and W_b x_b.
  MergedCovariance with_own = MergeRows(columns, moments.first, moments.cross, moments.second);
  moments.first = moments.cross = moments.second = {};
  const int64_t width = inputs.width(), out = outputs.width();
  DenseMatrix xx(width, width);
  for (int64_t i = 0; i < width; ++i) {
    const absl::Span<const double> a(with_own.with_first.row(i), with_own.with_first.columns);
    const absl::Span<const double> b(with_own.with_second.row(i), with_own.with_second.columns);
    for (int64_t j = 0; j < width; ++j) xx(i, j) = columns.Of(j, a, b);
  }
  ASSIGN_OR_RETURN(const DenseMatrix xya, Product(algebra, Transpose::kNo, with_own.with_first,
                                                  Transpose::kYes, first.weight));
  ASSIGN_OR_RETURN(const DenseMatrix xyb, Product(algebra, Transpose::kNo, with_own.with_second,
                                                  Transpose::kYes, second.weight));
  with_own = {};
  DenseMatrix xy(width, out);
  for (int64_t i = 0; i < width; ++i) {
    const std::vector<double> a = RowOf(xya, i), b = RowOf(xyb, i);
    for (int64_t o = 0; o < out; ++o) xy(i, o) = rows.Of(o, a, b);
  }

  double trace = 0;
  for (int64_t i = 0; i < width; ++i) trace += xx(i, i);
  const double penalty =
      ridge.strength * (ridge.relative ? trace / static_cast<double>(width) : moments.rows);
  const Runs in = RunsOf(inputs), produced = RunsOf(outputs);
  for (int block = 0; block < 3; ++block) {
    const int64_t begin = produced.begin[block], end = produced.begin[block + 1];
    if (begin == end) continue;
    // Columns that the block may use.
    std::vector<int64_t> used;
    for (int run = 0; run < 3; ++run) {
      if (block != 0 && run != 0 && run != block) continue;
      for (int64_t i = in.begin[run]; i < in.begin[run + 1]; ++i) used.push_back(i);
    }
    const auto n = static_cast<int64_t>(used.size());
    // For the difference from the average, so that the ridge pulls there and nothing cancels.
    DenseMatrix left(n, n), right(n, end - begin), average(end - begin, n);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < n; ++j) left(i, j) = xx(used[i], used[j]);
      for (int64_t o = begin; o < end; ++o) {
        right(i, o - begin) = xy(used[i], o);
        average(o - begin, i) = layer.weight(o, used[i]);
      }
    }
    RETURN_IF_ERROR(algebra.Gemm(Transpose::kNo, left.view(), Transpose::kYes,
                                 std::as_const(average).view(), -1, 1, right.view()));
    for (int64_t i = 0; i < n; ++i) {
      left(i, i) += penalty;
      if (!ridge.towards_zero) continue;
      for (int64_t o = begin; o < end; ++o) right(i, o - begin) -= penalty * average(o - begin, i);
    }
    const absl::Status solved = algebra.SolvePosDef(left.view(), right.view());
    if (absl::IsFailedPrecondition(solved)) {
      return Annotate(solved,
                      "the layer's inputs leave no one least-squares solution; `ridge` "
                      "must be above 0");
    }
    RETURN_IF_ERROR(solved);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t o = begin; o < end; ++o) layer.weight(o, used[i]) += right(i, o - begin);
    }
  }
  if (!biased) return layer;
  // The means of the targets are met exactly.
  std::vector<double> mean_a(first.weight.rows), mean_b(second.weight.rows);
  const auto mean_output = [&](const LinearLayer& own, const std::vector<double>& sum, int64_t o) {
    double mean = own.bias[o];
    for (int64_t i = 0; i < own.weight.columns; ++i) {
      mean += own.weight(o, i) * (sum[i] / moments.rows);
    }
    return mean;
  };
  for (int64_t o = 0; o < first.weight.rows; ++o) {
    mean_a[o] = mean_output(first, moments.first_sum, o);
  }
  for (int64_t o = 0; o < second.weight.rows; ++o) {
    mean_b[o] = mean_output(second, moments.second_sum, o);
  }
  for (int64_t o = 0; o < out; ++o) {
    double mean = rows.Of(o, mean_a, mean_b);
    for (int64_t i = 0; i < width; ++i) {
      mean -=
          layer.weight(o, i) * columns.Of(i, moments.first_sum, moments.second_sum) / moments.rows;
    }
    layer.bias[o] = mean;
  }
  return layer;
}

int64_t FitLayerBytes(int64_t outputs, int64_t inputs, int64_t merged_outputs,
                      int64_t merged_inputs) {
  // Moments of both models and between them, and their products with the merged features; or those
  // products' sums, X^T X, and the part of it that a block of outputs uses. The two layers, the
  // result, its products with X, and what is solved for.
  const int64_t matrices = std::max(3 * inputs * inputs + 2 * merged_inputs * inputs,
                                    2 * merged_inputs * inputs + 2 * merged_inputs * merged_inputs);
  const int64_t weights =
      2 * outputs * inputs + 2 * merged_inputs * outputs + 4 * merged_inputs * merged_outputs;
  return static_cast<int64_t>(sizeof(double)) * (matrices + weights);
}

double BudgetCost(const BudgetProblem& problem, absl::Span<const double> ratios) {
  double cost = 0;
  for (const BudgetTerm& term : problem.terms) {
    if (term.groups.empty()) {
      cost += term.cost;
      continue;
    }
    const int a = term.groups[0];
    if (term.groups.size() == 1) {
      cost += term.cost * problem.sizes[a] * (1 + ratios[a]);
      continue;
    }
    const int b = term.groups[1];
    cost += term.cost * problem.sizes[a] * problem.sizes[b] *
            (1 + ratios[a] + ratios[b] - ratios[a] * ratios[b]);
  }
  return cost;
}

namespace {

// The fewest groups (at most three) such that every term of two groups has one of them; the first
// such set in order of size. Nothing when more are needed.
absl::StatusOr<std::vector<int>> Cover(const BudgetProblem& problem) {
  const auto count = static_cast<int>(problem.sizes.size());
  const auto covers = [&](const std::vector<int>& chosen) {
    const auto has = [&](int group) {
      return std::find(chosen.begin(), chosen.end(), group) != chosen.end();
    };
    return std::all_of(problem.terms.begin(), problem.terms.end(), [&](const BudgetTerm& term) {
      return term.groups.size() < 2 || has(term.groups[0]) || has(term.groups[1]);
    });
  };
  if (covers({})) return std::vector<int>{};
  for (int a = 0; a < count; ++a) {
    if (covers({a})) return std::vector<int>{a};
  }
  for (int a = 0; a < count; ++a) {
    for (int b = a + 1; b < count; ++b) {
      if (covers({a, b})) return std::vector<int>{a, b};
    }
  }
  for (int a = 0; a < count; ++a) {
    for (int b = a + 1; b < count; ++b) {
      for (int c = b + 1; c < count; ++c) {
        if (covers({a, b, c})) return std::vector<int>{a, b, c};
      }
    }
  }
  return absl::InvalidArgumentError(
      "no three groups are in all layers between two groups: the budget cannot be solved exactly");
}

}  // namespace

absl::StatusOr<std::vector<double>> SolveBudget(const BudgetProblem& problem, double budget) {
  const auto count = static_cast<int>(problem.sizes.size());
  for (const BudgetTerm& term : problem.terms) {
    const bool known = term.groups.size() <= 2 &&
                       std::all_of(term.groups.begin(), term.groups.end(),
                                   [&](int group) { return group >= 0 && group < count; }) &&
                       (term.groups.size() < 2 || term.groups[0] != term.groups[1]);
    if (!known) return absl::InternalError("a layer of the budget is between unknown groups");
  }
  const std::vector<double> none(count);
  const double limit = budget * BudgetCost(problem, none);
  if (budget < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("the budget is ", budget, " of one model's work, and 1 is the least"));
  }
  ASSIGN_OR_RETURN(const std::vector<int> cover, Cover(problem));

  // With the cover fixed the work is linear in all others: a fractional knapsack, filled by worth
  // for cost.
  struct Found {
    double worth = -1;
    std::vector<double> ratios;
  };
  const auto fill = [&](std::vector<double> ratios) {
    Found found;
    double left = limit - BudgetCost(problem, ratios);
    // Rounding of the sums.
    if (left < -1e-12 * limit) return found;
    struct Item {
      int group;
      double cost;
    };
    std::vector<Item> items;
    for (int g = 0; g < count; ++g) {
      if (std::find(cover.begin(), cover.end(), g) != cover.end()) continue;
      std::vector<double> apart = ratios;
      apart[g] = 1;
      items.push_back({g, BudgetCost(problem, apart) - BudgetCost(problem, ratios)});
    }
    std::stable_sort(items.begin(), items.end(), [&](const Item& a, const Item& b) {
      return problem.weights[a.group] * b.cost > problem.weights[b.group] * a.cost;
    });
    for (const Item& item : items) {
      if (problem.weights[item.group] <= 0) continue;
      const double share = item.cost <= 0 ? 1 : std::clamp(left / item.cost, 0.0, 1.0);
      ratios[item.group] = share;
      left -= share * item.cost;
    }
    found.worth = std::inner_product(ratios.begin(), ratios.end(), problem.weights.begin(), 0.0);
    found.ratios = std::move(ratios);
    return found;
  };

  // A grid over the cover, then finer ones around the best point.
  constexpr int kSteps = 100, kRefined = 20;
  Found best;
  std::vector<double> low(cover.size(), 0), high(cover.size(), 1);
  for (int level = 0; level < 3; ++level) {
    const int steps = level == 0 ? (cover.size() < 3 ? kSteps : 50) : kRefined;
    std::vector<int> at(cover.size(), 0);
    while (true) {
      std::vector<double> ratios(count);
      for (size_t k = 0; k < cover.size(); ++k) {
        ratios[cover[k]] = low[k] + (high[k] - low[k]) * at[k] / steps;
      }
      Found found = fill(std::move(ratios));
      if (found.worth > best.worth) best = std::move(found);
      size_t k = 0;
      while (k < cover.size() && ++at[k] > steps) at[k++] = 0;
      if (k == cover.size()) break;
    }
    for (size_t k = 0; k < cover.size(); ++k) {
      const double step = (high[k] - low[k]) / steps, middle = best.ratios[cover[k]];
      low[k] = std::max(0.0, middle - step);
      high[k] = std::min(1.0, middle + step);
    }
  }
  return best.ratios;
}

}  // namespace pewter
