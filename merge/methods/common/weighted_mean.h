// The weighted mean of the models: what methods that know more of some tensors do with the others.
#pragma once

#include "merge/methods/method.h"

namespace pewter::methods {

// `weight`, set per model, 1.
Param MeanWeightParam(const char* help);

// InvalidArgument when the weights sum to 0.
absl::Status CheckWeights(absl::Span<const double> weights);

// out = sum_i weight_i x_i / sum_i weight_i
absl::Status RunWeightedMean(MethodContext& context);

}  // namespace pewter::methods
