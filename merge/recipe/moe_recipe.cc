#include "merge/recipe/moe_recipe.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "absl/algorithm/container.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "merge/recipe/yaml.h"
#include "merge/recipe/yaml_reader.h"

namespace pewter {
namespace {

class MoeReader : private YamlReader {
 public:
  explicit MoeReader(MoeRecipe& recipe) : YamlReader(recipe.warnings), recipe_(recipe) {}

  absl::Status Read(const YamlNode& root) {
    static constexpr Key kKeys[] = {{"base_model"},    {"experts"},      {"gate_mode"},
                                    {"dtype"},         {"architecture"}, {"experts_per_token"},
                                    {"shared_experts"}};
    if (root.kind != Kind::kMapping) {
      return Expected(root, "a recipe", "a mapping with `base_model` and `experts`");
    }
    RETURN_IF_ERROR(CheckKeys(root, "the recipe", kKeys));
    const YamlNode* base = root.Find("base_model");
    if (IsNull(base)) return RecipeError(root.at, "`base_model` is missing");
    ASSIGN_OR_RETURN(recipe_.base_model, ReadModel(*base, "`base_model`"));
    RETURN_IF_ERROR(ReadDType(root, "dtype", recipe_.dtype));
    RETURN_IF_ERROR(ReadGate(root));
    RETURN_IF_ERROR(ReadExperts(root, "experts", recipe_.experts));
    RETURN_IF_ERROR(ReadExperts(root, "shared_experts", recipe_.shared_experts));
    if (const YamlNode* node = root.Find("architecture"); !IsNull(node)) {
      ASSIGN_OR_RETURN(recipe_.architecture, Text(*node, "architecture"));
      recipe_.architecture_at = node->at;
    }
    return CheckExperts(root);
  }

 private:
  absl::Status ReadGate(const YamlNode& root) {
    const YamlNode* node = root.Find("gate_mode");
    std::string mode = "hidden";
    if (!IsNull(node)) {
      ASSIGN_OR_RETURN(mode, Text(*node, "gate_mode"));
    }
    static constexpr std::pair<absl::string_view, MoeGate> kModes[] = {
        {"hidden", MoeGate::kHiddenLast},     {"hidden_last", MoeGate::kHiddenLast},
        {"hidden_avg", MoeGate::kHiddenMean}, {"cheap_embed", MoeGate::kCheapEmbed},
        {"random", MoeGate::kRandom},         {"uniform_random", MoeGate::kUniformRandom}};
    const auto found =
        absl::c_find_if(kModes, [&](const auto& known) { return known.first == mode; });
    if (found == std::end(kModes)) {
      return Expected(*node, "`gate_mode`",
                      "hidden, hidden_avg, hidden_last, cheap_embed, random or uniform_random");
    }
    recipe_.gate = found->second;
    if (const YamlNode* count = root.Find("experts_per_token"); !IsNull(count)) {
      const std::optional<int64_t> number = YamlInt(*count);
      if (!number || *number < 1) {
        return Expected(*count, "`experts_per_token`", "a whole number of at least 1");
      }
      recipe_.experts_per_token = *number;
    }
    return absl::OkStatus();
  }

  absl::Status ReadExperts(const YamlNode& root, absl::string_view key,
                           std::vector<MoeExpert>& experts) {
    ASSIGN_OR_RETURN(const YamlNode* list, List(root, key));
    if (list == nullptr) return absl::OkStatus();
    static constexpr Key kKeys[] = {{"source_model"},        {"positive_prompts"},
                                    {"negative_prompts"},    {"positive_prompt_ids"},
                                    {"negative_prompt_ids"}, {"noise_scale"},
                                    {"residual_scale"}};
    for (const YamlNode* node : list->items) {
      if (node->kind != Kind::kMapping) {
        return Expected(*node, "an expert", "a mapping with `source_model`");
      }
      RETURN_IF_ERROR(CheckKeys(*node, "an expert", kKeys));
      const YamlNode* model = node->Find("source_model");
      if (IsNull(model)) return RecipeError(node->at, "the expert has no `source_model`");
      MoeExpert expert{.at = node->at};
      ASSIGN_OR_RETURN(expert.model, ReadModel(*model, "`source_model`"));
      RETURN_IF_ERROR(ReadPrompts(*node, "positive", expert.positive));
      RETURN_IF_ERROR(ReadPrompts(*node, "negative", expert.negative));
      RETURN_IF_ERROR(ReadNumber(*node, "noise_scale", expert.noise_scale));
      RETURN_IF_ERROR(ReadNumber(*node, "residual_scale", expert.residual_scale));
      experts.push_back(std::move(expert));
    }
    return absl::OkStatus();
  }

