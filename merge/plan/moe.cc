#include "merge/plan/moe.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "absl/algorithm/container.h"
#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/strip.h"
#include "base/dtype_names.h"
#include "base/status.h"
#include "kernels/backends.h"
#include "merge/forward/hidden_states.h"
#include "merge/plan/layout.h"
#include "merge/plan/moe_sources.h"
#include "merge/plan/moe_style.h"
#include "merge/plan/output_files.h"
#include "merge/plan/plan_steps.h"
#include "merge/plan/prompt_tokens.h"

namespace pewter {
namespace {

// Routers whose rows are this near to each other (cosine) hardly tell their experts apart.
constexpr double kNearlySame = 0.9;

// The matrices of a gated MLP.
constexpr const char* kParts[] = {"gate_proj", "up_proj", "down_proj"};

absl::Status RecipeAt(TextPosition at, absl::string_view message) {
  return absl::InvalidArgumentError(absl::StrCat(at.ToString(), ": ", message));
}

class MoePlanner {
 public:
  MoePlanner(const MoeRecipe& recipe, const PlanOptions& options, const MoeOptions& moe)
      : recipe_(recipe), moe_(moe) {
    plan_.options = options;
    plan_.recipe_text = recipe.text;
    plan_.method = "moe";
    plan_.warnings = recipe.warnings;
  }

  absl::StatusOr<Plan> Make() {
    RETURN_IF_ERROR(ResolveOptions(plan_.options));
    RETURN_IF_ERROR(OpenModels());
    RETURN_IF_ERROR(CheckArchitectures());
    RETURN_IF_ERROR(ChooseStyle());
    RETURN_IF_ERROR(FindSizes());
    RETURN_IF_ERROR(FindDirections());
    RETURN_IF_ERROR(PlanDense());
    for (int64_t layer = 0; layer < layers_; ++layer) RETURN_IF_ERROR(PlanLayer(layer));
    WarnOfCasts();
    ListUnused();
    RETURN_IF_ERROR(LayOutShards(plan_.options.shard_bytes, plan_));
    RETURN_IF_ERROR(AddFiles());
    RETURN_IF_ERROR(FinishPlan(recipe_.overrides, plan_));
    return std::move(plan_);
  }

 private:
  // --- models ----------------------------------------------------------------------------------

  absl::StatusOr<int> OpenModel(const ModelRef& ref) {
    const std::string name = ref.ToString();
    if (const auto it = model_index_.find(name); it != model_index_.end()) return it->second;
    auto checkpoint = Checkpoint::Open(ref);
    if (!checkpoint.ok()) return Annotate(checkpoint.status(), ref.at.ToString());
    if ((*checkpoint)->raw()) {
      return RecipeAt(ref.at, absl::StrCat("model ", name, " has no config.json"));
    }
    return model_index_[name] = AddModel("model", name, *std::move(checkpoint), plan_);
  }

  absl::Status OpenModels() {
    RETURN_IF_ERROR(OpenModel(recipe_.base_model).status());
    for (const MoeExpert& expert : recipe_.experts) {
      ASSIGN_OR_RETURN(const int index, OpenModel(expert.model));
      experts_.push_back(index);
    }
    for (const MoeExpert& expert : recipe_.shared_experts) {
      ASSIGN_OR_RETURN(const int index, OpenModel(expert.model));
      shared_.push_back(index);
    }
    const bool all_same = std::all_of(experts_.begin(), experts_.end(),
                                      [&](int index) { return index == experts_[0]; });
    if (!all_same || experts_.size() == 1 || moe_.allow_all_same) return absl::OkStatus();
    constexpr char kSame[] =
        "all experts are from the same model, so that the mixture computes what that model does";
    // Random routers are there to be trained.
    if (!NeedsPrompts(recipe_.gate)) {
      plan_.warnings.push_back(absl::StrCat(kSame, " until it is trained"));
      return absl::OkStatus();
    }
    return RecipeAt(
        recipe_.experts[0].at,
        absl::StrCat(kSame, "; --i-understand-this-is-not-useful-without-training makes it"));
  }

  const Checkpoint& Base() const { return *plan_.models[0].checkpoint; }

  // Those that differ from the base's, with the line that asks for them.
  absl::Status CheckArchitectures() {
    const std::shared_ptr<const Checkpoint> base = plan_.models[0].checkpoint;
    ASSIGN_OR_RETURN(architecture_, ResolveArchitecture({&base, 1}, /*allow_mixed=*/false));
    for (size_t i = 1; i < plan_.models.size(); ++i) {
      const std::shared_ptr<const Checkpoint> both[] = {base, plan_.models[i].checkpoint};
      RETURN_IF_ERROR(Annotate(ResolveArchitecture(both, plan_.options.allow_mixed).status(),
                               both[1]->ref().at.ToString()));
    }
    return absl::OkStatus();
  }

