#include "merge/plan/adapter_merge.h"

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "base/status.h"
#include "base/units.h"
#include "merge/checkpoint/lora_config.h"
#include "merge/checkpoint/lora_file.h"
#include "merge/checkpoint/printable.h"
#include "merge/methods/adapter_method.h"
#include "merge/plan/adapter_files.h"
#include "merge/plan/layout.h"
#include "merge/plan/output_files.h"
#include "merge/plan/parameters.h"
#include "merge/plan/plan_steps.h"
#include "merge/plan/planning_work.h"

namespace pewter {
namespace {

using nlohmann::json;

// What adapter_config.json says besides the arithmetic. Whatever has an unusual type is left out.
struct Settings {
  std::string base_model;
  std::string task_type;
  std::string biases = "none";
  // Ends of the names of modules; nullopt when they are told in another way (a pattern, only some
  // layers).
  std::optional<std::set<std::string>> target_modules;
  std::set<std::string> modules_to_save;
};

std::set<std::string> Strings(const json& list) {
  std::set<std::string> strings;
  for (const json& item : list) {
    if (item.is_string()) strings.insert(item.get<std::string>());
  }
  return strings;
}

Settings ReadSettings(const std::string& text) {
  const json config = json::parse(text, nullptr, /*allow_exceptions=*/false);
  Settings settings;
  if (!config.is_object()) return settings;
  const auto read = [&](const char* key, std::string& to) {
    const auto found = config.find(key);
    if (found != config.end() && found->is_string()) to = found->get<std::string>();
  };
  read("base_model_name_or_path", settings.base_model);
  read("task_type", settings.task_type);
  read("bias", settings.biases);
  if (const auto saved = config.find("modules_to_save");
      saved != config.end() && saved->is_array()) {
    settings.modules_to_save = Strings(*saved);
  }
  bool some = false;
  for (const char* key : {"layers_to_transform", "layers_pattern", "exclude_modules"}) {
    const auto found = config.find(key);
    some = some || (found != config.end() && !found->is_null());
  }
  if (const auto targets = config.find("target_modules");
      !some && targets != config.end() && targets->is_array()) {
    settings.target_modules = Strings(*targets);
  }
  return settings;
}

// True when `name` is the module, or the last parts of its name.
bool Reaches(absl::string_view name, absl::string_view module) {
  return module == name || absl::EndsWith(module, absl::StrCat(".", name));
}

// The first number in a module's name; -1 when there is none.
int64_t LayerOf(absl::string_view module) {
  for (absl::string_view part : absl::StrSplit(module, '.')) {
    int64_t layer = -1;
    if (!part.empty() && std::all_of(part.begin(), part.end(), absl::ascii_isdigit) &&
        absl::SimpleAtoi(part, &layer)) {
      return layer;
    }
  }
  return -1;
}

class AdapterMerge {
 public:
  AdapterMerge(const Recipe& recipe, const PlanOptions& options) : recipe_(recipe) {
    plan_.options = options;
    plan_.recipe_text = recipe.text;
    plan_.warnings = recipe.warnings;
    plan_.architecture = "LoRA";
    plan_.config_file = kAdapterConfigFile;
  }

  absl::StatusOr<Plan> Make() {
    RETURN_IF_ERROR(ResolveOptions(plan_.options));
    const auto method = FindAdapterMethod(recipe_.merge_method);
    if (!method.ok()) return Annotate(method.status(), recipe_.merge_method_at.ToString());
    method_ = *method;
    plan_.method = method_->method.name;
    RETURN_IF_ERROR(CheckRecipe());
    RETURN_IF_ERROR(CheckParameters(recipe_, method_->method, plan_.warnings));
    if (recipe_.report) {
      plan_.warnings.push_back(
          absl::StrCat(recipe_.report_at.ToString(), ": there is no report of merged adapters"));
    }
    for (const RecipeSource& source : slice().sources) RETURN_IF_ERROR(Open(source));
    RETURN_IF_ERROR(Describe());
    for (const auto& [module, owners] : modules_) {
      ASSIGN_OR_RETURN(Module added, OpenModule(module, owners));
      opened_.push_back(std::move(added));
    }
    RETURN_IF_ERROR(MeasureRanks());
    for (Module& module : opened_) RETURN_IF_ERROR(AddModule(module));
    for (const auto& [module, owners] : biases_) RETURN_IF_ERROR(AddBias(module, owners));
    for (const auto& [tensor, owners] : saved_) RETURN_IF_ERROR(Save(tensor, owners));
    WarnOfIdleSettings(recipe_, method_->method, param_use_, names_, plan_.warnings);
    Warn();
    RETURN_IF_ERROR(LayOutAdapter(kAdapterFile, plan_));
    AddFiles();
    RETURN_IF_ERROR(FinishPlan(recipe_.overrides, plan_));
    return std::move(plan_);
  }

