#include "merge/recipe/recipe.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "absl/types/span.h"
#include "base/nearest.h"
#include "base/status.h"
#include "merge/recipe/stages.h"
#include "merge/recipe/yaml.h"
#include "merge/recipe/yaml_reader.h"

namespace pewter {
namespace {

constexpr const char* kLater = "is not supported by this version of Pewter";

// Larger than any alignment that hardware asks for.
constexpr int64_t kMaxPadding = int64_t{1} << 20;
// The work for a row grows with the square.
constexpr int64_t kMaxRowsOfApproximation = 1024;
// Each is an evaluation.
constexpr int64_t kMaxBarrierPoints = 1001;
constexpr int64_t kMaxRestarts = 1000;

class RecipeReader : private YamlReader {
 public:
  explicit RecipeReader(Recipe& recipe) : YamlReader(recipe.warnings), recipe_(recipe) {}

  absl::Status Read(const YamlNode& root) {
    static constexpr Key kKeys[] = {
        {"name"},       {"merge_method"},        {"models"},     {"slices"},
        {"modules"},    {"base_model"},          {"dtype"},      {"out_dtype"},
        {"parameters"}, {"tokenizer_source"},    {"tokenizer"},  {"chat_template"},
        {"align"},      {"calibration", kLater}, {"statistics"}, {"evaluate"},
        {"output"},     {"arithmetic", kLater},
    };
    if (root.kind != Kind::kMapping) {
      return Expected(root, "a recipe", "a mapping with `merge_method` and `models`");
    }
    if (!IsNull(root.Find("layer_slices"))) {
      Note(ReadLayerSlices(root));
      return Problems();
    }
    if (!IsNull(root.Find("merging_config"))) {
      Note(ReadMergingConfig(root));
      return Problems();
    }
    Note(CheckKeys(root, "the recipe", kKeys));
    Note(ReadHead(root));
    Note(ReadMethod(root));
    Note(ReadOptionalModel(root, "base_model", recipe_.base_model));
    Note(ReadParameters(root, recipe_.parameters));
    Note(ReadOutput(root));
    Note(ReadStatistics(root));
    Note(ReadEvaluation(root));
    Note(ReadTokenizer(root));
    Note(ReadAlign(root));
    if (const YamlNode* chat = root.Find("chat_template"); !IsNull(chat)) {
      auto text = Text(*chat, "chat_template");
      Note(text.status());
      if (text.ok()) recipe_.chat_template = *std::move(text);
      recipe_.chat_template_at = chat->at;
    }
    Note(ReadInputs(root));
    return Problems();
  }

 private:
  // What recipes of every form have.
  absl::Status ReadHead(const YamlNode& root) {
    recipe_.at = root.at;
    if (const YamlNode* name = root.Find("name"); !IsNull(name)) {
      ASSIGN_OR_RETURN(recipe_.name, Text(*name, "name"));
      recipe_.name_at = name->at;
    }
    Note(ReadDType(root, "dtype", recipe_.dtype));
    return ReadDType(root, "out_dtype", recipe_.out_dtype);
  }

  absl::Status ReadMethod(const YamlNode& root) {
    const YamlNode* method = root.Find("merge_method");
    if (IsNull(method)) {
      return RecipeError(root.at,
                         IsNull(root.Find("experts"))
                             ? "`merge_method` is missing; `pewter methods` lists the methods"
                             : "`merge_method` is missing; mixtures of experts are made by "
                               "`pewter moe`");
    }
    ASSIGN_OR_RETURN(recipe_.merge_method, Text(*method, "merge_method"));
    recipe_.merge_method_at = method->at;
    return absl::OkStatus();
  }

  static absl::StatusOr<ParamScalar> ReadScalar(const YamlNode& node, absl::string_view param) {
    if (node.kind != Kind::kScalar) {
      return Expected(node, absl::StrCat("parameter `", param, "`"),
                      "a number, true or false, text, a list of them, or {filter, value}");
    }
    if (const auto flag = YamlBool(node)) return ParamScalar(*flag);
    if (const auto number = YamlInt(node)) return ParamScalar(*number);
    if (const auto number = YamlFloat(node)) {
      if (!std::isfinite(*number)) {
        return Expected(node, absl::StrCat("parameter `", param, "`"), "finite");
      }
      return ParamScalar(*number);
    }
    return ParamScalar(node.text);
  }

  // A scalar or a gradient.
  static absl::StatusOr<ParamCase> ReadValue(const YamlNode& node, absl::string_view param) {
    ParamCase result;
    result.at = node.at;
    if (node.kind != Kind::kSequence) {
      ASSIGN_OR_RETURN(ParamScalar scalar, ReadScalar(node, param));
      result.values.push_back(std::move(scalar));
      return result;
    }
    result.gradient = true;
    for (const YamlNode* item : node.items) {
      ASSIGN_OR_RETURN(ParamScalar scalar, ReadScalar(*item, param));
      result.values.push_back(std::move(scalar));
    }
    return result;
  }

  absl::StatusOr<ParamCase> ReadConditional(const YamlNode& node, absl::string_view param) {
    if (node.kind != Kind::kMapping) {
      return Expected(node, absl::StrCat("parameter `", param, "`"),
                      "a list of {filter, value} here, as its first item is");
    }
    static constexpr Key kKeys[] = {{"filter"}, {"value"}};
    RETURN_IF_ERROR(CheckKeys(node, absl::StrCat("parameter `", param, "`"), kKeys));
    const YamlNode* value = node.Find("value");
    if (value == nullptr) {
      return RecipeError(node.at, absl::StrCat("parameter `", param, "` has no `value`"));
    }
    ASSIGN_OR_RETURN(ParamCase result, ReadValue(*value, param));
    if (const YamlNode* filter = node.Find("filter"); !IsNull(filter)) {
      ASSIGN_OR_RETURN(result.filter, Text(*filter, "filter"));
    }
    return result;
  }

