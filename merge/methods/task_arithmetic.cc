// Task arithmetic (arXiv 2212.04089): the base plus a weighted sum of task vectors.
#include "merge/methods/common/task_vectors.h"

namespace pewter::methods {

absl::Span<const MergeMethod> task_arithmetic() {
  static const MergeMethod methods[] = {{
      .name = "task_arithmetic",
      .title = "Task Arithmetic",
      .summary = "adds the weighted differences of the models from the base",
      .formula =
          "out = base + lambda sum_i weight_i (x_i - base) / (normalize ? sum_i weight_i : 1)",
      .reference = "https://arxiv.org/abs/2212.04089",
      .params = TaskVectorParams({}, /*normalize=*/false, /*rescale=*/false),
      .base = BaseUse::kRequired,
      .min_inputs = 0,
      .run = [](MethodContext& context) { return RunTaskVectors(context, {}); },
  }};
  return methods;
}

}  // namespace pewter::methods