 private:
  struct Adapter {
    const ParamScope* parameters = nullptr;
    LoraConfig config;
    Settings settings;
    LoraTensors tensors;
  };
  using Owners = std::vector<int>;  // indices into adapters_, ascending
  struct Saved {
    int adapter = 0;
    TensorInfo info;
  };

  // A module of the output on its way into the plan.
  struct Module {
    std::string name;
    const LoraFactors* first = nullptr;  // of its first adapter
    AdapterModule resolved;
    PlanTensor tensor;
    DType stored = DType::kF32;
    double energy = 0;  // that its rank follows from; 0: it does not
  };

  const RecipeSlice& slice() const { return recipe_.modules.front().slices.front(); }
  const std::string& Name(int adapter) const { return plan_.models[adapter].ref; }
  static std::string WeightOf(absl::string_view module) { return absl::StrCat(module, ".weight"); }

  // --- recipe and inputs -----------------------------------------------------------------------

  absl::Status CheckRecipe() const {
    const auto bad = [](TextPosition at, absl::string_view why) {
      return absl::InvalidArgumentError(absl::StrCat(at.ToString(), ": ", why));
    };
    const RecipeModule& module = recipe_.modules.front();
    if (recipe_.has_modules_key || !module.from_models) {
      return bad(module.at,
                 "adapters are merged whole (`output: {format: lora}`): list them in "
                 "`models`");
    }
    if (recipe_.base_model) {
      return bad(recipe_.base_model->at,
                 "no `base_model` takes part when adapters are merged (`output: {format: lora}`); "
                 "theirs is in adapter_config.json");
    }
    if (recipe_.tokenizer) return bad(recipe_.tokenizer->at, "an adapter has no tokenizer");
    if (recipe_.align) return bad(recipe_.align->at, "adapters are not aligned, models are");
    if (recipe_.chat_template) {
      return bad(recipe_.chat_template_at, "an adapter has no chat template");
    }
    for (const RecipeSource& source : slice().sources) {
      const ModelRef& ref = source.model;
      if (!ref.adapter.empty()) {
        return bad(ref.at, absl::StrCat("`output: {format: lora}` merges adapters: write ",
                                        ref.adapter, " without its model ", ref.path));
      }
      if (!ref.override_architecture.empty()) {
        return bad(ref.at, "`override_architecture` means nothing for an adapter");
      }
    }
    return absl::OkStatus();
  }

  absl::Status Open(const RecipeSource& source) {
    const ModelRef& ref = source.model;
    const std::string name = ref.ToString();
    for (const PlanModel& other : plan_.models) {
      if (other.ref == name) {
        return absl::InvalidArgumentError(
            absl::StrCat(ref.at.ToString(), ": adapter ", name, " is listed twice"));
      }
    }
    auto opened = Checkpoint::OpenAdapter(ref);
    if (!opened.ok()) return Annotate(opened.status(), ref.at.ToString());
    const std::shared_ptr<const Checkpoint> checkpoint = *std::move(opened);
    const auto annotate = [&](const absl::Status& status, const InputFile& file) {
      return Annotate(status,
                      absl::StrCat(ref.at.ToString(), ": adapter ", name, ": ", file.Describe()));
    };
    const InputFile& config_file = checkpoint->files().front();
    const InputFile& weights = checkpoint->files().back();
    auto config = LoraConfig::Parse(checkpoint->config_json());
    if (!config.ok()) return annotate(config.status(), config_file);
    std::vector<TensorInfo> infos;
    for (const std::string& tensor : checkpoint->tensor_names()) {
      infos.push_back(*checkpoint->Find(tensor));
    }
    auto tensors = SortLoraTensors(infos, *config, weights.Describe());
    if (!tensors.ok()) {
      return Annotate(tensors.status(), absl::StrCat(ref.at.ToString(), ": adapter ", name));
    }

    const int index = AddModel("adapter", name, checkpoint, plan_);
    for (const auto& [module, factors] : tensors->factors) {
      modules_[module].push_back(index);
      names_.insert(WeightOf(module));
      layers_ = std::max(layers_, LayerOf(module) + 1);
    }
    for (const auto& [module, bias] : tensors->biases) biases_[module].push_back(index);
    for (const auto& [tensor, info] : tensors->replacements) {
      std::vector<Saved>& saved = saved_[tensor];
      if (!saved.empty() && saved.back().adapter == index) {
        return annotate(absl::FailedPreconditionError(absl::StrCat(
                            "tensors ", Printable(saved.back().info.name), " and ",
                            Printable(info.name), " both stand for ", Printable(tensor))),
                        weights);
      }
      saved.push_back({.adapter = index, .info = info});
    }
    adapters_.push_back({.parameters = &source.parameters,
                         .config = *std::move(config),
                         .settings = ReadSettings(checkpoint->config_json()),
                         .tensors = *std::move(tensors)});
    return absl::OkStatus();
  }

