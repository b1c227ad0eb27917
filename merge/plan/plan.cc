#include "merge/plan/plan.h"

#include <algorithm>
#include <set>
#include <utility>

#include "absl/algorithm/container.h"
#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/dtype_names.h"
#include "base/status.h"
#include "base/units.h"
#include "kernels/backends.h"
#include "merge/align/aligned_model.h"
#include "merge/align/aligner.h"
#include "merge/align/symmetry.h"
#include "merge/evaluate/evaluation.h"
#include "merge/methods/adapter_method.h"
#include "merge/plan/adapter_files.h"
#include "merge/plan/adapter_merge.h"
#include "merge/plan/chat_template.h"
#include "merge/plan/fitted_layers.h"
#include "merge/plan/layout.h"
#include "merge/plan/output_files.h"
#include "merge/plan/parameters.h"
#include "merge/plan/plan_steps.h"
#include "merge/plan/stage_store.h"
#include "merge/plan/statistics_files.h"
#include "merge/plan/tokenizer.h"

namespace pewter {
namespace {

// A source of a slice with its model opened and its layers known.
struct Source {
  int model = 0;
  int64_t first_layer = 0;
  const ParamScope* parameters = nullptr;  // null: base_model that the recipe does not list
};

struct Slice {
  std::vector<Source> sources;
  int base = -1;  // index into `sources` when the method takes the base out of its inputs
  int64_t layers = 0;
  ParamPlace place;
  std::string where;  // "recipe:5:3"
};

// Which of a slice's layers a tensor belongs to.
struct LayerPlace {
  double t = 0;
  int64_t layer = -1;  // of the output; -1: none
  int64_t offset = 0;  // in the slice
};

// A stored tensor of one model that takes part in an output tensor.
struct Operand {
  int source = 0;      // index into Slice::sources
  std::string name;    // the architecture's
  std::string tensor;  // in the checkpoint
  const TensorInfo* info = nullptr;
};

class Planner {
 public:
  // `stages`: those before it.
  Planner(const Recipe& recipe, const PlanOptions& options, absl::Span<const PlanStage> stages)
      : recipe_(recipe), stages_(stages) {
    plan_.options = options;
    plan_.recipe_text = recipe.text;
    plan_.warnings = recipe.warnings;
  }

  absl::StatusOr<Plan> Make() {
    RETURN_IF_ERROR(ResolveOptions(plan_.options));
    auto method = FindMethod(recipe_.merge_method);
    if (!method.ok()) {
      if (FindAdapterMethod(recipe_.merge_method).ok()) {
        return RecipeAt(recipe_.merge_method_at,
                        absl::StrCat("merge method \"", recipe_.merge_method,
                                     "\" merges adapters and gives one: it needs `output: {format: "
                                     "lora}`"));
      }
      return Annotate(method.status(), recipe_.merge_method_at.ToString());
    }
    method_ = *method;
    plan_.method = method_->name;
    plan_.report = recipe_.report;
    RETURN_IF_ERROR(CheckParameters(recipe_, *method_, plan_.warnings));
    RETURN_IF_ERROR(OpenModels());
    RETURN_IF_ERROR(OpenStatistics());
    RETURN_IF_ERROR(FindArchitecture());
    RETURN_IF_ERROR(SetUpAlignments());
    RETURN_IF_ERROR(SetUpTokenizer());
    RETURN_IF_ERROR(PlanModules());
    if (plan_.tensors.empty()) {
      return absl::FailedPreconditionError("no tensor is merged; the models have none in common");
    }
    RETURN_IF_ERROR(CheckStatisticsUsed());
    RETURN_IF_ERROR(FitLayers());
    if (plan_.report && absl::c_none_of(plan_.tensors, [](const PlanTensor& tensor) {
          return tensor.task != nullptr;
        })) {
      plan_.warnings.push_back(absl::StrCat(recipe_.report_at.ToString(), ": ", method_->name,
                                            " decomposes nothing here, so there is no report"));
    }
    RETURN_IF_ERROR(PlanMeasure());
    RETURN_IF_ERROR(PlanEvaluation());
    WarnOfIdleSettings(recipe_, *method_, param_use_, known_names_, plan_.warnings);
    WarnOfCasts();
    ListUnused();
    RETURN_IF_ERROR(LayOutShards(plan_.options.shard_bytes, plan_));
    RETURN_IF_ERROR(AddFiles());
    RETURN_IF_ERROR(FinishPlan(recipe_.overrides, plan_));
    RETURN_IF_ERROR(SizeAlignments());
    return std::move(plan_);
  }

 private:
  // --- models ----------------------------------------------------------------------------------

  absl::Status OpenModel(const ModelRef& ref) {
    const std::string name = ref.ToString();
    if (model_index_.contains(name)) return absl::OkStatus();
    const auto stage = std::find_if(stages_.begin(), stages_.end(),
                                    [&](const PlanStage& s) { return s.name == ref.path; });
    auto checkpoint =
        stage == stages_.end() ? Checkpoint::Open(ref) : Checkpoint::Open(ref, stage->store);
    if (!checkpoint.ok()) {
      return Annotate(checkpoint.status(), ref.at.ToString());
    }
    model_index_[name] = AddModel("model", name, *checkpoint, plan_);
    if ((*checkpoint)->raw() && !plan_.options.name_by_name &&
        (*checkpoint)->store().Stat(kAdapterConfigFile).ok()) {
      plan_.warnings.push_back(absl::StrCat(
          "model ", name,
          " is an adapter, whose factors mean nothing by themselves: `output: {format: lora}` "
          "merges adapters, BASE+ADAPTER is a model"));
    }
    return absl::OkStatus();
  }

  int ModelIndex(const ModelRef& ref) const { return model_index_.at(ref.ToString()); }
  const Checkpoint& Model(int index) const { return *plan_.models[index].checkpoint; }

  // Every distinct reference once, in the recipe's order; then bases; then a tokenizer's model,
  // which is no input.
  absl::Status OpenModels() {
    for (const RecipeModule& module : recipe_.modules) {
      for (const RecipeSlice& slice : module.slices) {
        for (const RecipeSource& source : slice.sources) RETURN_IF_ERROR(OpenModel(source.model));
      }
    }
    listed_models_ = static_cast<int>(plan_.models.size());
    if (recipe_.base_model) RETURN_IF_ERROR(OpenModel(*recipe_.base_model));
    for (const RecipeModule& module : recipe_.modules) {
      for (const RecipeSlice& slice : module.slices) {
        if (slice.base_model) RETURN_IF_ERROR(OpenModel(*slice.base_model));
      }
    }
    input_models_ = static_cast<int>(plan_.models.size());
    if (recipe_.align) RETURN_IF_ERROR(OpenModel(recipe_.align->reference));
    if (recipe_.tokenizer && recipe_.tokenizer->model) {
      RETURN_IF_ERROR(OpenModel(*recipe_.tokenizer->model));
    }
    base_ = recipe_.base_model ? ModelIndex(*recipe_.base_model) : -1;
    donor_ = base_ >= 0 ? base_ : 0;
    return absl::OkStatus();
  }

  // --- statistics ------------------------------------------------------------------------------

  // They stand among the plan's models, as a tokenizer's model does, so that what is read of them
  // is recorded.
  absl::Status OpenStatistics() {
    if (method_->statistics == StatisticsUse::kNone) {
      if (!recipe_.statistics.empty()) {
        plan_.warnings.push_back(absl::StrCat(recipe_.statistics_at.ToString(),
                                              ": `statistics` has no effect: ", method_->name,
                                              " needs none"));
      }
      return absl::OkStatus();
    }
    for (const RecipeStatistics& one : recipe_.statistics) {
      const auto model = model_index_.find(one.model.ToString());
      if (model == model_index_.end()) {
        return RecipeAt(one.model.at, absl::StrCat("`statistics` of model ", one.model.ToString(),
                                                   ", which is not in the recipe"));
      }
      auto file = StatisticsFile::Open(one);
      if (!file.ok()) return Annotate(file.status(), one.file.at.ToString());
      const Checkpoint& checkpoint = *file->checkpoint();
      statistics_.emplace(model->second,
                          Statistics{static_cast<int>(plan_.models.size()), *std::move(file)});
      plan_.models.push_back({.ref = one.file.ToString(),
                              .checkpoint = statistics_.at(model->second).file.checkpoint(),
                              .file_base = static_cast<int>(plan_.files.size())});
      plan_.files.insert(plan_.files.end(), checkpoint.files().begin(), checkpoint.files().end());
    }
    return absl::OkStatus();
  }

