// LoraAdapter: a PEFT LoRA adapter (its files: lora_file.h), opened against the tensors of a model.
//
// The adapted tensor is W + alpha / r * B A (alpha / sqrt(r) with use_rslora), transposed where W
// is stored [in, out] (fan_in_fan_out, embeddings). A feature that changes this formula and is not
// supported (DoRA, ...) is FailedPrecondition that names it. Immutable once opened; views may be
// read from any thread and keep the adapter alive.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "merge/checkpoint/checkpoint.h"
#include "merge/checkpoint/safetensors.h"
#include "merge/checkpoint/tensor_source.h"
#include "store/object_store.h"

namespace pewter {

class LoraAdapter : public std::enable_shared_from_this<LoraAdapter> {
 public:
  // `find` gives the model's tensors (null when there is no such tensor). `name` is for messages.
  static absl::StatusOr<std::shared_ptr<const LoraAdapter>> Open(
      std::shared_ptr<ObjectStore> store, std::string name,
      absl::FunctionRef<const TensorInfo*(absl::string_view)> find);

  const InputFile& config_file() const { return config_file_; }
  const InputFile& file() const { return file_; }  // of the weights
  const std::vector<std::string>& warnings() const { return warnings_; }
  bool Changes(absl::string_view tensor) const { return changes_.contains(tensor); }
  // A view of `stored`, which is the model's tensor that Changes() is true for. `file` is the index
  // of the adapter's file for a ReadObserver.
  std::shared_ptr<const TensorSource> Apply(absl::string_view tensor,
                                            std::shared_ptr<const TensorSource> stored,
                                            int file) const;

  // A pair of factors: delta = scale * L R with L [rows, rank], R [rank, cols].
  struct LowRank {
    TensorInfo a;  // [rank, in]
    TensorInfo b;  // [out, rank]
    int64_t rank = 0;
    float scale = 0;
    bool transposed = false;  // L = A^T, R = B^T; else L = B, R = A
  };

 private:
  struct Change {
    bool has_replacement = false;
    TensorInfo replacement;
    bool has_bias = false;
    TensorInfo bias;  // added to the model's, times bias_scale
    float bias_scale = 1;
    bool has_low_rank = false;
    LowRank low_rank;
  };
  class View;
  class Factors;

  LoraAdapter() = default;

  std::string name_;
  InputFile config_file_, file_;
  std::vector<std::string> warnings_;
  absl::flat_hash_map<std::string, Change> changes_;  // by the model's tensor
  std::shared_ptr<Factors> factors_;
};

}  // namespace pewter