  // What the configurations say of the whole adapter.
  absl::Status Describe() {
    const auto common = [&](std::string Settings::*field, absl::string_view key) {
      std::string value;
      int from = -1;
      for (size_t i = 0; i < adapters_.size(); ++i) {
        const std::string& own = adapters_[i].settings.*field;
        if (own.empty() || own == value) continue;
        if (from < 0) {
          value = own;
          from = static_cast<int>(i);
        } else {
          plan_.warnings.push_back(absl::StrCat(
              "adapters ", Name(from), " and ", Name(static_cast<int>(i)), " have different ", key,
              ", ", Printable(value), " and ", Printable(own), "; the output has the first"));
        }
      }
      return value;
    };
    output_.base_model = common(&Settings::base_model, "base_model_name_or_path");
    output_.task_type = common(&Settings::task_type, "task_type");
    for (size_t i = 0; i < adapters_.size(); ++i) {
      if (adapters_[i].config.fan_in_fan_out() == adapters_[0].config.fan_in_fan_out()) continue;
      return absl::FailedPreconditionError(
          absl::StrCat("adapters ", Name(0), " and ", Name(static_cast<int>(i)),
                       " disagree about fan_in_fan_out, so that they are not for one model"));
    }
    output_.fan_in_fan_out = adapters_[0].config.fan_in_fan_out();
    const bool by_name = std::all_of(
        adapters_.begin(), adapters_.end(),
        [](const Adapter& adapter) { return adapter.settings.target_modules.has_value(); });
    for (const Adapter& adapter : adapters_) {
      if (by_name)
        output_.target_modules.insert(adapter.settings.target_modules->begin(),
                                      adapter.settings.target_modules->end());
      largest_rank_ = std::max(largest_rank_, adapter.config.largest_rank());
    }
    // Names that do not reach every module, or may reach others, give way to full ones.
    const bool all_reached = std::all_of(modules_.begin(), modules_.end(), [&](const auto& module) {
      return std::any_of(output_.target_modules.begin(), output_.target_modules.end(),
                         [&](const std::string& name) { return Reaches(name, module.first); });
    });
    if (by_name && all_reached) return absl::OkStatus();
    output_.target_modules.clear();
    for (const auto& [module, owners] : modules_) output_.target_modules.insert(module);
    return absl::OkStatus();
  }

  // --- modules ---------------------------------------------------------------------------------

  absl::StatusOr<PlanInput> Input(int adapter, const TensorInfo& info) const {
    const PlanModel& model = plan_.models[adapter];
    PlanInput input{.model = adapter, .tensor = info.name};
    ASSIGN_OR_RETURN(input.source, model.checkpoint->OpenTensor(info.name, model.file_base));
    return input;
  }

  // As a task wants it.
  absl::StatusOr<PlanInput> FloatInput(int adapter, const TensorInfo& info) {
    ASSIGN_OR_RETURN(PlanInput input, Input(adapter, info));
    input.source = CastSource(input.source, DType::kF32);
    plan_.read_bytes += info.bytes;
    if (info.dtype == DType::kF64) ++doubles_;
    return input;
  }

