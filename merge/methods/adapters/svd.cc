// svd: the weighted sum of the adapters, cut to a rank.
#include "merge/methods/adapters/common/elementwise.h"
#include "merge/methods/adapters/common/tasks.h"

namespace pewter::adapter_methods {

absl::Span<const AdapterMethod> svd() {
  static const AdapterMethod methods[] = {{
      .method = {.name = "svd",
                 .title = "SVD",
                 .summary = "the best approximation of a given rank to the weighted sum of the "
                            "adapters",
                 .formula = "U S V^T = sum_i weight_i s_i B_i A_i; B = U S, A = V^T of the "
                            "svd_rank largest singular values",
                 .reference = "https://huggingface.co/docs/peft/main/en/package_reference/"
                              "lora#peft.LoraModel.add_weighted_adapter",
                 .params = adapters::WithSvdParams({adapters::WeightParam()})},
      .rank = AdapterMethod::Rank::kSvd,
      .factors = &adapters::MakeSvdTask,
  }};
  return methods;
}

}  // namespace pewter::adapter_methods
