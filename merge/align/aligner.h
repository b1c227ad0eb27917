// Aligner: a way to find the alignment of one model with another, as a recipe's `align` asks for
// it. Made and checked while planning, run before the merge.
//
// AlignmentSlot: the place of what a run has not found out yet about a model that is aligned, and
// views that wait for it.
//
// Aligners are immutable; slots and views may be used from any thread.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "merge/align/alignment.h"
#include "merge/align/pleas.h"
#include "merge/align/symmetry.h"
#include "merge/checkpoint/checkpoint.h"
#include "merge/forward/data.h"
#include "merge/forward/statistics.h"
#include "merge/recipe/recipe.h"
#include "store/object_store.h"

namespace pewter {

struct AlignerRun {
  const Symmetry& symmetry;
  const Checkpoint& reference;
  const Checkpoint& model;
  kernels::Backend& backend;  // of forward passes
  kernels::Backend& host;     // of matrices: the CPU's
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
  // What aligned models lose, as a sentence for the plan's warnings; empty: nothing, they compute
  // what they did.
  virtual std::string caveat() const { return ""; }
  // Features of a group that a linear map may mix; 0: they are only reordered.
  virtual int64_t MapWidth(const Symmetry& symmetry, const SymmetryGroup& group) const { return 0; }
  // Allowed by the symmetry; `report` says what was found. The same whatever the threads.
  virtual absl::StatusOr<Alignment> Align(const AlignerRun& run) const = 0;
};

// What a recipe's alignment is made with.
struct AlignerInputs {
  // What `calibration` and `objective` name; null without them.
  std::shared_ptr<const ForwardData> calibration, objective;
  int64_t memory_bytes = 0;  // for the passes over them
  // Layers of the merged model are fitted to what both models' do (PLeaS): statistics have all
  // products, and models are compared as they are with their layers fitted.
  std::optional<Ridge> fit;
};
// InvalidArgument with the recipe's line for keys that do not fit together, a group that the models
// do not have, data that is missing, and orthogonal maps of heads that the architecture does not
// allow.
absl::StatusOr<std::shared_ptr<const Aligner>> MakeAligner(const RecipeAlign& recipe,
                                                           const Symmetry& symmetry,
                                                           AlignerInputs inputs);

class AlignmentSlot {
 public:
  AlignmentSlot() = default;
  // `map_widths`: Aligner::MapWidth of each group, which memory is planned by.
  explicit AlignmentSlot(std::vector<int64_t> map_widths) : map_widths_(std::move(map_widths)) {}

  // Null takes it out again.
  void Set(std::shared_ptr<const Alignment> alignment);
  std::shared_ptr<const Alignment> Get() const;
  // Second moments of the reference (model 0) and the model (1), where somebody needs them.
  void SetStatistics(std::shared_ptr<const StatisticsReader> statistics);
  std::shared_ptr<const StatisticsReader> statistics() const;

  int64_t MapWidth(int group) const {
    return group < static_cast<int>(map_widths_.size()) ? map_widths_[group] : 0;
  }

 private:
  const std::vector<int64_t> map_widths_ = {};
  mutable std::mutex mutex_;
  std::shared_ptr<const Alignment> alignment_;          // guarded by mutex_
  std::shared_ptr<const StatisticsReader> statistics_;  // guarded by mutex_
};

// AlignSource with the alignment that `slot` has when the view is read: Internal when it has none.
// `source` itself where no group can move it.
std::shared_ptr<const TensorSource> AlignLater(std::shared_ptr<const Symmetry> symmetry,
                                               const SymmetricTensor& tensor,
                                               std::shared_ptr<const AlignmentSlot> slot,
                                               std::shared_ptr<const TensorSource> source);

}  // namespace pewter