  absl::StatusOr<ParamSetting> ReadSetting(const YamlNode& node, absl::string_view param) {
    ParamSetting setting;
    setting.at = node.at;
    if (node.kind == Kind::kMapping) {
      ASSIGN_OR_RETURN(ParamCase only, ReadConditional(node, param));
      setting.cases.push_back(std::move(only));
    } else if (node.kind == Kind::kSequence && !node.items.empty() &&
               node.items[0]->kind == Kind::kMapping) {
      for (const YamlNode* item : node.items) {
        ASSIGN_OR_RETURN(ParamCase one, ReadConditional(*item, param));
        setting.cases.push_back(std::move(one));
      }
    } else {
      ASSIGN_OR_RETURN(ParamCase only, ReadValue(node, param));
      setting.cases.push_back(std::move(only));
    }
    return setting;
  }

  absl::Status ReadParameters(const YamlNode& mapping, ParamScope& scope) {
    const YamlNode* parameters = mapping.Find("parameters");
    if (IsNull(parameters)) return absl::OkStatus();
    if (parameters->kind != Kind::kMapping) {
      return Expected(*parameters, "`parameters`", "a mapping of parameter names to values");
    }
    for (const YamlNode::Entry& entry : parameters->entries) {
      auto setting = ReadSetting(*entry.value, entry.key->text);
      Note(setting.status());
      if (setting.ok()) scope[entry.key->text] = *std::move(setting);
    }
    return absl::OkStatus();
  }

  absl::Status ReadOutput(const YamlNode& root) {
    static constexpr Key kKeys[] = {
        {"format"},
        {"shard_size",
         "is not supported by this version of Pewter; it is an option of the command "
         "(--shard-size)"},
        {"compression", kLater},
        {"report"},
    };
    const YamlNode* output = root.Find("output");
    if (IsNull(output)) return absl::OkStatus();
    if (output->kind != Kind::kMapping)
      return Expected(*output, "`output`", "a mapping with `format` or `report`");
    RETURN_IF_ERROR(CheckKeys(*output, "`output`", kKeys));
    if (const YamlNode* report = output->Find("report"); !IsNull(report)) {
      recipe_.report_at = report->at;
      RETURN_IF_ERROR(ReadFlag(report, "`report`", recipe_.report));
    }
    const YamlNode* format = output->Find("format");
    if (IsNull(format)) return absl::OkStatus();
    recipe_.output_format_at = format->at;
    if (format->kind == Kind::kScalar && format->text == "safetensors") return absl::OkStatus();
    if (format->kind != Kind::kScalar || format->text != "lora") {
      return Expected(*format, "`format`", "safetensors (a model) or lora (an adapter)");
    }
    recipe_.output_format = OutputFormat::kLora;
    return absl::OkStatus();
  }

  absl::Status ReadStatistics(const YamlNode& root) {
    const YamlNode* statistics = root.Find("statistics");
    if (IsNull(statistics)) return absl::OkStatus();
    if (statistics->kind != Kind::kMapping) {
      return Expected(*statistics, "`statistics`", "a mapping of models to files");
    }
    recipe_.statistics_at = statistics->at;
    for (const YamlNode::Entry& entry : statistics->entries) {
      RecipeStatistics one;
      ASSIGN_OR_RETURN(one.model, ReadModel(*entry.key, "a key of `statistics`"));
      ASSIGN_OR_RETURN(one.file, ReadModel(*entry.value, "a file of `statistics`"));
      if (!one.file.adapter.empty()) {
        return RecipeError(one.file.at, "a file of `statistics` has no adapter");
      }
      recipe_.statistics.push_back(std::move(one));
    }
    return absl::OkStatus();
  }

  absl::Status ReadEvaluation(const YamlNode& root) {
    static constexpr Key kKeys[] = {{"data"}, {"metric"}, {"barrier_points"}};
    const YamlNode* evaluate = root.Find("evaluate");
    if (IsNull(evaluate)) return absl::OkStatus();
    if (evaluate->kind != Kind::kMapping || IsNull(evaluate->Find("data"))) {
      return Expected(*evaluate, "`evaluate`", "a mapping with `data`");
    }
    RETURN_IF_ERROR(CheckKeys(*evaluate, "`evaluate`", kKeys));
    RecipeEvaluation& evaluation = recipe_.evaluation.emplace();
    evaluation.at = evaluate->at;
    ASSIGN_OR_RETURN(evaluation.data, ReadModel(*evaluate->Find("data"), "`data`"));
    if (!evaluation.data.adapter.empty()) {
      return RecipeError(evaluation.data.at, "`data` is a file, which has no adapter");
    }
    if (const YamlNode* metric = evaluate->Find("metric"); !IsNull(metric)) {
      ASSIGN_OR_RETURN(evaluation.metric, Text(*metric, "metric"));
      evaluation.metric_at = metric->at;
    }
    if (const YamlNode* points = evaluate->Find("barrier_points"); !IsNull(points)) {
      const auto number = YamlInt(*points);
      if (!number || *number < 3 || *number > kMaxBarrierPoints) {
        return Expected(*points, "`barrier_points`",
                        absl::StrCat("a whole number from 3 to ", kMaxBarrierPoints));
      }
      evaluation.barrier_points = *number;
    }
    return absl::OkStatus();
  }

