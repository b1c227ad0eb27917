// cat: the factors of all adapters side by side, which is their sum exactly.
#include "merge/methods/adapters/common/elementwise.h"
#include "merge/methods/adapters/common/tasks.h"

namespace pewter::adapter_methods {

absl::Span<const AdapterMethod> cat() {
  static const AdapterMethod methods[] = {{
      .method = {.name = "cat",
                 .title = "Concatenation",
                 .summary = "stacks the factors of the adapters: the weighted sum, exactly, of the "
                            "sum of their ranks",
                 .formula = "A = [weight_1 s_1 A_1; weight_2 s_2 A_2; ...]; B = [B_1, B_2, ...]",
                 .reference = "https://huggingface.co/docs/peft/main/en/package_reference/"
                              "lora#peft.LoraModel.add_weighted_adapter",
                 .params = {adapters::WeightParam()}},
      .rank = AdapterMethod::Rank::kSum,
      .factors = &adapters::MakeStackTask,
  }};
  return methods;
}

}  // namespace pewter::adapter_methods
