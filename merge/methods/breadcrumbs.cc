// Model Breadcrumbs (arXiv 2312.06795): drop the smallest elements of the task vectors and the very
// largest, which are outliers; merged as task arithmetic (breadcrumbs) or with TIES' sign election.
#include "merge/methods/common/task_vectors.h"

namespace pewter::methods {
namespace {

constexpr TaskVectorOptions kLinear = {.sparsifier = Sparsifier::kBand};
constexpr TaskVectorOptions kTies = {.sparsifier = Sparsifier::kBand, .elect_sign = true};

}  // namespace

absl::Span<const MergeMethod> breadcrumbs() {
  static const MergeMethod methods[] = {
      {
          .name = "breadcrumbs",
          .title = "Model Breadcrumbs",
          .summary = "drops the smallest and the largest elements of the task vectors, then task "
                     "arithmetic",
          .formula =
              "d_i = x_i - base without its largest gamma and all but the next density elements; "
              "out = base + lambda sum_i weight_i d_i / (normalize ? sum_i weight_i : 1)",
          .reference = "https://arxiv.org/abs/2312.06795",
          .params = TaskVectorParams(kLinear, /*normalize=*/false, /*rescale=*/false),
          .base = BaseUse::kRequired,
          .min_inputs = 0,
          .selects = true,
          .run = [](MethodContext& context) { return RunTaskVectors(context, kLinear); },
      },
      {
          .name = "breadcrumbs_ties",
          .title = "Model Breadcrumbs with TIES",
          .summary = "drops the smallest and the largest elements of the task vectors, then merges "
                     "those that agree in sign",
          .formula = "d_i as breadcrumbs; D_i, m and out as ties",
          .reference = "https://arxiv.org/abs/2312.06795",
          .params = TaskVectorParams(kTies, /*normalize=*/false, /*rescale=*/false),
          .base = BaseUse::kRequired,
          .min_inputs = 0,
          .selects = true,
          .run = [](MethodContext& context) { return RunTaskVectors(context, kTies); },
      }};
  return methods;
}

}  // namespace pewter::methods
