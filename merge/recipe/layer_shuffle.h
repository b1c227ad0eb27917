// Layers of several models, drawn at random, as a recipe that stacks them.
//
// A pure function of its arguments: draws come from Philox, keyed by the seed.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace pewter {

struct ShuffleModel {
  std::string ref;
  double weight = 1;  // chance of a layer to come from it; of kFull the share of its layers
  int64_t layers = 0;
};

enum class ShuffleOrder {
  kKept,  // layer i is layer i of one of the models; there are as many as the first model has
  kFull,  // each model gives weight * layers of its layers, any of them, in any order
};

// The text of a passthrough recipe; `dtype` may be empty. InvalidArgument for weights that are
// negative, not finite or all 0, for a model with fewer layers than the first (kKept), and when no
// layer is left (kFull).
absl::StatusOr<std::string> ShuffleLayers(absl::Span<const ShuffleModel> models, ShuffleOrder order,
                                          uint64_t seed, const std::string& dtype);

}  // namespace pewter