  ParamPlace PlaceOf(absl::string_view module) const {
    const int64_t layer = LayerOf(module);
    ParamPlace place{.slice = &slice().parameters,
                     .module = &recipe_.modules.front().parameters,
                     .recipe = &recipe_.parameters};
    if (layer >= 0) {
      place.t = layers_ == 1 ? 1 : static_cast<double>(layer) / static_cast<double>(layers_ - 1);
    }
    return place;
  }

  // Parameters of the module, and an input for each owner, without ranks.
  absl::StatusOr<AdapterModule> Resolve(const std::string& module, const Owners& owners,
                                        PlanTensor& tensor,
                                        std::vector<ParamOrigins>& origins_of_inputs) {
    AdapterModule resolved{.name = absl::StrCat(kPeftPrefix, module), .seed = plan_.options.seed};
    const ParamPlace place = PlaceOf(module);
    ASSIGN_OR_RETURN(ResolvedParams shared,
                     TensorParameters(method_->method, place, WeightOf(module)));
    param_use_.Add(shared.origins);
    resolved.params = shared.values;
    tensor.params = std::move(shared.values);
    tensor.origins = std::move(shared.origins);
    for (int owner : owners) {
      ASSIGN_OR_RETURN(ResolvedParams own,
                       ModelParameters(method_->method, place, adapters_[owner].parameters,
                                       Name(owner), WeightOf(module)));
      param_use_.Add(own.origins);
      resolved.inputs.push_back({.rank = adapters_[owner].config.Rank(module),
                                 .scale = adapters_[owner].config.Scale(module),
                                 .params = std::move(own.values)});
      origins_of_inputs.push_back(std::move(own.origins));
    }
    tensor.name = resolved.name;
    if (owners.size() < adapters_.size()) {
      std::vector<std::string> names;
      for (int owner : owners) names.push_back(Name(owner));
      tensor.notes.push_back(absl::StrCat("only in ", absl::StrJoin(names, ", ")));
    }
    return resolved;
  }

  DType OutputDType(DType stored) const {
    return recipe_.out_dtype ? *recipe_.out_dtype : recipe_.dtype ? *recipe_.dtype : stored;
  }

  absl::Status CheckShapes(const std::string& module, const Owners& owners) const {
    const LoraFactors& first = adapters_[owners[0]].tensors.factors.at(module);
    for (int owner : owners) {
      const LoraFactors& own = adapters_[owner].tensors.factors.at(module);
      if (own.embedding == first.embedding && own.b.shape[0] == first.b.shape[0] &&
          own.b.shape.rank() == first.b.shape.rank() &&
          own.a.shape.extents().subspan(1) == first.a.shape.extents().subspan(1)) {
        continue;
      }
      return absl::FailedPreconditionError(absl::StrCat(
          "module ", Printable(module), ": shapes differ; adapter ", Name(owners[0]), " has A ",
          first.a.shape.ToString(), " and B ", first.b.shape.ToString(), ", adapter ", Name(owner),
          " has A ", own.a.shape.ToString(), " and B ", own.b.shape.ToString()));
    }
    return absl::OkStatus();
  }

  absl::StatusOr<int64_t> RankOf(const std::string& module, const Owners& owners,
                                 const AdapterModule& resolved,
                                 std::vector<std::string>& notes) const {
    switch (method_->rank) {
      case AdapterMethod::Rank::kSum: {
        int64_t sum = 0;
        for (const AdapterInput& input : resolved.inputs) sum += input.rank;
        return sum;
      }
      case AdapterMethod::Rank::kSame:
        for (size_t i = 0; i < owners.size(); ++i) {
          if (resolved.inputs[i].rank == resolved.inputs[0].rank) continue;
          return absl::FailedPreconditionError(
              absl::StrCat("module ", Printable(module), ": ", method_->method.name,
                           " needs adapters of one rank; adapter ", Name(owners[0]), " has ",
                           resolved.inputs[0].rank, ", adapter ", Name(owners[i]), " has ",
                           resolved.inputs[i].rank, "; cat and svd merge any ranks"));
        }
        return resolved.inputs[0].rank;
      case AdapterMethod::Rank::kSvd:
        break;
    }
    const ParamValue* const asked = resolved.Find("svd_rank");
    const absl::StatusOr<int64_t> most = LargestRank(*method_, resolved);
    if (!most.ok()) {
      return Annotate(most.status(), absl::StrCat("module ", Printable(module)));
    }
    // The energy finds it, up to what is asked for.
    if (asked == nullptr && resolved.Find("svd_energy") != nullptr) return most;
    const int64_t rank = asked == nullptr ? largest_rank_ : std::get<int64_t>(*asked);
    if (rank > *most) {
      notes.push_back(
          absl::StrCat("rank ", *most, " instead of ", rank, ": there is no more in it"));
    }
    return std::min(rank, *most);
  }

