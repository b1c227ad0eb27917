#include "merge/plan/moe_style.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "base/dtype_names.h"

namespace pewter {
namespace {

using nlohmann::ordered_json;

const std::map<std::string, const char*>& SameParts() {
  static const auto* const parts = new std::map<std::string, const char*>{
      {"gate_proj", "gate_proj"}, {"up_proj", "up_proj"}, {"down_proj", "down_proj"}};
  return *parts;
}

bool Says(const ordered_json& config, const char* key) {
  const auto it = config.find(key);
  return it != config.end() && !it->is_null();
}

std::string TypeOf(const ordered_json& config) {
  const auto it = config.find("model_type");
  return it != config.end() && it->is_string() ? it->get<std::string>() : "";
}

// What the base's class takes where config.json says nothing (transformers 5.23,
// configuration_*.py of llama, mistral, qwen2 and qwen3): for these keys the mixtures' classes take
// something else.
void WriteOutDefaults(int64_t tokens, ordered_json& config) {
  const std::string type = TypeOf(config);
  const bool llama = type == "llama", mistral = type == "mistral";
  const auto set = [&](const char* key, const ordered_json& value) {
    if (!Says(config, key)) config[key] = value;
  };
  set("vocab_size", tokens);
  set("num_attention_heads", 32);
  // Written as null it means the number of heads to all classes.
  if (!config.contains("num_key_value_heads")) {
    config["num_key_value_heads"] = llama     ? config["num_attention_heads"]
                                    : mistral ? ordered_json(8)
                                              : ordered_json(32);
  }
  set("max_position_embeddings", llama ? 2048 : mistral ? 131072 : 32768);
  set("rms_norm_eps", 1e-6);
  if (type == "qwen3") set("head_dim", 128);
  if (llama || mistral) {
    // Null is a choice here.
    if (!config.contains("bos_token_id")) config["bos_token_id"] = 1;
    if (!config.contains("eos_token_id")) config["eos_token_id"] = 2;
  }
  constexpr char kTheta[] = "rope_theta";
  const auto rope = config.find("rope_parameters");
  if (rope != config.end() && rope->is_object()) {
    if (!rope->contains(kTheta) && !Says(config, kTheta)) (*rope)[kTheta] = 10000.0;
  } else {
    set(kTheta, 10000.0);
  }
}

// The mixtures made from these attend to all tokens, as mergekit makes them.
void DropSlidingWindow(ordered_json& config, std::vector<std::string>& warnings) {
  const std::string type = TypeOf(config);
  const auto used = config.find("use_sliding_window");
  const bool has_one =
      type == "mistral" || (used != config.end() && used->is_boolean() && used->get<bool>());
  const auto window = config.find("sliding_window");
  if (has_one && (window == config.end() || !window->is_null())) {
    warnings.push_back(
        "the base model attends to a sliding window of tokens, the mixture to all of them");
  }
  config["sliding_window"] = nullptr;
  const auto types = config.find("layer_types");
  if (types == config.end() || !types->is_array()) return;
  for (ordered_json& layer : *types) layer = "full_attention";
}

}  // namespace

absl::Span<const MoeStyle> MoeStyles() {
  static const auto* const styles = new std::vector<MoeStyle>{
      {.name = "Mixtral",
       .architecture = "MixtralForCausalLM",
       .model_type = "mixtral",
       .from = {"llama", "mistral"},
       .fused = true,
       .router = "mlp.gate.weight",
       .separate_router = "block_sparse_moe.gate.weight",
       .separate_expert = "block_sparse_moe.experts.{expert}.{part}.weight",
       .parts = {{"gate_proj", "w1"}, {"down_proj", "w2"}, {"up_proj", "w3"}}},
      {.name = "DeepSeek MoE",
       .architecture = "DeepseekForCausalLM",
       .model_type = "deepseek",
       .from = {"llama", "mistral"},
       .most_shared = 1,
       .query_biases = true,
       .other_biases = true,
       .router = "mlp.gate.weight",
       .separate_router = "mlp.gate.weight",
       .separate_expert = "mlp.experts.{expert}.{part}.weight",
       .shared = "mlp.shared_experts.{part}.weight",
       .parts = SameParts()},
      {.name = "Qwen MoE",
       .architecture = "Qwen2MoeForCausalLM",
       .model_type = "qwen2_moe",
       .from = {"llama", "mistral", "qwen2"},
       .least_shared = 1,
       .most_shared = 1,
       .gated_shared = true,
       .query_biases = true,
       .router = "mlp.gate.weight",
       .separate_router = "mlp.gate.weight",
       .separate_expert = "mlp.experts.{expert}.{part}.weight",
       .shared = "mlp.shared_expert.{part}.weight",
       .parts = SameParts()},
      {.name = "Qwen3 MoE",
       .architecture = "Qwen3MoeForCausalLM",
       .model_type = "qwen3_moe",
       .from = {"qwen3"},
       .query_biases = true,
       .other_biases = true,
       .fused = true,
       .router = "mlp.gate.weight",
       .separate_router = "mlp.gate.weight",
       .separate_expert = "mlp.experts.{expert}.{part}.weight",
       .parts = SameParts()}};
  return *styles;
}

std::string MoeConfigJson(const MoeStyle& style, const std::string& base_config,
                          const MoeSizes& sizes, std::vector<std::string>& warnings) {
  ordered_json config = ordered_json::parse(base_config, nullptr, /*allow_exceptions=*/false);
  WriteOutDefaults(sizes.tokens, config);
  const absl::string_view type = style.model_type;
  if (type != "qwen3_moe") DropSlidingWindow(config, warnings);
  config["architectures"] = {style.architecture};
  config["model_type"] = style.model_type;
  config["num_experts_per_tok"] = sizes.experts_per_token;
  config.erase("auto_map");  // the base's code
  if (type == "mixtral") {
    config["intermediate_size"] = sizes.width;
    config["num_local_experts"] = sizes.experts;
    config["output_router_logits"] = false;
  } else {
    config["moe_intermediate_size"] = sizes.width;
    config["norm_topk_prob"] = true;
  }
  if (type == "deepseek") {
    config["n_routed_experts"] = sizes.experts;
    config["n_shared_experts"] = sizes.shared == 0 ? ordered_json() : ordered_json(sizes.shared);
    config["first_k_dense_replace"] = 0;
    config["moe_layer_freq"] = 1;
    config["scoring_func"] = "softmax";
    const std::string repository = "deepseek-ai/deepseek-moe-16b-base--";
    config["auto_map"] = {
        {"AutoConfig", repository + "configuration_deepseek.DeepseekConfig"},
        {"AutoModel", repository + "modeling_deepseek.DeepseekModel"},
        {"AutoModelForCausalLM", repository + "modeling_deepseek.DeepseekForCausalLM"}};
  }
  if (type == "qwen2_moe" || type == "qwen3_moe") {
    config["num_experts"] = sizes.experts;
    config["decoder_sparse_step"] = 1;
    config["mlp_only_layers"] = ordered_json::array();
  }
  if (type == "qwen2_moe") {
    config["use_sliding_window"] = false;
    config["shared_expert_intermediate_size"] = sizes.shared_width;
  }
  if (sizes.dtype) {
    const std::string name(TorchName(*sizes.dtype));
    const bool any = config.contains("torch_dtype") || config.contains("dtype");
    for (const char* key : {"torch_dtype", "dtype"}) {
      if (config.contains(key) || (!any && key == absl::string_view("torch_dtype"))) {
        config[key] = name;
      }
    }
  }
  return config.dump(2, ' ', false, ordered_json::error_handler_t::replace) + "\n";
}

}  // namespace pewter
