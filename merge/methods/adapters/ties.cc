// TIES (arXiv 2306.01708) as PEFT has it: signs are elected without the weights, and what agrees is
// divided by how many agree; of the factors, or of their products (ties_svd).
#include "merge/methods/adapters/common/elementwise.h"
#include "merge/methods/adapters/common/tasks.h"

namespace pewter::adapter_methods {
namespace {

constexpr Elementwise kTies = {.prune = Elementwise::Prune::kMagnitude, .elect_sign = true};

}  // namespace

absl::Span<const AdapterMethod> ties() {
  static const AdapterMethod methods[] = {
      {
          .method = {.name = "ties",
                     .title = "TIES",
                     .summary = "trims the factors by magnitude and takes the mean of the elements "
                                "that agree in sign",
                     .formula =
                         "c_i = weight_i s_i; for x = A and x = B: d_i = top_density(x_i); m = "
                         "sign(sum_i d_i), sign(0) = +; x = sum_{sign d_i = m} sqrt|c_i| d_i / "
                         "max(1, count of them), A's terms times sign(c_i)",
                     .reference = "https://arxiv.org/abs/2306.01708",
                     .params = {adapters::WeightParam(), adapters::DensityParam(/*random=*/false),
                                adapters::MajoritySignParam()}},
          .elementwise = kTies,
          .factors = &adapters::MakeFactorwiseTask,
      },
      {
          .method = {.name = "ties_svd",
                     .title = "TIES and SVD",
                     .summary = "trims the adapters' products by magnitude, takes the mean of the "
                                "elements that agree in sign and cuts it to a rank",
                     .formula =
                         "d_i = top_density(s_i B_i A_i); m = sign(sum_i d_i), sign(0) = +; U S "
                         "V^T = sum_{sign d_i = m} weight_i d_i / max(1, count of them); B = U "
                         "S, A = V^T as svd",
                     .reference = "https://arxiv.org/abs/2306.01708",
                     .params = adapters::WithSvdParams({adapters::WeightParam(),
                                                        adapters::DensityParam(/*random=*/false),
                                                        adapters::MajoritySignParam()})},
          .rank = AdapterMethod::Rank::kSvd,
          .elementwise = kTies,
          .factors = &adapters::MakeSvdTask,
      },
  };
  return methods;
}

}  // namespace pewter::adapter_methods
