#include "merge/plan/extract_lora.h"

#include <re2/re2.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <set>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "base/dtype_names.h"
#include "base/status.h"
#include "base/units.h"
#include "kernels/linear_algebra.h"
#include "merge/methods/common/low_rank.h"
#include "merge/plan/adapter_files.h"
#include "merge/plan/layout.h"
#include "merge/plan/plan_steps.h"
#include "merge/plan/planning_work.h"

namespace pewter {
namespace {

using Regexes = std::vector<std::unique_ptr<re2::RE2>>;

absl::StatusOr<std::unique_ptr<re2::RE2>> Compile(absl::string_view option,
                                                  const std::string& text) {
  auto regex = std::make_unique<re2::RE2>(text, re2::RE2::Quiet);
  if (regex->ok()) return regex;
  return absl::InvalidArgumentError(
      absl::StrCat(option, " ", text, " is not a regular expression: ", regex->error()));
}

absl::StatusOr<Regexes> CompileAll(absl::string_view option,
                                   const std::vector<std::string>& texts) {
  Regexes regexes;
  for (const std::string& text : texts) {
    ASSIGN_OR_RETURN(std::unique_ptr<re2::RE2> regex, Compile(option, text));
    regexes.push_back(std::move(regex));
  }
  return regexes;
}

bool Found(const re2::RE2& regex, absl::string_view text) {
  return re2::RE2::PartialMatch(re2::StringPiece(text.data(), text.size()), regex);
}

bool AnyFound(const Regexes& regexes, absl::string_view text) {
  return std::any_of(regexes.begin(), regexes.end(),
                     [&](const auto& regex) { return Found(*regex, text); });
}

absl::string_view LastPart(absl::string_view name) {
  const size_t dot = name.rfind('.');
  return dot == absl::string_view::npos ? name : name.substr(dot + 1);
}

// How a module's weight is used, as far as names tell.
bool IsHead(absl::string_view module) {
  constexpr absl::string_view kHeads[] = {"lm_head", "embed_out", "output", "score", "classifier"};
  return std::find(std::begin(kHeads), std::end(kHeads), LastPart(module)) != std::end(kHeads);
}

bool IsEmbedding(absl::string_view module) {
  const absl::string_view last = LastPart(module);
  return !IsHead(module) && (absl::StrContains(last, "embed") || last == "wte" || last == "wpe" ||
                             last == "shared" || last == "relative_attention_bias");
}

// Families whose linear weights are stored [in, out].
bool StoresInOut(const Checkpoint& model) {
  const auto config =
      nlohmann::json::parse(model.config_json(), nullptr, /*allow_exceptions=*/false);
  if (!config.is_object()) return false;
  const auto type = config.find("model_type");
  if (type == config.end() || !type->is_string()) return false;
  const std::string name = type->get<std::string>();
  return name == "gpt2" || name == "openai-gpt" || name == "imagegpt" ||
         name == "decision_transformer";
}

class Extraction {
 public:
  Extraction(const ExtractLoraOptions& extract, const PlanOptions& options) : extract_(extract) {
    plan_.options = options;
    plan_.method = "extract_lora";
    plan_.config_file = kAdapterConfigFile;
  }

  absl::StatusOr<Plan> Make() {
    RETURN_IF_ERROR(ResolveOptions(plan_.options));
    RETURN_IF_ERROR(CheckOptions());
    for (const ModelRef& ref : {extract_.model, extract_.base}) {
      ASSIGN_OR_RETURN(auto checkpoint, Checkpoint::Open(ref));
      AddModel("model", ref.ToString(), std::move(checkpoint), plan_);
    }
    RETURN_IF_ERROR(FindTensors());
    for (const auto& [tensor, stored] : tensors_) RETURN_IF_ERROR(Sort(tensor));
    RETURN_IF_ERROR(CheckNames());
    if (extract_.energy > 0 || extract_.sv_epsilon > 0) RETURN_IF_ERROR(MeasureRanks());
    RETURN_IF_ERROR(AddTensors());
    Warn();
    RETURN_IF_ERROR(LayOutAdapter(kAdapterFile, plan_));
    AddFiles();
    RETURN_IF_ERROR(FinishPlan({}, plan_));
    return std::move(plan_);
  }