  absl::Status ReadTokenizer(const YamlNode& root) {
    const YamlNode* legacy = root.Find("tokenizer_source");
    const YamlNode* tokenizer = root.Find("tokenizer");
    if (IsNull(legacy) && IsNull(tokenizer)) return absl::OkStatus();
    if (!IsNull(legacy) && !IsNull(tokenizer)) {
      return RecipeError(tokenizer->at, absl::StrCat("both `tokenizer` and `tokenizer_source` (",
                                                     legacy->at.ToString(), "); give one of them"));
    }
    RecipeTokenizer& result = recipe_.tokenizer.emplace();
    const YamlNode* source = legacy;
    if (IsNull(legacy)) {
      static constexpr Key kKeys[] = {
          {"source"}, {"tokens"}, {"pad_to_multiple_of"}, {"approximate"}};
      if (tokenizer->kind != Kind::kMapping) {
        return Expected(*tokenizer, "`tokenizer`",
                        "a mapping with `source`, `tokens` or `pad_to_multiple_of`");
      }
      RETURN_IF_ERROR(CheckKeys(*tokenizer, "`tokenizer`", kKeys));
      RETURN_IF_ERROR(ReadTokens(tokenizer->Find("tokens"), result.tokens));
      if (const YamlNode* multiple = tokenizer->Find("pad_to_multiple_of"); !IsNull(multiple)) {
        const auto number = YamlInt(*multiple);
        if (!number || *number < 1 || *number > kMaxPadding) {
          return Expected(*multiple, "`pad_to_multiple_of`",
                          absl::StrCat("a whole number from 1 to ", kMaxPadding));
        }
        result.pad_to_multiple_of = *number;
      }
      RETURN_IF_ERROR(ReadApproximation(tokenizer->Find("approximate"), result.approximate));
      source = tokenizer->Find("source");
    }
    result.at = IsNull(source) ? tokenizer->at : source->at;
    const bool named = !IsNull(source) && !(source->kind == Kind::kScalar &&
                                            (source->text == "union" || source->text == "base"));
    if (result.approximate && !named) {
      return RecipeError(result.approximate->at,
                         "`approximate` needs a model as the tokenizer's `source`, from which rows "
                         "can be made");
    }
    if (IsNull(source) || (source->kind == Kind::kScalar && source->text == "union")) {
      return absl::OkStatus();
    }
    if (source->kind == Kind::kScalar && source->text == "base") {
      result.source = RecipeTokenizer::Source::kBase;
      return absl::OkStatus();
    }
    result.source = RecipeTokenizer::Source::kModel;
    ASSIGN_OR_RETURN(result.model, ReadModel(*source, "the tokenizer's source"));
    return absl::OkStatus();
  }

  // The value that a word stands for, of a list of them.
  template <class T, size_t kCount>
  static absl::Status ReadWord(const YamlNode* node, absl::string_view what,
                               const std::pair<absl::string_view, T> (&words)[kCount], T& value) {
    if (IsNull(node)) return absl::OkStatus();
    std::vector<absl::string_view> names;
    for (const auto& [name, meaning] : words) {
      if (node->kind == Kind::kScalar && node->text == name) {
        value = meaning;
        return absl::OkStatus();
      }
      names.push_back(name);
    }
    return Expected(*node, what, absl::StrCat("one of ", absl::StrJoin(names, ", ")));
  }

  absl::Status ReadAlign(const YamlNode& root) {
    static constexpr Key kKeys[] = {{"reference"}, {"method"},      {"evidence"},   {"groups"},
                                    {"heads"},     {"calibration"}, {"restarts"},   {"verify"},
                                    {"query_key"}, {"objective"},   {"last_stage"}, {"mapped"},
                                    {"gamma"}};
    static constexpr std::pair<absl::string_view, RecipeAlign::Method> kMethods[] = {
        {"permutation", RecipeAlign::Method::kPermutation},
        {"staged", RecipeAlign::Method::kStaged},
        {"cca", RecipeAlign::Method::kCca}};
    static constexpr std::pair<absl::string_view, RecipeAlign::Evidence> kEvidence[] = {
        {"activations", RecipeAlign::Evidence::kActivations},
        {"weights", RecipeAlign::Evidence::kWeights}};
    static constexpr std::pair<absl::string_view, RecipeAlign::Heads> kHeads[] = {
        {"permutation", RecipeAlign::Heads::kPermutation},
        {"orthogonal", RecipeAlign::Heads::kOrthogonal}};
    static constexpr std::pair<absl::string_view, RecipeAlign::QueryKey> kQueryKeys[] = {
        {"own", RecipeAlign::QueryKey::kOwn}, {"shared", RecipeAlign::QueryKey::kShared}};
    static constexpr std::pair<absl::string_view, RecipeAlign::Stage> kStages[] = {
        {"weights", RecipeAlign::Stage::kWeights}, {"residual", RecipeAlign::Stage::kResidual}};
    const YamlNode* align = root.Find("align");
    if (IsNull(align)) return absl::OkStatus();
    if (align->kind != Kind::kMapping) {
      return Expected(*align, "`align`", "a mapping with `reference`");
    }
    RETURN_IF_ERROR(CheckKeys(*align, "`align`", kKeys));
    RecipeAlign& result = recipe_.align.emplace();
    result.at = align->at;
    const auto place = [&](const char* key) {
      const YamlNode* node = align->Find(key);
      return IsNull(node) ? align->at : node->at;
    };
    result.method_at = place("method");
    result.evidence_at = place("evidence");
    result.heads_at = place("heads");
    result.groups_at = place("groups");
    const auto given = [&](const char* key) -> std::optional<TextPosition> {
      const YamlNode* node = align->Find(key);
      return IsNull(node) ? std::nullopt : std::optional(node->at);
    };
    result.query_key_at = given("query_key");
    result.last_stage_at = given("last_stage");
    result.mapped_at = given("mapped");
    result.gamma_at = given("gamma");
    const YamlNode* reference = align->Find("reference");
    if (IsNull(reference)) return RecipeError(align->at, "`align` has no `reference`");
    ASSIGN_OR_RETURN(result.reference, ReadModel(*reference, "`reference`"));
    for (const auto& [key, file] :
         {std::pair{"calibration", &result.calibration}, std::pair{"objective", &result.objective},
          std::pair{"verify", &result.verify}}) {
      RETURN_IF_ERROR(ReadOptionalModel(*align, key, *file));
      if (*file && !(*file)->adapter.empty()) {
        return RecipeError((*file)->at,
                           absl::StrCat("`", key, "` is a file, which has no adapter"));
      }
    }
    if (result.calibration) result.evidence = RecipeAlign::Evidence::kActivations;
    RETURN_IF_ERROR(ReadWord(align->Find("method"), "`method`", kMethods, result.method));
    RETURN_IF_ERROR(ReadWord(align->Find("evidence"), "`evidence`", kEvidence, result.evidence));
    RETURN_IF_ERROR(ReadWord(align->Find("heads"), "`heads`", kHeads, result.heads));
    RETURN_IF_ERROR(
        ReadWord(align->Find("query_key"), "`query_key`", kQueryKeys, result.query_key));
    if (result.last_stage_at) {
      RETURN_IF_ERROR(ReadWord(align->Find("last_stage"), "`last_stage`", kStages,
                               result.last_stage.emplace()));
    }
    RETURN_IF_ERROR(ReadReal(align->Find("gamma"), "`gamma`", /*zero=*/true, result.gamma));
    if (const YamlNode* restarts = align->Find("restarts"); !IsNull(restarts)) {
      const auto number = YamlInt(*restarts);
      if (!number || *number < 1 || *number > kMaxRestarts) {
        return Expected(*restarts, "`restarts`",
                        absl::StrCat("a whole number from 1 to ", kMaxRestarts));
      }
      result.restarts = static_cast<int>(*number);
    }
    result.groups = {RecipeAlign::Group::kFfn, RecipeAlign::Group::kHeads,
                     RecipeAlign::Group::kResidual};
    result.mapped = {RecipeAlign::Group::kHeads};
    RETURN_IF_ERROR(ReadGroups(*align, "groups", result.groups));
    return ReadGroups(*align, "mapped", result.mapped);
  }