  // Why a style cannot be made of these models; empty when it can.
  std::string Misfit(const MoeStyle& style, const std::string& type) const {
    if (std::find(style.from.begin(), style.from.end(), type) == style.from.end()) {
      return absl::StrCat("it is made of models of type ", absl::StrJoin(style.from, ", "),
                          ", not ", type.empty() ? "one that is not said" : type);
    }
    if (!absl::EndsWith(architecture_->name(), "ForCausalLM")) {
      return absl::StrCat("it is made of causal language models, not of ", architecture_->name());
    }
    const auto shared = static_cast<int>(shared_.size());
    if (shared < style.least_shared || shared > style.most_shared) {
      return style.most_shared == 0 ? std::string("it has no `shared_experts`")
             : style.least_shared > 0
                 ? absl::StrCat("it has exactly one of `shared_experts`, not ", shared)
                 : absl::StrCat("it has at most one of `shared_experts`, not ", shared);
    }
    if (shared == 0) return "";
    const MoeExpert& expert = recipe_.shared_experts[0];
    if (style.gated_shared && expert.positive.empty() && NeedsPrompts(recipe_.gate)) {
      return "its shared expert has a gate, which needs `positive_prompts`";
    }
    if (!style.gated_shared && !(expert.positive.empty() && expert.negative.empty())) {
      return "its shared expert has no gate, so no prompts";
    }
    return "";
  }

  absl::Status ChooseStyle() {
    const auto config = nlohmann::json::parse(Base().config_json(), nullptr,
                                              /*allow_exceptions=*/false);
    if (!config.is_object()) {
      return absl::DataLossError(
          absl::StrCat("model ", plan_.models[0].ref, ": config.json is not a JSON object"));
    }
    const auto type = config.find("model_type");
    const std::string base_type =
        type != config.end() && type->is_string() ? type->get<std::string>() : "";
    std::vector<std::string> names, reasons;
    std::vector<const MoeStyle*> fitting;
    for (const MoeStyle& style : MoeStyles()) {
      names.emplace_back(style.name);
      if (!absl::StartsWithIgnoreCase(style.name, recipe_.architecture)) continue;
      const std::string misfit = Misfit(style, base_type);
      if (misfit.empty()) {
        fitting.push_back(&style);
      } else {
        reasons.push_back(absl::StrCat(style.name, ": ", misfit));
      }
    }
    if (fitting.empty() && reasons.empty()) {
      return RecipeAt(recipe_.architecture_at,
                      absl::StrCat("no mixture is called \"", recipe_.architecture,
                                   "\"; there are ", absl::StrJoin(names, ", ")));
    }
    if (fitting.empty()) {
      const TextPosition at =
          recipe_.architecture.empty() ? recipe_.base_model.at : recipe_.architecture_at;
      return RecipeAt(at, absl::StrCat("no kind of mixture can be made of these models. ",
                                       absl::StrJoin(reasons, ". ")));
    }
    style_ = fitting[0];
    if (fitting.size() > 1 && style_->model_type != absl::string_view("mixtral")) {
      plan_.warnings.push_back(absl::StrCat("the mixture becomes a ", style_->name, "; a ",
                                            fitting[1]->name,
                                            " could be made, too (`architecture`)"));
    }
    plan_.architecture = style_->architecture;
    const size_t count = experts_.size();
    if ((count & (count - 1)) != 0) {
      plan_.warnings.push_back(
          absl::StrCat(count, " experts are not a power of two, which llama.cpp cannot load"));
    }
    return absl::OkStatus();
  }

  // --- sizes and dtype -------------------------------------------------------------------------

