// Plan: immutable data made from a recipe and the checkpoints' headers: every output tensor with
// its inputs, its method and resolved parameters, its place in an output shard. Everything that can
// be wrong with the user's input is wrong here. The one exception to "headers only": tensors that
// are not floating must be equal in all inputs, so they are compared here.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "merge/checkpoint/architecture.h"
#include "merge/checkpoint/checkpoint.h"
#include "merge/methods/method.h"
#include "merge/methods/tensor_task.h"
#include "merge/plan/parameters.h"
#include "merge/recipe/recipe.h"

namespace pewter {

class Aligner;        // merge/align/aligner.h
class AlignmentSlot;  // likewise
class ForwardData;    // merge/forward/data.h
class Symmetry;       // merge/align/symmetry.h

struct PlanOptions {
  int64_t memory_bytes = 0;  // 0: 4 GiB or a quarter of RAM, the smaller
  int threads = 0;           // 0: one for each core; only for the memory estimate
  std::string device = "auto";
  uint64_t seed = 0;
  bool strict = false;       // warnings are errors
  bool allow_mixed = false;  // architectures of inputs may differ (mergekit's --allow-crimes)
  bool truncate_vocabularies =
      false;  // to the fewest rows (mergekit's --unsafe-truncate-embeddings)
  RawNames raw_names = RawNames::kSame;  // mergekit-pytorch's --tensor-intersection, --tensor-union
  bool name_by_name = false;  // of a single model: all tensors, whatever its architecture knows
  int64_t shard_bytes =
      5'000'000'000;  // data bytes of an output shard; a larger tensor gets its own
  bool copy_tokenizer = true;
  bool write_model_card = true;
};

// One input of one output tensor.
struct PlanInput {
  int model = 0;       // index into Plan::models
  std::string tensor;  // name in the checkpoint; empty for what is made and not read
  std::shared_ptr<const TensorSource> source;  // LoRA applied, cast to the work dtype
  ParamValues params;                          // of scope kModel
  ParamOrigins origins;                        // of params
  int64_t layer = -1;                          // of the model; -1: no layer's
  // What `source` does besides reading: "LoRA ./adapter", "F32 to BF16", "rows by token".
  std::vector<std::string> views;
};

// A tensor of the output file.
struct PlanPart {
  std::string name;
  Shape shape;
};

struct PlanTensor {
  std::string name;
  DType dtype = DType::kF32;  // of the output
  Shape shape;
  const MergeMethod* method =
      nullptr;  // null, as is task: the inputs are copied, one after the other (buffers, single
                // optional inputs; experts that are stacked). They have one dtype
  std::shared_ptr<const TensorTask> task;  // instead of what the method runs
  std::string kind;                        // Treatment::kind
  bool measured = false;                   // Treatment::measured
  // What a task computes together and the file holds one after the other (factors of a matrix);
  // `name` is then for messages alone and `shape` flat. Empty: the tensor itself.
  std::vector<PlanPart> parts;
  std::vector<PlanInput> inputs;  // without the base
  std::optional<PlanInput> base;
  std::vector<PlanInput> statistics;  // of the inputs, in their order; empty: none
  DType result_dtype =
      DType::kF32;  // the result is rounded to it before `dtype` (mergekit: dtype, then out_dtype)
  ParamValues params;    // of scopes kTensor and kJob
  ParamOrigins origins;  // of params
  int64_t layer = -1;    // of the output's module; -1: no layer's
  // Decisions that neither recipe nor method tell: "copied: no other model has it".
  std::vector<std::string> notes;
  int shard = 0;
  int64_t offset = 0;  // in the shard's file
  int64_t bytes = 0;
};

struct PlanShard {
  std::string file;          // "model-00001-of-00003.safetensors", "model.safetensors"
  std::string header;        // bytes before the data
  int64_t bytes = 0;         // of the whole file
  std::vector<int> tensors;  // indices into Plan::tensors, in file order
};

// A small file of the output: written from `text`, or copied from a model's folder.
struct PlanFile {
  std::string name;
  std::string text;
  int model = -1;  // >= 0: copied from there
};

struct PlanModel {
  std::string ref;
  std::shared_ptr<const Checkpoint> checkpoint;
  int file_base = 0;  // its first file in Plan::files
};

// A model that is reordered, before it is merged, so that its features lie where the reference's
// do.
struct PlanAlignment {
  int model = 0, reference = 0;  // indices into Plan::models
  std::shared_ptr<const Symmetry> symmetry;
  std::shared_ptr<const Aligner> aligner;
  std::shared_ptr<AlignmentSlot> slot;  // what the model's views wait for
  std::string file;                     // of the output, for the alignment
  // Second moments of both models on this are found after the alignment; null: nobody needs them.
  std::shared_ptr<const ForwardData> statistics;
  // The model must have the same loss before and after on this; null: nobody asked.
  std::shared_ptr<const ForwardData> verify;
};

struct EvaluationPlan;  // merge/evaluate/evaluation.h
struct Plan;
class StageStore;

// A model that the recipe makes on the way, and that other stages or the output are made from.
struct PlanStage {
  std::string name;
  std::shared_ptr<const Plan> plan;
  std::shared_ptr<StageStore> store;  // the model, as far as the plan knows it
  bool used = true;                   // false: nothing depends on it
};

struct Plan {
  std::vector<PlanStage> stages;  // in the order to merge them; they have no stages themselves
  std::string recipe_text;
  std::string method;
  std::string architecture;
  PlanOptions options;  // memory, threads and device resolved
  std::vector<PlanModel> models;
  std::vector<InputFile> files;           // of all models, in order
  std::vector<std::string> data_digests;  // of data that the output follows from, besides models
  // Found before the first tensor is merged; the views of these models do the rest.
  std::vector<PlanAlignment> alignments;
  std::vector<PlanTensor> tensors;
  // Run over the measured tensors before the first tensor is merged; null where there are none.
  std::function<std::unique_ptr<Measure>()> measure;
  std::vector<PlanShard> shards;
  // What is measured once the output is there; null: nothing.
  std::shared_ptr<const EvaluationPlan> evaluation;
  std::vector<PlanFile> aux_files;  // tokenizer, generation config, model card, recipe
  std::string config_json;          // written with the index, last; empty for raw checkpoints
  std::string config_file = "config.json";  // where to; adapter_config.json for an adapter
  std::string index_json;                   // empty for a single shard with nothing beside it
  std::vector<std::string> warnings;  // nothing is dropped, defaulted or cast silently; stages too
  std::map<std::string, std::vector<std::string>>
      unused_tensors;                       // model -> tensors that no output reads
  std::vector<std::string> absent_tensors;  // optional ones that no model has
  bool report = false;                      // the manifest tells what tasks found
  int64_t read_bytes = 0;                   // stored bytes that one pass over all inputs reads
  int64_t write_bytes = 0;
  int64_t peak_bytes = 0;   // estimate of anonymous memory, stages included
  std::string fingerprint;  // SHA-256 of what decides the output's bytes: recipe, inputs, options,
                            // format version
};

// Stages are planned from the plans of those that they depend on, so nothing has been merged when
// all is known to be right.
absl::StatusOr<Plan> MakePlan(const Recipe& recipe, const PlanOptions& options);

}  // namespace pewter
