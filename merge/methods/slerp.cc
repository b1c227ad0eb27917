// Spherical interpolation between the base and one other model (Shoemake 1985; mergekit `slerp`).
//
// The angle is that of the whole tensors seen as vectors; the blend is of the vectors themselves,
// not of their unit vectors. Nearly parallel tensors (|cos| > 0.9995: most norm weights) are
// blended linearly.
#include <algorithm>
#include <cmath>

#include "base/status.h"
#include "merge/methods/method.h"

namespace pewter::methods {
namespace {

absl::Status Run(MethodContext& context) {
  constexpr double kTinyNorm = 1e-8;
  constexpr double kParallel = 0.9995;
  const double t = context.number("t");
  ASSIGN_OR_RETURN(const std::vector<double> dots,
                   context.Reduce(kernels::DotNorms{}, context.AllOperands()));
  const auto norm = [](double square) {
    const double root = std::sqrt(square);
    return root > kTinyNorm ? root : 1.0;
  };
  const double cosine = std::clamp(dots[2] / (norm(dots[0]) * norm(dots[1])), -1.0, 1.0);
  kernels::WeightedSum op;
  op.count = 2;
  if (std::abs(cosine) > kParallel) {
    op.weight[0] = 1 - t;
    op.weight[1] = t;
  } else {
    const double angle = std::acos(cosine);
    op.weight[0] = std::sin((1 - t) * angle) / std::sin(angle);
    op.weight[1] = std::sin(t * angle) / std::sin(angle);
  }
  return context.Map(op, context.AllOperands());
}

}  // namespace

absl::Span<const MergeMethod> slerp() {
  static const MergeMethod methods[] = {{
      .name = "slerp",
      .title = "SLERP",
      .summary = "spherical interpolation from the base model to one other",
      .formula = "cos a = <x0, x1> / (|x0| |x1|); out = (sin((1-t) a) x0 + sin(t a) x1) / sin a; "
                 "|cos a| > 0.9995: (1-t) x0 + t x1",
      .reference = "https://en.wikipedia.org/wiki/Slerp",
      .params = {{.name = "t", .help = "0: the base, 1: the other model"}},
      .base = BaseUse::kRequired,
      .min_inputs = 1,
      .max_inputs = 1,
      .single_input_passes = true,
      .run = &Run,
  }};
  return methods;
}

}  // namespace pewter::methods