  absl::Status FindSizes() {
    const ArchModule& module = *architecture_->modules()[0];
    ASSIGN_OR_RETURN(layers_, module.LayerCount(Base()));
    for (const PlanModel& model : plan_.models) {
      ASSIGN_OR_RETURN(const int64_t layers, module.LayerCount(*model.checkpoint));
      if (layers != layers_) {
        return RecipeAt(model.checkpoint->ref().at,
                        absl::StrCat("model ", model.ref, " has ", layers, " layers and the base ",
                                     plan_.models[0].ref, " has ", layers_));
      }
    }
    for (const ArchTensor& tensor : module.pre()) {
      if (!tensor.vocabulary) continue;
      embedding_ = StoredName(Base(), tensor, /*with_tied=*/false);
      break;
    }
    const TensorInfo* info = embedding_.empty() ? nullptr : Base().Find(embedding_);
    if (info == nullptr || info->shape.rank() != 2 || !IsFloat(info->dtype)) {
      return absl::FailedPreconditionError(
          absl::StrCat("model ", plan_.models[0].ref, " has no input embedding"));
    }
    sizes_ = {.experts = static_cast<int64_t>(experts_.size()),
              .experts_per_token = recipe_.experts_per_token,
              .shared = static_cast<int64_t>(shared_.size()),
              .tokens = info->shape[0],
              .dtype = recipe_.dtype};
    hidden_ = info->shape[1];
    if (recipe_.dtype) return absl::OkStatus();
    const auto config = nlohmann::json::parse(Base().config_json(), nullptr, false);
    for (const char* key : {"torch_dtype", "dtype"}) {
      const auto it = config.find(key);
      if (it == config.end() || !it->is_string()) continue;
      const auto parsed = DTypeFromTorch(it->get<std::string>());
      if (parsed.ok() && IsFloat(*parsed)) sizes_.dtype = *parsed;
    }
    return absl::OkStatus();
  }

  // --- routers ---------------------------------------------------------------------------------

  using Rows = std::shared_ptr<const std::vector<float>>;
  // A vector of `hidden_` features for each layer, or one for all of them.
  using Features = std::vector<std::vector<double>>;

  absl::Status FindDirections() {
    if (!NeedsPrompts(recipe_.gate)) return absl::OkStatus();
    std::vector<PlacedPrompts> prompts;
    for (const MoeExpert& expert : recipe_.experts) AddPrompts(expert, prompts);
    if (style_->gated_shared) AddPrompts(recipe_.shared_experts[0], prompts);
    ASSIGN_OR_RETURN(const std::vector<Features> features, FeaturesOf(prompts));
    const Features* next = features.data();
    ASSIGN_OR_RETURN(router_, Directions(recipe_.experts, "expert", next));
    WarnOfNearRouters();
    if (style_->gated_shared) {
      ASSIGN_OR_RETURN(shared_router_, Directions(recipe_.shared_experts, "shared expert", next));
    }
    return absl::OkStatus();
  }

  struct PlacedPrompts {
    const MoePrompts& prompts;
    TextPosition at;
  };
  static void AddPrompts(const MoeExpert& expert, std::vector<PlacedPrompts>& prompts) {
    prompts.push_back({expert.positive, expert.at});
    if (!expert.negative.empty()) prompts.push_back({expert.negative, expert.at});
  }

  // By layer one row of `hidden_` for each expert; `next` moves on by what AddPrompts adds.
  absl::StatusOr<std::vector<Rows>> Directions(const std::vector<MoeExpert>& experts,
                                               absl::string_view what, const Features*& next) {
    std::vector<std::vector<float>> rows(next->size());
    for (size_t i = 0; i < experts.size(); ++i) {
      Features features = *next++;
      const Features* const others = experts[i].negative.empty() ? nullptr : next++;
      int64_t zeros = 0;
      for (size_t layer = 0; layer < features.size(); ++layer) {
        std::vector<double>& row = features[layer];
        for (int64_t j = 0; others != nullptr && j < hidden_; ++j) row[j] -= (*others)[layer][j];
        Normalize(row);
        if (!absl::c_all_of(row, [](double x) { return std::isfinite(x); })) {
          return absl::FailedPreconditionError(absl::StrCat(
              experts[i].at.ToString(), ": model ", plan_.models[0].ref,
              " gives the prompts features that are NaN or infinite at layer ", layer));
        }
        zeros += absl::c_all_of(row, [](double x) { return x == 0; });
        rows[layer].insert(rows[layer].end(), row.begin(), row.end());
      }
      if (zeros > 0) {
        plan_.warnings.push_back(absl::StrCat(experts[i].at.ToString(), ": the prompts of ", what,
                                              " ", i, " cancel", InLayers(zeros),
                                              ": its row of the router is zero"));
      }
    }
    std::vector<Rows> shared;
    for (std::vector<float>& layer : rows) {
      shared.push_back(std::make_shared<const std::vector<float>>(std::move(layer)));
    }
    return shared;
  }

  // Nothing where one row is that of all layers.
  std::string InLayers(int64_t count) const {
    return recipe_.gate == MoeGate::kCheapEmbed
               ? ""
               : absl::StrCat(" in ", count, " of ", layers_, " layers");
  }

  static void Normalize(std::vector<double>& vector) {
    double square = 0;
    for (double x : vector) square += x * x;
    const double norm = std::max(std::sqrt(square), 1e-8);
    for (double& x : vector) x /= norm;
  }

  using Tokens = std::vector<std::vector<int32_t>>;

