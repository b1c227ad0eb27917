// The small files of an adapter that is an output: adapter_config.json in PEFT's layout, model
// card.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "merge/plan/plan.h"

namespace pewter {

// What PEFT puts before the name of a model's tensor.
inline constexpr char kPeftPrefix[] = "base_model.model.";
inline constexpr char kAdapterFile[] = "adapter_model.safetensors";
inline constexpr char kAdapterConfigFile[] = "adapter_config.json";

struct AdapterDescription {
  std::string base_model;                 // as the user would load it; may be empty
  std::string task_type;                  // "CAUSAL_LM", ...; empty: null
  std::map<std::string, int64_t> ranks;   // by module: the full name, without kPeftPrefix
  std::map<std::string, double> scales;   // what B A is multiplied with; absent: 1
  std::set<std::string> modules_to_save;  // last parts of names
  // Modules that end like one of `ranks` and have no factors, which a short name would reach too.
  std::set<std::string> other_modules;
  // What is written for the modules of `ranks`, when that is known; empty: found from those.
  std::set<std::string> target_modules;
  bool fan_in_fan_out = false;
  bool bias = false;                  // factors B have a bias
  bool embeddings = false;            // some modules are embeddings
  std::string saved_biases = "none";  // biases of the model that are saved whole: all, lora_only
};

// r is the largest rank, with rank_pattern and alpha_pattern for modules that differ; a name in
// target_modules is short where that means the same modules, as far as it is found here.
std::string AdapterConfigJson(const AdapterDescription& adapter);

// Warns of what PEFT does not load.
void WarnOfPeft(const AdapterDescription& adapter, std::vector<std::string>& warnings);

// From config.json's architectures: "LlamaForCausalLM" is CAUSAL_LM. Empty when it does not say.
std::string TaskTypeOf(absl::string_view config_json);

// README.md. `made` is a sentence; `recipe` is shown as code.
std::string AdapterCard(const AdapterDescription& adapter, absl::string_view made,
                        absl::Span<const std::string> models, absl::string_view recipe,
                        absl::string_view language);

}  // namespace pewter
