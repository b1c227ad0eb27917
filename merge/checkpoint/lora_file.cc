#include "merge/checkpoint/lora_file.h"

#include <optional>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "base/digest.h"
#include "base/dtype_names.h"
#include "base/status.h"
#include "merge/checkpoint/printable.h"

namespace pewter {
namespace {

constexpr absl::string_view kConfig = "adapter_config.json";
constexpr absl::string_view kWeights = "adapter_model.safetensors";
constexpr absl::string_view kTorchWeights = "adapter_model.bin";
constexpr int64_t kMaxConfigBytes = int64_t{256} << 10;

enum class Role { kFactorA, kFactorB, kBias, kReplacement };

// What a tensor of the adapter's file is, from its name.
struct AdapterTensor {
  Role role = Role::kReplacement;
  std::string target;  // a module for factors and their bias, a tensor for replacements
  bool embedding = false;
};

// Removes ".modules_to_save" or ".modules_to_save.ADAPTER", and ".base_layer".
std::string PlainName(absl::string_view name) {
  std::vector<absl::string_view> parts = absl::StrSplit(name, '.');
  std::vector<absl::string_view> kept;
  for (size_t i = 0; i < parts.size(); ++i) {
    if (parts[i] == "base_layer") continue;
    if (parts[i] == "modules_to_save") {
      if (i + 1 < parts.size() && parts[i + 1] == "default") ++i;
      continue;
    }
    kept.push_back(parts[i]);
  }
  return absl::StrJoin(kept, ".");
}

absl::StatusOr<AdapterTensor> Classify(absl::string_view name) {
  absl::ConsumePrefix(&name, "base_model.model.");
  const size_t at = name.rfind(".lora_");
  if (at == absl::string_view::npos) return AdapterTensor{.target = PlainName(name)};
  // lora_A.weight, lora_A.default.weight, lora_embedding_A, lora_embedding_A.default
  std::vector<absl::string_view> parts = absl::StrSplit(name.substr(at + 1), '.');
  AdapterTensor tensor{.target = std::string(name.substr(0, at))};
  const absl::string_view kind = parts.front();
  tensor.embedding = absl::StartsWith(kind, "lora_embedding_");
  tensor.role = absl::EndsWith(kind, "_A") ? Role::kFactorA : Role::kFactorB;
  if (kind == "lora_magnitude_vector") {
    return absl::FailedPreconditionError("DoRA (lora_magnitude_vector) is not supported");
  }
  const bool factor = kind == "lora_A" || kind == "lora_B" || kind == "lora_embedding_A" ||
                      kind == "lora_embedding_B";
  if (kind == "lora_B" && parts.size() > 1 && parts.back() == "bias") {  // lora_bias
    tensor.role = Role::kBias;
    parts.pop_back();
  }
  if (!tensor.embedding && parts.size() > 1 && parts.back() == "weight") parts.pop_back();
  if (!factor || parts.size() > 2) {
    return absl::FailedPreconditionError("it is not a tensor of a LoRA adapter");
  }
  return tensor;
}

absl::Status CheckFactors(const TensorInfo& a, const TensorInfo& b, int64_t rank) {
  for (const TensorInfo* info : {&a, &b}) {
    if (!IsFloat(info->dtype)) {
      return absl::FailedPreconditionError(absl::StrCat("tensor ", Printable(info->name), " is ",
                                                        SafetensorsName(info->dtype),
                                                        "; LoRA needs floating types"));
    }
  }
  const auto bad = [&](absl::string_view what) {
    return absl::FailedPreconditionError(absl::StrCat(what, ": A ", a.shape.ToString(), ", B ",
                                                      b.shape.ToString(), ", rank ", rank,
                                                      " by adapter_config.json"));
  };
  if (a.shape.rank() < 2 || b.shape.rank() < 2) return bad("LoRA factors must be matrices");
  // B has no extents of a kernel.
  if (a.shape[0] != rank || b.shape[1] != rank || b.shape[0] == 0 ||
      b.shape.elements() / b.shape[0] != rank) {
    return bad("the factors do not have the rank that the configuration says");
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<AdapterConfigFile> ReadAdapterConfig(std::shared_ptr<ObjectStore> store) {
  absl::StatusOr<std::string> text = ReadText(*store, kConfig, kMaxConfigBytes);
  if (absl::IsNotFound(text.status())) {
    return absl::NotFoundError(
        absl::StrCat("it is not a LoRA adapter: there is no ", store->Describe(kConfig)));
  }
  RETURN_IF_ERROR(text.status());
  AdapterConfigFile config{.text = *std::move(text)};
  ASSIGN_OR_RETURN(const ObjectStat stat, store->Stat(kConfig));
  const auto bytes = absl::MakeConstSpan(reinterpret_cast<const std::byte*>(config.text.data()),
                                         config.text.size());
  config.file = {
      .store = std::move(store),
      .key = std::string(kConfig),
      .stat = stat,
      .header = {{.bytes = static_cast<int64_t>(bytes.size()), .crc32c = Crc32c(bytes)}}};
  return config;
}

absl::StatusOr<TensorFile> ReadAdapterWeights(std::shared_ptr<ObjectStore> store) {
  absl::StatusOr<TensorFile> weights = ReadTensorFile(store, kWeights);
  if (absl::IsNotFound(weights.status()) && store->Stat(kTorchWeights).ok()) {
    return ReadTensorFile(store, kTorchWeights);
  }
  return weights;
}

absl::StatusOr<LoraTensors> SortLoraTensors(absl::Span<const TensorInfo> tensors,
                                            const LoraConfig& config, absl::string_view file) {
  struct Pair {
    std::optional<TensorInfo> a, b;
    bool embedding = false;
  };
  std::map<std::string, Pair> pairs;
  LoraTensors sorted;
  for (const TensorInfo& tensor : tensors) {
    const std::string where = absl::StrCat(file, ", tensor ", Printable(tensor.name));
    const auto twice = [&](absl::string_view module) {
      return absl::FailedPreconditionError(
          absl::StrCat(where, ": module ", Printable(module),
                       " has this factor twice; several adapters in one file are not supported"));
    };
    absl::StatusOr<AdapterTensor> classified = Classify(tensor.name);
    if (!classified.ok()) return Annotate(classified.status(), where);
    std::string target = std::move(classified->target);
    switch (classified->role) {
      case Role::kReplacement:
        sorted.replacements.emplace_back(std::move(target), tensor);
        break;
      case Role::kBias:
        if (!sorted.biases.try_emplace(target, tensor).second) return twice(target);
        break;
      case Role::kFactorA:
      case Role::kFactorB: {
        Pair& pair = pairs[target];
        pair.embedding = classified->embedding;
        std::optional<TensorInfo>& factor = classified->role == Role::kFactorA ? pair.a : pair.b;
        if (factor.has_value()) return twice(target);
        factor = tensor;
        break;
      }
    }
  }
  for (auto& [module, pair] : pairs) {
    const std::string where = absl::StrCat(file, ", module ", Printable(module));
    if (!pair.a || !pair.b) {
      return absl::FailedPreconditionError(
          absl::StrCat(where, " has no ", pair.embedding ? "lora_embedding_" : "lora_",
                       pair.a ? "B" : "A", " factor"));
    }
    RETURN_IF_ERROR(Annotate(CheckFactors(*pair.a, *pair.b, config.Rank(module)), where));
    sorted.factors[module] = {
        .a = *std::move(pair.a), .b = *std::move(pair.b), .embedding = pair.embedding};
  }
  return sorted;
}

}  // namespace pewter