  absl::StatusOr<Tokens> TokensOf(const PlacedPrompts& prompts) {
    std::vector<std::vector<int64_t>> all = prompts.prompts.ids;
    for (const std::string& text : prompts.prompts.texts) {
      if (!tokenizer_) {
        ASSIGN_OR_RETURN(tokenizer_, PromptTokenizer::Make(Base()));
      }
      ASSIGN_OR_RETURN(const auto encoded, tokenizer_->Encode(tokenizer_->bos() + text));
      if (encoded.left_out > 0) {
        plan_.warnings.push_back(absl::StrCat(
            prompts.at.ToString(), ": ", encoded.left_out,
            " characters of a prompt have no token in the base's tokenizer and are left out"));
      }
      all.emplace_back(encoded.ids.begin(), encoded.ids.end());
    }
    Tokens tokens;
    for (const std::vector<int64_t>& ids : all) {
      for (int64_t id : ids) {
        if (id < 0 || id >= sizes_.tokens) {
          return absl::InvalidArgumentError(absl::StrCat("token id ", id, " is beyond the ",
                                                         sizes_.tokens, " rows of ", embedding_,
                                                         " of model ", plan_.models[0].ref));
        }
      }
      if (!ids.empty()) tokens.emplace_back(ids.begin(), ids.end());
    }
    if (tokens.empty()) {
      return absl::InvalidArgumentError("the prompts of the expert have no tokens");
    }
    return tokens;
  }

  // Of each group of prompts.
  absl::StatusOr<std::vector<Features>> FeaturesOf(const std::vector<PlacedPrompts>& prompts) {
    std::vector<Features> features;
    Tokens all;
    std::vector<int> groups;
    if (recipe_.gate == MoeGate::kCheapEmbed) {
      ASSIGN_OR_RETURN(embedding_source_, Base().OpenTensor(embedding_, plan_.models[0].file_base));
      embedding_source_ = CastSource(embedding_source_, DType::kF32);
    }
    for (size_t group = 0; group < prompts.size(); ++group) {
      auto tokens = TokensOf(prompts[group]);
      if (!tokens.ok()) return Annotate(tokens.status(), prompts[group].at.ToString());
      if (recipe_.gate == MoeGate::kCheapEmbed) {
        ASSIGN_OR_RETURN(features.emplace_back(1)[0], Embed(*tokens));
        continue;
      }
      groups.insert(groups.end(), tokens->size(), static_cast<int>(group));
      absl::c_move(*tokens, std::back_inserter(all));
    }
    if (recipe_.gate == MoeGate::kCheapEmbed) return features;
    ASSIGN_OR_RETURN(const kernels::Device device, kernels::ResolveDevice(plan_.options.device));
    ASSIGN_OR_RETURN(const auto backend, kernels::OpenBackend(device, plan_.options.threads));
    ASSIGN_OR_RETURN(const ForwardModel model, MakeForwardModel(plan_.models[0].checkpoint));
    return MeanHiddenStates(
        model, ForwardData::OfTokens("of the prompts", all), groups,
        recipe_.gate == MoeGate::kHiddenLast ? RowState::kLast : RowState::kMean,
        {.backend = backend.get(), .memory_bytes = plan_.options.memory_bytes});
  }

  // The sum of the tokens' embeddings, at unit length.
  absl::StatusOr<std::vector<double>> Embed(const Tokens& tokens) {
    std::vector<double> sum(hidden_, 0.0);
    std::vector<float> row(hidden_);
    for (const std::vector<int32_t>& ids : tokens) {
      for (int64_t id : ids) {
        RETURN_IF_ERROR(embedding_source_->Read(
            id * hidden_, hidden_,
            absl::MakeSpan(reinterpret_cast<std::byte*>(row.data()), hidden_ * sizeof(float)),
            nullptr));
        for (int64_t i = 0; i < hidden_; ++i) sum[i] += row[i];
        if (!absl::c_all_of(row, [](float x) { return std::isfinite(x); })) {
          return absl::FailedPreconditionError(
              absl::StrCat("model ", plan_.models[0].ref, ", tensor ", embedding_, ": row ", id,
                           " has NaN or infinity, and a prompt needs it"));
        }
      }
    }
    Normalize(sum);
    return sum;
  }