  // Each once; `result` stays where the key is not there. An empty list is one.
  absl::Status ReadGroups(const YamlNode& align, const char* key,
                          std::vector<RecipeAlign::Group>& result) {
    static constexpr std::pair<absl::string_view, RecipeAlign::Group> kGroups[] = {
        {"ffn", RecipeAlign::Group::kFfn},
        {"heads", RecipeAlign::Group::kHeads},
        {"residual", RecipeAlign::Group::kResidual},
        {"pooler", RecipeAlign::Group::kPooler},
        {"output_head", RecipeAlign::Group::kOutputHead}};
    if (IsNull(align.Find(key))) return absl::OkStatus();
    ASSIGN_OR_RETURN(const YamlNode* groups, List(align, key));
    result.clear();
    if (groups == nullptr) return absl::OkStatus();
    const std::string entry = absl::StrCat("an entry of `", key, "`");
    for (const YamlNode* item : groups->items) {
      RecipeAlign::Group group{};
      if (IsNull(item)) return Expected(*item, entry, "a group's name");
      RETURN_IF_ERROR(ReadWord(item, entry, kGroups, group));
      if (std::find(result.begin(), result.end(), group) == result.end()) result.push_back(group);
    }
    return absl::OkStatus();
  }

  static absl::Status ReadFlag(const YamlNode* node, absl::string_view what, bool& value) {
    if (IsNull(node)) return absl::OkStatus();
    const auto flag = YamlBool(*node);
    if (!flag) return Expected(*node, what, "true or false");
    value = *flag;
    return absl::OkStatus();
  }

  // yes, no, embed, lm_head
  static absl::Status ReadMatch(const YamlNode* node, absl::string_view what,
                                TokenApproximation::Match& value) {
    using Match = TokenApproximation::Match;
    if (IsNull(node)) return absl::OkStatus();
    if (const auto flag = YamlBool(*node)) {
      value = *flag ? Match::kBoth : Match::kNo;
      return absl::OkStatus();
    }
    static constexpr std::pair<absl::string_view, Match> kWords[] = {{"yes", Match::kBoth},
                                                                     {"no", Match::kNo},
                                                                     {"embed", Match::kEmbeddings},
                                                                     {"lm_head", Match::kHead}};
    return ReadWord(node, what, kWords, value);
  }

  static absl::Status ReadReal(const YamlNode* node, absl::string_view what, bool zero,
                               double& value) {
    if (IsNull(node)) return absl::OkStatus();
    const auto number = YamlFloat(*node);
    if (!number || !std::isfinite(*number) || (zero ? *number < 0 : *number == 0)) {
      return Expected(*node, what, zero ? "a number, not negative" : "a number other than 0");
    }
    value = *number;
    return absl::OkStatus();
  }

  // METHOD, or {method: METHOD, k: N, ...}: options of mergekit-tokensurgeon.
  absl::Status ReadApproximation(const YamlNode* node, std::optional<TokenApproximation>& result) {
    if (IsNull(node)) return absl::OkStatus();
    using Method = TokenApproximation::Method;
    using Weights = TokenApproximation::Weights;
    using Subwords = TokenApproximation::Subwords;
    static constexpr std::pair<absl::string_view, Method> kMethods[] = {
        {"omp", Method::kOmp},
        {"common_interpolation", Method::kCommonInterpolation},
        {"subword", Method::kSubword},
        {"mean", Method::kMean},
        {"zero", Method::kZero},
        {"randn", Method::kRandn},
        {"john_hewitt", Method::kJohnHewitt},
        {"landmark_pca", Method::kLandmarkPca},
        {"stb", Method::kSparseTokenBasis},
        {"mp_rope", Method::kMatchingPursuitRope}};
    static constexpr std::pair<absl::string_view, Weights> kWeights[] = {
        {"distance_proportional", Weights::kDistance},
        {"barycentric", Weights::kBarycentric},
        {"least_squares", Weights::kLeastSquares}};
    static constexpr std::pair<absl::string_view, Subwords> kSubwords[] = {
        {"mean", Subwords::kMean},
        {"sum", Subwords::kSum},
        {"weighted_mean", Subwords::kWeightedMean},
        {"first_last", Subwords::kFirstLast}};
    constexpr absl::string_view kWhat = "the method of `approximate`";
    TokenApproximation& how = result.emplace();
    how.at = node->at;
    if (node->kind != Kind::kMapping) return ReadWord(node, kWhat, kMethods, how.method);
    static constexpr Key kKeys[] = {{"method"},
                                    {"k"},
                                    {"cosine_similarity"},
                                    {"weight_scheme"},
                                    {"subword_method"},
                                    {"prefix_match"},
                                    {"byte_match"},
                                    {"magikarp"},
                                    {"new_vocab_noise"},
                                    {"new_vocab_scale"}};
    RETURN_IF_ERROR(CheckKeys(*node, "`approximate`", kKeys));
    RETURN_IF_ERROR(ReadWord(node->Find("method"), kWhat, kMethods, how.method));
    if (const YamlNode* k = node->Find("k"); !IsNull(k)) {
      const auto number = YamlInt(*k);
      if (!number || *number < 1 || *number > kMaxRowsOfApproximation) {
        return Expected(*k, "`k`",
                        absl::StrCat("a whole number from 1 to ", kMaxRowsOfApproximation));
      }
      how.k = *number;
    }
    RETURN_IF_ERROR(ReadFlag(node->Find("cosine_similarity"), "`cosine_similarity`", how.cosine));
    RETURN_IF_ERROR(
        ReadWord(node->Find("weight_scheme"), "`weight_scheme`", kWeights, how.weights));
    RETURN_IF_ERROR(
        ReadWord(node->Find("subword_method"), "`subword_method`", kSubwords, how.subwords));
    RETURN_IF_ERROR(ReadMatch(node->Find("prefix_match"), "`prefix_match`", how.prefix));
    RETURN_IF_ERROR(ReadMatch(node->Find("byte_match"), "`byte_match`", how.byte));
    RETURN_IF_ERROR(ReadFlag(node->Find("magikarp"), "`magikarp`", how.magikarp));
    RETURN_IF_ERROR(
        ReadReal(node->Find("new_vocab_noise"), "`new_vocab_noise`", /*zero=*/true, how.noise));
    return ReadReal(node->Find("new_vocab_scale"), "`new_vocab_scale`", /*zero=*/false, how.scale);
  }

