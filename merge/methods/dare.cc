// DARE (arXiv 2311.03099): drop elements of the task vectors at random, scale the rest; merged as
// task arithmetic (dare_linear) or with TIES' sign election (dare_ties). The scale keeps the L1
// norm, as mergekit does, and is not the paper's 1 / density.
#include "merge/methods/common/task_vectors.h"

namespace pewter::methods {
namespace {

constexpr TaskVectorOptions kLinear = {.sparsifier = Sparsifier::kRandom};
constexpr TaskVectorOptions kTies = {.sparsifier = Sparsifier::kRandom, .elect_sign = true};

}  // namespace

absl::Span<const MergeMethod> dare() {
  static const MergeMethod methods[] = {
      {
          .name = "dare_linear",
          .title = "DARE",
          .summary = "drops elements of the task vectors at random, then task arithmetic",
          .formula =
              "d_i = (x_i - base) * Bernoulli(density) * (rescale ? L1 before / L1 after : 1); "
              "out = base + lambda sum_i weight_i d_i / (normalize ? sum_i weight_i : 1)",
          .reference = "https://arxiv.org/abs/2311.03099",
          .params = TaskVectorParams(kLinear, /*normalize=*/false, /*rescale=*/true),
          .base = BaseUse::kRequired,
          .min_inputs = 0,
          .run = [](MethodContext& context) { return RunTaskVectors(context, kLinear); },
      },
      {
          .name = "dare_ties",
          .title = "DARE-TIES",
          .summary =
              "drops elements of the task vectors at random, then merges those that agree in sign",
          .formula = "d_i as dare_linear; D_i, m and out as ties",
          .reference = "https://arxiv.org/abs/2311.03099",
          .params = TaskVectorParams(kTies, /*normalize=*/false, /*rescale=*/true),
          .base = BaseUse::kRequired,
          .min_inputs = 0,
          .run = [](MethodContext& context) { return RunTaskVectors(context, kTies); },
      }};
  return methods;
}

}  // namespace pewter::methods