 private:
  // A weight that becomes two factors.
  struct Module {
    std::string name;    // "model.layers.0.self_attn.q_proj"
    std::string tensor;  // its weight
    bool embedding = false;
    bool transposed = false;
    DType dtype = DType::kF32;  // in which the difference is taken
    Shape shape;
    int64_t rank = 0;
  };

  // What the two models call a tensor; `base` is empty when it has none.
  struct Stored {
    std::string tuned, base;
  };

  const Checkpoint& tuned() const { return *plan_.models[0].checkpoint; }
  const Checkpoint& base() const { return *plan_.models[1].checkpoint; }

  absl::Status CheckOptions() {
    const auto bad = [](absl::string_view what) { return absl::InvalidArgumentError(what); };
    if (extract_.max_rank < 1) return bad("--max-rank must be at least 1");
    if (!(extract_.energy >= 0 && extract_.energy <= 1)) {
      return bad("--energy is a share of the squared singular values: above 0, at most 1");
    }
    if (!(extract_.sv_epsilon >= 0) || std::isinf(extract_.sv_epsilon)) {
      return bad("--sv-epsilon must not be negative");
    }
    ASSIGN_OR_RETURN(include_, CompileAll("--include-regex", extract_.include));
    ASSIGN_OR_RETURN(exclude_, CompileAll("--exclude-regex", extract_.exclude));
    for (const auto& [text, rank] : extract_.rank_of) {
      if (rank < 1) return bad(absl::StrCat("--rank-of ", text, ": a rank must be at least 1"));
      ASSIGN_OR_RETURN(std::unique_ptr<re2::RE2> regex, Compile("--rank-of", text));
      rank_of_.emplace_back(std::move(regex), rank);
    }
    rank_of_used_.resize(rank_of_.size());
    return absl::OkStatus();
  }

  // Pairs the two models' tensors, by the names of the architecture: either may use another of a
  // tensor's names. What the architecture does not know goes by its own.
  absl::Status FindTensors() {
    const std::shared_ptr<const Checkpoint> both[] = {plan_.models[0].checkpoint,
                                                      plan_.models[1].checkpoint};
    ASSIGN_OR_RETURN(const auto architecture, ResolveArchitecture(both, plan_.options.allow_mixed));
    plan_.architecture = architecture->name();
    absl::flat_hash_set<std::string> known;
    const auto add = [&](const std::vector<ArchTensor>& tensors) {
      for (const ArchTensor& tensor : tensors) {
        if (tensor.vocabulary) vocabulary_.insert(tensor.name);
        const Stored names{StoredName(tuned(), tensor, /*with_tied=*/false),
                           StoredName(base(), tensor, /*with_tied=*/false)};
        if (names.tuned.empty()) {
          if (!tensor.tied_names.empty()) tied_.push_back(tensor);
          continue;
        }
        known.insert(names.tuned);
        tensors_[tensor.name] = names;
      }
    };
    for (const auto& module : architecture->modules()) {
      add(module->pre());
      add(module->post());
      ASSIGN_OR_RETURN(const int64_t layers, module->LayerCount(tuned()));
      for (int64_t layer = 0; layer < layers; ++layer) add(module->LayerTensors(layer));
    }
    for (const std::string& tensor : tuned().tensor_names()) {
      if (known.contains(tensor)) continue;
      tensors_[tensor] = {tensor, base().Find(tensor) == nullptr ? "" : tensor};
    }
    AddInferredHead();
    return absl::OkStatus();
  }

  // A language model that no description tells us the head of: it has one, tied to the embeddings
  // if it is not stored.
  void AddInferredHead() {
    constexpr char kHead[] = "lm_head.weight";
    if (tensors_.contains(kHead) || !tied_.empty() ||
        TaskTypeOf(tuned().config_json()) != "CAUSAL_LM") {
      return;
    }
    ArchTensor head{.name = kHead};
    for (const auto& [tensor, stored] : tensors_) {
      if (vocabulary_.contains(tensor)) head.tied_names.push_back(tensor);
    }
    if (head.tied_names.size() == 1) tied_.push_back(std::move(head));
  }

  // By the architecture's name; null when the model has none.
  const TensorInfo* Tuned(const std::string& tensor) const {
    const auto found = tensors_.find(tensor);
    return found == tensors_.end() ? nullptr : tuned().Find(found->second.tuned);
  }
  const TensorInfo* Base(const std::string& tensor) const {
    const auto found = tensors_.find(tensor);
    return found == tensors_.end() ? nullptr : base().Find(found->second.base);
  }

