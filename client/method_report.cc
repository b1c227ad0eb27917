#include "client/method_report.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <variant>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"

namespace pewter::client {

namespace {

constexpr int kTextColumns = 100;

const char* TypeName(ParamType type) {
  switch (type) {
    case ParamType::kBool:
      return "bool";
    case ParamType::kInt:
      return "int";
    case ParamType::kFloat:
      return "float";
    case ParamType::kString:
      return "string";
    case ParamType::kPatterns:
      return "patterns";
  }
  return "";
}

const char* ScopeName(ParamScopeKind scope) {
  switch (scope) {
    case ParamScopeKind::kJob:
      return "recipe";
    case ParamScopeKind::kModel:
      return "model";
    case ParamScopeKind::kTensor:
      return "tensor";
  }
  return "";
}

struct DefaultToJson {
  Json operator()(NoDefault) const { return nullptr; }
  Json operator()(Unset) const { return nullptr; }
  template <class T>
  Json operator()(T value) const {
    return value;
  }
};

bool Required(const Param& param) { return std::holds_alternative<NoDefault>(param.fallback); }

std::string DefaultText(const Param& param) {
  if (Required(param)) return "required";
  if (std::holds_alternative<Unset>(param.fallback)) return "unset";
  if (const bool* flag = std::get_if<bool>(&param.fallback)) return *flag ? "true" : "false";
  if (const auto* number = std::get_if<double>(&param.fallback)) {
    return absl::StrFormat("%g", *number);
  }
  if (const auto* number = std::get_if<int64_t>(&param.fallback)) return absl::StrCat(*number);
  return std::get<const char*>(param.fallback);
}

std::string RangeText(const Param& param) {
  if (!param.choices.empty()) return absl::StrJoin(param.choices, "|");
  const bool below = std::isfinite(param.min), above = std::isfinite(param.max);
  if (below && above) return absl::StrFormat("%g to %g", param.min, param.max);
  if (below) return absl::StrFormat("at least %g", param.min);
  if (above) return absl::StrFormat("at most %g", param.max);
  return "";
}

// A value that is good for `param`.
std::string ExampleValue(const Param& param) {
  if (!Required(param)) {
    const std::string text = DefaultText(param);
    // To YAML 1.1 a number with an exponent has a point.
    const bool needs_point = param.type == ParamType::kFloat && !absl::StrContains(text, '.');
    return needs_point ? absl::StrReplaceAll(text, {{"e", ".0e"}}) : text;
  }
  switch (param.type) {
    case ParamType::kBool:
      return "true";
    case ParamType::kString:
    case ParamType::kPatterns:
      return param.choices.empty() ? "TEXT" : param.choices.front();
    case ParamType::kInt:
      return absl::StrFormat("%g", std::clamp(1.0, param.min, param.max));
    case ParamType::kFloat:
      return absl::StrFormat("%g", std::clamp(0.5, param.min, param.max));
  }
  return "";
}

// The keys `models` and `parameters`.
std::string ExampleInputs(const MergeMethod& method, int models, absl::string_view path) {
  std::string of_model, of_recipe;
  for (const Param& param : method.params) {
    if (param.no_effect || std::holds_alternative<Unset>(param.fallback)) continue;
    absl::StrAppend(param.scope == ParamScopeKind::kModel ? &of_model : &of_recipe,
                    param.scope == ParamScopeKind::kModel ? "      " : "  ", param.name, ": ",
                    ExampleValue(param), "\n");
  }
  std::string text = "models:\n";
  for (int i = 0; i < models; ++i) {
    absl::StrAppend(&text, "  - model: ", path, std::string(1, static_cast<char>('a' + i)), "\n");
    if (!of_model.empty()) absl::StrAppend(&text, "    parameters:\n", of_model);
  }
  if (!of_recipe.empty()) absl::StrAppend(&text, "parameters:\n", of_recipe);
  return text;
}

std::string MeaningText(const Param& param) {
  return param.no_effect ? "accepted for compatibility; no effect" : param.help;
}

// "Takes at least 2 models besides the base model."
std::string InputsText(const MergeMethod& method) {
  const int fewest = std::max(method.min_inputs, 1);
  std::string text = absl::StrCat("Takes ", fewest == method.max_inputs ? "" : "at least ", fewest,
                                  fewest == 1 ? " model" : " models");
  switch (method.base) {
    case BaseUse::kInput:
      return absl::StrCat(text, "; `base_model` is one like the others.");
    case BaseUse::kOptional:
      return absl::StrCat(text, " besides `base_model`, which may be left out.");
    case BaseUse::kRequired:
      return absl::StrCat(text, " besides `base_model`.");
  }
  return text;
}

}  // namespace

const char* BaseName(BaseUse base) {
  switch (base) {
    case BaseUse::kInput:
      return "input";
    case BaseUse::kOptional:
      return "optional";
    case BaseUse::kRequired:
      return "required";
  }
  return "";
}

std::string ExampleRecipe(const MergeMethod& method) {
  std::string text = absl::StrCat("merge_method: ", method.name, "\n");
  if (method.base != BaseUse::kInput) absl::StrAppend(&text, "base_model: ./base\n");
  const int models =
      std::clamp(2, method.min_inputs, std::max(method.min_inputs, method.max_inputs));
  absl::StrAppend(&text, ExampleInputs(method, models, "./model-"));
  if (method.statistics != StatisticsUse::kNone) {
    absl::StrAppend(&text, "statistics:\n");
    for (int i = 0; i < models; ++i) {
      const std::string model =
          absl::StrCat("./model-", std::string(1, static_cast<char>('a' + i)));
      absl::StrAppend(&text, "  ", model, ": ", model, ".statistics.safetensors\n");
    }
  }
  if (method.fits_layers) {
    absl::StrAppend(&text, "align: {reference: ./model-a, calibration: ./tokens.safetensors}\n");
  }
  return absl::StrCat(text, "dtype: bfloat16\n");
}

std::string ExampleRecipe(const AdapterMethod& method) {
  return absl::StrCat("merge_method: ", method.method.name, "\noutput: {format: lora}\n",
                      ExampleInputs(method.method, 2, "./lora-"));
}

namespace {

Json ParametersToJson(const MergeMethod& method) {
  Json params = Json::array();
  for (const Param& param : method.params) {
    params.push_back({{"name", param.name},
                      {"help", param.help},
                      {"type", TypeName(param.type)},
                      {"scope", ScopeName(param.scope)},
                      {"required", Required(param)},
                      {"default", std::visit(DefaultToJson{}, param.fallback)},
                      {"min", std::isfinite(param.min) ? Json(param.min) : Json()},
                      {"max", std::isfinite(param.max) ? Json(param.max) : Json()},
                      {"choices", param.choices},
                      {"no_effect", param.no_effect}});
  }
  return params;
}

}  // namespace

Json MethodToJson(const MergeMethod& method) {
  return {{"name", method.name},
          {"title", method.title},
          {"summary", method.summary},
          {"formula", method.formula},
          {"reference", method.reference},
          {"base_model", BaseName(method.base)},
          {"min_inputs", method.min_inputs},
          {"max_inputs", method.max_inputs},
          {"parameters", ParametersToJson(method)},
          {"example", ExampleRecipe(method)}};
}

Json MethodToJson(const AdapterMethod& adapter) {
  const MergeMethod& method = adapter.method;
  return {{"name", method.name},
          {"title", method.title},
          {"summary", method.summary},
          {"formula", method.formula},
          {"reference", method.reference},
          {"output_format", "lora"},
          {"parameters", ParametersToJson(method)},
          {"example", ExampleRecipe(adapter)}};
}

namespace {

std::string MethodToMarkdown(const MergeMethod& method, absl::string_view heading,
                             absl::string_view inputs, absl::string_view example) {
  std::string text =
      absl::StrCat("\n", heading, " `", method.name, "`\n\n", method.title, ": ", method.summary,
                   ".\n\n    ", absl::StrReplaceAll(method.formula, {{"\n", "\n    "}}),
                   "\n\n[Reference](", method.reference, "). ", inputs, "\n\n");
  if (!method.params.empty()) {
    absl::StrAppend(&text,
                    "| parameter | type | set per | default | range | meaning |\n"
                    "|---|---|---|---|---|---|\n");
  }
  for (const Param& param : method.params) {
    absl::StrAppend(&text, "| `", param.name, "` | ", TypeName(param.type), " | ",
                    ScopeName(param.scope), " | ", DefaultText(param), " | ",
                    absl::StrReplaceAll(RangeText(param), {{"|", "\\|"}}), " | ",
                    absl::StrReplaceAll(MeaningText(param), {{"|", "\\|"}}), " |\n");
  }
  if (!method.params.empty()) absl::StrAppend(&text, "\n");
  absl::StrAppend(&text, "```yaml\n", example, "```\n");
  return text;
}

}  // namespace

std::string MethodsToMarkdown() {
  std::string text =
      "# Merge methods\n\n"
      "Made from the table of methods by `pewter methods --markdown`; a test compares the two. "
      "Where a\n"
      "parameter may be set, and gradients and filters: [recipes.md](recipes.md#parameters). \"Set "
      "per\" says\n"
      "how finely: for each model (and so for slices, modules and the recipe), for each tensor "
      "(slices,\n"
      "modules, the recipe), or for the recipe as a whole.\n";
  for (const MergeMethod* method : Methods()) {
    absl::StrAppend(&text,
                    MethodToMarkdown(*method, "##", InputsText(*method), ExampleRecipe(*method)));
  }
  absl::StrAppend(
      &text,
      "\n## Adapters\n\n"
      "With `output: {format: lora}` the models are LoRA adapters, and these methods make one of "
      "them\n"
      "([recipes.md](recipes.md#merging-adapters)). The definitions are PEFT's; `s_i` is adapter "
      "i's scale.\n");
  for (const AdapterMethod* adapter : AdapterMethods()) {
    absl::StrAppend(&text, MethodToMarkdown(adapter->method, "###",
                                            adapter->rank == AdapterMethod::Rank::kSame
                                                ? "Takes adapters of one rank."
                                                : "Takes adapters of any ranks.",
                                            ExampleRecipe(*adapter)));
  }
  return text;
}

namespace {

std::string FormulaText(const MergeMethod& method, absl::string_view title) {
  return absl::StrCat(method.name, " (", title, ")\n", Wrap(method.summary, kTextColumns, 2),
                      "\nFormula\n", Wrap(method.formula, kTextColumns, 2), "\n");
}

std::string ParametersText(const MergeMethod& method, absl::string_view example) {
  std::string text = absl::StrCat("Reference   ", method.reference, "\n\n");
  if (method.params.empty()) {
    absl::StrAppend(&text, "No parameters.\n");
  } else {
    Table table({"PARAMETER", "TYPE", "SET PER", "DEFAULT", "RANGE", "MEANING"});
    for (const Param& param : method.params) {
      table.Add({param.name, TypeName(param.type), ScopeName(param.scope), DefaultText(param),
                 RangeText(param), MeaningText(param)});
    }
    absl::StrAppend(&text, table.ToString());
  }
  absl::StrAppend(&text, "\nExample\n");
  for (absl::string_view line : absl::StrSplit(example, '\n', absl::SkipEmpty())) {
    absl::StrAppend(&text, "  ", line, "\n");
  }
  return text;
}

}  // namespace

std::string MethodToText(const MergeMethod& method) {
  const int fewest = std::max(method.min_inputs, 1);
  return absl::StrCat(
      FormulaText(method, method.title), "Inputs      ",
      fewest == method.max_inputs ? "" : "at least ", fewest,
      method.base == BaseUse::kInput ? "" : ", besides the base model", "\nBase model  ",
      method.base == BaseUse::kInput ? "an input like the others" : BaseName(method.base), "\n",
      ParametersText(method, ExampleRecipe(method)));
}

std::string MethodToText(const AdapterMethod& adapter) {
  const MergeMethod& method = adapter.method;
  return absl::StrCat(FormulaText(method, absl::StrCat(method.title, ", of adapters")),
                      "Inputs      LoRA adapters",
                      adapter.rank == AdapterMethod::Rank::kSame ? " of one rank" : "", "\n",
                      ParametersText(method, ExampleRecipe(adapter)));
}

}  // namespace pewter::client