  // {TOKEN: {source: MODEL | {kind: zero} | {kind: model_token, ...}, force: BOOL}}
  absl::Status ReadTokens(const YamlNode* tokens, std::vector<RecipeToken>& result) {
    if (IsNull(tokens)) return absl::OkStatus();
    if (tokens->kind != Kind::kMapping) {
      return Expected(*tokens, "`tokens`", "a mapping of tokens to {source, force}");
    }
    for (const YamlNode::Entry& entry : tokens->entries) {
      static constexpr Key kKeys[] = {{"source"}, {"force"}};
      RecipeToken& token = result.emplace_back();
      token.token = entry.key->text;
      token.at = entry.key->at;
      if (token.token.empty()) return RecipeError(token.at, "a token of `tokens` is empty");
      const std::string where = absl::StrCat("token ", entry.key->Describe());
      if (IsNull(entry.value)) continue;
      if (entry.value->kind != Kind::kMapping) {
        return Expected(*entry.value, where, "a mapping with `source` and `force`");
      }
      RETURN_IF_ERROR(CheckKeys(*entry.value, where, kKeys));
      if (const YamlNode* force = entry.value->Find("force"); !IsNull(force)) {
        const auto flag = YamlBool(*force);
        if (!flag) return Expected(*force, "`force`", "true or false");
        token.force = *flag;
      }
      if (const YamlNode* source = entry.value->Find("source"); !IsNull(source)) {
        RETURN_IF_ERROR(ReadTokenSource(*source, token));
      } else if (token.force) {
        return RecipeError(entry.value->at,
                           absl::StrCat(where, " has `force` and no `source` to take"));
      }
    }
    return absl::OkStatus();
  }

  absl::Status ReadTokenSource(const YamlNode& source, RecipeToken& token) {
    constexpr absl::string_view kWhat = "the token's `source`";
    const YamlNode* kind = source.kind == Kind::kMapping ? source.Find("kind") : nullptr;
    if (kind == nullptr) {
      token.rows = RecipeToken::Rows::kModel;
      ASSIGN_OR_RETURN(token.model, ReadModel(source, kWhat));
      return absl::OkStatus();
    }
    if (kind->kind == Kind::kScalar && kind->text == "zero") {
      static constexpr Key kKeys[] = {{"kind"}};
      token.rows = RecipeToken::Rows::kZero;
      return CheckKeys(source, kWhat, kKeys);
    }
    if (kind->kind != Kind::kScalar || kind->text != "model_token") {
      return Expected(*kind, "`kind`", "zero or model_token");
    }
    static constexpr Key kKeys[] = {{"kind"}, {"model"}, {"token"}, {"token_id"}};
    RETURN_IF_ERROR(CheckKeys(source, kWhat, kKeys));
    token.rows = RecipeToken::Rows::kModelToken;
    const YamlNode* model = source.Find("model");
    if (IsNull(model)) return RecipeError(source.at, absl::StrCat(kWhat, " has no `model`"));
    ASSIGN_OR_RETURN(token.model, ReadModel(*model, "`model`"));
    const YamlNode* other = source.Find("token");
    const YamlNode* id = source.Find("token_id");
    if (IsNull(other) == IsNull(id)) {
      return RecipeError(source.at,
                         absl::StrCat(kWhat, " needs exactly one of `token` and `token_id`"));
    }
    if (!IsNull(other)) {
      ASSIGN_OR_RETURN(token.other, Text(*other, "token"));
      return absl::OkStatus();
    }
    token.other_id = YamlInt(*id);
    if (!token.other_id || *token.other_id < 0) {
      return Expected(*id, "`token_id`", "a whole number that is not negative");
    }
    return absl::OkStatus();
  }

