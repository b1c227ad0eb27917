// Checkpoint: an opened model. Headers and small JSON only; tensor bytes are read through
// TensorSource.
//
// Kinds: a Hugging Face folder (config.json; model.safetensors, or model.safetensors.index.json
// with its shards; else pytorch_model.bin likewise), or a raw checkpoint (one .safetensors, .bin,
// .pt or .pth file, or a folder without config.json). An adapter (PEFT LoRA) makes the tensors it
// touches views, or is opened by itself: a raw checkpoint of its own tensors. Shared between
// threads once opened.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "merge/checkpoint/tensor_file.h"
#include "merge/checkpoint/tensor_source.h"
#include "merge/recipe/recipe.h"
#include "store/object_store.h"

namespace pewter {

class Checkpoint {
 public:
  // NotFound when the model is not there; DataLoss or FailedPrecondition for a damaged or
  // inconsistent one: truncated shards, an index that names files outside the folder, tensors in
  // the index that no shard has (and the reverse), the same tensor twice, adapters whose factors do
  // not fit. All shards' headers are read here.
  static absl::StatusOr<std::shared_ptr<const Checkpoint>> Open(const ModelRef& ref);
  // The same for a model that is the folder `store`, whatever ref's path says.
  static absl::StatusOr<std::shared_ptr<const Checkpoint>> Open(const ModelRef& ref,
                                                                std::shared_ptr<ObjectStore> store);
  // The folder of an adapter without a model, which ref's path says. NotFound when it is none.
  static absl::StatusOr<std::shared_ptr<const Checkpoint>> OpenAdapter(const ModelRef& ref);

  virtual ~Checkpoint() = default;
  virtual const ModelRef& ref() const = 0;
  virtual ObjectStore& store() const = 0;  // of the model's folder (not the adapter's)
  virtual bool raw() const = 0;
  // config.json's text; empty for a raw checkpoint. Of an adapter by itself adapter_config.json's.
  virtual const std::string& config_json() const = 0;
  // What was left out while opening.
  virtual const std::vector<std::string>& warnings() const = 0;
  // Files in a fixed order, the adapter's configuration and weights last.
  virtual const std::vector<InputFile>& files() const = 0;
  // Names of the model's tensors, sorted (adapter tensors are not among them).
  virtual const std::vector<std::string>& tensor_names() const = 0;
  // Null when there is no such tensor. dtype and shape as stored.
  virtual const TensorInfo* Find(absl::string_view tensor) const = 0;
  // Index into files() of the file that stores a tensor; -1 when there is no such tensor.
  virtual int FileOf(absl::string_view tensor) const = 0;
  // A readable view of a tensor with the adapter applied in float32 and rounded to the stored
  // dtype. `file_base` is added to file indices given to ReadObserver. NotFound when there is no
  // such tensor.
  virtual absl::StatusOr<std::shared_ptr<const TensorSource>> OpenTensor(absl::string_view tensor,
                                                                         int file_base) const = 0;
  // True when the adapter changes this tensor.
  virtual bool Adapted(absl::string_view tensor) const = 0;
};

// A view whose elements are converted to `dtype` (round to nearest even). Returns `source` itself
// when nothing changes.
std::shared_ptr<const TensorSource> CastSource(std::shared_ptr<const TensorSource> source,
                                               DType dtype);

}  // namespace pewter
