// Spherical interpolation of two models, or of their task vectors (mergekit `nuslerp`).
//
// Unlike slerp there is no threshold for nearly parallel vectors but rounding, and the angle may be
// that of each row or column instead of the whole tensor's.
#include <algorithm>
#include <cmath>

#include "base/status.h"
#include "merge/methods/common/gram.h"
#include "merge/methods/method.h"

namespace pewter::methods {
namespace {

std::vector<double> Slerp(const GramMatrix& gram, double t) {
  constexpr double kTinyNorm = 1e-7;
  const double n0 = std::max(std::sqrt(gram(0, 0)), kTinyNorm);
  const double n1 = std::max(std::sqrt(gram(1, 1)), kTinyNorm);
  const double cosine = std::clamp(gram(0, 1) / (n0 * n1), -1.0, 1.0);
  if (1 - cosine * cosine <= 1e-16) return {1 - t, t};
  const double angle = std::acos(cosine);
  return {std::sin((1 - t) * angle) / std::sin(angle), std::sin(t * angle) / std::sin(angle)};
}

absl::Status Run(MethodContext& context) {
  constexpr double kTinyWeight = 1e-6;
  const double w0 = context.number(0, "weight"), w1 = context.number(1, "weight");
  const double t = std::abs(w0 + w1) < kTinyWeight ? 0.5 : w1 / (w0 + w1);
  const auto slerp = [t](const GramMatrix& gram) { return Slerp(gram, t); };
  if (!context.flag("nuslerp_flatten")) {
    // A vector has one axis.
    const bool columns = context.flag("nuslerp_row_wise") && context.shape().rank() > 1;
    return MapCombinationOfAxis(context, columns ? Axis::kColumns : Axis::kRows, slerp);
  }
  ASSIGN_OR_RETURN(const GramMatrix gram, InputGram(context, context.has_base()));
  return MapCombination(context, slerp(gram));
}

}  // namespace

absl::Span<const MergeMethod> nuslerp() {
  static const MergeMethod methods[] = {{
      .name = "nuslerp",
      .title = "NuSLERP",
      .summary = "spherical interpolation of two models, or of their task vectors, with weights",
      .formula = "t = weight_1 / (weight_0 + weight_1); v_i = x_i - base (x_i without a base); "
                 "cos a = <v_0, v_1> / (|v_0| |v_1|); "
                 "out = base + (sin((1-t) a) v_0 + sin(t a) v_1) / sin a",
      .reference = "https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md",
      .params = {{.name = "weight", .help = "share of this model", .scope = ParamScopeKind::kModel},
                 {.name = "nuslerp_flatten",
                  .help = "one angle for the whole tensor",
                  .type = ParamType::kBool,
                  .fallback = true},
                 {.name = "nuslerp_row_wise",
                  .help = "not flattened: an angle for each column (vector along the first axis) "
                          "instead of each row (along the last)",
                  .type = ParamType::kBool,
                  .fallback = false}},
      .base = BaseUse::kOptional,
      .min_inputs = 2,
      .max_inputs = 2,
      .single_input_passes = true,
      .by_rows = true,
      .by_columns = true,
      .run = &Run,
  }};
  return methods;
}

}  // namespace pewter::methods