  absl::StatusOr<RecipeSource> ReadSource(const YamlNode& node, bool sliced) {
    static constexpr Key kModelKeys[] = {{"model"}, {"parameters"}};
    static constexpr Key kSourceKeys[] = {{"model"}, {"layer_range"}, {"parameters"}};
    const absl::string_view where = sliced ? "an entry of `sources`" : "an entry of `models`";
    if (node.kind != Kind::kMapping) return Expected(node, where, "a mapping with `model`");
    RETURN_IF_ERROR(
        CheckKeys(node, where,
                  sliced ? absl::Span<const Key>(kSourceKeys) : absl::Span<const Key>(kModelKeys)));
    const YamlNode* model = node.Find("model");
    if (IsNull(model)) return RecipeError(node.at, absl::StrCat(where, " has no `model`"));
    RecipeSource source;
    auto ref = ReadModel(*model, "`model`");
    Note(ref.status());
    if (ref.ok()) source.model = *std::move(ref);
    RETURN_IF_ERROR(ReadParameters(node, source.parameters));
    if (!sliced) return source;

    const YamlNode* range = node.Find("layer_range");
    if (IsNull(range)) {
      return RecipeError(node.at, absl::StrCat(where, " has no `layer_range: [FIRST, END]`"));
    }
    std::optional<int64_t> first;
    std::optional<int64_t> end;
    if (range->kind == Kind::kSequence && range->items.size() == 2) {
      first = YamlInt(*range->items[0]);
      end = YamlInt(*range->items[1]);
    }
    if (!first || !end) {
      return Expected(*range, "`layer_range`", "two whole numbers, [FIRST, END)");
    }
    if (*first < 0 || *end <= *first) {
      return RecipeError(range->at, absl::StrCat("layer_range [", *first, ", ", *end,
                                                 "] has no layers; it runs from FIRST up to, not "
                                                 "including, END"));
    }
    source.layer_range = {*first, *end};
    return source;
  }

  absl::StatusOr<RecipeSlice> ReadSlice(const YamlNode& node) {
    static constexpr Key kKeys[] = {{"sources"}, {"base_model"}, {"parameters"}};
    if (node.kind != Kind::kMapping) {
      return Expected(node, "an entry of `slices`", "a mapping with `sources`");
    }
    RETURN_IF_ERROR(CheckKeys(node, "an entry of `slices`", kKeys));
    RecipeSlice slice;
    slice.at = node.at;
    RETURN_IF_ERROR(ReadOptionalModel(node, "base_model", slice.base_model));
    RETURN_IF_ERROR(ReadParameters(node, slice.parameters));
    ASSIGN_OR_RETURN(const YamlNode* sources, List(node, "sources"));
    if (sources == nullptr) return RecipeError(node.at, "a slice without `sources`");
    for (const YamlNode* item : sources->items) {
      auto source = ReadSource(*item, /*sliced=*/true);
      Note(source.status());
      if (source.ok()) slice.sources.push_back(*std::move(source));
    }
    return slice;
  }

  // A configuration of bakllama: runs of layers, stacked. What it calls the sources of embeddings
  // and output head become slices without layers at the ends.
  absl::Status ReadLayerSlices(const YamlNode& root) {
    static constexpr Key kKeys[] = {{"name"},  {"layer_slices"}, {"embedding_source"},
                                    {"dtype"}, {"out_dtype"},    {"lm_head_source"}};
    static constexpr Key kSliceKeys[] = {{"model"}, {"start"}, {"end"}, {"scale"}};
    RETURN_IF_ERROR(CheckKeys(root, "a recipe with `layer_slices`", kKeys));
    RETURN_IF_ERROR(ReadHead(root));
    recipe_.merge_method = "passthrough";
    ASSIGN_OR_RETURN(const YamlNode* slices, List(root, "layer_slices"));
    if (slices == nullptr) return RecipeError(root.at, "`layer_slices` is empty");
    recipe_.merge_method_at = slices->at;
    RecipeModule& module = recipe_.modules.emplace_back();
    module.name = "default";
    module.at = slices->at;
    const auto add_end = [&](absl::string_view key) -> absl::Status {
      std::optional<ModelRef> model;
      RETURN_IF_ERROR(ReadOptionalModel(root, key, model));
      if (!model) return absl::OkStatus();
      RecipeSlice& slice = module.slices.emplace_back();
      slice.at = model->at;
      slice.sources.push_back({.model = *std::move(model), .layer_range = {{0, 0}}});
      return absl::OkStatus();
    };
    RETURN_IF_ERROR(add_end("embedding_source"));
    for (const YamlNode* item : slices->items) {
      constexpr absl::string_view kWhere = "an entry of `layer_slices`";
      if (item->kind != Kind::kMapping) return Expected(*item, kWhere, "a mapping with `model`");
      RETURN_IF_ERROR(CheckKeys(*item, kWhere, kSliceKeys));
      std::optional<ModelRef> model;
      RETURN_IF_ERROR(ReadOptionalModel(*item, "model", model));
      const auto number = [&](absl::string_view key) {
        const YamlNode* node = item->Find(key);
        return node == nullptr ? std::nullopt : YamlInt(*node);
      };
      const std::optional<int64_t> start = number("start");
      const std::optional<int64_t> end = number("end");
      if (!model || !start || !end || *start < 0 || *end <= *start) {
        return RecipeError(item->at, absl::StrCat(kWhere,
                                                  " needs `model`, and `start` and `end` with at "
                                                  "least one layer from `start` up to, not "
                                                  "including, `end`"));
      }
      RecipeSlice& slice = module.slices.emplace_back();
      slice.at = item->at;
      RecipeSource source{.model = *std::move(model), .layer_range = {{*start, *end}}};
      if (const YamlNode* scale = item->Find("scale"); !IsNull(scale)) {
        ASSIGN_OR_RETURN(ParamCase scaled, ReadValue(*scale, "scale"));
        scaled.filter = "down_proj";
        source.parameters["scale"] = {.cases = {std::move(scaled)}, .at = scale->at};
      }
      slice.sources.push_back(std::move(source));
    }
    return add_end("lm_head_source");
  }