  // --- what becomes of a tensor ----------------------------------------------------------------

  bool SavedByName(absl::string_view module) {
    bool saved = false;
    for (const std::string& name : extract_.save_modules) {
      if (module != name && !absl::EndsWith(module, absl::StrCat(".", name))) continue;
      saved_names_seen_.insert(name);
      saved = true;
    }
    return saved;
  }

  absl::Status Sort(const std::string& tensor) {
    const TensorInfo& info = *Tuned(tensor);
    absl::string_view module = tensor;
    const bool weight = absl::ConsumeSuffix(&module, ".weight");
    const bool bias = !weight && absl::ConsumeSuffix(&module, ".bias");
    if (!weight && !bias) module = module.substr(0, module.rfind('.'));
    if (AnyFound(exclude_, module) || (!include_.empty() && !AnyFound(include_, module))) {
      if (weight && info.shape.rank() >= 2) adapter_.other_modules.insert(std::string(module));
      left_out_.push_back(tensor);
      return absl::OkStatus();
    }
    if (!IsFloat(info.dtype)) {
      not_float_.push_back(tensor);
      return absl::OkStatus();
    }
    if (SavedByName(module)) return Save(tensor, module);
    if (bias && Factored(std::string(module))) {
      biases_.emplace_back(std::string(module), tensor);
      return absl::OkStatus();
    }
    return weight && Factored(std::string(module)) ? AddModule(tensor, module, info)
                                                   : SaveUnlessSkipped(tensor, module);
  }

  // True when the module's weight becomes factors.
  bool Factored(const std::string& module) {
    const std::string tensor = absl::StrCat(module, ".weight");
    const TensorInfo* const tuned_info = Tuned(tensor);
    const TensorInfo* const base_info = Base(tensor);
    if (tuned_info == nullptr || base_info == nullptr) return false;
    if (tuned_info->shape.rank() < 2 || tuned_info->shape.rank() > 5 ||
        tuned_info->shape.elements() == 0 || !IsFloat(tuned_info->dtype) ||
        !IsFloat(base_info->dtype)) {
      return false;
    }
    const bool token_rows =
        vocabulary_.contains(tensor) || IsEmbedding(module) || LastPart(module) == "lm_head";
    // Rows of tokens that the base does not have have no difference.
    if (token_rows) return extract_.embed_lora && tuned_info->shape == base_info->shape;
    return true;
  }

  absl::Status AddModule(const std::string& tensor, absl::string_view name,
                         const TensorInfo& info) {
    const TensorInfo& of_base = *Base(tensor);
    if (!(info.shape == of_base.shape)) {
      return absl::FailedPreconditionError(
          absl::StrCat("tensor ", tensor, ": shapes differ; model ", plan_.models[0].ref, " has ",
                       info.shape.ToString(), ", base model ", plan_.models[1].ref, " has ",
                       of_base.shape.ToString(),
                       "; leave it out with --exclude-regex or save it whole with "
                       "--save-module ",
                       LastPart(name)));
    }
    Module module{.name = std::string(name),
                  .tensor = tensor,
                  .embedding = IsEmbedding(name) && info.shape.rank() == 2,
                  .dtype = Promote(info.dtype, of_base.dtype),
                  .shape = info.shape};
    const bool conv1d = StoresInOut(tuned()) && info.shape.rank() == 2 && !IsHead(name);
    module.transposed = module.embedding || conv1d;
    adapter_.fan_in_fan_out |= conv1d && !module.embedding;
    const MatrixShape matrix = AsMatrix(info.shape);
    if (std::min(matrix.rows, matrix.columns) > kernels::kMaxExtent) {
      return absl::FailedPreconditionError(absl::StrCat(
          "tensor ", tensor, " ", info.shape.ToString(), " is too large to be decomposed (",
          kernels::kMaxExtent, " by the shorter side); leave it out with --exclude-regex"));
    }
    module.rank = std::min({MaxRank(module.name), matrix.rows, matrix.columns});
    modules_.push_back(std::move(module));
    return absl::OkStatus();
  }