  void WarnOfNearRouters() {
    for (size_t a = 0; a < experts_.size(); ++a) {
      for (size_t b = a + 1; b < experts_.size(); ++b) {
        double largest = 0;
        int64_t layers = 0;
        for (const Rows& layer : router_) {
          const float* const rows = layer->data();
          double cosine = 0;
          for (int64_t i = 0; i < hidden_; ++i) {
            cosine += double{rows[a * hidden_ + i]} * rows[b * hidden_ + i];
          }
          largest = std::max(largest, cosine);
          layers += cosine >= kNearlySame;
        }
        if (layers == 0) continue;
        plan_.warnings.push_back(
            absl::StrFormat("the prompts of experts %d and %d are nearly the same to the router%s "
                            "(cosine %.2f); one "
                            "of them will hardly be used",
                            a, b, InLayers(layers), largest));
      }
    }
  }

  // [count, hidden]: of `rows`, or random ones, drawn by the fused layout's name.
  absl::Status PlanRouter(int64_t layer, absl::string_view name, absl::string_view fused_name,
                          const std::vector<Rows>& rows, int64_t count) {
    PlanInput input{.layer = layer};
    const Shape shape = {count, hidden_};
    const std::string where = absl::StrCat("model.layers.", layer, ".");
    const PhiloxKey key = MakePhiloxKey(plan_.options.seed, absl::StrCat(where, fused_name));
    PlanTensor tensor;
    tensor.name = absl::StrCat(where, name);
    switch (recipe_.gate) {
      case MoeGate::kRandom:
        input.source = RandomSource(Distribution::kNormal, key, 1, shape, tensor.name);
        input.views = {"drawn from a normal distribution"};
        break;
      case MoeGate::kUniformRandom: {
        const double bound = std::sqrt(1 / static_cast<double>(hidden_));
        input.source = RandomSource(Distribution::kUniform, key, bound, shape, tensor.name);
        input.views = {absl::StrFormat("drawn between -%.3g and %.3g", bound, bound)};
        break;
      }
      case MoeGate::kCheapEmbed:
        input.source = ValueSource(rows[0], shape, tensor.name);
        input.views = {
            absl::StrCat("of the prompts, by ", embedding_, " of ", plan_.models[0].ref)};
        break;
      case MoeGate::kHiddenLast:
      case MoeGate::kHiddenMean:
        input.source = ValueSource(rows[layer], shape, tensor.name);
        input.views = {absl::StrCat(
            "of the prompts, by what layer ", layer, " of ", plan_.models[0].ref,
            " reads: ", recipe_.gate == MoeGate::kHiddenLast ? "last tokens" : "means of tokens")};
    }
    return PlanCopy(std::move(tensor), shape, {std::move(input)}, layer);
  }

  // --- tensors ---------------------------------------------------------------------------------

  // A tensor of a model as it is stored; the empty input when an optional one is not.
  absl::StatusOr<PlanInput> OpenInput(int model, const ArchTensor& tensor, int64_t layer) {
    const PlanModel& from = plan_.models[model];
    PlanInput input{.model = model,
                    .tensor = StoredName(*from.checkpoint, tensor, !tensor.optional),
                    .layer = layer};
    if (input.tensor.empty()) {
      if (tensor.optional) return input;
      return absl::FailedPreconditionError(absl::StrCat("model ", from.ref, " has no tensor ",
                                                        tensor.name, ", which ",
                                                        architecture_->name(), " needs"));
    }
    used_[model].insert(input.tensor);
    plan_.read_bytes += from.checkpoint->Find(input.tensor)->bytes;
    if (from.checkpoint->Adapted(input.tensor)) {
      input.views.push_back(absl::StrCat("LoRA ", from.checkpoint->ref().adapter));
    }
    ASSIGN_OR_RETURN(input.source, from.checkpoint->OpenTensor(input.tensor, from.file_base));
    const DType stored = input.source->dtype();
    if (sizes_.dtype && IsFloat(stored) && Promote(stored, *sizes_.dtype) != *sizes_.dtype) {
      ++narrowed_[{model, stored}];
    }
    return input;
  }

  // The output is the inputs, one after the other, in the output's dtype.
  absl::Status PlanCopy(PlanTensor tensor, Shape shape, std::vector<PlanInput> inputs,
                        int64_t layer) {
    if (!names_.insert(tensor.name).second) {
      return absl::FailedPreconditionError(
          absl::StrCat("two tensors of the output would be called ", tensor.name));
    }
    DType work = inputs.front().source->dtype();
    for (const PlanInput& input : inputs) work = Promote(work, input.source->dtype());
    for (PlanInput& input : inputs) {
      const DType own = input.source->dtype();
      if (own != work) {
        input.views.push_back(absl::StrCat(SafetensorsName(own), " to ", SafetensorsName(work)));
      }
      input.source = CastSource(std::move(input.source), work);
    }
    tensor.shape = std::move(shape);
    tensor.layer = layer;
    tensor.dtype = tensor.result_dtype = IsFloat(work) ? sizes_.dtype.value_or(work) : work;
    tensor.inputs = std::move(inputs);
    plan_.tensors.push_back(std::move(tensor));
    return absl::OkStatus();
  }

