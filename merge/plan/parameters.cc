#include "merge/plan/parameters.h"

#include <re2/re2.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <set>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/types/span.h"
#include "base/nearest.h"
#include "base/status.h"

namespace pewter {
namespace {

std::string Describe(const ParamScalar& scalar) {
  if (const bool* flag = std::get_if<bool>(&scalar)) return *flag ? "true" : "false";
  if (const int64_t* number = std::get_if<int64_t>(&scalar)) return absl::StrCat(*number);
  if (const double* number = std::get_if<double>(&scalar)) return absl::StrCat(*number);
  return absl::StrCat("\"", std::get<std::string>(scalar), "\"");
}

absl::Status Wrong(const Param& param, TextPosition at, absl::string_view expected,
                   absl::string_view got) {
  return absl::InvalidArgumentError(absl::StrCat(at.ToString(), ": parameter `", param.name,
                                                 "` must be ", expected, ", not ", got));
}

// A number, also from text ("5e-1" is text to YAML 1.1) and from true and false.
std::optional<double> AsNumber(const ParamScalar& scalar) {
  if (const bool* flag = std::get_if<bool>(&scalar)) return *flag ? 1 : 0;
  if (const int64_t* number = std::get_if<int64_t>(&scalar)) return static_cast<double>(*number);
  if (const double* number = std::get_if<double>(&scalar)) return *number;
  double number = 0;
  if (!absl::SimpleAtod(std::get<std::string>(scalar), &number) || !std::isfinite(number)) {
    return std::nullopt;
  }
  return number;
}

std::optional<bool> AsFlag(const ParamScalar& scalar) {
  if (const std::string* text = std::get_if<std::string>(&scalar)) {
    for (absl::string_view word : {"yes", "on", "true", "y", "t", "1"}) {
      if (absl::EqualsIgnoreCase(*text, word)) return true;
    }
    for (absl::string_view word : {"no", "off", "false", "n", "f", "0"}) {
      if (absl::EqualsIgnoreCase(*text, word)) return false;
    }
    return std::nullopt;
  }
  const double number = *AsNumber(scalar);
  if (number != 0 && number != 1) return std::nullopt;
  return number == 1;
}

absl::StatusOr<ParamValue> NumberToValue(const Param& param, double number, TextPosition at) {
  if (number < param.min || number > param.max) {
    const std::string range = std::isinf(param.max) ? absl::StrCat("at least ", param.min)
                              : std::isinf(param.min)
                                  ? absl::StrCat("at most ", param.max)
                                  : absl::StrCat("from ", param.min, " to ", param.max);
    return Wrong(param, at, range, absl::StrCat(number));
  }
  if (param.type == ParamType::kFloat) return ParamValue(number);
  constexpr double kExact = 9007199254740992.0;  // 2^53
  if (number != std::floor(number) || std::abs(number) > kExact) {
    return Wrong(param, at, "a whole number", absl::StrCat(number));
  }
  return ParamValue(static_cast<int64_t>(number));
}

absl::StatusOr<ParamValue> ScalarToValue(const Param& param, const ParamScalar& scalar,
                                         TextPosition at) {
  switch (param.type) {
    case ParamType::kBool: {
      const std::optional<bool> flag = AsFlag(scalar);
      if (!flag) return Wrong(param, at, "true or false", Describe(scalar));
      return ParamValue(*flag);
    }
    case ParamType::kInt:
    case ParamType::kFloat: {
      const std::optional<double> number = AsNumber(scalar);
      if (!number) {
        return Wrong(param, at, param.type == ParamType::kInt ? "a whole number" : "a number",
                     Describe(scalar));
      }
      return NumberToValue(param, *number, at);
    }
    case ParamType::kString:
    case ParamType::kPatterns:
      break;
  }
  const std::string* text = std::get_if<std::string>(&scalar);
  std::string value = text != nullptr ? *text : Describe(scalar);
  if (!param.choices.empty() && std::none_of(param.choices.begin(), param.choices.end(),
                                             [&](const char* choice) { return value == choice; })) {
    return Wrong(param, at, absl::StrCat("one of ", absl::StrJoin(param.choices, ", ")),
                 Describe(scalar));
  }
  if (param.type == ParamType::kPatterns) {
    RE2::Options quiet;
    quiet.set_log_errors(false);
    const RE2 pattern(value, quiet);
    if (!pattern.ok()) {
      return Wrong(param, at, absl::StrCat("a regular expression (", pattern.error(), ")"),
                   Describe(scalar));
    }
  }
  return ParamValue(std::move(value));
}

// One expression that matches where one of the values does.
absl::StatusOr<ParamValue> JoinPatterns(const Param& param, const ParamCase& condition) {
  std::vector<std::string> patterns;
  for (const ParamScalar& scalar : condition.values) {
    ASSIGN_OR_RETURN(const ParamValue value, ScalarToValue(param, scalar, condition.at));
    patterns.push_back(std::get<std::string>(value));
  }
  if (patterns.size() == 1) return ParamValue(patterns[0]);
  return ParamValue(absl::StrCat("(?:", absl::StrJoin(patterns, ")|(?:"), ")"));
}

bool Matches(const ParamCase& condition, absl::string_view tensor) {
  return condition.filter.empty() || condition.filter == "*" ||
         absl::StrContains(tensor, condition.filter);
}

struct Found {
  ParamValue value;
  ParamOrigin origin;
};

// Nullopt when the setting says nothing for this tensor.
absl::StatusOr<std::optional<Found>> Evaluate(const Param& param, const ParamSetting& setting,
                                              absl::string_view tensor, double t) {
  for (const ParamCase& condition : setting.cases) {
    if (!Matches(condition, tensor)) continue;
    const auto count = static_cast<int64_t>(condition.values.size());
    if (count == 0) return std::nullopt;
    if (param.type == ParamType::kPatterns) {
      ParamOrigin origin{.at = condition.at};
      if (condition.filter != "*") origin.filter = condition.filter;
      ASSIGN_OR_RETURN(ParamValue value, JoinPatterns(param, condition));
      return Found{std::move(value), std::move(origin)};
    }
    const double x = t * static_cast<double>(count - 1);
    const auto index = static_cast<int64_t>(std::floor(x));
    ParamOrigin origin{.at = condition.at};
    if (condition.filter != "*") origin.filter = condition.filter;
    if (count > 1) origin.t = t;
    const bool interpolated = param.type == ParamType::kFloat || param.type == ParamType::kInt;
    if (!interpolated || count == 1) {
      ASSIGN_OR_RETURN(ParamValue value,
                       ScalarToValue(param, condition.values[index], condition.at));
      return Found{std::move(value), std::move(origin)};
    }
    const double fraction = x - static_cast<double>(index);
    const std::optional<double> low = AsNumber(condition.values[index]);
    const std::optional<double> high = AsNumber(condition.values[std::min(index + 1, count - 1)]);
    if (!low || !high) return Wrong(param, condition.at, "a list of numbers", "text");
    ASSIGN_OR_RETURN(ParamValue value,
                     NumberToValue(param, (1 - fraction) * *low + fraction * *high, condition.at));
    return Found{std::move(value), std::move(origin)};
  }
  return std::nullopt;
}

struct NamedScope {
  const char* name;
  const ParamScope* scope;  // null: none
};

// The first level that says something.
absl::StatusOr<std::optional<Found>> Lookup(const Param& param, absl::Span<const NamedScope> levels,
                                            absl::string_view tensor, double t) {
  for (const NamedScope& level : levels) {
    if (level.scope == nullptr) continue;
    const auto setting = level.scope->find(param.name);
    if (setting == level.scope->end()) continue;
    ASSIGN_OR_RETURN(std::optional<Found> found, Evaluate(param, setting->second, tensor, t));
    if (!found) continue;
    found->origin.level = level.name;
    return found;
  }
  if (const bool* flag = std::get_if<bool>(&param.fallback)) return Found{*flag, {}};
  if (const auto* number = std::get_if<int64_t>(&param.fallback)) {
    if (param.type == ParamType::kFloat) return Found{static_cast<double>(*number), {}};
    return Found{*number, {}};
  }
  if (const auto* number = std::get_if<double>(&param.fallback)) return Found{*number, {}};
  if (const auto* text = std::get_if<const char*>(&param.fallback)) {
    return Found{std::string(*text), {}};
  }
  return std::nullopt;
}

void Add(const Param& param, Found found, ResolvedParams& params) {
  params.values.emplace(param.name, std::move(found.value));
  params.origins.emplace(param.name, std::move(found.origin));
}

// --- checking -----------------------------------------------------------------------------------

enum class Level { kRecipe, kModule, kSlice, kModel };

absl::string_view LevelName(Level level) {
  switch (level) {
    case Level::kRecipe:
      return "the recipe";
    case Level::kModule:
      return "a module";
    case Level::kSlice:
      return "a slice";
    case Level::kModel:
      break;
  }
  return "a model";
}

bool Allowed(ParamScopeKind scope, Level level) {
  switch (scope) {
    case ParamScopeKind::kModel:
      return true;
    case ParamScopeKind::kTensor:
      return level != Level::kModel;
    case ParamScopeKind::kJob:
      break;
  }
  return level == Level::kRecipe;
}

class ParameterChecker {
 public:
  ParameterChecker(const MergeMethod& method, std::vector<std::string>& warnings)
      : method_(method), warnings_(warnings) {
    for (const Param& param : method.params) names_.emplace_back(param.name);
  }