  int64_t MaxRank(absl::string_view module) {
    int64_t rank = 0;
    for (size_t i = 0; i < rank_of_.size(); ++i) {
      if (!Found(*rank_of_[i].first, module)) continue;
      rank_of_used_[i] = true;
      if (rank == 0) rank = rank_of_[i].second;
    }
    return rank == 0 ? extract_.max_rank : rank;
  }

  absl::Status SaveUnlessSkipped(const std::string& tensor, absl::string_view module) {
    if (extract_.skip_undecomposable) {
      skipped_.push_back(tensor);
      return absl::OkStatus();
    }
    return Save(tensor, module);
  }

  absl::Status Save(const std::string& tensor, absl::string_view module) {
    const TensorInfo& info = *Tuned(tensor);
    const TensorInfo* const of_base = Base(tensor);
    if (of_base == nullptr) {
      plan_.warnings.push_back(absl::StrCat("tensor ", tensor, " is saved whole: base model ",
                                            plan_.models[1].ref, " has none of this name"));
    } else if (!(of_base->shape == info.shape)) {
      plan_.warnings.push_back(absl::StrCat(
          "tensor ", tensor, " ", info.shape.ToString(), " is saved whole: the base model's is ",
          of_base->shape.ToString(), "; resize the base to ", info.shape[0],
          " tokens (resize_token_embeddings) before the adapter is loaded"));
    }
    saved_.push_back(tensor);
    adapter_.modules_to_save.insert(std::string(LastPart(module)));
    return absl::OkStatus();
  }

  absl::Status CheckNames() {
    const bool related = std::any_of(tensors_.begin(), tensors_.end(),
                                     [](const auto& entry) { return !entry.second.base.empty(); });
    if (!related) {
      return absl::FailedPreconditionError(
          absl::StrCat("models ", plan_.models[0].ref, " and ", plan_.models[1].ref,
                       " have no tensor of one name; is this the base of that?"));
    }
    for (const std::string& name : extract_.save_modules) {
      if (!saved_names_seen_.contains(name)) {
        return absl::InvalidArgumentError(absl::StrCat("--save-module ", name, ": model ",
                                                       plan_.models[0].ref, " has no such module"));
      }
    }
    if (!modules_.empty() || !saved_.empty()) return absl::OkStatus();
    return absl::FailedPreconditionError(
        "nothing is extracted: the options leave out every tensor of the model");
  }

  // --- ranks from singular values --------------------------------------------------------------

  absl::Status Measure(kernels::Backend& backend, Module& module) const {
    ASSIGN_OR_RETURN(const PlanInput tuned_input, Input(0, module.tensor, module.dtype));
    ASSIGN_OR_RETURN(const PlanInput base_input, Input(1, module.tensor, module.dtype));
    ASSIGN_OR_RETURN(const auto a, LoadWhole(backend, *tuned_input.source));
    ASSIGN_OR_RETURN(const auto b, LoadWhole(backend, *base_input.source));
    ASSIGN_OR_RETURN(const std::vector<double> values,
                     Spectrum(backend, a->data(), b->data(), AsMatrix(module.shape), module.dtype));
    module.rank = RankOfEnergy(values, module.rank, extract_.sv_epsilon, extract_.energy);
    return absl::OkStatus();
  }

  absl::Status MeasureRanks() {
    int64_t largest = 0;
    for (const Module& module : modules_) {
      largest = std::max(largest, SpectrumBytes(AsMatrix(module.shape), module.dtype));
    }
    return ForEachWhilePlanning(plan_.options, static_cast<int64_t>(modules_.size()), largest,
                                "the singular values of the largest weight",
                                [&](kernels::Backend& backend, int64_t i) {
                                  return Annotate(Measure(backend, modules_[i]),
                                                  absl::StrCat("tensor ", modules_[i].tensor));
                                });
  }

  // --- the plan's tensors ----------------------------------------------------------------------

  absl::StatusOr<PlanInput> Input(int model, const std::string& tensor, DType dtype) const {
    const Stored& stored = tensors_.at(tensor);
    PlanInput input{.model = model, .tensor = model == 0 ? stored.tuned : stored.base};
    const PlanModel& from = plan_.models[model];
    ASSIGN_OR_RETURN(input.source, from.checkpoint->OpenTensor(input.tensor, from.file_base));
    input.source = CastSource(input.source, dtype);
    return input;
  }