  // Sets tensor.statistics, and for StatisticsUse::kLayerInputs what the method is told, where the
  // files have them for the tensor: for all of its inputs or for none.
  absl::StatusOr<std::optional<LayerInputs>> FindStatistics(bool rearranged, PlanTensor& tensor) {
    std::optional<LayerInputs> layer;
    if (method_->statistics == StatisticsUse::kNone) return layer;
    std::vector<PlanInput> found;
    const PlanInput* without = nullptr;
    for (const PlanInput& input : tensor.inputs) {
      const auto known = statistics_.find(input.model);
      if (known == statistics_.end()) {
        return absl::InvalidArgumentError(absl::StrCat(method_->name, " needs `statistics: {",
                                                       plan_.models[input.model].ref,
                                                       ": FILE}`, a file for each model"));
      }
      const Statistics& statistics = known->second;
      const Checkpoint& checkpoint = *statistics.file.checkpoint();
      StatisticsFile::Gram gram;
      std::string name = input.tensor;
      if (method_->statistics == StatisticsUse::kLayerInputs) {
        ASSIGN_OR_RETURN(gram,
                         statistics.file.FindGram(Model(input.model).config_json(), input.tensor));
        name = gram.tensor;
      }
      const TensorInfo* const info = name.empty() ? nullptr : checkpoint.Find(name);
      if (info == nullptr) {
        without = &input;
        continue;
      }
      const PlanModel& model = plan_.models[statistics.model];
      PlanInput one{.model = statistics.model, .tensor = name, .layer = input.layer};
      ASSIGN_OR_RETURN(one.source, checkpoint.OpenTensor(name, model.file_base));
      if (method_->statistics == StatisticsUse::kLayerInputs) {
        if (!layer)
          layer = LayerInputs{.width = gram.width,
                              .axis = gram.axis.value_or(AxisOf(tensor, gram.width))};
        if (gram.width != layer->width) {
          return absl::FailedPreconditionError(absl::StrCat(
              "statistics of ", layer->width, " inputs in ", plan_.models[found[0].model].ref,
              " and of ", gram.width, " in ", model.ref));
        }
        layer->rows.push_back(gram.rows);
      } else {
        RETURN_IF_ERROR(CheckLike(*info, input, model, rearranged));
        if (info->dtype != input.source->dtype()) {
          one.views.push_back(absl::StrCat(SafetensorsName(info->dtype), " to ",
                                           SafetensorsName(input.source->dtype())));
        }
        one.source = CastSource(std::move(one.source), input.source->dtype());
      }
      found.push_back(std::move(one));
    }
    if (found.empty()) return layer;
    if (without != nullptr) {
      return absl::FailedPreconditionError(
          absl::StrCat("the statistics of model ", plan_.models[without->model].ref,
                       " do not have it, those in ", plan_.models[found[0].model].ref, " do"));
    }
    tensor.statistics = std::move(found);
    return layer;
  }

  // Along which axis of a weight its layer's inputs lie, as far as its shape tells.
  static int AxisOf(const PlanTensor& tensor, int64_t width) {
    return tensor.shape.rank() == 2 && tensor.shape[1] != width && tensor.shape[0] == width ? 0 : 1;
  }

  absl::Status CheckLike(const TensorInfo& info, const PlanInput& input, const PlanModel& model,
                         bool rearranged) const {
    if (rearranged) {
      return absl::FailedPreconditionError(absl::StrCat(
          method_->name,
          " cannot merge vocabularies token by token or cut: its statistics have rows by index"));
    }
    if (IsFloat(info.dtype) && info.shape == input.source->shape()) return absl::OkStatus();
    return absl::FailedPreconditionError(
        absl::StrCat(model.ref, " has ", SafetensorsName(info.dtype), " ", info.shape.ToString(),
                     " for it, and the model ", input.source->shape().ToString()));
  }

  absl::Status CheckStatisticsUsed() const {
    if (method_->statistics == StatisticsUse::kNone) return absl::OkStatus();
    if (std::any_of(plan_.tensors.begin(), plan_.tensors.end(),
                    [](const PlanTensor& tensor) { return !tensor.statistics.empty(); })) {
      return absl::OkStatus();
    }
    return RecipeAt(recipe_.statistics.empty() ? recipe_.merge_method_at : recipe_.statistics_at,
                    "the statistics have nothing for any tensor that is merged");
  }

  // --- passes over data ------------------------------------------------------------------------

  static absl::Status RecipeAt(TextPosition at, absl::string_view message) {
    return absl::InvalidArgumentError(absl::StrCat(at.ToString(), ": ", message));
  }

  absl::StatusOr<ForwardModel> ModelToRun(int model) const {
    return MakeForwardModel(plan_.models[model].checkpoint);
  }

  absl::StatusOr<std::shared_ptr<const ForwardData>> OpenData(const ModelRef& file) {
    auto data = ForwardData::Open(file.path);
    if (!data.ok()) return Annotate(data.status(), file.at.ToString());
    plan_.data_digests.push_back((*data)->digest());
    return data;
  }

  // Of passes that are opened to see whether they can be run.
  absl::StatusOr<ForwardOptions> PassOptions() {
    if (backend_ == nullptr) {
      ASSIGN_OR_RETURN(backend_, kernels::OpenBackend({}, /*threads=*/1));
    }
    return ForwardOptions{.backend = backend_.get(), .memory_bytes = plan_.options.memory_bytes};
  }

  // --- evaluation ------------------------------------------------------------------------------

  absl::Status PlanEvaluation() {
    if (!recipe_.evaluation) return absl::OkStatus();
    const RecipeEvaluation& asked = *recipe_.evaluation;
    auto evaluation = std::make_shared<EvaluationPlan>();
    ASSIGN_OR_RETURN(ForwardModel first, ModelToRun(0));
    const auto metric = asked.metric.empty() ? DefaultMetric(first) : ParseMetric(asked.metric);
    if (!metric.ok()) {
      return Annotate(metric.status(),
                      (asked.metric.empty() ? asked.at : asked.metric_at).ToString());
    }
    evaluation->metric = *metric;
    ASSIGN_OR_RETURN(evaluation->data, OpenData(asked.data));
    evaluation->points = static_cast<int>(asked.barrier_points);
    if (evaluation->points > 0) {
      RETURN_IF_ERROR(Annotate(AddPairs(first, *evaluation), asked.at.ToString()));
    }
    ASSIGN_OR_RETURN(const ForwardOptions options, PassOptions());
    RETURN_IF_ERROR(Annotate(CheckEvaluation(first, evaluation->data, evaluation->metric, options),
                             asked.at.ToString()));
    RETURN_IF_ERROR(Annotate(CheckCurves(*evaluation, options), asked.at.ToString()));
    plan_.evaluation = std::move(evaluation);
    return absl::OkStatus();
  }

  // The reference with each model that is aligned to it, or the first input with each of the
  // others; a base is one of them when there is but one other.
  absl::Status AddPairs(const ForwardModel& first, EvaluationPlan& evaluation) const {
    for (const PlanAlignment& alignment : plan_.alignments) {
      const auto& checkpoint = plan_.models[alignment.model].checkpoint;
      ModelPair& pair = evaluation.pairs.emplace_back();
      ASSIGN_OR_RETURN(pair.a, ModelToRun(alignment.reference));
      ASSIGN_OR_RETURN(ForwardModel plain, ModelToRun(alignment.model));
      ASSIGN_OR_RETURN(ForwardModel aligned,
                       AlignedModel(alignment.symmetry, checkpoint, alignment.slot));
      pair.views = {{"not aligned", std::move(plain)}, {"aligned", std::move(aligned)}};
    }
    if (!evaluation.pairs.empty()) return absl::OkStatus();
    for (int i = 1; i < input_models_; ++i) {
      const bool base = recipe_.base_model && i == ModelIndex(*recipe_.base_model);
      if (base && input_models_ > 2) continue;
      ASSIGN_OR_RETURN(ForwardModel other, ModelToRun(i));
      evaluation.pairs.push_back({.a = first, .views = {{"not aligned", std::move(other)}}});
    }
    if (!evaluation.pairs.empty()) return absl::OkStatus();
    return absl::InvalidArgumentError(
        "`barrier_points` are of the line between two models, and the recipe has one");
  }

  std::vector<std::shared_ptr<const Checkpoint>> Inputs() const {
    std::vector<std::shared_ptr<const Checkpoint>> inputs;
    for (int i = 0; i < input_models_; ++i) inputs.push_back(plan_.models[i].checkpoint);
    return inputs;
  }

  absl::Status FindArchitecture() {
    // The donor comes first: with allow_mixed its layout is used for all.
    std::vector<std::shared_ptr<const Checkpoint>> inputs = Inputs();
    std::rotate(inputs.begin(), inputs.begin() + donor_, inputs.begin() + donor_ + 1);
    const Checkpoint* unlisted = base_ >= listed_models_ ? &Model(base_) : nullptr;
    ASSIGN_OR_RETURN(architecture_,
                     ResolveArchitecture(inputs, plan_.options.allow_mixed,
                                         {.names = plan_.options.raw_names, .base = unlisted}));
    if (plan_.options.name_by_name) architecture_ = NameByName(*architecture_, Model(donor_));
    // A model that lost tensors would not compute what it could.
    if (recipe_.align || recipe_.evaluation) {
      ASSIGN_OR_RETURN(architecture_, WithAllTensors(architecture_, inputs));
    }
    plan_.architecture = architecture_->name();
    return absl::OkStatus();
  }