  absl::Status Check(const ParamScope& scope, Level level) {
    for (const auto& [name, setting] : scope) {
      const auto param = std::find_if(method_.params.begin(), method_.params.end(),
                                      [&name = name](const Param& p) { return name == p.name; });
      if (param == method_.params.end()) {
        Warn(setting, name, WhyUnknown(name));
        continue;
      }
      if (!Allowed(param->scope, level)) {
        Warn(setting, name,
             absl::StrCat("is ignored under ", LevelName(level),
                          param->scope == ParamScopeKind::kTensor
                              ? "; it holds for all models: set it in `parameters` of the recipe, "
                                "a module or a slice"
                              : "; it holds for the whole job: set it in `parameters` of the "
                                "recipe"));
        continue;
      }
      if (param->no_effect) Warn(setting, name, absl::StrCat("has no effect in ", method_.name));
      for (const ParamCase& condition : setting.cases) {
        for (const ParamScalar& scalar : condition.values) {
          const auto value = ScalarToValue(*param, scalar, condition.at);
          if (!value.ok()) return value.status();
        }
      }
    }
    return absl::OkStatus();
  }

 private:
  void Warn(const ParamSetting& setting, absl::string_view name, absl::string_view why) {
    warnings_.push_back(absl::StrCat(setting.at.ToString(), ": parameter `", name, "` ", why));
  }