  static std::vector<PlanPart> FactorNames(const Module& module) {
    const std::string name = absl::StrCat(kPeftPrefix, module.name);
    const MatrixShape matrix = AsMatrix(module.shape);
    const int64_t in = module.transposed ? matrix.rows : matrix.columns;
    const int64_t out = module.transposed ? matrix.columns : matrix.rows;
    if (module.embedding) {
      return {{absl::StrCat(name, ".lora_embedding_A"), Shape{module.rank, in}},
              {absl::StrCat(name, ".lora_embedding_B"), Shape{out, module.rank}}};
    }
    // A convolution's A has the kernel's extents, and its B is one of 1 x 1.
    std::vector<int64_t> a(module.shape.extents().begin(), module.shape.extents().end());
    std::vector<int64_t> b(a.size(), 1);
    a[0] = module.rank;
    if (a.size() == 2) a[1] = in;
    b[0] = out;
    b[1] = module.rank;
    return {{absl::StrCat(name, ".lora_A.weight"), *Shape::Make(a)},
            {absl::StrCat(name, ".lora_B.weight"), *Shape::Make(b)}};
  }

  absl::Status AddTensors() {
    for (const Module& module : modules_) {
      if (module.rank == 0) {
        unchanged_.push_back(module.name);
        adapter_.other_modules.insert(module.name);
        continue;
      }
      adapter_.ranks[module.name] = module.rank;
      adapter_.embeddings |= module.embedding;
      PlanTensor tensor;
      tensor.name = absl::StrCat(kPeftPrefix, module.name);
      tensor.dtype = tensor.result_dtype = extract_.dtype;
      tensor.parts = FactorNames(module);
      tensor.shape = Shape{tensor.parts[0].shape.elements() + tensor.parts[1].shape.elements()};
      const MatrixShape matrix = AsMatrix(module.shape);
      tensor.task = MakeExtractTask(matrix, module.dtype,
                                    {.rank = module.rank,
                                     .transposed = module.transposed,
                                     .distribute_scale = extract_.distribute_scale});
      tensor.params["rank"] = module.rank;
      ASSIGN_OR_RETURN(PlanInput input, Input(0, module.tensor, module.dtype));
      tensor.inputs.push_back(std::move(input));
      ASSIGN_OR_RETURN(tensor.base, Input(1, module.tensor, module.dtype));
      plan_.read_bytes += Tuned(module.tensor)->bytes + Base(module.tensor)->bytes;
      plan_.tensors.push_back(std::move(tensor));
    }
    for (const auto& [module, bias] : biases_) RETURN_IF_ERROR(AddBias(module, bias));
    for (const std::string& name : saved_) {
      PlanTensor tensor;
      const TensorInfo& info = *Tuned(name);
      tensor.name = absl::StrCat(kPeftPrefix, name);
      tensor.dtype = tensor.result_dtype = info.dtype;
      tensor.shape = info.shape;
      ASSIGN_OR_RETURN(PlanInput input, Input(0, name, info.dtype));
      tensor.inputs.push_back(std::move(input));
      plan_.read_bytes += info.bytes;
      plan_.tensors.push_back(std::move(tensor));
    }
    RETURN_IF_ERROR(AddTiedHeads());
    if (plan_.tensors.empty()) {
      return absl::FailedPreconditionError(
          "nothing is extracted: no weight differs by more than --sv-epsilon");
    }
    return absl::OkStatus();
  }

