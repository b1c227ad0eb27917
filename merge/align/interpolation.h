// Models on the line between a reference and a model seen through its alignment: what loss barriers
// are measured on.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "merge/align/alignment.h"
#include "merge/align/symmetry.h"
#include "merge/checkpoint/checkpoint.h"
#include "merge/forward/model.h"

namespace pewter {

// lambda * reference + (1 - lambda) * aligned, each tensor in float32. Tensors of one name, as the
// two store them; at 0 and 1 they are the one model's. FailedPrecondition for tensors of different
// shapes. The checkpoints and views that it makes are kept alive; the alignment is copied.
absl::StatusOr<ForwardModel> Interpolate(const Symmetry& symmetry,
                                         std::shared_ptr<const Checkpoint> reference,
                                         std::shared_ptr<const Checkpoint> model,
                                         const Alignment& alignment, double lambda);

}  // namespace pewter
