// Karcher mean on the sphere (Grove and Karcher 1973; mergekit `karcher`): the point with the least
// sum of squared angles to the directions of all models, scaled to the mean of their norms.
//
// Every iterate is a combination of the inputs, so the iteration runs on their Gram matrix alone,
// in double, and the tensors are read twice whatever `max_iter` is.
#include <algorithm>
#include <cmath>

#include "base/status.h"
#include "merge/methods/common/gram.h"
#include "merge/methods/method.h"

namespace pewter::methods {
namespace {

// The mean of unit vectors with Gram matrix `cosines`, as coefficients of them.
std::vector<double> KarcherMean(const GramMatrix& cosines, int64_t max_iter, double tol) {
  const int n = cosines.size();
  std::vector<double> u(n, 1.0 / n);
  if (const double norm = cosines.Norm(u); norm >= tol) {
    for (double& value : u) value /= norm;
  } else {
    std::fill(u.begin(), u.end(), 0.0);
    u[0] = 1;
  }
  for (int64_t iteration = 0; iteration < max_iter; ++iteration) {
    // The tangent at u: the mean of the logarithms of all vectors.
    std::vector<double> tangent(n);
    double along = 0;
    for (int i = 0; i < n; ++i) {
      const double cosine = std::clamp(cosines.DotWith(i, u), -1.0, 1.0);
      const double angle = std::acos(cosine);
      if (angle < tol) continue;
      const double factor = angle / std::sin(angle) / n;
      tangent[i] += factor;
      along += factor * cosine;
    }
    for (int i = 0; i < n; ++i) tangent[i] -= along * u[i];
    const double length = cosines.Norm(tangent);
    if (length < tol) break;
    for (int i = 0; i < n; ++i) {
      u[i] = std::cos(length) * u[i] + std::sin(length) / length * tangent[i];
    }
    const double norm = cosines.Norm(u);
    if (norm > 0) {
      for (double& value : u) value /= norm;
    }
  }
  return u;
}

absl::Status Run(MethodContext& context) {
  ASSIGN_OR_RETURN(const GramMatrix gram, InputGram(context, /*from_base=*/false));
  const double tol = context.number("tol");
  double norm_sum = 0;
  std::vector<int> valid;
  std::vector<double> norms;
  for (int i = 0; i < gram.size(); ++i) {
    const double norm = std::sqrt(gram(i, i));
    norm_sum += norm;
    if (norm <= tol) continue;
    valid.push_back(i);
    norms.push_back(norm);
  }
  kernels::WeightedSum op;
  op.count = gram.size();
  std::fill_n(op.weight, op.count, 0.0);
  if (!valid.empty()) {
    GramMatrix cosines(static_cast<int>(valid.size()));
    for (size_t i = 0; i < valid.size(); ++i) {
      for (size_t j = 0; j < valid.size(); ++j) {
        cosines(i, j) = gram(valid[i], valid[j]) / (norms[i] * norms[j]);
      }
    }
    const std::vector<double> mean =
        KarcherMean(cosines, static_cast<int64_t>(context.number("max_iter")), tol);
    for (size_t i = 0; i < valid.size(); ++i) {
      op.weight[valid[i]] = mean[i] / norms[i] * norm_sum / gram.size();
    }
  }
  return context.Map(op, context.AllOperands());
}

}  // namespace

absl::Span<const MergeMethod> karcher() {
  static const MergeMethod methods[] = {{
      .name = "karcher",
      .title = "Karcher mean",
      .summary = "mean of the models' directions on the sphere, with the mean of their norms",
      .formula = "u = argmin_{|u| = 1} sum_i angle(u, x_i)^2; out = u sum_i |x_i| / n",
      .reference = "https://en.wikipedia.org/wiki/Karcher_mean",
      .params = {{.name = "max_iter",
                  .help = "iterations at most",
                  .type = ParamType::kInt,
                  .fallback = int64_t{10},
                  .min = 0},
                 {.name = "tol",
                  .help = "length of a step, an angle or a norm that counts as none",
                  .fallback = 1e-5,
                  .min = 0}},
      .run = &Run,
  }};
  return methods;
}

}  // namespace pewter::methods