  // PEFT gives a module that is saved whole a weight of its own, so that a head which was tied to
  // the embeddings would stay what it was: it is saved, too.
  absl::Status AddTiedHeads() {
    const auto config =
        nlohmann::json::parse(tuned().config_json(), nullptr, /*allow_exceptions=*/false);
    if (!config.is_object()) return absl::OkStatus();
    const auto tie = config.find("tie_word_embeddings");
    if (tie != config.end() && tie->is_boolean() && !tie->get<bool>()) return absl::OkStatus();
    for (const ArchTensor& head : tied_) {
      absl::string_view module = head.name;
      if (!absl::ConsumeSuffix(&module, ".weight") || !IsHead(module)) continue;
      for (const std::string& embeddings : head.tied_names) {
        if (adapter_.ranks.contains(std::string(absl::StripSuffix(embeddings, ".weight")))) {
          plan_.warnings.push_back(absl::StrCat(
              "the output head ", module, " is tied to ", embeddings,
              ", whose factors PEFT applies to the embeddings alone: leave out --embed-lora to "
              "save both whole, or merge the adapter into its base with Pewter"));
        }
        if (std::find(saved_.begin(), saved_.end(), embeddings) == saved_.end()) continue;
        const TensorInfo& info = *Tuned(embeddings);
        PlanTensor tensor;
        tensor.name = absl::StrCat(kPeftPrefix, head.name);
        tensor.dtype = tensor.result_dtype = info.dtype;
        tensor.shape = info.shape;
        ASSIGN_OR_RETURN(PlanInput input, Input(0, embeddings, info.dtype));
        tensor.inputs.push_back(std::move(input));
        plan_.read_bytes += info.bytes;
        plan_.tensors.push_back(std::move(tensor));
        adapter_.modules_to_save.insert(std::string(LastPart(module)));
        break;
      }
    }
    return absl::OkStatus();
  }

  // The difference of a bias becomes that of the module's B (lora_bias). Most fine-tunes leave
  // biases alone, which the reader need not pay for: they are small, and compared here.
  absl::Status AddBias(const std::string& module, const std::string& tensor) {
    const TensorInfo& info = *Tuned(tensor);
    const TensorInfo* const of_base = Base(tensor);
    if (of_base == nullptr || !IsFloat(of_base->dtype) || !(of_base->shape == info.shape)) {
      return absl::FailedPreconditionError(
          absl::StrCat("tensor ", tensor, " has no counterpart of its shape in base model ",
                       plan_.models[1].ref, "; save the module whole with --save-module ",
                       LastPart(module), " or leave it out with --exclude-regex"));
    }
    const DType dtype = Promote(info.dtype, of_base->dtype);
    ASSIGN_OR_RETURN(const PlanInput a, Input(0, tensor, dtype));
    ASSIGN_OR_RETURN(const PlanInput b, Input(1, tensor, dtype));
    const int64_t elements = info.shape.elements();
    std::vector<std::byte> of_a(elements * ByteWidth(dtype)), of_b(of_a.size());
    RETURN_IF_ERROR(a.source->Read(0, elements, absl::MakeSpan(of_a), nullptr));
    RETURN_IF_ERROR(b.source->Read(0, elements, absl::MakeSpan(of_b), nullptr));
    if (of_a == of_b) return absl::OkStatus();
    if (!adapter_.ranks.contains(module)) {
      return absl::FailedPreconditionError(
          absl::StrCat("tensor ", tensor,
                       " differs from the base's and its weight does not, so that it has no "
                       "factors to go with; save the module whole with --save-module ",
                       LastPart(module)));
    }
    adapter_.bias = true;
    changed_biases_.push_back(tensor);
    PlanTensor difference;
    difference.name = absl::StrCat(kPeftPrefix, module, ".lora_B.bias");
    difference.dtype = difference.result_dtype = extract_.dtype;
    difference.shape = info.shape;
    difference.task = MakeDifferenceTask(elements, dtype);
    ASSIGN_OR_RETURN(PlanInput input, Input(0, tensor, dtype));
    difference.inputs.push_back(std::move(input));
    ASSIGN_OR_RETURN(difference.base, Input(1, tensor, dtype));
    plan_.read_bytes += info.bytes + of_base->bytes;
    plan_.tensors.push_back(std::move(difference));
    return absl::OkStatus();
  }