  // A configuration of the authors of Decom-Renorm-Merge: drm with other names. Rates say what is
  // dropped. A list of patterns that is missing has none: it matches nothing.
  absl::Status ReadMergingConfig(const YamlNode& root) {
    static constexpr Key kKeys[] = {{"name"},      {"models"}, {"base_model"}, {"merging_config"},
                                    {"save_path"}, {"dtype"},  {"out_dtype"}};
    struct Setting {
      Key key;
      const char* param;
      enum { kValue, kDropRate, kPatterns } form;
      const char* otherwise = nullptr;  // a pattern
    };
    static constexpr char kNothing[] = "^$";
    static constexpr Setting kSettings[] = {
        {{"singular_matrices_drop_rate"}, "density", Setting::kDropRate},
        {{"non_linear_module_entries_drop_rate"}, "other_density", Setting::kDropRate},
        {{"direction"}, "direction", Setting::kValue},
        {{"enable_disjoint_mean"}, "disjoint_mean", Setting::kValue},
        {{"enable_sign_resolution"}, "sign_resolution", Setting::kValue},
        {{"linear_parameter_regex_pattern"}, "linear_include", Setting::kPatterns, kNothing},
        {{"linear_parameter_ignore_regex_pattern"}, "linear_exclude", Setting::kPatterns, kNothing},
        {{"ignore_module_regex_pattern"}, "ignore", Setting::kPatterns},
        {{"native_stacked_QKV"}, "split_qkv", Setting::kValue},
        {{"dtype"}, nullptr, Setting::kValue},
    };
    RETURN_IF_ERROR(CheckKeys(root, "a recipe with `merging_config`", kKeys));
    RETURN_IF_ERROR(ReadHead(root));
    recipe_.merge_method = "drm";
    const YamlNode& config = *root.Find("merging_config");
    recipe_.merge_method_at = config.at;
    if (config.kind != Kind::kMapping) {
      return Expected(config, "`merging_config`", "a mapping");
    }
    std::vector<Key> config_keys;
    for (const Setting& setting : kSettings) config_keys.push_back(setting.key);
    RETURN_IF_ERROR(CheckKeys(config, "`merging_config`", config_keys));
    for (const Setting& setting : kSettings) {
      const YamlNode* node = config.Find(setting.key.name);
      const bool none = IsNull(node) || (node->kind == Kind::kSequence && node->items.empty());
      if (none) {
        if (setting.otherwise == nullptr) continue;
        ParamCase nothing{.values = {std::string(setting.otherwise)}, .at = config.at};
        recipe_.parameters[setting.param] = {.cases = {std::move(nothing)}, .at = config.at};
        continue;
      }
      if (setting.param == nullptr) {
        recipe_.warnings.push_back(
            absl::StrCat(node->at.ToString(), ": `", setting.key.name,
                         "` is ignored: decompositions are made in float64; the recipe's own "
                         "`dtype` is that of the result"));
        continue;
      }
      if (setting.form != Setting::kDropRate) {
        ASSIGN_OR_RETURN(recipe_.parameters[setting.param], ReadSetting(*node, setting.key.name));
        continue;
      }
      const auto rate = node->kind == Kind::kScalar ? YamlFloat(*node) : std::nullopt;
      if (!rate || !(*rate >= 0 && *rate <= 1)) {
        return Expected(*node, absl::StrCat("`", setting.key.name, "`"), "a number from 0 to 1");
      }
      ParamCase density{.values = {1 - *rate}, .at = node->at};
      recipe_.parameters[setting.param] = {.cases = {std::move(density)}, .at = node->at};
    }
    if (const YamlNode* path = root.Find("save_path"); !IsNull(path)) {
      recipe_.warnings.push_back(absl::StrCat(
          path->at.ToString(), ": `save_path` is ignored: the command names the output"));
    }
    RETURN_IF_ERROR(ReadOptionalModel(root, "base_model", recipe_.base_model));
    RETURN_IF_ERROR(ReadInputs(root));
    RETURN_IF_ERROR(Problems());
    for (RecipeSource& source : recipe_.modules[0].slices[0].sources) {
      auto coefficient = source.parameters.extract("coefficient");
      if (coefficient.empty()) continue;
      coefficient.key() = "weight";
      source.parameters.insert(std::move(coefficient));
    }
    return absl::OkStatus();
  }

  // `models` or `slices` of the recipe or of a module.
  absl::StatusOr<RecipeModule> ReadModule(const YamlNode& models, bool from_models) {
    RecipeModule module;
    module.at = models.at;
    module.from_models = from_models;
    if (from_models) {
      RecipeSlice slice;
      slice.at = models.at;
      for (const YamlNode* item : models.items) {
        auto source = ReadSource(*item, /*sliced=*/false);
        Note(source.status());
        if (source.ok()) slice.sources.push_back(*std::move(source));
      }
      module.slices.push_back(std::move(slice));
      return module;
    }
    for (const YamlNode* item : models.items) {
      auto slice = ReadSlice(*item);
      Note(slice.status());
      if (slice.ok()) module.slices.push_back(*std::move(slice));
    }
    return module;
  }

  absl::Status ReadInputs(const YamlNode& root) {
    ASSIGN_OR_RETURN(const YamlNode* models, List(root, "models"));
    ASSIGN_OR_RETURN(const YamlNode* slices, List(root, "slices"));
    const YamlNode* modules = root.Find("modules");
    if (IsNull(modules)) {
      modules = nullptr;
    } else if (modules->kind != Kind::kMapping) {
      return Expected(*modules, "`modules`", "a mapping of component names");
    } else if (modules->entries.empty()) {
      modules = nullptr;
    }
    const int given = (models != nullptr) + (slices != nullptr) + (modules != nullptr);
    if (given != 1) {
      return RecipeError(root.at,
                         absl::StrCat("give exactly one of `models`, `slices` and `modules`; ",
                                      given == 0 ? "there is none" : "there are several"));
    }
    if (modules == nullptr) {
      ASSIGN_OR_RETURN(RecipeModule module,
                       ReadModule(models != nullptr ? *models : *slices, models != nullptr));
      module.name = "default";
      recipe_.modules.push_back(std::move(module));
      return absl::OkStatus();
    }
    recipe_.has_modules_key = true;
    for (const YamlNode::Entry& entry : modules->entries) {
      static constexpr Key kKeys[] = {{"models"}, {"slices"}, {"parameters"}};
      const std::string where = absl::StrCat("module \"", entry.key->text, "\"");
      if (entry.value->kind != Kind::kMapping) {
        return Expected(*entry.value, where, "a mapping with `models` or `slices`");
      }
      RETURN_IF_ERROR(CheckKeys(*entry.value, where, kKeys));
      ASSIGN_OR_RETURN(const YamlNode* own_models, List(*entry.value, "models"));
      ASSIGN_OR_RETURN(const YamlNode* own_slices, List(*entry.value, "slices"));
      if ((own_models == nullptr) == (own_slices == nullptr)) {
        return RecipeError(entry.value->at,
                           absl::StrCat(where, " needs exactly one of `models` and `slices`"));
      }
      ASSIGN_OR_RETURN(
          RecipeModule module,
          ReadModule(own_models != nullptr ? *own_models : *own_slices, own_models != nullptr));
      module.name = entry.key->text;
      module.at = entry.key->at;
      RETURN_IF_ERROR(ReadParameters(*entry.value, module.parameters));
      recipe_.modules.push_back(std::move(module));
    }
    return absl::OkStatus();
  }