  // --- alignment -------------------------------------------------------------------------------

  absl::Status SetUpAlignments() {
    if (!recipe_.align) return absl::OkStatus();
    const RecipeAlign& align = *recipe_.align;
    for (const RecipeModule& module : recipe_.modules) {
      if (module.from_models) continue;
      return RecipeAt(align.at,
                      "`align` pairs the layers of whole models one by one: list them in `models`, "
                      "not in `slices`");
    }
    if (recipe_.tokenizer && recipe_.tokenizer->approximate) {
      return RecipeAt(
          recipe_.tokenizer->approximate->at,
          "rows cannot be made for tokens (`approximate`) of models that are aligned in "
          "the same recipe; align them in a stage of their own");
    }
    const int reference = ModelIndex(align.reference);
    std::vector<std::shared_ptr<const Checkpoint>> models = {plan_.models[reference].checkpoint};
    std::vector<int> moved;
    for (int i = 0; i < input_models_; ++i) {
      if (i == reference) continue;
      moved.push_back(i);
      models.push_back(plan_.models[i].checkpoint);
    }
    if (moved.empty()) {
      return RecipeAt(align.reference.at, "the reference is the only model: nothing is aligned");
    }
    // The reference first; it need not be an input.
    auto architecture = ResolveArchitecture(models, plan_.options.allow_mixed);
    if (architecture.ok()) architecture = WithAllTensors(*architecture, models);
    if (!architecture.ok()) return Annotate(architecture.status(), align.at.ToString());
    auto made = Symmetry::Make(**architecture, models);
    if (!made.ok()) return Annotate(made.status(), align.at.ToString());
    const auto symmetry = std::make_shared<const Symmetry>(*std::move(made));
    AlignerInputs inputs{.memory_bytes = plan_.options.memory_bytes};
    if (align.calibration) {
      ASSIGN_OR_RETURN(inputs.calibration, OpenData(*align.calibration));
      const std::string at = align.calibration->at.ToString();
      auto sites = SitesOf(models, inputs.calibration);
      if (!sites.ok()) return Annotate(sites.status(), at);
      calibration_sites_ = *std::move(sites);
    }
    if (align.objective) {
      ASSIGN_OR_RETURN(inputs.objective, OpenData(*align.objective));
      for (const int model : moved) {
        RETURN_IF_ERROR(CheckRuns(model, *align.objective, inputs.objective));
      }
    }
    if (method_->fits_layers) {
      ASSIGN_OR_RETURN(const ResolvedParams params,
                       TensorParameters(*method_, {.recipe = &recipe_.parameters}, ""));
      inputs.fit = RidgeOf(params.values);
      RETURN_IF_ERROR(CheckFit(align, reference, moved));
    }
    const auto calibration = inputs.calibration;
    ASSIGN_OR_RETURN(const std::shared_ptr<const Aligner> aligner,
                     MakeAligner(align, *symmetry, std::move(inputs)));
    if (const std::string caveat = aligner->caveat(); !caveat.empty()) {
      plan_.warnings.push_back(
          absl::StrCat(align.mapped_at.value_or(align.at).ToString(), ": ", caveat));
    }
    std::vector<int64_t> map_widths;
    for (const SymmetryGroup& group : symmetry->groups()) {
      map_widths.push_back(aligner->MapWidth(*symmetry, group));
    }
    for (size_t i = 0; i < moved.size(); ++i) {
      plan_.alignments.push_back(
          {.model = moved[i],
           .reference = reference,
           .symmetry = symmetry,
           .aligner = aligner,
           .slot = std::make_shared<AlignmentSlot>(map_widths),
           .file = moved.size() == 1
                       ? "alignment.safetensors"
                       : absl::StrCat("alignment-", i + 1, "-of-", moved.size(), ".safetensors"),
           .statistics = method_->fits_layers ? calibration : nullptr});
    }
    return align.verify ? VerifyAlignments(*align.verify) : absl::OkStatus();
  }

  // Of the models, which must be ones that can be run on the data together.
  absl::StatusOr<std::set<std::string>> SitesOf(
      absl::Span<const std::shared_ptr<const Checkpoint>> checkpoints,
      std::shared_ptr<const ForwardData> data) {
    std::vector<ForwardModel> models;
    for (const auto& checkpoint : checkpoints) {
      ASSIGN_OR_RETURN(models.emplace_back(), MakeForwardModel(checkpoint));
    }
    ASSIGN_OR_RETURN(const ForwardOptions options, PassOptions());
    ASSIGN_OR_RETURN(const auto pass, ForwardPass::Open(models, std::move(data), options));
    std::set<std::string> sites;
    for (int64_t stage = 0; stage < pass->stages(); ++stage) {
      for (const Site& site : pass->SitesOf(stage)) sites.insert(site.name);
    }
    return sites;
  }

  // That a model can be evaluated on data that has been opened.
  absl::Status CheckRuns(int index, const ModelRef& file,
                         const std::shared_ptr<const ForwardData>& data) {
    ASSIGN_OR_RETURN(const ForwardModel model, ModelToRun(index));
    const auto metric = DefaultMetric(model);
    if (!metric.ok()) return Annotate(metric.status(), file.at.ToString());
    ASSIGN_OR_RETURN(const ForwardOptions options, PassOptions());
    return Annotate(CheckEvaluation(model, data, *metric, options), file.at.ToString());
  }

  absl::Status VerifyAlignments(const ModelRef& file) {
    ASSIGN_OR_RETURN(const auto data, OpenData(file));
    for (PlanAlignment& alignment : plan_.alignments) {
      RETURN_IF_ERROR(CheckRuns(alignment.model, file, data));
      alignment.verify = data;
    }
    return absl::OkStatus();
  }

  // --- layers that are fitted ------------------------------------------------------------------

  // That one model is aligned with the other one that is merged, by data.
  absl::Status CheckFit(const RecipeAlign& align, int reference,
                        const std::vector<int>& moved) const {
    if (!align.calibration) {
      return RecipeAt(align.at, absl::StrCat(method_->name,
                                             " fits layers to what both models do with data: "
                                             "`align` needs `calibration: FILE`"));
    }
    if (moved.size() == 1 && reference < input_models_) return absl::OkStatus();
    return RecipeAt(align.reference.at,
                    absl::StrCat(method_->name,
                                 " merges two models, one of which is the reference "
                                 "of `align`"));
  }

  absl::Status FitLayers() {
    if (!method_->fits_layers) return absl::OkStatus();
    if (plan_.alignments.empty()) {
      return RecipeAt(recipe_.merge_method_at,
                      absl::StrCat(method_->name,
                                   " merges aligned models: it needs `align: {reference: MODEL, "
                                   "calibration: FILE}`; `groups: []` there leaves every feature "
                                   "where it is"));
    }
    const PlanAlignment& alignment = plan_.alignments[0];
    auto fitted = FitPlannedLayers({.alignment = alignment, .sites = calibration_sites_}, plan_);
    if (!fitted.ok()) return Annotate(fitted.status(), recipe_.merge_method_at.ToString());
    config_widths_ = *std::move(fitted);
    return absl::OkStatus();
  }

  absl::Status SizeAlignments() {
    if (plan_.alignments.empty()) return absl::OkStatus();
    const int64_t bytes = plan_.alignments[0].aligner->bytes();
    if (bytes > plan_.options.memory_bytes) {
      return absl::ResourceExhaustedError(
          absl::StrCat("the alignment (", plan_.alignments[0].aligner->name(), ") needs ",
                       FormatBytes(bytes), " and the memory budget is ",
                       FormatBytes(plan_.options.memory_bytes), "; raise --memory"));
    }
    plan_.peak_bytes = std::max(plan_.peak_bytes, bytes);
    return absl::OkStatus();
  }

  // Null for a model that is not aligned.
  const PlanAlignment* AlignmentOf(int model) const {
    const auto it = std::find_if(plan_.alignments.begin(), plan_.alignments.end(),
                                 [&](const PlanAlignment& a) { return a.model == model; });
    return it == plan_.alignments.end() ? nullptr : &*it;
  }

  // --- tokenizer -------------------------------------------------------------------------------