  static absl::Status ReadPrompts(const YamlNode& expert, absl::string_view kind,
                                  MoePrompts& prompts) {
    ASSIGN_OR_RETURN(const YamlNode* texts, List(expert, absl::StrCat(kind, "_prompts")));
    if (texts != nullptr) {
      for (const YamlNode* node : texts->items) {
        const bool text =
            node->kind == Kind::kScalar && (node->quoted || !(YamlBool(*node) || YamlFloat(*node)));
        if (!text) {
          return Expected(*node, "a prompt",
                          absl::StrCat("text (in quotes, if need be; token ids are for `", kind,
                                       "_prompt_ids`)"));
        }
        prompts.texts.push_back(node->text);
      }
    }
    ASSIGN_OR_RETURN(const YamlNode* lists, List(expert, absl::StrCat(kind, "_prompt_ids")));
    if (lists == nullptr) return absl::OkStatus();
    for (const YamlNode* list : lists->items) {
      if (list->kind != Kind::kSequence || list->items.empty()) {
        return Expected(*list, absl::StrCat("a prompt of `", kind, "_prompt_ids`"),
                        "a list of token ids");
      }
      std::vector<int64_t> ids;
      for (const YamlNode* node : list->items) {
        const std::optional<int64_t> id = YamlInt(*node);
        if (!id || *id < 0) return Expected(*node, "a token id", "a whole number");
        ids.push_back(*id);
      }
      prompts.ids.push_back(std::move(ids));
    }
    return absl::OkStatus();
  }

  static absl::Status ReadNumber(const YamlNode& expert, absl::string_view key, double& number) {
    const YamlNode* node = expert.Find(key);
    if (IsNull(node)) return absl::OkStatus();
    const std::optional<double> value = YamlFloat(*node);
    if (!value || !(std::abs(*value) <= std::numeric_limits<float>::max())) {
      return Expected(*node, absl::StrCat("`", key, "`"), "a number that float32 can hold");
    }
    number = *value;
    return absl::OkStatus();
  }

  // mergekit-moe's rules for what makes sense.
  absl::Status CheckExperts(const YamlNode& root) {
    const std::vector<MoeExpert>& experts = recipe_.experts;
    if (static_cast<int64_t>(experts.size()) < recipe_.experts_per_token || experts.empty()) {
      return RecipeError(root.at, absl::StrCat("there are ", experts.size(), " `experts` and ",
                                               recipe_.experts_per_token,
                                               " are used for each token (`experts_per_token`)"));
    }
    if (!NeedsPrompts(recipe_.gate)) {
      const auto prompted = std::find_if(experts.begin(), experts.end(), [](const MoeExpert& e) {
        return !e.positive.empty() || !e.negative.empty();
      });
      if (prompted != experts.end()) {
        recipe_.warnings.push_back(absl::StrCat(
            prompted->at.ToString(), ": prompts have no effect where routers are random"));
      }
      return absl::OkStatus();
    }
    for (const MoeExpert& expert : experts) {
      if (expert.positive.empty()) {
        return RecipeError(expert.at,
                           "the expert has no `positive_prompts`, which say what is "
                           "routed to it");
      }
    }
    const bool all_equal = std::all_of(experts.begin(), experts.end(), [&](const MoeExpert& e) {
      return e.positive == experts[0].positive && e.negative == experts[0].negative;
    });
    if (all_equal && experts.size() > 1) {
      return RecipeError(experts[0].at,
                         "all experts have the same prompts, so nothing tells them apart");
    }
    return absl::OkStatus();
  }

  MoeRecipe& recipe_;
};

}  // namespace

absl::StatusOr<MoeRecipe> ParseMoeRecipe(
    absl::string_view text, const std::vector<std::pair<std::string, std::string>>& overrides) {
  ASSIGN_OR_RETURN(YamlDocument document, YamlDocument::Parse(text));
  for (const auto& [path, value] : overrides) RETURN_IF_ERROR(document.Set(path, value));
  MoeRecipe recipe;
  recipe.overrides = overrides;
  recipe.text = std::string(text);
  recipe.warnings = document.warnings();
  RETURN_IF_ERROR(MoeReader(recipe).Read(document.root()));
  return recipe;
}

}  // namespace pewter