  Recipe& recipe_;
};

}  // namespace

std::string TextPosition::ToString() const {
  return line == 0 ? "--set" : absl::StrCat("recipe:", line, ":", column);
}

std::string ModelRef::ToString() const {
  const auto part = [](absl::string_view path, absl::string_view revision) {
    return revision.empty() ? std::string(path) : absl::StrCat(path, "@", revision);
  };
  std::string text = part(path, revision);
  if (!adapter.empty()) absl::StrAppend(&text, "+", part(adapter, adapter_revision));
  if (!override_architecture.empty()) absl::StrAppend(&text, " as ", override_architecture);
  return text;
}

absl::StatusOr<ModelRef> ParseModelRef(absl::string_view text) {
  const auto fail = [&](absl::string_view why) {
    return absl::InvalidArgumentError(absl::StrCat(
        "model reference \"", text, "\" ", why,
        "; the form is PATH[@REVISION][+ADAPTER[@REVISION]], and a path that has '@' or '+' itself "
        "is written as {model: {path: ...}}"));
  };
  const std::vector<absl::string_view> parts = absl::StrSplit(text, '+');
  if (parts.size() > 2) return fail("has more than one '+'");
  ModelRef ref;
  for (size_t i = 0; i < parts.size(); ++i) {
    const std::vector<absl::string_view> pieces = absl::StrSplit(parts[i], '@');
    if (pieces.size() > 2) return fail("has more than one '@'");
    for (absl::string_view piece : pieces) {
      if (piece.empty()) return fail("has an empty part");
    }
    (i == 0 ? ref.path : ref.adapter) = std::string(pieces[0]);
    if (pieces.size() == 2) {
      (i == 0 ? ref.revision : ref.adapter_revision) = std::string(pieces[1]);
    }
  }
  return ref;
}

namespace {

using Overrides = std::vector<std::pair<std::string, std::string>>;

absl::StatusOr<Recipe> ReadDocument(YamlDocument document, absl::string_view text,
                                    const Overrides& overrides) {
  for (const auto& [path, value] : overrides) RETURN_IF_ERROR(document.Set(path, value));
  Recipe recipe;
  recipe.text = std::string(text);
  recipe.overrides = overrides;
  recipe.warnings = document.warnings();
  RETURN_IF_ERROR(RecipeReader(recipe).Read(document.root()));
  return recipe;
}

// Of the overrides those of the document `name`, without "NAME/".
absl::StatusOr<std::vector<Overrides>> SplitOverrides(const Overrides& overrides,
                                                      const std::vector<std::string>& names) {
  std::vector<Overrides> result(names.size());
  for (const auto& [path, value] : overrides) {
    const size_t slash = path.find('/');
    const bool staged = slash != std::string::npos && slash < path.find('.');
    const std::string name = staged ? path.substr(0, slash) : "";
    const auto found = std::find(names.begin(), names.end(), name);
    if (found == names.end()) {
      return absl::InvalidArgumentError(absl::StrCat(
          "--set ", path, "=", value, ": ",
          staged ? absl::StrCat("no document of the recipe is called \"", name, "\"",
                                DidYouMean(name, names))
                 : std::string("every document of the recipe has a name; write NAME/KEY=VALUE")));
    }
    result[found - names.begin()].emplace_back(path.substr(staged ? slash + 1 : 0), value);
  }
  return result;
}

}  // namespace

absl::StatusOr<Recipe> ParseRecipe(absl::string_view text, const Overrides& overrides) {
  if (static_cast<int64_t>(text.size()) > YamlDocument::kMaxBytes) {
    return absl::InvalidArgumentError(absl::StrCat(
        "recipe: ", text.size(), " bytes; a recipe has at most ", YamlDocument::kMaxBytes));
  }
  const std::vector<DocumentText> parts = SplitYamlDocuments(text);
  if (parts.size() > kMaxDocuments) {
    return RecipeError({.line = parts[kMaxDocuments].first_line, .column = 1},
                       absl::StrCat("a recipe has at most ", kMaxDocuments, " documents"));
  }
  std::vector<YamlDocument> documents;
  std::vector<std::string> names;
  for (const DocumentText& part : parts) {
    ASSIGN_OR_RETURN(YamlDocument document, YamlDocument::Parse(part.text, part.first_line));
    const YamlNode* name = document.root().Find("name");
    names.push_back(name == nullptr ? "" : name->text);
    documents.push_back(std::move(document));
  }
  if (documents.size() == 1) {
    ASSIGN_OR_RETURN(Recipe recipe, ReadDocument(std::move(documents[0]), text, overrides));
    if (!recipe.name.empty()) {
      recipe.warnings.push_back(absl::StrCat(recipe.name_at.ToString(),
                                             ": `name` means something only where a recipe has "
                                             "several documents"));
    }
    return recipe;
  }
  ASSIGN_OR_RETURN(const std::vector<Overrides> own, SplitOverrides(overrides, names));
  std::vector<Recipe> recipes;
  for (size_t i = 0; i < documents.size(); ++i) {
    ASSIGN_OR_RETURN(Recipe recipe, ReadDocument(std::move(documents[i]), parts[i].text, own[i]));
    recipes.push_back(std::move(recipe));
  }
  ASSIGN_OR_RETURN(Recipe result, LinkStages(std::move(recipes)));
  result.text = std::string(text);
  result.overrides = overrides;
  return result;
}

}  // namespace pewter