  static bool IsMlp(const ArchTensor& tensor) { return absl::StrContains(tensor.name, ".mlp."); }

  // Biases that the mixture has no place for.
  absl::Status CheckPlace(const ArchTensor& tensor) const {
    if (!absl::EndsWith(tensor.name, ".bias")) return absl::OkStatus();
    const bool query = absl::EndsWith(tensor.name, "q_proj.bias") ||
                       absl::EndsWith(tensor.name, "k_proj.bias") ||
                       absl::EndsWith(tensor.name, "v_proj.bias");
    if (!IsMlp(tensor) && (query ? style_->query_biases : style_->other_biases)) {
      return absl::OkStatus();
    }
    return absl::FailedPreconditionError(
        absl::StrCat("tensor ", tensor.name, " has no place in ", style_->name));
  }

  absl::Status PlanDense() {
    const ArchModule& module = *architecture_->modules()[0];
    const auto plan = [&](const std::vector<ArchTensor>& tensors, int64_t layer) -> absl::Status {
      for (const ArchTensor& tensor : tensors) {
        if (IsMlp(tensor)) continue;
        ASSIGN_OR_RETURN(PlanInput input, OpenInput(0, tensor, layer));
        if (input.tensor.empty()) {
          RETURN_IF_ERROR(PlanMissing(tensor, layer));
          continue;
        }
        RETURN_IF_ERROR(CheckPlace(tensor));
        PlanTensor copy;
        copy.name = tensor.name;
        const Shape shape = input.source->shape();
        RETURN_IF_ERROR(PlanCopy(std::move(copy), shape, {std::move(input)}, layer));
      }
      return absl::OkStatus();
    };
    RETURN_IF_ERROR(plan(module.pre(), -1));
    for (int64_t layer = 0; layer < layers_; ++layer) {
      RETURN_IF_ERROR(plan(module.LayerTensors(layer), layer));
    }
    return plan(module.post(), -1);
  }

  // Qwen2's attention has biases, which are zero where the base has none. Other optional tensors
  // stay away.
  absl::Status PlanMissing(const ArchTensor& tensor, int64_t layer) {
    absl::string_view module = tensor.name;
    const TensorInfo* weight = nullptr;
    if (style_->gated_shared && absl::ConsumeSuffix(&module, "_proj.bias") &&
        !absl::EndsWith(module, ".o")) {
      weight = Base().Find(absl::StrCat(module, "_proj.weight"));
    }
    if (weight == nullptr || weight->shape.rank() != 2) {
      plan_.absent_tensors.push_back(tensor.name);
      return absl::OkStatus();
    }
    const Shape shape = {weight->shape[0]};
    const auto zeros = std::make_shared<const std::vector<float>>(shape[0], 0.0f);
    PlanTensor made;
    made.name = tensor.name;
    PlanInput input{.source = ValueSource(zeros, shape, tensor.name), .layer = layer};
    input.views = {"zeros: the base has none"};
    return PlanCopy(std::move(made), shape, {std::move(input)}, layer);
  }

  // A source model's matrix as it enters the expert; `place` says which one that is.
  absl::StatusOr<PlanInput> OpenPart(int model, const MoeExpert& expert, const std::string& place,
                                     int64_t layer, const std::string& part) {
    const std::string module = absl::StrCat("model.layers.", layer, ".mlp.", part);
    const std::string name = module + ".weight", bias = module + ".bias";
    std::optional<PlanInput> found;
    for (const ArchTensor& tensor : architecture_->modules()[0]->LayerTensors(layer)) {
      if (tensor.name == bias &&
          !StoredName(*plan_.models[model].checkpoint, tensor, false).empty()) {
        RETURN_IF_ERROR(CheckPlace(tensor));
      }
      if (tensor.name != name) continue;
      ASSIGN_OR_RETURN(found, OpenInput(model, tensor, layer));
    }
    if (!found || found->source == nullptr) {
      return absl::FailedPreconditionError(absl::StrCat(architecture_->name(), " has no ", name));
    }
    PlanInput input = *std::move(found);
    const Shape& shape = input.source->shape();
    const bool down = part == "down_proj";
    if (!IsFloat(input.source->dtype()) || shape.rank() != 2 || shape[down ? 0 : 1] != hidden_) {
      return absl::FailedPreconditionError(absl::StrCat(
          input.source->name(), " ", shape.ToString(), " is not a floating matrix with ", hidden_,
          down ? " rows" : " columns", ", as the base's features are"));
    }
    const double scale = down ? expert.residual_scale : 1.0;
    if (expert.noise_scale != 0 || scale != 1) {
      const PhiloxKey key = MakePhiloxKey(plan_.options.seed, absl::StrCat(name, "#", place));
      input.source = NoisySource(input.source, key, expert.noise_scale, scale);
      if (expert.noise_scale != 0) input.params["noise_scale"] = expert.noise_scale;
      if (scale != 1) input.params["residual_scale"] = scale;
    }
    return input;
  }

