// The files of a PEFT LoRA adapter, sorted by what they do to which module of a model.
//
//   adapter_config.json           peft_type, r, lora_alpha, use_rslora, rank_pattern, ...
//   adapter_model.safetensors, or adapter_model.bin of torch.save:
//     base_model.model.MODULE.lora_A.weight [r, in], of a convolution [r, in, h, w]
//     base_model.model.MODULE.lora_B.weight [out, r], of a convolution [out, r, 1, 1]
//     base_model.model.MODULE.lora_embedding_A [r, tokens], .lora_embedding_B [dim, r]
//     base_model.model.MODULE.lora_B.bias [out]: added to the module's bias like the product of the
//                                                factors (lora_bias)
//     base_model.model.TENSOR: takes the place of the model's (modules_to_save, trained biases)
//
// Headers and the small configuration only. Names of tensors may say the adapter's name
// (lora_A.default.weight) and where PEFT keeps things (modules_to_save, base_layer).
#pragma once

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "merge/checkpoint/lora_config.h"
#include "merge/checkpoint/tensor_file.h"
#include "store/object_store.h"

namespace pewter {

struct AdapterConfigFile {
  InputFile file;
  std::string text;
};
// NotFound when there is none: the folder is no adapter.
absl::StatusOr<AdapterConfigFile> ReadAdapterConfig(std::shared_ptr<ObjectStore> store);

// The file of an adapter's weights: adapter_model.safetensors, else adapter_model.bin.
absl::StatusOr<TensorFile> ReadAdapterWeights(std::shared_ptr<ObjectStore> store);

// The factors of a module: of the rank that the configuration says, floating, and matrices but for
// a kernel's extents.
struct LoraFactors {
  TensorInfo a;
  TensorInfo b;
  bool embedding = false;
};

struct LoraTensors {
  std::map<std::string, LoraFactors> factors;  // by module
  std::map<std::string, TensorInfo> biases;    // of B, by module
  // The tensor of the model that one takes the place of, and the one; in the file's order.
  std::vector<std::pair<std::string, TensorInfo>> replacements;
};

// FailedPrecondition that names `file` and the tensor or module for what is no LoRA (DoRA, ...), a
// factor that is missing or there twice, and factors that do not have the configuration's rank.
absl::StatusOr<LoraTensors> SortLoraTensors(absl::Span<const TensorInfo> tensors,
                                            const LoraConfig& config, absl::string_view file);

}  // namespace pewter
