// Architectures are data: merge/checkpoint/architectures/*.json (compiled in) name every tensor of
// a family. Unknown families are inferred from tensor names. Semantics are mergekit's (names,
// aliases, tied and optional weights).
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "merge/checkpoint/checkpoint.h"

namespace pewter {

// One of several sets of tensors of which every layer has exactly one: attention or convolution,
// experts one by one or fused.
struct ArchChoice {
  int id = 0;          // the same for all sets of one choice; 0: always there
  std::string set;     // "fused experts"
  bool needed = true;  // false: a layer may have none of the sets
};

// A tensor of the architecture with its layer number filled in.
struct ArchTensor {
  std::string name;                  // canonical: the output's name, what filters see
  std::vector<std::string> aliases;  // other names that a checkpoint may use, tried in order
  std::vector<std::string>
      tied_names;  // tensors that hold the same values when this one is not stored
  bool optional = false;
  bool vocabulary = false;  // rows are tokens (axis 0): subject to the tokenizer stage
  ArchChoice choice;
};

// Where a component's tensors lie. Layer tensors are templates, instantiated by LayerTensors.
class ArchModule {
 public:
  virtual ~ArchModule() = default;
  virtual const std::string& name() const = 0;  // "default", "encoder", ...
  virtual const std::vector<ArchTensor>& pre() const = 0;
  virtual const std::vector<ArchTensor>& post() const = 0;
  virtual std::vector<ArchTensor> LayerTensors(int64_t layer) const = 0;
  // Layers of this component in `model` (from its config key, or counted when inferred).
  virtual absl::StatusOr<int64_t> LayerCount(const Checkpoint& model) const = 0;
  // config.json's keys that hold the layer count ("num_hidden_layers"; dotted for nested): those
  // that a configuration has must all be kept right. Empty when there is none.
  virtual const std::vector<std::string>& layer_count_keys() const = 0;
  // config.json keys of other per-layer lists that a frankenmerge must slice alike ("layer_types").
  virtual std::vector<std::string> per_layer_keys() const = 0;
};

class Architecture {
 public:
  virtual ~Architecture() = default;
  virtual const std::string& name() const = 0;  // "LlamaForCausalLM", "inferred", "raw"
  virtual const std::vector<std::unique_ptr<ArchModule>>& modules() const = 0;
  // Extra small files that belong to the family and are copied to the output.
  virtual const std::vector<std::string>& tagalong_files() const = 0;
};

// The name under which a model stores a tensor: its own, an alias or, `with_tied`, that of a tensor
// with the same values. Empty when it does not.
std::string StoredName(const Checkpoint& model, const ArchTensor& tensor, bool with_tied);

// Which of the names of raw checkpoints are merged.
enum class RawNames {
  kSame,          // all; every checkpoint must have them
  kIntersection,  // those that every checkpoint has
  kUnion,         // all, each from the checkpoints that have it
};
struct RawNaming {
  RawNames names = RawNames::kSame;
  // Null, or an input whose own names are not merged: a base that the recipe does not list.
  const Checkpoint* base = nullptr;
};

// The architecture that all inputs share, with as many experts as they have. FailedPrecondition
// when they differ (unless `allow_mixed`, then the first's), naming both. Raw checkpoints: one
// module whose pre() are the names that `raw` asks for.
absl::StatusOr<std::shared_ptr<const Architecture>> ResolveArchitecture(
    absl::Span<const std::shared_ptr<const Checkpoint>> inputs, bool allow_mixed,
    const RawNaming& raw = {});

// `family`, but with all of the model's tensors, name by name: nothing that the family does not
// know is left out.
std::shared_ptr<const Architecture> NameByName(const Architecture& family, const Checkpoint& model);

// `family` with what it does not know of the models' tensors as tensors of its last module,
// optional where a model lacks them: for what must keep every tensor. The same object when it knows
// all.
absl::StatusOr<std::shared_ptr<const Architecture>> WithAllTensors(
    std::shared_ptr<const Architecture> family,
    absl::Span<const std::shared_ptr<const Checkpoint>> models);

}  // namespace pewter