  // The three matrices of an expert, by their names in the source model. `width` becomes that of
  // its MLP, or is already that of others which it must share.
  absl::StatusOr<std::map<std::string, PlanInput>> OpenExpert(int model, const MoeExpert& expert,
                                                              const std::string& place,
                                                              int64_t layer, int64_t& width) {
    std::map<std::string, PlanInput> parts;
    for (const char* part : kParts) {
      auto input = OpenPart(model, expert, place, layer, part);
      if (!input.ok()) return Annotate(input.status(), expert.at.ToString());
      const int64_t own = input->source->shape()[part == absl::string_view("down_proj") ? 1 : 0];
      if (width == 0) width = own;
      if (own != width) {
        return RecipeAt(
            expert.at,
            absl::StrCat("model ", plan_.models[model].ref, ", tensor ", input->tensor, " ",
                         input->source->shape().ToString(), ": the MLPs of the ", style_->name,
                         " have one width, and this one has ", own, " where others have ", width));
      }
      parts[part] = *std::move(input);
    }
    return parts;
  }

  absl::Status PlanLayer(int64_t layer) {
    const bool separate = moe_.separate_experts || !style_->fused;
    const std::string at = absl::StrCat("model.layers.", layer, ".");
    std::vector<std::map<std::string, PlanInput>> experts;
    for (size_t i = 0; i < experts_.size(); ++i) {
      ASSIGN_OR_RETURN(auto parts, OpenExpert(experts_[i], recipe_.experts[i],
                                              absl::StrCat("expert ", i), layer, sizes_.width));
      experts.push_back(std::move(parts));
    }
    if (separate) {
      for (size_t i = 0; i < experts.size(); ++i) {
        RETURN_IF_ERROR(PlanExpert(
            absl::StrReplaceAll(style_->separate_expert, {{"{expert}", absl::StrCat(i)}}),
            std::move(experts[i]), layer));
      }
    } else {
      RETURN_IF_ERROR(PlanFused("gate_up_proj", {"gate_proj", "up_proj"}, experts, layer));
      RETURN_IF_ERROR(PlanFused("down_proj", {"down_proj"}, experts, layer));
    }
    RETURN_IF_ERROR(PlanRouter(layer, separate ? style_->separate_router : style_->router,
                               style_->router, router_, sizes_.experts));
    if (shared_.empty()) return absl::OkStatus();
    // A gated one may have a width of its own.
    int64_t& width = style_->gated_shared ? sizes_.shared_width : sizes_.width;
    ASSIGN_OR_RETURN(auto parts,
                     OpenExpert(shared_[0], recipe_.shared_experts[0], "shared", layer, width));
    RETURN_IF_ERROR(PlanExpert(style_->shared, std::move(parts), layer));
    if (!style_->gated_shared) return absl::OkStatus();
    constexpr absl::string_view kGate = "mlp.shared_expert_gate.weight";
    return PlanRouter(layer, kGate, kGate, shared_router_, 1);
  }

  // One tensor for each matrix; `name` has {part}.
  absl::Status PlanExpert(const std::string& name, std::map<std::string, PlanInput> parts,
                          int64_t layer) {
    for (auto& [part, input] : parts) {
      PlanTensor tensor;
      tensor.name = absl::StrCat("model.layers.", layer, ".",
                                 absl::StrReplaceAll(name, {{"{part}", style_->parts.at(part)}}));
      const Shape shape = input.source->shape();
      RETURN_IF_ERROR(PlanCopy(std::move(tensor), shape, {std::move(input)}, layer));
    }
    return absl::OkStatus();
  }

  // [experts, rows of all `parts`, columns]: of each expert one matrix below the other.
  absl::Status PlanFused(absl::string_view name, const std::vector<std::string>& parts,
                         std::vector<std::map<std::string, PlanInput>>& experts, int64_t layer) {
    std::vector<PlanInput> inputs;
    int64_t rows = 0;
    for (auto& expert : experts) {
      for (const std::string& part : parts) {
        inputs.push_back(std::move(expert.at(part)));
        rows += inputs.back().source->shape()[0];
      }
    }
    const auto count = static_cast<int64_t>(experts.size());
    const Shape shape = {count, rows / count, inputs[0].source->shape()[1]};
    PlanTensor tensor;
    tensor.name = absl::StrCat("model.layers.", layer, ".mlp.experts.", name);
    return PlanCopy(std::move(tensor), shape, std::move(inputs), layer);
  }