  // Ranks that follow from the singular values of the merge: a module is merged once more for them.
  absl::Status MeasureRanks() {
    std::vector<Module*> measured;
    int64_t largest = 0;
    for (Module& module : opened_) {
      if (module.energy == 0) continue;
      measured.push_back(&module);
      largest = std::max(largest, WholeMerge(module)->bytes());
    }
    return ForEachWhilePlanning(
        plan_.options, static_cast<int64_t>(measured.size()), largest,
        "the singular values of the largest module", [&](kernels::Backend& backend, int64_t i) {
          return Annotate(Measure(backend, *measured[i]),
                          absl::StrCat("module ", Printable(measured[i]->name)));
        });
  }

  // With every direction that there may be.
  std::shared_ptr<const TensorTask> WholeMerge(const Module& module) const {
    AdapterModule whole = module.resolved;
    whole.rank = *LargestRank(*method_, whole);  // OpenModule has seen that there is one
    whole.params.erase("svd_clamp");
    return method_->factors(*method_, whole);
  }

  absl::Status Measure(kernels::Backend& backend, Module& module) const {
    AdapterModule& resolved = module.resolved;
    const int64_t all = *LargestRank(*method_, resolved);
    ASSIGN_OR_RETURN(const std::vector<float> factors,
                     RunWhilePlanning(backend, *WholeMerge(module),
                                      all * (resolved.in + resolved.out), module.tensor.inputs));
    // Columns of B are singular vectors times their values.
    std::vector<double> squares(all, 0.0);
    for (int64_t i = 0; i < resolved.out * all; ++i) {
      squares[i % all] += std::pow(double{factors[all * resolved.in + i]}, 2);
    }
    for (double& square : squares) square = std::sqrt(square);
    resolved.rank =
        std::max<int64_t>(RankOfEnergy(squares, resolved.rank, /*epsilon=*/0, module.energy), 1);
    module.tensor.notes.push_back(
        absl::StrCat("rank ", resolved.rank, " by svd_energy ", module.energy));
    return absl::OkStatus();
  }

  absl::StatusOr<Module> OpenModule(const std::string& module, const Owners& owners) {
    RETURN_IF_ERROR(CheckShapes(module, owners));
    PlanTensor tensor;
    std::vector<ParamOrigins> origins;
    ASSIGN_OR_RETURN(AdapterModule resolved, Resolve(module, owners, tensor, origins));
    const LoraFactors& first = adapters_[owners[0]].tensors.factors.at(module);
    resolved.out = first.b.shape[0];
    resolved.in = first.a.shape.elements() / first.a.shape[0];
    // Products of extents that a task counts bytes with.
    constexpr int64_t kMostBytesPerElement = 1024;
    if (resolved.in == 0 || !CheckedMul(resolved.in, resolved.out).ok() ||
        !CheckedMul(resolved.in * resolved.out, kMostBytesPerElement).ok()) {
      return absl::FailedPreconditionError(
          absl::StrCat("module ", Printable(module), ": factors A ", first.a.shape.ToString(),
                       " and B ", first.b.shape.ToString(), " are no matrix that can be merged"));
    }
    ASSIGN_OR_RETURN(resolved.rank, RankOf(module, owners, resolved, tensor.notes));

    DType stored = first.a.dtype;
    for (size_t i = 0; i < owners.size(); ++i) {
      const LoraFactors& factors = adapters_[owners[i]].tensors.factors.at(module);
      stored = Promote(stored, Promote(factors.a.dtype, factors.b.dtype));
      ASSIGN_OR_RETURN(PlanInput a, FloatInput(owners[i], factors.a));
      ASSIGN_OR_RETURN(PlanInput b, FloatInput(owners[i], factors.b));
      a.params = resolved.inputs[i].params;
      a.origins = std::move(origins[i]);
      tensor.inputs.push_back(std::move(a));
      tensor.inputs.push_back(std::move(b));
      tensor.notes.push_back(absl::StrCat("adapter ", Name(owners[i]), ": rank ",
                                          resolved.inputs[i].rank, ", scale ",
                                          resolved.inputs[i].scale));
    }
    if (owners.size() < adapters_.size()) partly_.push_back(module);
    const ParamValue* const asked = resolved.Find("svd_energy");
    const double energy = asked == nullptr ? 0 : std::get<double>(*asked);
    return Module{module, &first, std::move(resolved), std::move(tensor), stored, energy};
  }

