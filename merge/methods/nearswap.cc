// NearSwap (mergekit `nearswap`): elements near the base's are swapped for the other model's.
#include "merge/methods/method.h"

namespace pewter::methods {
namespace {

absl::Status Run(MethodContext& context) {
  return context.Map(kernels::NearSwap{.t = context.number("t")}, context.AllOperands());
}

}  // namespace

absl::Span<const MergeMethod> nearswap() {
  static const MergeMethod methods[] = {{
      .name = "nearswap",
      .title = "NearSwap",
      .summary = "takes the other model's elements where they are near the base's",
      .formula = "w = clamp(t / max(|x - base|, 1e-6), 0, 1); out = w x + (1 - w) base",
      .reference = "https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
      .params = {{.name = "t", .help = "distance up to which an element is taken as it is"}},
      .base = BaseUse::kRequired,
      .min_inputs = 1,
      .max_inputs = 1,
      .run = &Run,
  }};
  return methods;
}

}  // namespace pewter::methods