  // --- warnings --------------------------------------------------------------------------------

  // Rounding that the recipe does not ask for.
  void WarnOfCasts() {
    if (recipe_.dtype) return;
    for (const auto& [key, count] : narrowed_) {
      plan_.warnings.push_back(absl::StrCat(
          count, " tensors of model ", plan_.models[key.first].ref, " are rounded from ",
          TorchName(key.second), " to ", TorchName(*sizes_.dtype),
          ", which config.json of the base says; `dtype` chooses another"));
    }
  }

  // Of the experts' models everything but MLPs is meant to be unused, and of the base's the MLPs.
  void ListUnused() {
    absl::flat_hash_set<std::string> mlps;
    for (int64_t layer = 0; layer < layers_; ++layer) {
      for (const ArchTensor& tensor : architecture_->modules()[0]->LayerTensors(layer)) {
        if (IsMlp(tensor)) mlps.insert(StoredName(Base(), tensor, /*with_tied=*/false));
      }
    }
    std::vector<std::string> unknown;
    for (size_t i = 0; i < plan_.models.size(); ++i) {
      std::vector<std::string> unused;
      for (const std::string& name : plan_.models[i].checkpoint->tensor_names()) {
        if (used_[static_cast<int>(i)].contains(name)) continue;
        unused.push_back(name);
        if (i == 0 && !mlps.contains(name)) unknown.push_back(name);
      }
      if (!unused.empty()) plan_.unused_tensors[plan_.models[i].ref] = std::move(unused);
    }
    if (unknown.empty()) return;
    plan_.warnings.push_back(absl::StrCat(
        unknown.size(), " of the tensors of model ", plan_.models[0].ref, " are not part of ",
        architecture_->name(), " and are left out: ", Listed(unknown)));
  }

  // --- files -----------------------------------------------------------------------------------

  absl::Status AddFiles() {
    plan_.config_json = MoeConfigJson(*style_, Base().config_json(), sizes_, plan_.warnings);
    RETURN_IF_ERROR(AddModelFiles(0, 0, *architecture_, /*changes=*/{}, {}, plan_));
    if (!plan_.options.write_model_card) return absl::OkStatus();
    const auto listed = [&](const std::vector<int>& models) {
      return absl::StrJoin(models, ", ", [&](std::string* out, int model) {
        absl::StrAppend(out, "`", plan_.models[model].ref, "`");
      });
    };
    ModelCard card{.method = absl::StrCat("A mixture of experts (", style_->name,
                                          "): its experts are the MLPs of ", listed(experts_)),
                   .recipe = recipe_.text,
                   .overrides = recipe_.overrides,
                   .recipe_file = "mergekit_moe_config.yml"};
    if (!shared_.empty()) absl::StrAppend(&card.method, ", shared by all tokens ", listed(shared_));
    absl::StrAppend(&card.method, "; everything else is that of ", listed({0}), ".");
    for (size_t i = 0; i < plan_.models.size(); ++i) card.models.push_back(static_cast<int>(i));
    AddModelCard(card, plan_);
    return absl::OkStatus();
  }

  const MoeRecipe& recipe_;
  const MoeOptions moe_;
  Plan plan_;  // models[0] is the base
  absl::flat_hash_map<std::string, int> model_index_;
  std::vector<int> experts_;  // indices of their models
  std::vector<int> shared_;
  std::shared_ptr<const Architecture> architecture_;  // of the dense models
  const MoeStyle* style_ = nullptr;
  int64_t layers_ = 0;
  int64_t hidden_ = 0;     // features
  MoeSizes sizes_;         // widths are known from the first layer on
  std::string embedding_;  // the base's input embedding
  std::shared_ptr<const TensorSource> embedding_source_;
  std::optional<PromptTokenizer> tokenizer_;
  std::vector<Rows> router_;  // by layer, or one for all; none where routers are random
  std::vector<Rows> shared_router_;
  absl::flat_hash_set<std::string> names_;
  std::map<int, std::set<std::string>> used_;          // by model
  std::map<std::pair<int, DType>, int64_t> narrowed_;  // by model and stored dtype
};

}  // namespace

absl::StatusOr<Plan> MakeMoePlan(const MoeRecipe& recipe, const PlanOptions& options,
                                 const MoeOptions& moe) {
  return MoePlanner(recipe, options, moe).Make();
}

}  // namespace pewter
