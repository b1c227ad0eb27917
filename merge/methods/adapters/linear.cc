// linear: weighted sums of the factors, which have cross terms between adapters.
#include "merge/methods/adapters/common/elementwise.h"
#include "merge/methods/adapters/common/tasks.h"

namespace pewter::adapter_methods {

absl::Span<const AdapterMethod> linear() {
  static const AdapterMethod methods[] = {{
      .method = {.name = "linear",
                 .title = "Linear",
                 .summary = "sums the factors A and the factors B: cheap and of the same rank, but "
                            "not the sum of the adapters, as every B meets every A",
                 .formula = "c_i = weight_i s_i; A = sum_i sign(c_i) sqrt|c_i| A_i; B = sum_i "
                            "sqrt|c_i| B_i",
                 .reference = "https://huggingface.co/docs/peft/main/en/package_reference/"
                              "lora#peft.LoraModel.add_weighted_adapter",
                 .params = {adapters::WeightParam()}},
      .factors = &adapters::MakeFactorwiseTask,
  }};
  return methods;
}

}  // namespace pewter::adapter_methods
