// DARE (arXiv 2311.03099) as PEFT has it: elements are dropped at random and the rest divided by
// the density; of the factors, or of their products (*_svd).
#include "merge/methods/adapters/common/elementwise.h"
#include "merge/methods/adapters/common/tasks.h"

namespace pewter::adapter_methods {
namespace {

constexpr Elementwise kLinear = {.prune = Elementwise::Prune::kRandom};
constexpr Elementwise kTies = {.prune = Elementwise::Prune::kRandom, .elect_sign = true};

}  // namespace

absl::Span<const AdapterMethod> dare() {
  static const AdapterMethod methods[] = {
      {
          .method = {.name = "dare_linear",
                     .title = "DARE",
                     .summary = "drops elements of the factors at random and sums the rest",
                     .formula = "A and B as linear, of x_i Bernoulli(density) / density",
                     .reference = "https://arxiv.org/abs/2311.03099",
                     .params = {adapters::WeightParam(), adapters::DensityParam(/*random=*/true)}},
          .elementwise = kLinear,
          .factors = &adapters::MakeFactorwiseTask,
      },
      {
          .method = {.name = "dare_linear_svd",
                     .title = "DARE and SVD",
                     .summary =
                         "drops elements of the adapters' products at random, sums the rest and "
                         "cuts the sum to a rank",
                     .formula = "d_i = s_i B_i A_i Bernoulli(density) / density; U S V^T = sum_i "
                                "weight_i d_i; B = U S, A = V^T as svd",
                     .reference = "https://arxiv.org/abs/2311.03099",
                     .params = adapters::WithSvdParams(
                         {adapters::WeightParam(), adapters::DensityParam(/*random=*/true)})},
          .rank = AdapterMethod::Rank::kSvd,
          .elementwise = kLinear,
          .factors = &adapters::MakeSvdTask,
      },
      {
          .method = {.name = "dare_ties",
                     .title = "DARE-TIES",
                     .summary =
                         "drops elements of the factors at random and takes the mean of those "
                         "that agree in sign",
                     .formula = "A and B as ties, with d_i = x_i Bernoulli(density) / density",
                     .reference = "https://arxiv.org/abs/2311.03099",
                     .params = {adapters::WeightParam(), adapters::DensityParam(/*random=*/true),
                                adapters::MajoritySignParam()}},
          .elementwise = kTies,
          .factors = &adapters::MakeFactorwiseTask,
      },
      {
          .method = {.name = "dare_ties_svd",
                     .title = "DARE-TIES and SVD",
                     .summary =
                         "drops elements of the adapters' products at random, takes the mean of "
                         "those that agree in sign and cuts it to a rank",
                     .formula = "as ties_svd, with d_i = s_i B_i A_i Bernoulli(density) / density",
                     .reference = "https://arxiv.org/abs/2311.03099",
                     .params = adapters::WithSvdParams({adapters::WeightParam(),
                                                        adapters::DensityParam(/*random=*/true),
                                                        adapters::MajoritySignParam()})},
          .rank = AdapterMethod::Rank::kSvd,
          .elementwise = kTies,
          .factors = &adapters::MakeSvdTask,
      },
  };
  return methods;
}

}  // namespace pewter::adapter_methods
