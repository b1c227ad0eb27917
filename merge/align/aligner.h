// Aligner: a way to find the alignment of one model with another, as a recipe's `align` asks for
// it. Made and checked while planning, run before the merge.
//
// AlignmentSlot: the place of an alignment that a run has not found yet, and views that wait for
// it.
//
// Aligners are immutable; slots and views may be used from any thread.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "merge/align/alignment.h"
#include "merge/align/symmetry.h"
#include "merge/checkpoint/checkpoint.h"
#include "merge/forward/data.h"
#include "merge/recipe/recipe.h"
#include "store/object_store.h"

namespace pewter {

struct AlignerRun {
  const Symmetry& symmetry;
  const Checkpoint& reference;
  const Checkpoint& model;
  kernels::Backend& backend;
  int threads = 1;
  uint64_t seed = 0;
  std::function<absl::Status()> check;  // asked now and then; an error ends the search with it
  // Where aligners that need statistics keep them, and under which key; null: nowhere.
  std::shared_ptr<ObjectStore> store = nullptr;
  std::string statistics = "statistics.safetensors";
};

class Aligner {
 public:
  virtual ~Aligner() = default;
  virtual std::string name() const = 0;  // "permutation by weights"
  // Host memory that Align takes at most.
  virtual int64_t bytes() const = 0;
  // Allowed by the symmetry; `report` says what was found. The same whatever the threads.
  virtual absl::StatusOr<Alignment> Align(const AlignerRun& run) const = 0;
};

// `data` is what `calibration` names, null without it; `memory_bytes` are for the passes over it.
// InvalidArgument with the recipe's line for a value that is not supported, a group that the models
// do not have, data that is missing, and orthogonal maps of heads that the architecture does not
// allow.
absl::StatusOr<std::shared_ptr<const Aligner>> MakeAligner(const RecipeAlign& recipe,
                                                           const Symmetry& symmetry,
                                                           std::shared_ptr<const ForwardData> data,
                                                           int64_t memory_bytes);

class AlignmentSlot {
 public:
  // Null takes it out again.
  void Set(std::shared_ptr<const Alignment> alignment);
  std::shared_ptr<const Alignment> Get() const;

 private:
  mutable std::mutex mutex_;
  std::shared_ptr<const Alignment> alignment_;  // guarded by mutex_
};

// AlignSource with the alignment that `slot` has when the view is read: Internal when it has none.
// `source` itself where no group can move it.
std::shared_ptr<const TensorSource> AlignLater(std::shared_ptr<const Symmetry> symmetry,
                                               const SymmetricTensor& tensor,
                                               std::shared_ptr<const AlignmentSlot> slot,
                                               std::shared_ptr<const TensorSource> source);

}  // namespace pewter