  absl::Status AddModule(Module& module) {
    const LoraFactors& first = *module.first;
    PlanTensor& tensor = module.tensor;
    const int64_t rank = module.resolved.rank;
    std::vector<int64_t> a(first.a.shape.extents().begin(), first.a.shape.extents().end());
    std::vector<int64_t> b(first.b.shape.extents().begin(), first.b.shape.extents().end());
    a[0] = b[1] = rank;
    ASSIGN_OR_RETURN(const Shape shape_a, Shape::Make(a));
    ASSIGN_OR_RETURN(const Shape shape_b, Shape::Make(b));
    const absl::string_view name_a = first.embedding ? ".lora_embedding_A" : ".lora_A.weight";
    const absl::string_view name_b = first.embedding ? ".lora_embedding_B" : ".lora_B.weight";
    tensor.parts = {{absl::StrCat(tensor.name, name_a), shape_a},
                    {absl::StrCat(tensor.name, name_b), shape_b}};
    tensor.shape = Shape{shape_a.elements() + shape_b.elements()};
    tensor.dtype = tensor.result_dtype = OutputDType(module.stored);
    tensor.params["rank"] = rank;
    tensor.task = method_->factors(*method_, module.resolved);
    output_.ranks[module.name] = rank;
    output_.embeddings |= first.embedding;
    plan_.tensors.push_back(std::move(tensor));
    return absl::OkStatus();
  }

  // What adapters add to a module's bias is merged like their products.
  absl::Status AddBias(const std::string& module, const Owners& owners) {
    PlanTensor tensor;
    std::vector<ParamOrigins> origins;
    ASSIGN_OR_RETURN(const AdapterModule resolved, Resolve(module, owners, tensor, origins));
    tensor.name = absl::StrCat(kPeftPrefix, module, ".lora_B.bias");
    const TensorInfo& first = adapters_[owners[0]].tensors.biases.at(module);
    DType stored = first.dtype;
    for (size_t i = 0; i < owners.size(); ++i) {
      const TensorInfo& info = adapters_[owners[i]].tensors.biases.at(module);
      const auto factors = adapters_[owners[i]].tensors.factors.find(module);
      if (factors == adapters_[owners[i]].tensors.factors.end() || !IsFloat(info.dtype) ||
          !(info.shape == Shape{factors->second.b.shape[0]})) {
        return absl::FailedPreconditionError(
            absl::StrCat("adapter ", Name(owners[i]), ", tensor ", Printable(info.name), " ",
                         info.shape.ToString(), " does not go with the factors of its module"));
      }
      stored = Promote(stored, info.dtype);
      ASSIGN_OR_RETURN(PlanInput input, FloatInput(owners[i], info));
      input.params = resolved.inputs[i].params;
      input.origins = std::move(origins[i]);
      tensor.inputs.push_back(std::move(input));
    }
    tensor.shape = first.shape;
    tensor.dtype = tensor.result_dtype = OutputDType(stored);
    tensor.task = MakeBiasTask(*method_, resolved, first.shape.elements());
    output_.bias = true;
    plan_.tensors.push_back(std::move(tensor));
    return absl::OkStatus();
  }

  // --- what is saved whole ---------------------------------------------------------------------