  std::string WhyUnknown(const std::string& name) const {
    std::vector<absl::string_view> owners;
    for (const MergeMethod* other : Methods()) {
      for (const Param& param : other->params) {
        if (name == param.name) owners.push_back(other->name);
      }
    }
    const std::string ignored =
        absl::StrCat("is ignored: ", method_.name, " has no such parameter");
    if (owners.empty()) return absl::StrCat(ignored, DidYouMean(name, names_));
    return absl::StrCat(ignored, " (", absl::StrJoin(owners, ", "),
                        owners.size() == 1 ? " has)" : " have)");
  }

  const MergeMethod& method_;
  std::vector<std::string>& warnings_;
  std::vector<std::string> names_;
};

}  // namespace

std::string ParamOrigin::ToString() const {
  std::string text = level;
  if (at.line != 0 || level != absl::string_view("default")) {
    absl::StrAppend(&text, ", ", at.ToString());
  }
  if (!filter.empty()) absl::StrAppend(&text, ", filter \"", filter, "\"");
  if (t) absl::StrAppend(&text, ", gradient at ", *t);
  return text;
}

void ParamUse::Add(const ParamOrigins& origins) {
  for (const auto& [name, origin] : origins) {
    if (origin.at.line == 0) continue;
    const double t = origin.t.value_or(0);
    const auto [range, added] = range_.try_emplace({origin.at.line, origin.at.column}, t, t);
    range->second.first = std::min(range->second.first, t);
    range->second.second = std::max(range->second.second, t);
  }
}

const std::pair<double, double>* ParamUse::Find(TextPosition at) const {
  const auto found = range_.find({at.line, at.column});
  return found == range_.end() ? nullptr : &found->second;
}

absl::Status CheckParameters(const Recipe& recipe, const MergeMethod& method,
                             std::vector<std::string>& warnings) {
  ParameterChecker checker(method, warnings);
  RETURN_IF_ERROR(checker.Check(recipe.parameters, Level::kRecipe));
  for (const RecipeModule& module : recipe.modules) {
    RETURN_IF_ERROR(checker.Check(module.parameters, Level::kModule));
    for (const RecipeSlice& slice : module.slices) {
      RETURN_IF_ERROR(checker.Check(slice.parameters, Level::kSlice));
      for (const RecipeSource& source : slice.sources) {
        RETURN_IF_ERROR(checker.Check(source.parameters, Level::kModel));
      }
    }
  }
  return absl::OkStatus();
}

namespace {

// Calls `visit` with every setting of the recipe that the method looks at, its name and whether it
// is the base model's.
template <typename Visit>
void ForEachSetting(const Recipe& recipe, const MergeMethod& method, const Visit& visit) {
  const auto walk = [&](const ParamScope& scope, Level level, bool of_base) {
    for (const Param& param : method.params) {
      const auto setting = scope.find(param.name);
      if (setting == scope.end() || param.no_effect || !Allowed(param.scope, level)) continue;
      visit(param, setting->second, of_base);
    }
  };
  walk(recipe.parameters, Level::kRecipe, false);
  for (const RecipeModule& module : recipe.modules) {
    walk(module.parameters, Level::kModule, false);
    for (const RecipeSlice& slice : module.slices) {
      walk(slice.parameters, Level::kSlice, false);
      const std::optional<ModelRef>& base = slice.base_model ? slice.base_model : recipe.base_model;
      for (const RecipeSource& source : slice.sources) {
        const bool of_base = method.base != BaseUse::kInput && base && *base == source.model;
        walk(source.parameters, Level::kModel, of_base);
      }
    }
  }
}

}  // namespace

void WarnOfIdleSettings(const Recipe& recipe, const MergeMethod& method, const ParamUse& use,
                        const absl::flat_hash_set<std::string>& tensors,
                        std::vector<std::string>& warnings) {
  std::set<std::pair<int, int>> seen;  // aliases lead to one place several times
  ForEachSetting(
      recipe, method, [&](const Param& param, const ParamSetting& setting, bool of_base) {
        for (const ParamCase& condition : setting.cases) {
          if (condition.at.line == 0 || condition.values.empty() ||
              !seen.emplace(condition.at.line, condition.at.column).second) {
            continue;
          }
          const auto warn = [&](const auto&... why) {
            warnings.push_back(absl::StrCat(condition.at.ToString(), ": ", why...));
          };
          const std::pair<double, double>* range = use.Find(condition.at);
          const bool matches =
              std::any_of(tensors.begin(), tensors.end(),
                          [&](const std::string& tensor) { return Matches(condition, tensor); });
          if (!matches) {
            warn("no tensor's name contains the filter \"", condition.filter, "\" of parameter `",
                 param.name, "`");
          } else if (range == nullptr && of_base) {
            warn("parameter `", param.name, "` of the base model has no effect in ", method.name,
                 ", which has it for the other models only");
          } else if (range == nullptr) {
            warn("parameter `", param.name,
                 "` changes nothing here: wherever it could count, a nearer level or an earlier "
                 "filter "
                 "decides");
          } else if (condition.values.size() > 1 && range->first == range->second) {
            warn("the gradient of parameter `", param.name,
                 "` does not vary: all tensors that it is "
                 "for take its value at ",
                 range->first, " (", range->first == 0 ? "the first" : "the last",
                 "); only layers of a slice with several vary");
          }
        }
      });
}

absl::StatusOr<ResolvedParams> TensorParameters(const MergeMethod& method, const ParamPlace& place,
                                                absl::string_view output_tensor) {
  ResolvedParams params;
  for (const Param& param : method.params) {
    if (param.scope == ParamScopeKind::kModel || param.no_effect) continue;
    const bool job = param.scope == ParamScopeKind::kJob;
    ASSIGN_OR_RETURN(std::optional<Found> found, Lookup(param,
                                                        {{"slice", job ? nullptr : place.slice},
                                                         {"module", job ? nullptr : place.module},
                                                         {"recipe", place.recipe}},
                                                        output_tensor, place.t));
    if (found) {
      Add(param, *std::move(found), params);
    } else if (std::holds_alternative<NoDefault>(param.fallback)) {
      return absl::InvalidArgumentError(absl::StrCat(
          "parameter `", param.name, "`, which ", method.name, " needs, is not set for tensor ",
          output_tensor, "; set it in `parameters` of the recipe"));
    }
  }
  return params;
}

absl::StatusOr<ResolvedParams> ModelParameters(const MergeMethod& method, const ParamPlace& place,
                                               const ParamScope* own, absl::string_view model,
                                               absl::string_view source_tensor) {
  ResolvedParams params;
  for (const Param& param : method.params) {
    if (param.scope != ParamScopeKind::kModel || param.no_effect) continue;
    ASSIGN_OR_RETURN(std::optional<Found> found, Lookup(param,
                                                        {{"model", own},
                                                         {"slice", place.slice},
                                                         {"module", place.module},
                                                         {"recipe", place.recipe}},
                                                        source_tensor, place.t));
    if (found) {
      Add(param, *std::move(found), params);
    } else if (std::holds_alternative<NoDefault>(param.fallback)) {
      return absl::InvalidArgumentError(absl::StrCat(
          "parameter `", param.name, "`, which ", method.name, " needs, is not set for model ",
          model, ", tensor ", source_tensor,
          own == nullptr ? " (base_model is one of the inputs of this method; list it in `models`)"
                         : "",
          "; set it under the model or in `parameters` of the recipe"));
    }
  }
  return params;
}

}  // namespace pewter
