// A model as a forward pass sees it through its alignment.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "merge/align/aligner.h"
#include "merge/align/symmetry.h"
#include "merge/checkpoint/checkpoint.h"
#include "merge/forward/model.h"

namespace pewter {

// Its tensors are AlignLater's, so the alignment is the one that `slot` has when they are read.
// FailedPrecondition for a model without a configuration.
absl::StatusOr<ForwardModel> AlignedModel(std::shared_ptr<const Symmetry> symmetry,
                                          std::shared_ptr<const Checkpoint> model,
                                          std::shared_ptr<const AlignmentSlot> slot);
// By an alignment that is known. FailedPrecondition for one that the symmetry does not allow.
absl::StatusOr<ForwardModel> AlignedModel(std::shared_ptr<const Symmetry> symmetry,
                                          std::shared_ptr<const Checkpoint> model,
                                          Alignment alignment);

}  // namespace pewter
