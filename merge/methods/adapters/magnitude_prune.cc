// magnitude_prune: the largest elements of each adapter, summed; of the factors, or of their
// products (magnitude_prune_svd).
#include "merge/methods/adapters/common/elementwise.h"
#include "merge/methods/adapters/common/tasks.h"

namespace pewter::adapter_methods {
namespace {

constexpr Elementwise kPrune = {.prune = Elementwise::Prune::kMagnitude};

}  // namespace

absl::Span<const AdapterMethod> magnitude_prune() {
  static const AdapterMethod methods[] = {
      {
          .method = {.name = "magnitude_prune",
                     .title = "Magnitude pruning",
                     .summary = "keeps the largest elements of the factors and sums these",
                     .formula = "A and B as linear, of top_density(A_i) and top_density(B_i)",
                     .reference = "https://huggingface.co/docs/peft/main/en/package_reference/"
                                  "lora#peft.LoraModel.add_weighted_adapter",
                     .params = {adapters::WeightParam(), adapters::DensityParam(/*random=*/false)}},
          .elementwise = kPrune,
          .factors = &adapters::MakeFactorwiseTask,
      },
      {
          .method = {.name = "magnitude_prune_svd",
                     .title = "Magnitude pruning and SVD",
                     .summary =
                         "keeps the largest elements of the adapters' products, sums these and "
                         "cuts the sum to a rank",
                     .formula =
                         "d_i = top_density(s_i B_i A_i); U S V^T = sum_i weight_i d_i; B = U "
                         "S, A = V^T as svd",
                     .reference = "https://huggingface.co/docs/peft/main/en/package_reference/"
                                  "lora#peft.LoraModel.add_weighted_adapter",
                     .params = adapters::WithSvdParams(
                         {adapters::WeightParam(), adapters::DensityParam(/*random=*/false)})},
          .rank = AdapterMethod::Rank::kSvd,
          .elementwise = kPrune,
          .factors = &adapters::MakeSvdTask,
      },
  };
  return methods;
}

}  // namespace pewter::adapter_methods
