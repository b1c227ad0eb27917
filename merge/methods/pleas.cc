// PLeaS (arXiv 2407.02447): merges two models of which one is aligned with the other. Linear layers
// are fitted by the plan (merge/plan/fitted_layers.h); here is what becomes of the other tensors.
#include "merge/methods/method.h"

namespace pewter::methods {
namespace {

absl::Status Run(MethodContext& context) {
  kernels::WeightedSum op;
  op.count = context.inputs();
  for (int i = 0; i < op.count; ++i) op.weight[i] = 1;
  op.divisor = op.count;
  return context.Map(op, context.AllOperands());
}

}  // namespace

absl::Span<const MergeMethod> pleas() {
  static const MergeMethod methods[] = {{
      .name = "pleas",
      .title = "PLeaS",
      .summary = "fits the layers of a merged model to those of two aligned ones by least squares; "
                 "pairs of features that are least alike may stay apart",
      .formula = "layers: argmin_W |X W^T + b - Y|^2 + ridge, X and Y the means of both models' "
                 "inputs and outputs (what stays apart: its own); other tensors: (x_1 + x_2) / 2",
      .reference = "https://arxiv.org/abs/2407.02447",
      .params = {{.name = "budget",
                  .help = "work of the merged model's linear layers for a token (but the output "
                          "head's), where that of one model is 1; above 1 feed-forward units stay "
                          "apart, of all layers as many",
                  .scope = ParamScopeKind::kJob,
                  .fallback = 1.0,
                  .min = 1},
                 {.name = "ridge",
                  .help = "pull towards the mean of the weights, in mean variances of a layer's "
                          "inputs",
                  .scope = ParamScopeKind::kJob,
                  .fallback = 0.01,
                  .min = 0}},
      .min_inputs = 2,
      .max_inputs = 2,
      .single_input_passes = true,
      .fits_layers = true,
      .run = &Run,
  }};
  return methods;
}

}  // namespace pewter::methods