  absl::Status SetUpTokenizer() {
    tokenizer_donor_ = donor_;
    const bool raw = Model(donor_).raw();
    if (recipe_.chat_template) {
      if (raw) return RecipeAt(recipe_.chat_template_at, "raw checkpoints have no chat template");
      if (!plan_.options.copy_tokenizer) {
        plan_.warnings.push_back(
            "`chat_template` has no effect: the tokenizer's files are left out");
      }
      auto text = ChooseChatTemplate(*recipe_.chat_template, Inputs(), plan_.warnings);
      if (!text.ok()) return Annotate(text.status(), recipe_.chat_template_at.ToString());
      tokenizer_edit_.chat_template = *std::move(text);
    }
    if (!recipe_.tokenizer) return WarnOfVocabularies();
    if (raw) return RecipeAt(recipe_.tokenizer->at, "raw checkpoints have no tokenizer");
    if (recipe_.tokenizer->model) tokenizer_donor_ = ModelIndex(*recipe_.tokenizer->model);
    std::vector<VocabularyMatrices> matrices;
    if (recipe_.tokenizer->approximate) {
      ASSIGN_OR_RETURN(donor_matrices_,
                       MatricesOf(plan_.models[tokenizer_donor_], /*with_tied=*/true));
    }
    if (recipe_.tokenizer->approximate && recipe_.tokenizer->approximate->magikarp) {
      for (int i = 0; i < input_models_; ++i) {
        ASSIGN_OR_RETURN(matrices.emplace_back(), MatricesOf(plan_.models[i], false));
      }
      matrices.push_back(donor_matrices_);
    }
    ASSIGN_OR_RETURN(alignment_, TokenAlignment::Make(*recipe_.tokenizer, Inputs(), base_,
                                                      Model(tokenizer_donor_), Model(donor_),
                                                      plan_.warnings, matrices));
    std::optional<std::string> chat_template = std::move(tokenizer_edit_.chat_template);
    tokenizer_edit_ = alignment_->edit();
    tokenizer_edit_.chat_template = std::move(chat_template);
    return absl::OkStatus();
  }

  // Without a tokenizer setting rows are merged by index, whatever they stand for.
  absl::Status WarnOfVocabularies() {
    if (Model(donor_).raw()) return absl::OkStatus();
    for (int i = 0; i < input_models_; ++i) {
      if (i == donor_) continue;
      const absl::StatusOr<bool> differ = VocabulariesDiffer(Model(donor_), Model(i));
      if (absl::IsDataLoss(differ.status())) {
        // Nobody asked for tokens, so odd ones stop nothing.
        plan_.warnings.push_back(
            absl::StrCat("tokenizers cannot be compared: ", differ.status().message()));
        continue;
      }
      if (!differ.ok()) return differ.status();
      if (!*differ) continue;
      plan_.warnings.push_back(absl::StrCat(
          "models ", plan_.models[donor_].ref, " and ", plan_.models[i].ref,
          " give tokens different ids; rows of vocabulary tensors are merged by id. Set "
          "`tokenizer_source` to merge them by token"));
    }
    return absl::OkStatus();
  }

  // --- slices ----------------------------------------------------------------------------------

  absl::Status PlanModules() {
    const auto& modules = architecture_->modules();
    const auto names = [&] {
      std::vector<std::string> result;
      for (const auto& module : modules) result.push_back(module->name());
      return result;
    };
    if (recipe_.has_modules_key) {
      for (const RecipeModule& own : recipe_.modules) {
        const auto found = std::find_if(modules.begin(), modules.end(),
                                        [&](const auto& m) { return m->name() == own.name; });
        if (found == modules.end()) {
          return RecipeAt(own.at,
                          absl::StrCat("architecture ", architecture_->name(), " has no module \"",
                                       own.name, "\"; it has ", Listed(names())));
        }
        RETURN_IF_ERROR(PlanModule(**found, own));
      }
      for (const auto& module : modules) {
        const bool listed =
            std::any_of(recipe_.modules.begin(), recipe_.modules.end(),
                        [&](const RecipeModule& own) { return own.name == module->name(); });
        if (!listed) {
          plan_.warnings.push_back(absl::StrCat("module \"", module->name(),
                                                "\" is not in the recipe and so not in the "
                                                "output"));
        }
      }
      return absl::OkStatus();
    }
    const RecipeModule& only = recipe_.modules.front();
    if (!only.from_models && modules.size() > 1) {
      return RecipeAt(only.at,
                      absl::StrCat("architecture ", architecture_->name(), " has several modules (",
                                   Listed(names()), "): write `modules: {NAME: {slices: ...}}`"));
    }
    for (const auto& module : modules) RETURN_IF_ERROR(PlanModule(*module, only));
    return absl::OkStatus();
  }

  absl::Status PlanModule(const ArchModule& module, const RecipeModule& recipe) {
    std::vector<Slice> slices;
    for (const RecipeSlice& slice : recipe.slices) {
      ASSIGN_OR_RETURN(Slice resolved, ResolveSlice(module, recipe, slice));
      slices.push_back(std::move(resolved));
    }

    ModuleLayers layers{.module = &module};
    RETURN_IF_ERROR(PlanSame(module.pre(), slices.front()));
    for (const Slice& slice : slices) {
      for (int64_t i = 0; i < slice.layers; ++i) {
        const double t = slice.layers == 1
                             ? 1.0
                             : static_cast<double>(i) / static_cast<double>(slice.layers - 1);
        RETURN_IF_ERROR(PlanLayer(module, slice, i, static_cast<int64_t>(layers.layers.size()), t));
        layers.layers.push_back(
            {.model = slice.sources[0].model, .layer = slice.sources[0].first_layer + i});
      }
    }
    RETURN_IF_ERROR(PlanSame(module.post(), slices.back()));
    layers_.push_back(std::move(layers));
    return absl::OkStatus();
  }

  absl::StatusOr<Slice> ResolveSlice(const ArchModule& module, const RecipeModule& recipe_module,
                                     const RecipeSlice& recipe) {
    Slice slice;
    slice.place = {.slice = &recipe.parameters,
                   .module = &recipe_module.parameters,
                   .recipe = &recipe_.parameters};
    slice.where = recipe.at.ToString();

    std::vector<int64_t> lengths;
    const auto add = [&](const ModelRef& ref, const ParamScope* parameters,
                         const std::optional<std::pair<int64_t, int64_t>>& range) -> absl::Status {
      const int model = ModelIndex(ref);
      for (const Source& other : slice.sources) {
        if (other.model == model) {
          return RecipeAt(ref.at,
                          absl::StrCat("model ", ref.ToString(), " is listed twice in one merge"));
        }
      }
      ASSIGN_OR_RETURN(const int64_t layers, module.LayerCount(Model(model)));
      if (range && range->second > layers) {
        return RecipeAt(ref.at, absl::StrCat("layer_range [", range->first, ", ", range->second,
                                             "] is beyond model ", ref.ToString(), ", which has ",
                                             layers, " layers"));
      }
      slice.sources.push_back(
          {.model = model, .first_layer = range ? range->first : 0, .parameters = parameters});
      lengths.push_back(range ? range->second - range->first : layers);
      return absl::OkStatus();
    };
    for (const RecipeSource& source : recipe.sources) {
      RETURN_IF_ERROR(add(source.model, &source.parameters, source.layer_range));
    }

    const std::optional<ModelRef>& base =
        recipe.base_model ? recipe.base_model : recipe_.base_model;
    if (base) RETURN_IF_ERROR(PlaceBase(*base, recipe_module.from_models, add, slice));
    if (!base && method_->base == BaseUse::kRequired) {
      return absl::InvalidArgumentError(
          absl::StrCat(slice.where, ": ", method_->name, " needs a `base_model`"));
    }

    for (size_t i = 1; i < lengths.size(); ++i) {
      if (lengths[i] == lengths[0]) continue;
      return absl::InvalidArgumentError(absl::StrCat(
          slice.where, ": all sources of a slice must have the same number of layers; model ",
          plan_.models[slice.sources[0].model].ref, " has ", lengths[0], " and model ",
          plan_.models[slice.sources[i].model].ref, " has ", lengths[i]));
    }
    slice.layers = lengths[0];

    const int inputs = static_cast<int>(slice.sources.size()) - (slice.base >= 0 ? 1 : 0);
    if (inputs < method_->min_inputs || inputs > method_->max_inputs) {
      const std::string expected =
          method_->min_inputs == method_->max_inputs ? absl::StrCat("exactly ", method_->min_inputs)
          : inputs < method_->min_inputs ? absl::StrCat("at least ", method_->min_inputs)
                                         : absl::StrCat("at most ", method_->max_inputs);
      return absl::InvalidArgumentError(
          absl::StrCat(slice.where, ": ", method_->name, " takes ", expected, " model",
                       method_->min_inputs == 1 && method_->max_inputs == 1 ? "" : "s",
                       slice.base >= 0 ? " besides the base model" : "", ", not ", inputs));
    }
    return slice;
  }

