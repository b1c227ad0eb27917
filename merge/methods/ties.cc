// TIES (arXiv 2306.01708): trim each task vector by magnitude, elect a sign for each element,
// average what agrees.
#include "merge/methods/common/task_vectors.h"

namespace pewter::methods {
namespace {

constexpr TaskVectorOptions kOptions = {.sparsifier = Sparsifier::kMagnitude, .elect_sign = true};

}  // namespace

absl::Span<const MergeMethod> ties() {
  static const MergeMethod methods[] = {{
      .name = "ties",
      .title = "TIES",
      .summary = "trims task vectors by magnitude and merges the elements that agree in sign",
      .formula =
          "d_i = top_density(x_i - base); D_i = weight_i d_i; m = sign(sum_i D_i), sign(0) = +; "
          "out = base + lambda sum_{sign D_i = m} D_i / (normalize ? sum_{sign D_i = m} weight_i : "
          "1)",
      .reference = "https://arxiv.org/abs/2306.01708",
      .params = TaskVectorParams(kOptions, /*normalize=*/true, /*rescale=*/false),
      .base = BaseUse::kRequired,
      .min_inputs = 0,
      .selects = true,
      .run = [](MethodContext& context) { return RunTaskVectors(context, kOptions); },
  }};
  return methods;
}

}  // namespace pewter::methods
