// ForwardModel: a model as a forward pass sees it: its configuration, and tensors by name.
//
// Tensors may come from a checkpoint, from views of it (an adapter, an alignment) or from several
// (an interpolation): whatever is a TensorSource of a floating type. Values; copied freely. The
// lookup is called and its sources are read from one thread at a time.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "merge/checkpoint/checkpoint.h"
#include "merge/checkpoint/tensor_source.h"

namespace pewter {

// By the name that the checkpoint stores; null when the model has no such tensor.
using TensorLookup =
    std::function<absl::StatusOr<std::shared_ptr<const TensorSource>>(absl::string_view tensor)>;

struct ForwardModel {
  std::string name;         // for messages and artefacts
  std::string config_json;  // config.json's text
  TensorLookup tensors;
  // Says which bytes the tensors have, so that an interrupted pass is resumed only on the same
  // ones. Empty: it is not resumed.
  std::string identity;
};

// All of a checkpoint, with its adapter. FailedPrecondition for a raw one, which has no
// configuration.
absl::StatusOr<ForwardModel> MakeForwardModel(std::shared_ptr<const Checkpoint> checkpoint);

}  // namespace pewter