  // Finds the base among the sources or, below `models:`, appends it; notes it when the method
  // takes it out of its inputs.
  template <typename Add>
  absl::Status PlaceBase(const ModelRef& base, bool from_models, const Add& add, Slice& slice) {
    const int model = ModelIndex(base);
    const auto find = [&] {
      const auto it = std::find_if(slice.sources.begin(), slice.sources.end(),
                                   [&](const Source& source) { return source.model == model; });
      return it == slice.sources.end() ? -1 : static_cast<int>(it - slice.sources.begin());
    };
    int index = find();
    if (index < 0 && from_models) {
      RETURN_IF_ERROR(add(base, nullptr, std::nullopt));
      index = find();
      if (method_->base == BaseUse::kInput) {
        plan_.warnings.push_back(absl::StrCat("base_model ", base.ToString(),
                                              " is not listed in `models`; for ", method_->name,
                                              " it is one of the inputs"));
      }
    }
    if (method_->base == BaseUse::kInput) return absl::OkStatus();
    if (index < 0) {
      return absl::InvalidArgumentError(
          absl::StrCat(slice.where, ": base_model ", base.ToString(),
                       " must be one of the sources of every slice (with the layers that stand "
                       "for the base)"));
    }
    slice.base = index;
    return absl::OkStatus();
  }

  // --- tensors ---------------------------------------------------------------------------------

  // Tensors that belong to no layer.
  absl::Status PlanSame(const std::vector<ArchTensor>& tensors, const Slice& slice) {
    return PlanTensors(tensors, {slice.sources.size(), tensors}, slice, {});
  }

  absl::Status PlanLayer(const ArchModule& module, const Slice& slice, int64_t offset,
                         int64_t output_layer, double t) {
    const std::vector<ArchTensor> outputs = module.LayerTensors(output_layer);
    std::vector<std::vector<ArchTensor>> sources;
    for (const Source& source : slice.sources) {
      sources.push_back(module.LayerTensors(source.first_layer + offset));
    }
    return PlanTensors(outputs, std::move(sources), slice,
                       {.t = t, .layer = output_layer, .offset = offset});
  }

  // `inputs` has for each source of the slice the tensors that stand for `outputs`.
  absl::Status PlanTensors(const std::vector<ArchTensor>& outputs,
                           std::vector<std::vector<ArchTensor>> inputs, const Slice& slice,
                           const LayerPlace& at) {
    ASSIGN_OR_RETURN(const auto chosen, ChooseSets(inputs, slice));
    for (size_t i = 0; i < outputs.size(); ++i) {
      const ArchChoice& choice = outputs[i].choice;
      if (choice.id != 0 && chosen.at(choice.id) != choice.set) continue;
      std::vector<ArchTensor> same;
      for (std::vector<ArchTensor>& tensors : inputs) same.push_back(std::move(tensors[i]));
      RETURN_IF_ERROR(PlanTensorOf(outputs[i], same, slice, at));
    }
    return absl::OkStatus();
  }

  // By choice: the set of tensors that the sources have, "" for none of them. They must agree.
  absl::StatusOr<std::map<int, std::string>> ChooseSets(
      const std::vector<std::vector<ArchTensor>>& inputs, const Slice& slice) const {
    std::map<int, std::string> chosen;
    for (size_t i = 0; i < inputs.size(); ++i) {
      const PlanModel& model = plan_.models[slice.sources[i].model];
      struct Found {
        std::map<std::string, int> stored;  // by set
        const ArchTensor* first = nullptr;
      };
      std::map<int, Found> found;
      for (const ArchTensor& tensor : inputs[i]) {
        if (tensor.choice.id == 0) continue;
        Found& one = found[tensor.choice.id];
        if (one.first == nullptr) one.first = &tensor;
        if (!StoredName(*model.checkpoint, tensor, false).empty()) ++one.stored[tensor.choice.set];
      }
      for (const auto& [id, one] : found) {
        const auto most =
            std::max_element(one.stored.begin(), one.stored.end(),
                             [](const auto& a, const auto& b) { return a.second < b.second; });
        const std::string set = most == one.stored.end() ? "" : most->first;
        if (set.empty() && one.first->choice.needed) {
          return absl::FailedPreconditionError(
              absl::StrCat("model ", model.ref, " has no tensor ", one.first->name,
                           ", nor what may stand for it; ", architecture_->name(), " needs it"));
        }
        const auto [known, is_new] = chosen.emplace(id, set);
        if (is_new || known->second == set) continue;
        const auto named = [](const std::string& text) { return text.empty() ? "nothing" : text; };
        return absl::FailedPreconditionError(absl::StrCat(
            "the models do not store the same kinds of tensors: where model ",
            plan_.models[slice.sources[0].model].ref, " has ", named(known->second), ", model ",
            model.ref, " has ", named(set), " (near ", one.first->name, ")"));
      }
    }
    return chosen;
  }

  // `inputs` has the tensor of each source of the slice, with the source's layer number.
  absl::Status PlanTensorOf(const ArchTensor& output, const std::vector<ArchTensor>& inputs,
                            const Slice& slice, const LayerPlace& at) {
    bool any = false;
    for (size_t i = 0; i < inputs.size(); ++i) {
      known_names_.insert(inputs[i].name);
      any = any || !StoredName(Model(slice.sources[i].model), inputs[i], false).empty();
    }
    known_names_.insert(output.name);
    if (!any && output.optional) {
      plan_.absent_tensors.push_back(output.name);
      return absl::OkStatus();
    }

    std::vector<Operand> operands;
    PlanTensor tensor;
    tensor.name = output.name;
    tensor.layer = at.layer;
    for (size_t i = 0; i < inputs.size(); ++i) {
      const Checkpoint& model = Model(slice.sources[i].model);
      std::string name = StoredName(model, inputs[i], true);
      if (name.empty()) {
        if (output.optional) {
          tensor.notes.push_back(absl::StrCat(
              "optional: model ", plan_.models[slice.sources[i].model].ref, " has none"));
          continue;
        }
        return absl::FailedPreconditionError(
            absl::StrCat("model ", plan_.models[slice.sources[i].model].ref, " has no tensor ",
                         inputs[i].name, ", which ", architecture_->name(), " needs"));
      }
      if (std::find(inputs[i].tied_names.begin(), inputs[i].tied_names.end(), name) !=
          inputs[i].tied_names.end()) {
        tensor.notes.push_back(absl::StrCat(
            "tied: model ", plan_.models[slice.sources[i].model].ref, " stores ", name, " for it"));
      }
      const TensorInfo* info = model.Find(name);
      operands.push_back({.source = static_cast<int>(i),
                          .name = inputs[i].name,
                          .tensor = std::move(name),
                          .info = info});
    }
    if (operands.empty()) return absl::OkStatus();

    const bool any_float = std::any_of(operands.begin(), operands.end(),
                                       [](const Operand& o) { return IsFloat(o.info->dtype); });
    if (!any_float) return PlanBuffer(output, operands, slice, at, std::move(tensor));
    return PlanMerged(output, inputs, operands, slice, at, std::move(tensor));
  }

  absl::StatusOr<PlanInput> OpenInput(const Operand& operand, const Slice& slice,
                                      const LayerPlace& at) const {
    const Source& source = slice.sources[operand.source];
    PlanInput input;
    input.model = source.model;
    input.tensor = operand.tensor;
    if (at.layer >= 0) input.layer = source.first_layer + at.offset;
    if (const Checkpoint& model = Model(source.model); model.Adapted(operand.tensor)) {
      input.views.push_back(absl::StrCat("LoRA ", model.ref().adapter));
    }
    const PlanModel& model = plan_.models[input.model];
    ASSIGN_OR_RETURN(input.source, model.checkpoint->OpenTensor(operand.tensor, model.file_base));
    if (const PlanAlignment* alignment = AlignmentOf(input.model); alignment != nullptr) {
      const SymmetricTensor* tensor = alignment->symmetry->Find(operand.name);
      if (tensor == nullptr) {
        return absl::InternalError(
            absl::StrCat(input.source->name(), ": not among the tensors that are aligned"));
      }
      auto view = AlignLater(alignment->symmetry, *tensor, alignment->slot, input.source);
      if (view != input.source && !IsFloat(input.source->dtype())) {
        return absl::FailedPreconditionError(absl::StrCat(input.source->name(), " is ",
                                                          SafetensorsName(input.source->dtype()),
                                                          "; only floating tensors are aligned"));
      }
      if (view != input.source) {
        input.views.push_back(absl::StrCat("aligned to ", plan_.models[alignment->reference].ref));
        input.source = std::move(view);
      }
    }
    return input;
  }

  std::string Name(const Operand& operand, const Slice& slice) const {
    return absl::StrCat("model ", plan_.models[slice.sources[operand.source].model].ref,
                        ", tensor ", operand.tensor);
  }

  absl::Status Mismatch(const ArchTensor& output, const Operand& a, const Operand& b,
                        const Slice& slice, absl::string_view what, absl::string_view of_a,
                        absl::string_view of_b, absl::string_view hint) const {
    return absl::FailedPreconditionError(absl::StrCat("tensor ", output.name, ": ", what, "; ",
                                                      Name(a, slice), " has ", of_a, ", ",
                                                      Name(b, slice), " has ", of_b, hint));
  }

