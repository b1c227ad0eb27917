#include "merge/checkpoint/lora_config.h"

#include <re2/re2.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "merge/checkpoint/printable.h"

namespace pewter {
namespace {

// Keeps the order of keys, which decides between patterns.
using Json = nlohmann::ordered_json;

constexpr double kMaxRank = 1 << 20;

// Settings that change what the adapter computes and that Pewter does not apply.
constexpr absl::string_view kUnsupported[] = {
    "use_dora",
    "target_parameters",
    "layer_replication",
    "use_qalora",
    "trainable_token_indices",
    "arrow_config",
    "alora_invocation_tokens",
};

// Initialisations that leave the base weights as they are; others (PiSSA, OLoRA, CorDA, LoftQ)
// change them, so the adapter does not belong to the weights that are stored.
constexpr absl::string_view kHarmlessInit[] = {"gaussian", "eva", "orthogonal"};

bool IsSet(const Json& json, absl::string_view key) {
  const auto found = json.find(std::string(key));
  if (found == json.end() || found->is_null()) return false;
  if (found->is_boolean()) return found->get<bool>();
  return !found->is_structured() || !found->empty();
}

absl::Status Bad(absl::string_view what) { return absl::FailedPreconditionError(what); }

absl::StatusOr<bool> Boolean(const Json& json, const char* key) {
  const auto found = json.find(key);
  if (found == json.end() || found->is_null()) return false;
  if (!found->is_boolean()) return Bad(absl::StrCat(key, " must be true or false"));
  return found->get<bool>();
}

absl::Status CheckRank(double rank, absl::string_view key) {
  if (rank >= 1 && rank <= kMaxRank && rank == std::floor(rank)) return absl::OkStatus();
  return Bad(absl::StrCat(key, " must be a positive whole number, not ", rank));
}

absl::Status CheckAlpha(double alpha, absl::string_view key) {
  if (std::isfinite(alpha)) return absl::OkStatus();
  return Bad(absl::StrCat(key, " must be a finite number"));
}

absl::StatusOr<double> Number(const Json& json, const char* key) {
  const auto found = json.find(key);
  if (found == json.end() || !found->is_number()) {
    return Bad(absl::StrCat("it has no number ", key));
  }
  return found->get<double>();
}

}  // namespace

absl::StatusOr<LoraConfig> LoraConfig::Parse(absl::string_view text) {
  const Json json = Json::parse(text.begin(), text.end(), nullptr, /*allow_exceptions=*/false);
  if (json.is_discarded()) return absl::DataLossError("it is not valid JSON");
  if (!json.is_object()) return absl::DataLossError("it is not a JSON object");
  const auto type = json.find("peft_type");
  if (type == json.end() || !type->is_string() || type->get_ref<const std::string&>() != "LORA") {
    return Bad(absl::StrCat("peft_type is ",
                            type != json.end() && type->is_string()
                                ? Printable(type->get_ref<const std::string&>())
                                : "missing",
                            "; only LORA adapters can be applied"));
  }
  for (absl::string_view key : kUnsupported) {
    if (IsSet(json, key)) {
      return Bad(absl::StrCat("the adapter uses ", key,
                              ", which is not supported; merge it into its base with PEFT first"));
    }
  }
  if (const auto init = json.find("init_lora_weights"); init != json.end() && init->is_string()) {
    const std::string& name = init->get_ref<const std::string&>();
    if (std::find(std::begin(kHarmlessInit), std::end(kHarmlessInit), name) ==
        std::end(kHarmlessInit)) {
      return Bad(absl::StrCat("the adapter was initialised with ", Printable(name),
                              ", which changes the base weights; save it with PEFT as a plain LoRA "
                              "(path_initial_model_for_weight_conversion) first"));
    }
  }

  LoraConfig config;
  ASSIGN_OR_RETURN(const double rank, Number(json, "r"));
  RETURN_IF_ERROR(CheckRank(rank, "r"));
  config.rank_ = static_cast<int64_t>(rank);
  ASSIGN_OR_RETURN(config.alpha_, Number(json, "lora_alpha"));
  RETURN_IF_ERROR(CheckAlpha(config.alpha_, "lora_alpha"));
  ASSIGN_OR_RETURN(config.use_rslora_, Boolean(json, "use_rslora"));
  ASSIGN_OR_RETURN(config.fan_in_fan_out_, Boolean(json, "fan_in_fan_out"));

  const auto read_patterns = [&](const char* key, auto check,
                                 std::vector<Pattern>& patterns) -> absl::Status {
    const auto found = json.find(key);
    if (found == json.end() || found->is_null()) return absl::OkStatus();
    if (!found->is_object()) return Bad(absl::StrCat(key, " must map module names to numbers"));
    for (const auto& [pattern, value] : found->items()) {
      const std::string where = absl::StrCat(key, " ", Printable(pattern));
      if (!value.is_number()) return Bad(absl::StrCat(where, " must be a number"));
      RETURN_IF_ERROR(check(value.template get<double>(), where));
      auto module = std::make_shared<const re2::RE2>(absl::StrCat("(?:.*\\.)?(?:", pattern, ")"),
                                                     re2::RE2::Quiet);
      if (!module->ok()) {
        return Bad(absl::StrCat(where, " is not a regular expression: ", module->error()));
      }
      patterns.push_back({std::move(module), value.template get<double>()});
    }
    return absl::OkStatus();
  };
  RETURN_IF_ERROR(read_patterns("rank_pattern", CheckRank, config.rank_patterns_));
  RETURN_IF_ERROR(read_patterns("alpha_pattern", CheckAlpha, config.alpha_patterns_));
  return config;
}

namespace {

template <typename Patterns>
double FirstMatch(const Patterns& patterns, absl::string_view module, double otherwise) {
  for (const auto& pattern : patterns) {
    if (re2::RE2::FullMatch(re2::StringPiece(module.data(), module.size()), *pattern.module)) {
      return pattern.value;
    }
  }
  return otherwise;
}

}  // namespace

int64_t LoraConfig::Rank(absl::string_view module) const {
  return static_cast<int64_t>(FirstMatch(rank_patterns_, module, static_cast<double>(rank_)));
}

int64_t LoraConfig::largest_rank() const {
  double largest = static_cast<double>(rank_);
  for (const Pattern& pattern : rank_patterns_) largest = std::max(largest, pattern.value);
  return static_cast<int64_t>(largest);
}

float LoraConfig::Scale(absl::string_view module) const {
  const double alpha = FirstMatch(alpha_patterns_, module, alpha_);
  const double rank = static_cast<double>(Rank(module));
  return static_cast<float>(alpha / (use_rslora_ ? std::sqrt(rank) : rank));
}

}  // namespace pewter