  absl::Status Save(const std::string& tensor, const std::vector<Saved>& owners) {
    const Saved& first = owners.front();
    ASSIGN_OR_RETURN(PlanInput input, Input(first.adapter, first.info));
    for (const Saved& other : owners) {
      if (&other == &first) continue;
      bool equal = other.info.dtype == first.info.dtype && other.info.shape == first.info.shape;
      if (equal) {
        ASSIGN_OR_RETURN(const PlanInput own, Input(other.adapter, other.info));
        ASSIGN_OR_RETURN(equal, EqualBytes(*input.source, *own.source));
      }
      if (equal) continue;
      return absl::FailedPreconditionError(absl::StrCat(
          "adapters ", Name(first.adapter), " and ", Name(other.adapter), " both save ",
          Printable(tensor),
          " whole and differ; no method merges that. Merge models instead (BASE+ADAPTER, without "
          "`output`)"));
    }
    const absl::string_view module(tensor.data(), std::min(tensor.rfind('.'), tensor.size()));
    bool listed = false;
    for (const Saved& owner : owners) {
      const Settings& settings = adapters_[owner.adapter].settings;
      for (const std::string& name : settings.modules_to_save) {
        if (!Reaches(name, module)) continue;
        listed = true;
        output_.modules_to_save.insert(name);
      }
      if (!listed && output_.saved_biases != "all" && absl::EndsWith(tensor, ".bias")) {
        output_.saved_biases = settings.biases;
      }
    }
    if (listed && modules_.contains(std::string(module))) {
      return absl::FailedPreconditionError(
          absl::StrCat("adapter ", Name(first.adapter), " saves module ", Printable(module),
                       " whole (modules_to_save), and adapter ",
                       Name(modules_.at(std::string(module)).front()), " has factors for it"));
    }
    if (owners.size() < adapters_.size()) copied_.push_back(tensor);
    PlanTensor copy;
    copy.name = first.info.name;
    copy.dtype = copy.result_dtype = first.info.dtype;
    copy.shape = first.info.shape;
    copy.notes.push_back(
        owners.size() == 1 ? absl::StrCat("copied: only adapter ", Name(first.adapter), " saves it")
                           : "copied: equal in all adapters that save it");
    copy.inputs.push_back(std::move(input));
    plan_.read_bytes += first.info.bytes;
    plan_.tensors.push_back(std::move(copy));
    return absl::OkStatus();
  }

  // --- warnings and files ----------------------------------------------------------------------

  void Warn() {
    const auto warn = [&](const std::vector<std::string>& names, absl::string_view what) {
      if (names.empty()) return;
      plan_.warnings.push_back(absl::StrCat(names.size(), " ", what, ": ", Listed(names)));
    };
    warn(partly_, "modules are not in all adapters and merged from those that have them");
    warn(copied_,
         "tensors are saved whole by some adapters only and copied, whatever the weights are");
    if (doubles_ > 0) {
      plan_.warnings.push_back(
          absl::StrCat(doubles_, " tensors are float64; adapters are merged as float32"));
    }
    WarnOfPeft(output_, plan_.warnings);
  }

  void AddFiles() {
    plan_.config_json = AdapterConfigJson(output_);
    if (!plan_.options.write_model_card) return;
    std::vector<std::string> models;
    for (const PlanModel& model : plan_.models) models.push_back(model.ref);
    const std::string recipe = RecipeFileText(recipe_.text, recipe_.overrides);
    plan_.aux_files.push_back(
        {.name = "README.md",
         .text = AdapterCard(output_,
                             absl::StrCat("It is merged from ", models.size(), " adapters with [",
                                          method_->method.title, "](", method_->method.reference,
                                          "): ", method_->method.summary, "."),
                             models, recipe, "yaml")});
    plan_.aux_files.push_back({.name = "mergekit_config.yml", .text = recipe});
  }

  const Recipe& recipe_;
  Plan plan_;
  const AdapterMethod* method_ = nullptr;
  std::vector<Adapter> adapters_;  // as plan_.models
  std::map<std::string, Owners> modules_, biases_;
  std::vector<Module> opened_;
  std::map<std::string, std::vector<Saved>> saved_;  // by the model's tensor
  int64_t largest_rank_ = 0;                         // by the configurations
  int64_t layers_ = 0;                               // as far as modules' names tell
  absl::flat_hash_set<std::string> names_;           // what filters see
  ParamUse param_use_;
  std::vector<std::string> partly_, copied_;
  int64_t doubles_ = 0;
  AdapterDescription output_;
};

}  // namespace

absl::StatusOr<Plan> MakeAdapterMergePlan(const Recipe& recipe, const PlanOptions& options) {
  return AdapterMerge(recipe, options).Make();
}

}  // namespace pewter