  // Tensors that are not floating (position ids, counters) are copied when all agree.
  absl::Status PlanBuffer(const ArchTensor& output, const std::vector<Operand>& operands,
                          const Slice& slice, const LayerPlace& at, PlanTensor tensor) {
    ASSIGN_OR_RETURN(PlanInput first, OpenInput(operands[0], slice, at));
    for (size_t i = 1; i < operands.size(); ++i) {
      const TensorInfo& a = *operands[0].info;
      const TensorInfo& b = *operands[i].info;
      const auto differ = [&](absl::string_view of_a, absl::string_view of_b) {
        return Mismatch(output, operands[0], operands[i], slice,
                        "tensors that are not floating are copied and must be equal in all models",
                        of_a, of_b, "");
      };
      if (a.dtype != b.dtype) return differ(SafetensorsName(a.dtype), SafetensorsName(b.dtype));
      if (!(a.shape == b.shape)) return differ(a.shape.ToString(), b.shape.ToString());
      ASSIGN_OR_RETURN(const PlanInput other, OpenInput(operands[i], slice, at));
      ASSIGN_OR_RETURN(const bool equal, EqualBytes(*first.source, *other.source));
      if (!equal) return differ("some values", "others");
    }
    tensor.notes.push_back(operands.size() == 1 ? "copied: it is not floating"
                                                : "copied: it is not floating, and equal in all "
                                                  "models");
    tensor.dtype = tensor.result_dtype = operands[0].info->dtype;
    tensor.shape = operands[0].info->shape;
    AddUsed(operands, slice);
    tensor.inputs.push_back(std::move(first));
    return AddTensor(std::move(tensor));
  }

  absl::Status PlanMerged(const ArchTensor& output, const std::vector<ArchTensor>& inputs,
                          const std::vector<Operand>& operands, const Slice& slice,
                          const LayerPlace& at, PlanTensor tensor) {
    const bool aligned = output.vocabulary && alignment_.has_value();
    DType work = operands[0].info->dtype;
    std::optional<int64_t> cut;  // rows of a vocabulary tensor that all models have
    for (const Operand& operand : operands) {
      if (!IsFloat(operand.info->dtype)) {
        return absl::FailedPreconditionError(
            absl::StrCat(Name(operand, slice), " is ", SafetensorsName(operand.info->dtype),
                         ", which cannot be merged with the floating tensors of the other models"));
      }
      if (!aligned && !(operand.info->shape == operands[0].info->shape)) {
        const bool only_rows =
            output.vocabulary && SameRows(operand.info->shape, operands[0].info->shape);
        if (!only_rows || !plan_.options.truncate_vocabularies) {
          return Mismatch(
              output, operands[0], operand, slice, "shapes differ",
              operands[0].info->shape.ToString(), operand.info->shape.ToString(),
              only_rows ? "; `tokenizer_source: base` (or union) merges vocabularies of different "
                          "size token by token, and --unsafe-truncate-embeddings cuts them to the "
                          "rows that all have, whatever tokens these stand for"
                        : "");
        }
        cut = std::min({cut.value_or(operands[0].info->shape[0]), operands[0].info->shape[0],
                        operand.info->shape[0]});
      }
      work = Promote(work, operand.info->dtype);
    }
    if (recipe_.dtype) work = *recipe_.dtype;

    tensor.shape = operands[0].info->shape;
    tensor.result_dtype = work;
    tensor.dtype = recipe_.out_dtype.value_or(work);

    std::vector<int> models;
    std::vector<PlanInput> opened;
    std::vector<std::shared_ptr<const TensorSource>> sources;
    for (const Operand& operand : operands) {
      ASSIGN_OR_RETURN(PlanInput input, OpenInput(operand, slice, at));
      models.push_back(input.model);
      sources.push_back(CastSource(input.source, work));
      if (method_->in_double) sources.back() = CastSource(sources.back(), DType::kF64);
      if (operand.info->dtype != work) {
        input.views.push_back(
            absl::StrCat(SafetensorsName(operand.info->dtype), " to ", SafetensorsName(work)));
      }
      if (aligned) input.views.push_back("rows by token");
      if (aligned && recipe_.tokenizer->approximate) input.views.push_back("new rows made");
      if (cut) input.views.push_back(absl::StrCat("first ", *cut, " rows"));
      opened.push_back(std::move(input));
    }
    if (aligned) {
      std::vector<std::string> warnings;
      ASSIGN_OR_RETURN(const TokenAlignment::Donor donor, DonorOf(output, *sources[0]));
      auto views = alignment_->Align(models, sources, donor, warnings);
      if (!views.ok()) return Annotate(views.status(), absl::StrCat("tensor ", output.name));
      for (const std::string& warning : warnings) {
        plan_.warnings.push_back(absl::StrCat("tensor ", output.name, ": ", warning));
      }
      sources = *std::move(views);
    } else if (cut) {
      RETURN_IF_ERROR(CutVocabulary(output, operands, slice, *cut, sources));
    }
    tensor.shape = sources[0]->shape();

    const ParamPlace place = PlaceAt(slice, at.t);
    bool base_missing = slice.base >= 0;
    for (size_t i = 0; i < operands.size(); ++i) {
      const Operand& operand = operands[i];
      const Source& source = slice.sources[operand.source];
      PlanInput input = std::move(opened[i]);
      input.source = sources[i];
      if (operand.source == slice.base) {
        base_missing = false;
        tensor.base = std::move(input);
        continue;
      }
      ASSIGN_OR_RETURN(ResolvedParams own, ModelParameters(*method_, place, source.parameters,
                                                           plan_.models[source.model].ref,
                                                           inputs[operand.source].name));
      param_use_.Add(own.origins);
      input.params = std::move(own.values);
      input.origins = std::move(own.origins);
      if (method_->check_input != nullptr) {
        RETURN_IF_ERROR(Annotate(
            method_->check_input(input.params),
            absl::StrCat("model ", plan_.models[source.model].ref, ", tensor ", output.name)));
      }
      tensor.inputs.push_back(std::move(input));
    }
    ASSIGN_OR_RETURN(ResolvedParams shared, TensorParameters(*method_, place, output.name));
    param_use_.Add(shared.origins);
    tensor.params = std::move(shared.values);
    tensor.origins = std::move(shared.origins);
    tensor.method = method_;
    NoteNarrowing(operands, slice, work);
    AddUsed(operands, slice);

    // An optional tensor that not every model has.
    if (operands.size() < inputs.size()) {
      const int least = method_->min_inputs + (slice.base >= 0 ? 1 : 0);
      if (operands.size() == 1 && (method_->single_input_passes || tensor.base)) {
        PassThrough(tensor);
      } else if (static_cast<int>(operands.size()) < least) {
        plan_.warnings.push_back(
            absl::StrCat("tensor ", output.name, " is left out: ", operands.size(), " of ",
                         inputs.size(), " models have it, too few for ", method_->name));
        return absl::OkStatus();
      } else if (base_missing) {
        return absl::FailedPreconditionError(
            absl::StrCat("tensor ", output.name, " is in some models and not in the base model ",
                         plan_.models[slice.sources[slice.base].model].ref, ", which ",
                         method_->name, " needs"));
      }
      plan_.warnings.push_back(absl::StrCat("tensor ", output.name, " is in ", operands.size(),
                                            " of ", inputs.size(),
                                            " models and merged from those"));
    }
    if (tensor.method != nullptr && method_->treat != nullptr) {
      RETURN_IF_ERROR(Annotate(Treat(output, aligned || cut.has_value(), tensor),
                               absl::StrCat("tensor ", output.name)));
    }
    return AddTensor(std::move(tensor));
  }

  // True for an output head, false for an embedding, as far as the architecture tells.
  static bool IsHead(const ArchModule& module, const ArchTensor& tensor) {
    const auto& post = module.post();
    const bool last = std::any_of(post.begin(), post.end(),
                                  [&](const ArchTensor& t) { return t.name == tensor.name; });
    const bool embedding =
        absl::StrContains(tensor.name, "embed") && !absl::StrContains(tensor.name, "embed_out");
    return last ||
           (!embedding && (!tensor.tied_names.empty() || absl::StrContains(tensor.name, "head")));
  }