  void Warn() {
    const auto warn = [&](const std::vector<std::string>& names, absl::string_view what) {
      if (names.empty()) return;
      plan_.warnings.push_back(absl::StrCat(names.size(), " ", what, ": ", Listed(names)));
    };
    warn(not_float_, "tensors that are not floating are left out");
    warn(skipped_, "tensors that cannot be factors are left out (--skip-undecomposable)");
    warn(left_out_, "tensors are left out by --include-regex and --exclude-regex");
    warn(unchanged_, "modules have no singular value that stays and are left out");
    warn(changed_biases_,
         "biases differ from the base's and become those of B (lora_bias: true), which older "
         "readers of adapters do not know");
    WarnOfPeft(adapter_, plan_.warnings);
    for (size_t i = 0; i < rank_of_.size(); ++i) {
      if (rank_of_used_[i]) continue;
      plan_.warnings.push_back(
          absl::StrCat("--rank-of ", extract_.rank_of[i].first, " matches no module"));
    }
    std::vector<std::string> unused = left_out_;
    unused.insert(unused.end(), not_float_.begin(), not_float_.end());
    unused.insert(unused.end(), skipped_.begin(), skipped_.end());
    if (!unused.empty()) {
      std::sort(unused.begin(), unused.end());
      plan_.unused_tensors[plan_.models[0].ref] = std::move(unused);
    }
    absl::flat_hash_set<std::string> paired;
    for (const auto& [tensor, stored] : tensors_) paired.insert(stored.base);
    std::vector<std::string> missing;
    for (const std::string& tensor : base().tensor_names()) {
      if (!paired.contains(tensor)) missing.push_back(tensor);
    }
    warn(missing, absl::StrCat("tensors of base model ", plan_.models[1].ref,
                               " are not in the model and stay as they are"));
  }

  // --- files -----------------------------------------------------------------------------------

  // The options as text: what the result depends on besides the models.
  std::string Command() const {
    std::string text =
        absl::StrCat("pewter extract-lora --model ", plan_.models[0].ref, " --base-model ",
                     plan_.models[1].ref, " --max-rank ", extract_.max_rank);
    if (!extract_.distribute_scale) absl::StrAppend(&text, " --no-distribute-scale");
    if (extract_.energy > 0) absl::StrAppend(&text, " --energy ", extract_.energy);
    if (extract_.sv_epsilon > 0) absl::StrAppend(&text, " --sv-epsilon ", extract_.sv_epsilon);
    if (extract_.embed_lora) absl::StrAppend(&text, " --embed-lora");
    if (extract_.skip_undecomposable) absl::StrAppend(&text, " --skip-undecomposable");
    for (const auto& [regex, rank] : extract_.rank_of) {
      absl::StrAppend(&text, " --rank-of '", regex, "=", rank, "'");
    }
    for (const std::string& name : extract_.save_modules) {
      absl::StrAppend(&text, " --save-module ", name);
    }
    for (const std::string& regex : extract_.include) {
      absl::StrAppend(&text, " --include-regex '", regex, "'");
    }
    for (const std::string& regex : extract_.exclude) {
      absl::StrAppend(&text, " --exclude-regex '", regex, "'");
    }
    if (extract_.dtype != DType::kF32)
      absl::StrAppend(&text, " --dtype ", TorchName(extract_.dtype));
    return text;
  }

  void AddFiles() {
    plan_.recipe_text = Command();
    const ModelRef& ref = extract_.base;
    adapter_.base_model = ref.path;
    adapter_.task_type = TaskTypeOf(tuned().config_json());
    plan_.config_json = AdapterConfigJson(adapter_);
    if (!plan_.options.write_model_card) return;
    const std::vector<std::string> models = {plan_.models[0].ref, plan_.models[1].ref};
    plan_.aux_files.push_back({.name = "README.md",
                               .text = AdapterCard(adapter_,
                                                   absl::StrCat("It holds what `", models[0],
                                                                "` changes in `", models[1], "`."),
                                                   models, plan_.recipe_text, "sh")});
  }

  const ExtractLoraOptions& extract_;
  Plan plan_;
  Regexes include_, exclude_;
  std::vector<std::pair<std::unique_ptr<re2::RE2>, int64_t>> rank_of_;
  std::vector<bool> rank_of_used_;
  std::map<std::string, Stored> tensors_;        // by the architecture's name
  absl::flat_hash_set<std::string> vocabulary_;  // tensors whose rows are tokens
  std::vector<ArchTensor> tied_;                 // not stored by the model
  std::vector<Module> modules_;
  std::vector<std::string> saved_;                           // tensors
  std::vector<std::pair<std::string, std::string>> biases_;  // of factored modules: module, tensor
  std::set<std::string> saved_names_seen_;
  std::vector<std::string> left_out_, not_float_, skipped_, unchanged_, changed_biases_;
  AdapterDescription adapter_;
};

}  // namespace

absl::StatusOr<Plan> MakeExtractLoraPlan(const ExtractLoraOptions& extract,
                                         const PlanOptions& options) {
  return Extraction(extract, options).Make();
}

}  // namespace pewter
