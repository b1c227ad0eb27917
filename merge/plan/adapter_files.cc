#include "merge/plan/adapter_files.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace pewter {
namespace {

using nlohmann::ordered_json;

absl::string_view LastPart(absl::string_view module) {
  const size_t dot = module.rfind('.');
  return dot == absl::string_view::npos ? module : module.substr(dot + 1);
}

}  // namespace

std::string AdapterConfigJson(const AdapterDescription& adapter) {
  // Short names reach every module that ends with them.
  std::set<std::string> ambiguous;
  for (const std::string& module : adapter.other_modules) {
    ambiguous.insert(std::string(LastPart(module)));
  }
  std::set<std::string> targets = adapter.target_modules;
  std::map<int64_t, int64_t> modules_of_rank;
  for (const auto& [module, rank] : adapter.ranks) {
    const std::string last(LastPart(module));
    if (adapter.target_modules.empty()) targets.insert(ambiguous.contains(last) ? module : last);
    ++modules_of_rank[rank];
  }
  const int64_t rank = modules_of_rank.empty() ? 1 : modules_of_rank.rbegin()->first;
  ordered_json rank_pattern = ordered_json::object(), alpha_pattern = ordered_json::object();
  for (const auto& [module, own] : adapter.ranks) {
    if (own != rank) rank_pattern[module] = own;
    const auto scale = adapter.scales.find(module);
    const double alpha =
        static_cast<double>(own) * (scale == adapter.scales.end() ? 1.0 : scale->second);
    if (alpha == static_cast<double>(rank)) continue;
    if (alpha == static_cast<double>(static_cast<int64_t>(alpha))) {
      alpha_pattern[module] = static_cast<int64_t>(alpha);
    } else {
      alpha_pattern[module] = alpha;
    }
  }
  ordered_json config = {
      {"base_model_name_or_path", adapter.base_model},
      {"peft_type", "LORA"},
      {"task_type", nullptr},
      {"inference_mode", true},
      {"r", rank},
      {"lora_alpha", rank},
      {"lora_dropout", 0.0},
      {"use_rslora", false},
      {"use_dora", false},
      {"bias", adapter.saved_biases},
      {"lora_bias", adapter.bias},
      {"fan_in_fan_out", adapter.fan_in_fan_out},
      {"target_modules", targets},
      {"modules_to_save", nullptr},
      {"rank_pattern", std::move(rank_pattern)},
      {"alpha_pattern", std::move(alpha_pattern)},
  };
  if (!adapter.task_type.empty()) config["task_type"] = adapter.task_type;
  if (!adapter.modules_to_save.empty()) config["modules_to_save"] = adapter.modules_to_save;
  return config.dump(2, ' ', false, ordered_json::error_handler_t::replace) + "\n";
}

void WarnOfPeft(const AdapterDescription& adapter, std::vector<std::string>& warnings) {
  if (!adapter.bias || !adapter.embeddings) return;
  warnings.push_back(
      "the adapter has factors of embeddings and biases of B (lora_bias), which PEFT does not load "
      "together; Pewter does: BASE+ADAPTER");
}

std::string TaskTypeOf(absl::string_view config_json) {
  const ordered_json config = ordered_json::parse(config_json.begin(), config_json.end(), nullptr,
                                                  /*allow_exceptions=*/false);
  if (!config.is_object()) return "";
  const auto architectures = config.find("architectures");
  if (architectures == config.end() || !architectures->is_array() || architectures->empty() ||
      !architectures->front().is_string()) {
    return "";
  }
  const std::string name = architectures->front().get<std::string>();
  constexpr std::pair<absl::string_view, absl::string_view> kTypes[] = {
      {"ForCausalLM", "CAUSAL_LM"},
      {"LMHeadModel", "CAUSAL_LM"},
      {"ForConditionalGeneration", "SEQ_2_SEQ_LM"},
      {"ForSequenceClassification", "SEQ_CLS"},
      {"ForTokenClassification", "TOKEN_CLS"},
      {"ForQuestionAnswering", "QUESTION_ANS"},
  };
  for (const auto& [ending, type] : kTypes) {
    if (absl::EndsWith(name, ending)) return std::string(type);
  }
  return "";
}

std::string AdapterCard(const AdapterDescription& adapter, absl::string_view made,
                        absl::Span<const std::string> models, absl::string_view recipe,
                        absl::string_view language) {
  std::string card = "---\n";
  if (!adapter.base_model.empty()) {
    absl::StrAppend(&card, "base_model: ", ordered_json(adapter.base_model).dump(), "\n");
  }
  absl::StrAppend(&card,
                  "library_name: peft\ntags:\n- mergekit\n- peft\n- pewter\n---\n# LoRA adapter\n\n"
                  "Made with Pewter. ",
                  made, "\n\n## Models\n\n");
  for (const std::string& model : models) absl::StrAppend(&card, "- `", model, "`\n");
  // A fence longer than any in the text, so that no text can end it.
  std::string fence = "```";
  while (absl::StrContains(recipe, fence)) fence += '`';
  absl::StrAppend(&card, "\n## How\n\n", fence, language, "\n", recipe,
                  absl::EndsWith(recipe, "\n") ? "" : "\n", fence, "\n");
  return card;
}

}  // namespace pewter