  // The matrices of a model whose rows are tokens, by its own architecture. `with_tied`: a head
  // that it does not store is the embedding.
  absl::StatusOr<VocabularyMatrices> MatricesOf(const PlanModel& model, bool with_tied) const {
    const std::shared_ptr<const Checkpoint> checkpoints[] = {model.checkpoint};
    ASSIGN_OR_RETURN(const std::shared_ptr<const Architecture> architecture,
                     ResolveArchitecture(checkpoints, /*allow_mixed=*/false));
    VocabularyMatrices found;
    std::string names[2];  // of the embedding and the head
    const auto see = [&](const ArchModule& module, const ArchTensor& tensor) -> absl::Status {
      const std::string name = StoredName(*model.checkpoint, tensor, with_tied);
      const TensorInfo* const info = name.empty() ? nullptr : model.checkpoint->Find(name);
      if (info == nullptr || !tensor.vocabulary || info->shape.rank() != 2 ||
          !IsFloat(info->dtype)) {
        return absl::OkStatus();
      }
      const bool head = IsHead(module, tensor);
      auto& matrix = head ? found.head : found.embedding;
      std::string& known = names[head ? 1 : 0];
      if (known == name) return absl::OkStatus();  // tied
      if (matrix != nullptr) {
        return absl::FailedPreconditionError(absl::StrCat(
            recipe_.tokenizer->approximate->at.ToString(), ": ", matrix->name(), " and ", name,
            " both have a row for each token; models with several vocabularies "
            "cannot be approximated"));
      }
      known = name;
      ASSIGN_OR_RETURN(matrix, model.checkpoint->OpenTensor(name, model.file_base));
      return absl::OkStatus();
    };
    for (const auto& module : architecture->modules()) {
      for (const ArchTensor& tensor : module->pre()) RETURN_IF_ERROR(see(*module, tensor));
      for (const ArchTensor& tensor : module->post()) RETURN_IF_ERROR(see(*module, tensor));
    }
    if (found.embedding == nullptr) {
      return absl::FailedPreconditionError(
          absl::StrCat(recipe_.tokenizer->approximate->at.ToString(), ": model ", model.ref,
                       " has no embeddings of tokens that Pewter knows"));
    }
    return found;
  }

  // What new rows of `output` are made from. Tensors that are no matrices (biases) have no donor.
  absl::StatusOr<TokenAlignment::Donor> DonorOf(const ArchTensor& output,
                                                const TensorSource& source) const {
    TokenAlignment::Donor donor{.device = plan_.options.device,
                                .threads = plan_.options.threads,
                                .seed = plan_.options.seed,
                                .name = output.name};
    if (!recipe_.tokenizer->approximate || source.shape().rank() != 2) return donor;
    for (const auto& module : architecture_->modules()) {
      const auto& pre = module->pre();
      const auto& post = module->post();
      const auto same = [&](const ArchTensor& tensor) { return tensor.name == output.name; };
      if (std::any_of(pre.begin(), pre.end(), same) ||
          std::any_of(post.begin(), post.end(), same)) {
        donor.head = IsHead(*module, output);
      }
    }
    donor.rows = donor.head ? donor_matrices_.head : donor_matrices_.embedding;
    if (donor.rows == nullptr) {
      return absl::FailedPreconditionError(absl::StrCat(
          recipe_.tokenizer->at.ToString(), ": model ", plan_.models[tokenizer_donor_].ref,
          " has no tensor that stands for ", output.name, ", so its rows cannot be made from it"));
    }
    return donor;
  }

  // The rank of the product by which an input differs from the base; 0 where it may differ in
  // another way.
  int64_t RankOverBase(const PlanInput& input, const PlanTensor& tensor) const {
    const LowRankUpdate* const update = input.source->update();
    if (update == nullptr || !tensor.base || tensor.base->tensor != input.tensor) return 0;
    const ModelRef& base = plan_.models[tensor.base->model].checkpoint->ref();
    const ModelRef& own = plan_.models[input.model].checkpoint->ref();
    const bool plain = !plan_.models[tensor.base->model].checkpoint->Adapted(tensor.base->tensor);
    return plain && base.path == own.path && base.revision == own.revision ? update->rank : 0;
  }

  // Lets the method say how it treats the tensor.
  absl::Status Treat(const ArchTensor& output, bool rearranged, PlanTensor& tensor) {
    ASSIGN_OR_RETURN(const std::optional<LayerInputs> layer, FindStatistics(rearranged, tensor));
    std::vector<const ParamValues*> of_inputs;
    std::vector<int64_t> ranks;
    for (const PlanInput& input : tensor.inputs) {
      of_inputs.push_back(&input.params);
      ranks.push_back(RankOverBase(input, tensor));
    }
    const PlanInput& any = tensor.base ? *tensor.base : tensor.inputs.front();
    ASSIGN_OR_RETURN(Treatment treatment,
                     method_->treat({.name = output.name,
                                     .shape = tensor.shape,
                                     .dtype = any.source->dtype(),
                                     .result_dtype = tensor.result_dtype,
                                     .inputs = static_cast<int>(tensor.inputs.size()),
                                     .vocabulary = output.vocabulary,
                                     .params = tensor.params,
                                     .input_params = std::move(of_inputs),
                                     .ranks = std::move(ranks),
                                     .layer_inputs = layer ? &*layer : nullptr,
                                     .has_statistics = !tensor.statistics.empty(),

                                     .report = plan_.report}));
    tensor.task = std::move(treatment.task);
    tensor.kind = std::move(treatment.kind);
    tensor.measured = treatment.measured;
    if (treatment.keep_base) KeepOnly(*std::move(tensor.base), tensor);
    tensor.notes.insert(tensor.notes.end(), treatment.notes.begin(), treatment.notes.end());
    return absl::OkStatus();
  }

  absl::Status PlanMeasure() {
    std::vector<int64_t> elements(plan_.models.size());
    const PlanTensor* first = nullptr;
    const auto f64 = [](const PlanTensor& tensor) {
      return tensor.inputs.front().source->dtype() == DType::kF64;
    };
    for (const PlanTensor& tensor : plan_.tensors) {
      if (!tensor.measured) continue;
      if (first == nullptr) first = &tensor;
      if (f64(tensor) != f64(*first)) {
        return absl::FailedPreconditionError(
            absl::StrCat(method_->name, " looks at tensors together of which some are float64 (",
                         f64(tensor) ? tensor.name : first->name, ") and some not (",
                         f64(tensor) ? first->name : tensor.name, "); set `dtype`"));
      }
      for (const PlanInput& input : tensor.inputs) {
        elements[input.model] += tensor.shape.elements();
      }
    }
    if (first == nullptr) return absl::OkStatus();
    // Values of scope kJob are every tensor's.
    plan_.measure = [measure = method_->measure, params = first->params,
                     elements = std::move(elements), is_f64 = f64(*first)] {
      return measure({.params = params, .elements = elements, .f64 = is_f64});
    };
    return absl::OkStatus();
  }

  static bool SameRows(const Shape& a, const Shape& b) {
    return a.rank() > 0 && b.rank() > 0 && a.extents().subspan(1) == b.extents().subspan(1);
  }

  // Leaves the first `rows` rows of every source.
  absl::Status CutVocabulary(const ArchTensor& output, const std::vector<Operand>& operands,
                             const Slice& slice, int64_t rows,
                             std::vector<std::shared_ptr<const TensorSource>>& sources) {
    if (cut_rows_ && *cut_rows_ != rows) {
      return absl::FailedPreconditionError(
          absl::StrCat("tensor ", output.name, " would be cut to ", rows,
                       " rows and another vocabulary tensor to ", *cut_rows_));
    }
    cut_rows_ = rows;
    std::vector<std::string> sizes;
    for (size_t i = 0; i < sources.size(); ++i) {
      sizes.push_back(absl::StrCat(plan_.models[slice.sources[operands[i].source].model].ref,
                                   " has ", sources[i]->shape()[0]));
      ASSIGN_OR_RETURN(sources[i], FirstRows(std::move(sources[i]), rows));
    }
    plan_.warnings.push_back(absl::StrCat("tensor ", output.name, " is cut to its first ", rows,
                                          " rows (", absl::StrJoin(sizes, ", "),
                                          "); rows are merged by index, whatever tokens they "
                                          "stand for, and tokens beyond have none"));
    return absl::OkStatus();
  }

  // The only operand is the result.
  static void PassThrough(PlanTensor& tensor) {
    KeepOnly(tensor.base ? *std::move(tensor.base) : std::move(tensor.inputs[0]), tensor);
    tensor.notes.push_back("copied: no other model has it");
  }

  // The operand is the result.
  static void KeepOnly(PlanInput operand, PlanTensor& tensor) {
    operand.params.clear();
    operand.origins.clear();
    tensor.inputs.clear();
    tensor.inputs.push_back(std::move(operand));
    tensor.base.reset();
    tensor.params.clear();
    tensor.origins.clear();
    tensor.method = nullptr;
  }

  static ParamPlace PlaceAt(const Slice& slice, double t) {
    ParamPlace place = slice.place;
    place.t = t;
    return place;
  }

  absl::Status AddTensor(PlanTensor tensor) {
    if (!output_names_.insert(tensor.name).second) {
      return absl::FailedPreconditionError(
          absl::StrCat("two tensors of the output would be called ", tensor.name));
    }
    plan_.tensors.push_back(std::move(tensor));
    return absl::OkStatus();
  }

