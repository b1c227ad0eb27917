#include "client/recipe_schema.h"

#include <cmath>
#include <map>
#include <string>
#include <utility>
#include <variant>

#include "absl/strings/str_cat.h"
#include "merge/methods/adapter_method.h"
#include "merge/methods/method.h"

namespace pewter::client {

namespace {

Json Reference(absl::string_view definition) {
  return {{"$ref", absl::StrCat("#/definitions/", definition)}};
}

Json ListOf(Json item) { return {{"type", "array"}, {"items", std::move(item)}, {"minItems", 1}}; }

Json Object(Json properties, Json required = Json::array()) {
  return {{"type", "object"},
          {"properties", std::move(properties)},
          {"required", std::move(required)},
          {"additionalProperties", false}};
}

Json ScalarOf(const Param& param) {
  Json scalar = Json::object();
  switch (param.type) {
    case ParamType::kBool:
      return {{"type", "boolean"}};
    case ParamType::kInt:
      scalar["type"] = "integer";
      break;
    case ParamType::kFloat:
      scalar["type"] = "number";
      break;
    case ParamType::kString:
    case ParamType::kPatterns:
      scalar["type"] = "string";
      break;
  }
  if (std::isfinite(param.min)) scalar["minimum"] = param.min;
  if (std::isfinite(param.max)) scalar["maximum"] = param.max;
  if (!param.choices.empty()) scalar["enum"] = param.choices;
  return scalar;
}

// A scalar, a gradient, {filter, value} or a list of those.
Json SettingOf(const Param& param) {
  const Json scalar = ScalarOf(param);
  const Json value = {{"anyOf", {scalar, {{"type", "array"}, {"items", scalar}}}}};
  const Json conditional =
      Object({{"filter", {{"type", {"string", "null"}}}}, {"value", value}}, {"value"});
  Json setting = {
      {"description", param.no_effect ? "Accepted, without effect." : param.help},
      {"anyOf",
       {scalar, {{"type", "array"}, {"items", scalar}}, conditional, ListOf(conditional)}}};
  std::visit(
      [&](const auto& fallback) {
        using T = std::decay_t<decltype(fallback)>;
        if constexpr (!std::is_same_v<T, NoDefault> && !std::is_same_v<T, Unset>) {
          setting["default"] = fallback;
        }
      },
      param.fallback);
  return setting;
}

// The parameters that a method takes, at a level of the recipe.
Json ParametersOf(const MergeMethod& method, bool of_model) {
  Json properties = Json::object();
  for (const Param& param : method.params) {
    if (of_model && param.scope != ParamScopeKind::kModel) continue;
    properties[param.name] = SettingOf(param);
  }
  return Object(std::move(properties));
}

// The keys that hold inputs, with the parameters of the method of that definition.
Json InputKeys(absl::string_view definition) {
  const Json shared = absl::StrCat("#/definitions/", definition);
  const Json own = absl::StrCat("#/definitions/", definition, "_of_model");
  const Json parameters = {{"$ref", shared}};
  const Json of_model = {{"$ref", own}};
  const Json models =
      ListOf(Object({{"model", Reference("model")}, {"parameters", of_model}}, {"model"}));
  const Json range = {{"type", "array"},
                      {"items", {{"type", "integer"}, {"minimum", 0}}},
                      {"minItems", 2},
                      {"maxItems", 2}};
  const Json source =
      Object({{"model", Reference("model")}, {"layer_range", range}, {"parameters", of_model}},
             {"model", "layer_range"});
  const Json slices = ListOf(Object(
      {{"sources", ListOf(source)}, {"base_model", Reference("model")}, {"parameters", parameters}},
      {"sources"}));
  const Json modules = {
      {"type", "object"},
      {"additionalProperties",
       Object({{"models", models}, {"slices", slices}, {"parameters", parameters}})}};
  return {{"parameters", parameters}, {"models", models}, {"slices", slices}, {"modules", modules}};
}

}  // namespace

Json RecipeSchema() {
  const Json path = {
      {"anyOf",
       {{{"type", "string"}},
        Object({{"path", {{"type", "string"}}}, {"revision", {{"type", "string"}}}}, {"path"})}}};
  Json definitions = {
      {"model",
       {{"description", "PATH[@REVISION][+ADAPTER[@REVISION]], or a mapping"},
        {"anyOf",
         {{{"type", "string"}},
          Object({{"model", path}, {"lora", path}, {"override_architecture", {{"type", "string"}}}},
                 {"model"})}}}},
      {"dtype",
       {{"enum",
         {"float32", "float16", "bfloat16", "float64", "torch.float32", "torch.float16",
          "torch.bfloat16", "torch.float64"}}}}};
  // Recipes whose output is an adapter have methods of their own.
  const Json is_lora = {
      {"properties",
       {{"output", {{"properties", {{"format", {{"const", "lora"}}}}}, {"required", {"format"}}}}}},
      {"required", {"output"}}};
  Json by_method = Json::array();
  const auto add = [&](const MergeMethod& method, const std::string& definition, const Json& when) {
    definitions[definition] = ParametersOf(method, /*of_model=*/false);
    definitions[absl::StrCat(definition, "_of_model")] = ParametersOf(method, /*of_model=*/true);
    const Json named = {{"properties", {{"merge_method", {{"const", method.name}}}}}};
    by_method.push_back(
        {{"if", {{"allOf", {named, when}}}}, {"then", {{"properties", InputKeys(definition)}}}});
  };
  Json of_models = Json::array(), of_adapters = Json::array();
  for (const MergeMethod* method : Methods()) {
    of_models.push_back(method->name);
    add(*method, method->name, {{"not", is_lora}});
  }
  for (const AdapterMethod* adapter : AdapterMethods()) {
    of_adapters.push_back(adapter->method.name);
    add(adapter->method, absl::StrCat("adapter_", adapter->method.name), is_lora);
  }
  const auto method_is = [](Json names) -> Json {
    return {{"properties", {{"merge_method", {{"enum", std::move(names)}}}}}};
  };
  by_method.push_back({{"if", is_lora},
                       {"then", method_is(std::move(of_adapters))},
                       {"else", method_is(std::move(of_models))}});
  const Json any = Json::object();
  const Json token_source = {
      {"anyOf",
       {Reference("model"), Object({{"kind", {{"const", "zero"}}}}, {"kind"}),
        Object({{"kind", {{"const", "model_token"}}},
                {"model", Reference("model")},
                {"token", {{"type", "string"}}},
                {"token_id", {{"type", "integer"}}}},
               {"kind", "model"})}}};
  const Json match = {{"enum", {"yes", "no", "embed", "lm_head", true, false}}};
  const Json how = {{"enum",
                     {"omp", "mp_rope", "common_interpolation", "landmark_pca", "stb", "subword",
                      "mean", "john_hewitt", "zero", "randn"}}};
  const Json approximate = {
      {"anyOf",
       {how, Object({{"method", how},
                     {"k", {{"type", "integer"}, {"minimum", 1}, {"maximum", 1024}}},
                     {"cosine_similarity", {{"type", "boolean"}}},
                     {"weight_scheme",
                      {{"enum", {"distance_proportional", "barycentric", "least_squares"}}}},
                     {"subword_method", {{"enum", {"mean", "sum", "weighted_mean", "first_last"}}}},
                     {"prefix_match", match},
                     {"byte_match", match},
                     {"magikarp", {{"type", "boolean"}}},
                     {"new_vocab_noise", {{"type", "number"}, {"minimum", 0}}},
                     {"new_vocab_scale", {{"type", "number"}}}})}}};
  const Json tokenizer =
      Object({{"source", Reference("model")},
              {"tokens",
               {{"type", "object"},
                {"additionalProperties",
                 Object({{"source", token_source}, {"force", {{"type", "boolean"}}}})}}},
              {"pad_to_multiple_of", {{"type", "integer"}, {"minimum", 1}}},
              {"approximate", approximate}});
  const auto groups = [](const Json& names) {
    return Json({{"type", "array"}, {"items", {{"enum", names}}}});
  };
  const Json align =
      Object({{"reference", Reference("model")},
              {"method", {{"enum", {"permutation", "staged", "cca"}}}},
              {"evidence", {{"enum", {"activations", "weights"}}}},
              {"groups", groups({"ffn", "heads", "residual", "pooler", "output_head"})},
              {"heads", {{"enum", {"permutation", "orthogonal"}}}},
              {"query_key", {{"enum", {"own", "shared"}}}},
              {"last_stage", {{"enum", {"weights", "residual"}}}},
              {"mapped", groups({"ffn", "heads", "residual"})},
              {"gamma", {{"type", "number"}, {"minimum", 0}}},
              {"calibration", Reference("model")},
              {"objective", Reference("model")},
              {"verify", Reference("model")},
              {"restarts", {{"type", "integer"}, {"minimum", 1}, {"maximum", 1000}}}},
             {"reference"});
  Json recipe =
      Object({{"name", {{"type", "string"}, {"pattern", "^[A-Za-z0-9_-][A-Za-z0-9._-]*$"}}},
              {"merge_method", {{"enum", MethodNames()}}},
              {"output", Object({{"format", {{"enum", {"safetensors", "lora"}}}}})},
              {"base_model", Reference("model")},
              {"dtype", Reference("dtype")},
              {"out_dtype", Reference("dtype")},
              {"tokenizer_source", Reference("model")},
              {"tokenizer", tokenizer},
              {"chat_template", {{"type", "string"}}},
              {"align", align},
              {"statistics", {{"type", "object"}, {"additionalProperties", Reference("model")}}},
              {"parameters", any},
              {"models", any},
              {"slices", any},
              {"modules", any}},
             {"merge_method"});
  recipe["oneOf"] = {
      {{"required", {"models"}}}, {{"required", {"slices"}}}, {{"required", {"modules"}}}};
  recipe["allOf"] = std::move(by_method);
  Json schema = {{"$schema", "http://json-schema.org/draft-07/schema#"},
                 {"title", "Pewter recipe"},
                 {"definitions", std::move(definitions)}};
  schema.update(recipe);
  return schema;
}

}  // namespace pewter::client
