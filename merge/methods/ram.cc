// RAM and RAM+ (arXiv 2601.13572; mergekit `ram`, `ramplus_tl`): what reinforcement learning
// changes is sparse. An element that one model changed is kept whole, one that several changed is
// averaged over them; RAM+ makes up for the averaging by scaling what a model alone changed.
#include <algorithm>

#include "base/status.h"
#include "merge/methods/method.h"

namespace pewter::methods {
namespace {

const Param kEpsilon = {
    .name = "epsilon", .help = "a change up to this counts as none", .fallback = 1e-5, .min = 0};

kernels::OverlapMean Op(const MethodContext& context) {
  kernels::OverlapMean op{.count = context.inputs(), .epsilon = context.number("epsilon")};
  std::fill_n(op.unique_scale, op.count, 1.0);
  return op;
}

absl::Status Ram(MethodContext& context) {
  if (context.inputs() == 0) return context.Copy(MethodContext::kBase);
  return context.Map(Op(context), context.AllOperands());
}

absl::Status RamPlus(MethodContext& context) {
  if (context.inputs() == 0) return context.Copy(MethodContext::kBase);
  kernels::OverlapMean op = Op(context);
  ASSIGN_OR_RETURN(const std::vector<double> counts,
                   context.Reduce(kernels::OverlapCounts{op}, context.AllOperands()));
  for (int i = 0; i < op.count; ++i) {
    const double shared = counts[2 * i], unique = counts[2 * i + 1];
    const double ratio = shared / std::max(unique, op.epsilon);
    op.unique_scale[i] = 1 + context.number("r") * std::clamp(ratio, 0.0, context.number("alpha"));
  }
  return context.Map(op, context.AllOperands());
}

}  // namespace

absl::Span<const MergeMethod> ram() {
  static const MergeMethod methods[] = {
      {
          .name = "ram",
          .title = "RAM",
          .summary = "keeps changes of one model alone, averages those that several models share",
          .formula = "a_i = |x_i - base| > epsilon, c = sum_i a_i; "
                     "out = base + sum_i a_i (x_i - base) / c",
          .reference = "https://arxiv.org/abs/2601.13572",
          .params = {kEpsilon},
          .base = BaseUse::kRequired,
          .min_inputs = 0,
          .run = &Ram,
      },
      {
          .name = "ramplus_tl",
          .title = "RAM+",
          .summary =
              "RAM that strengthens what one model alone changed, the more it shares otherwise",
          .formula = "a_i and c as ram; s_i, u_i = counts of a_i with c > 1, with c = 1; "
                     "scale_i = 1 + r clamp(s_i / max(u_i, epsilon), 0, alpha); "
                     "out = base + (c = 1 ? scale_i (x_i - base) : sum_i a_i (x_i - base) / c)",
          .reference = "https://arxiv.org/abs/2601.13572",
          .params = {{.name = "r", .help = "strength of the scaling", .fallback = 0.1},
                     {.name = "alpha",
                      .help = "largest ratio of shared to own changes that counts",
                      .fallback = 0.2,
                      .min = 0},
                     kEpsilon},
          .base = BaseUse::kRequired,
          .min_inputs = 0,
          .run = &RamPlus,
      }};
  return methods;
}

}  // namespace pewter::methods