  void AddUsed(const std::vector<Operand>& operands, const Slice& slice) {
    for (const Operand& operand : operands) {
      used_[slice.sources[operand.source].model].insert(operand.tensor);
      plan_.read_bytes += operand.info->bytes;
    }
  }

  // --- warnings --------------------------------------------------------------------------------

  // Counts tensors whose values lose precision before the arithmetic. A plain conversion of one
  // model is what `dtype` is for and says nothing.
  void NoteNarrowing(const std::vector<Operand>& operands, const Slice& slice, DType work) {
    if (slice.sources.size() < 2) return;
    for (const Operand& operand : operands) {
      if (Promote(operand.info->dtype, work) != work) {
        ++narrowed_[{slice.sources[operand.source].model, operand.info->dtype}];
      }
    }
  }

  void WarnOfCasts() {
    for (const auto& [key, count] : narrowed_) {
      plan_.warnings.push_back(absl::StrCat(
          count, " tensors of model ", plan_.models[key.first].ref, " are rounded from ",
          TorchName(key.second), " to ", TorchName(*recipe_.dtype),
          " (`dtype`) before they are merged; `out_dtype` rounds the result only"));
    }
  }

  // Tensors that no output reads. Layers that slices leave out are meant; what the architecture
  // does not know is warned of.
  void ListUnused() {
    for (int i = 0; i < input_models_; ++i) {
      const Checkpoint& model = Model(i);
      absl::flat_hash_set<std::string> known;
      for (const auto& module : architecture_->modules()) {
        const auto add = [&](const std::vector<ArchTensor>& tensors) {
          for (const ArchTensor& tensor : tensors) {
            known.insert(tensor.name);
            known.insert(tensor.aliases.begin(), tensor.aliases.end());
          }
        };
        add(module->pre());
        add(module->post());
        const int64_t layers = module->LayerCount(model).value_or(0);
        for (int64_t layer = 0; layer < layers; ++layer) add(module->LayerTensors(layer));
      }
      std::vector<std::string> unused;
      std::vector<std::string> unknown;
      for (const std::string& tensor : model.tensor_names()) {
        if (used_[i].contains(tensor)) continue;
        unused.push_back(tensor);
        if (!known.contains(tensor)) unknown.push_back(tensor);
      }
      if (!unknown.empty()) {
        plan_.warnings.push_back(
            absl::StrCat(unknown.size(), unknown.size() == 1 ? " tensor" : " tensors", " of model ",
                         plan_.models[i].ref, " are not part of ", architecture_->name(),
                         " and are left out: ", Listed(unknown)));
      }
      if (!unused.empty()) plan_.unused_tensors[plan_.models[i].ref] = std::move(unused);
    }
  }

  // --- files, estimates, fingerprint -----------------------------------------------------------

  absl::Status AddFiles() {
    const bool raw = Model(donor_).raw();
    if (!raw) {
      ConfigChanges changes{.modules = layers_};
      changes.dtype = OutputDType();
      changes.vocabulary_rows = cut_rows_;
      changes.widths = config_widths_;
      if (alignment_) {
        changes.vocabulary_rows = alignment_->rows();
        changes.token_ids = &alignment_->ids();
        if (recipe_.tokenizer->approximate) changes.token_id_donor = tokenizer_donor_;
      }
      ASSIGN_OR_RETURN(plan_.config_json, MakeConfigJson(plan_, donor_, changes, plan_.warnings));
      RETURN_IF_ERROR(
          AddModelFiles(donor_, tokenizer_donor_, *architecture_, changes, tokenizer_edit_, plan_));
    }
    if (plan_.options.write_model_card) {
      std::vector<int> models;
      for (int i = 0; i < input_models_; ++i) models.push_back(i);
      AddModelCard({.method = absl::StrCat("[", method_->title, "](", method_->reference,
                                           "): ", method_->summary, "."),
                    .models = std::move(models),
                    .base = base_,
                    .recipe = recipe_.text,
                    .overrides = recipe_.overrides,
                    .recipe_file = "mergekit_config.yml"},
                   plan_);
    }
    return absl::OkStatus();
  }

  // What the recipe asks for, else what all floating tensors have, if they agree.
  std::optional<DType> OutputDType() const {
    if (recipe_.out_dtype) return recipe_.out_dtype;
    if (recipe_.dtype) return recipe_.dtype;
    std::optional<DType> common;
    for (const PlanTensor& tensor : plan_.tensors) {
      if (!IsFloat(tensor.dtype)) continue;
      if (common && *common != tensor.dtype) return std::nullopt;
      common = tensor.dtype;
    }
    return common;
  }

  const Recipe& recipe_;
  const absl::Span<const PlanStage> stages_;
  Plan plan_;
  const MergeMethod* method_ = nullptr;
  absl::flat_hash_map<std::string, int> model_index_;
  int input_models_ = 0;   // plan_.models begins with these
  int listed_models_ = 0;  // of these, the ones that are not there as a base alone
  int base_ = -1;
  int donor_ = 0;  // of config.json: the base, else the first listed
  int tokenizer_donor_ = 0;
  std::shared_ptr<const Architecture> architecture_;
  std::optional<TokenAlignment> alignment_;
  VocabularyMatrices donor_matrices_;  // of the tokenizer's model, for `approximate`
  TokenizerEdit tokenizer_edit_;
  struct Statistics {
    int model;  // index into plan_.models
    StatisticsFile file;
  };
  std::map<int, Statistics> statistics_;       // by model
  std::unique_ptr<kernels::Backend> backend_;  // of PassOptions
  std::set<std::string> calibration_sites_;    // what the data of `align` shows of the models
  std::map<std::string, int64_t> config_widths_;
  std::optional<int64_t> cut_rows_;  // of vocabulary tensors that were cut to a common size
  std::vector<ModuleLayers> layers_;
  absl::flat_hash_set<std::string> output_names_;
  absl::flat_hash_set<std::string> known_names_;  // what filters see
  ParamUse param_use_;
  std::map<int, absl::flat_hash_set<std::string>> used_;  // by model
  std::map<std::pair<int, DType>, int64_t> narrowed_;     // by model and stored dtype
};

// A message that has a position in the recipe needs no more.
bool HasPosition(absl::string_view message) { return absl::StartsWith(message, "recipe:"); }

// The parsed recipe's warnings of all documents are among `warnings` already.
void AddStageWarnings(const PlanStage& stage, std::vector<std::string>& warnings) {
  for (const std::string& warning : stage.plan->warnings) {
    std::string named =
        HasPosition(warning) ? warning : absl::StrCat("stage ", stage.name, ": ", warning);
    if (std::find(warnings.begin(), warnings.end(), named) == warnings.end()) {
      warnings.push_back(std::move(named));
    }
  }
}

}  // namespace

absl::StatusOr<Plan> MakePlan(const Recipe& recipe, const PlanOptions& options) {
  if (recipe.output_format == OutputFormat::kLora && recipe.stages.empty()) {
    return MakeAdapterMergePlan(recipe, options);
  }
  std::vector<PlanStage> stages;
  absl::flat_hash_set<std::string> used;
  // The output may be asked to have no tokenizer; what is made from a stage may need it.
  PlanOptions stage_options = options;
  stage_options.copy_tokenizer = true;
  for (const Recipe& stage : recipe.stages) {
    if (stage.output_format == OutputFormat::kLora || recipe.output_format == OutputFormat::kLora) {
      return absl::InvalidArgumentError(absl::StrCat(
          (stage.output_format == OutputFormat::kLora ? stage : recipe).output_format_at.ToString(),
          ": adapters are merged by a recipe of one document: neither are they made in stages, nor "
          "are stages merged to one"));
    }
    auto plan = Planner(stage, stage_options, stages).Make();
    if (!plan.ok()) {
      return HasPosition(plan.status().message())
                 ? plan.status()
                 : Annotate(plan.status(), absl::StrCat("stage ", stage.name));
    }
    for (const PlanModel& model : plan->models) used.insert(model.checkpoint->ref().path);
    auto shared = std::make_shared<const Plan>(*std::move(plan));
    stages.push_back({.name = stage.name,
                      .plan = shared,
                      .store = std::make_shared<StageStore>(stage.name, shared)});
  }
  ASSIGN_OR_RETURN(Plan plan, Planner(recipe, options, stages).Make());
  for (const PlanModel& model : plan.models) used.insert(model.checkpoint->ref().path);
  for (PlanStage& stage : stages) {
    stage.used = used.contains(stage.name);
    plan.peak_bytes = std::max(plan.peak_bytes, stage.plan->peak_bytes);
    AddStageWarnings(stage, plan.warnings);
  }
  plan.stages = std::move(stages);
  return plan;
}

}  // namespace pewter
