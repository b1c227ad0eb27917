// One model's tensors, unchanged or scaled (mergekit `passthrough`): layer stacking, dtype
// conversion.
#include "merge/methods/method.h"

namespace pewter::methods {
namespace {

absl::Status Run(MethodContext& context) {
  if (context.of_input(0, "scale") == nullptr) return context.Copy(0);
  kernels::WeightedSum op;
  op.count = 1;
  op.weight[0] = context.number(0, "scale");
  return context.Map(op, context.AllOperands());
}

}  // namespace

absl::Span<const MergeMethod> passthrough() {
  static const MergeMethod methods[] = {{
      .name = "passthrough",
      .title = "Passthrough",
      .summary =
          "one model's tensors as they are: stacks layers of several models, converts dtypes",
      .formula = "out = scale x",
      .reference = "https://github.com/arcee-ai/mergekit",
      .params = {{.name = "scale",
                  .help = "factor for the tensor; not given: the bytes stay",
                  .scope = ParamScopeKind::kModel,
                  .fallback = Unset{}}},
      .max_inputs = 1,
      .run = &Run,
  }};
  return methods;
}

}  // namespace pewter::methods
