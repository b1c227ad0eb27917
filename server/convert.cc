#include "server/convert.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "base/dtype_names.h"
#include "base/reason.h"
#include "merge/recipe/problems.h"
#include "merge/recipe/referenced_models.h"
#include "server/errors.h"

namespace pewter::server {
namespace {

// Reasons of Job.error and findings; part of the interface.
absl::string_view ReasonForCode(absl::StatusCode code) {
  switch (code) {
    case absl::StatusCode::kInvalidArgument:
      return "RECIPE_INVALID";
    case absl::StatusCode::kFailedPrecondition:
      return "CHECKPOINT_MISMATCH";
    case absl::StatusCode::kNotFound:
      return "SOURCE_NOT_FOUND";
    case absl::StatusCode::kAlreadyExists:
      return "OUTPUT_EXISTS";
    case absl::StatusCode::kPermissionDenied:
      return "STORE_DENIED";
    case absl::StatusCode::kDataLoss:
      return "BAD_BYTES";
    case absl::StatusCode::kUnavailable:
      return "STORE_UNAVAILABLE";
    case absl::StatusCode::kResourceExhausted:
      return "RESOURCE_EXHAUSTED";
    case absl::StatusCode::kCancelled:
      return "CANCELLED_BY_CLIENT";
    case absl::StatusCode::kUnimplemented:
      return "NOT_SUPPORTED";
    default:
      return "INTERNAL";
  }
}

void SetValue(const ParamValue& value, google::protobuf::Value* out) {
  if (const auto* flag = std::get_if<bool>(&value)) out->set_bool_value(*flag);
  if (const auto* integer = std::get_if<int64_t>(&value)) {
    out->set_number_value(static_cast<double>(*integer));
  }
  if (const auto* number = std::get_if<double>(&value)) out->set_number_value(*number);
  if (const auto* text = std::get_if<std::string>(&value)) out->set_string_value(*text);
}

template <typename Map>
void SetParams(const ParamValues& params, Map* out) {
  for (const auto& [name, value] : params) SetValue(value, &(*out)[name]);
}

template <typename Map>
void SetOrigins(const ParamOrigins& origins, Map* out) {
  for (const auto& [name, origin] : origins) (*out)[name] = origin.ToString();
}

void SetInput(const PlanInput& input, v1::PlanTensorInput* out) {
  out->set_model(input.model);
  out->set_tensor(input.tensor);
  SetParams(input.params, out->mutable_params());
  SetOrigins(input.origins, out->mutable_param_origins());
  if (input.layer >= 0) out->set_layer(input.layer);
  for (const std::string& view : input.views) out->add_views(view);
}

v1::ParamType ToParamType(ParamType type) {
  switch (type) {
    case ParamType::kBool:
      return v1::PARAM_TYPE_BOOL;
    case ParamType::kInt:
      return v1::PARAM_TYPE_INT;
    case ParamType::kFloat:
      return v1::PARAM_TYPE_FLOAT;
    case ParamType::kString:
    case ParamType::kPatterns:
      return v1::PARAM_TYPE_STRING;
  }
  return v1::PARAM_TYPE_UNSPECIFIED;
}

v1::ParamScope ToParamScope(ParamScopeKind scope) {
  switch (scope) {
    case ParamScopeKind::kJob:
      return v1::PARAM_SCOPE_JOB;
    case ParamScopeKind::kModel:
      return v1::PARAM_SCOPE_MODEL;
    case ParamScopeKind::kTensor:
      return v1::PARAM_SCOPE_TENSOR;
  }
  return v1::PARAM_SCOPE_UNSPECIFIED;
}

v1::BaseModelUse ToBaseModelUse(BaseUse use) {
  switch (use) {
    case BaseUse::kInput:
      return v1::BASE_MODEL_USE_INPUT;
    case BaseUse::kOptional:
      return v1::BASE_MODEL_USE_OPTIONAL;
    case BaseUse::kRequired:
      return v1::BASE_MODEL_USE_REQUIRED;
  }
  return v1::BASE_MODEL_USE_UNSPECIFIED;
}

v1::ParamInfo ToParamInfo(const Param& param) {
  v1::ParamInfo info;
  info.set_name(param.name);
  info.set_help(param.help);
  info.set_type(ToParamType(param.type));
  info.set_scope(ToParamScope(param.scope));
  info.set_required(std::holds_alternative<NoDefault>(param.fallback));
  if (const auto* flag = std::get_if<bool>(&param.fallback)) {
    info.mutable_default_value()->set_bool_value(*flag);
  } else if (const auto* integer = std::get_if<int64_t>(&param.fallback)) {
    info.mutable_default_value()->set_number_value(static_cast<double>(*integer));
  } else if (const auto* number = std::get_if<double>(&param.fallback)) {
    info.mutable_default_value()->set_number_value(*number);
  } else if (const auto* text = std::get_if<const char*>(&param.fallback)) {
    info.mutable_default_value()->set_string_value(*text);
  }
  if (std::isfinite(param.min)) info.set_min(param.min);
  if (std::isfinite(param.max)) info.set_max(param.max);
  for (const char* choice : param.choices) info.add_choices(choice);
  info.set_no_effect(param.no_effect);
  return info;
}

}  // namespace

absl::StatusOr<Recipe> ToRecipe(const std::string& text, const v1::MergeOptions& options) {
  std::vector<std::pair<std::string, std::string>> overrides;
  for (const v1::RecipeOverride& override : options.overrides()) {
    overrides.emplace_back(override.key(), override.value());
  }
  return ParseRecipe(text, overrides);
}

PlanOptions ToPlanOptions(const v1::MergeOptions& options) {
  PlanOptions result;
  result.memory_bytes = options.memory_bytes();
  result.threads = options.threads();
  if (!options.device().empty()) result.device = options.device();
  result.seed = options.seed();
  result.strict = options.strict();
  result.allow_mixed = options.allow_mixed();
  result.truncate_vocabularies = options.truncate_vocabularies();
  switch (options.raw_names()) {
    case v1::RAW_NAMES_INTERSECTION:
      result.raw_names = RawNames::kIntersection;
      break;
    case v1::RAW_NAMES_UNION:
      result.raw_names = RawNames::kUnion;
      break;
    default:
      break;
  }
  if (options.shard_bytes() != 0) result.shard_bytes = options.shard_bytes();
  result.copy_tokenizer = !options.omit_tokenizer();
  result.write_model_card = !options.omit_model_card();
  return result;
}

std::vector<RecipePath> PathsOf(const Recipe& recipe) {
  std::vector<RecipePath> paths;
  for (const ModelRef& model : ReferencedModels(recipe)) {
    paths.push_back({.path = model.path, .at = model.at});
    if (!model.adapter.empty()) paths.push_back({.path = model.adapter, .at = model.at});
  }
  return paths;
}

v1::JobState ToState(Phase phase) {
  switch (phase) {
    case Phase::kPlanning:
      return v1::JOB_STATE_PLANNING;
    case Phase::kMerging:
      return v1::JOB_STATE_RUNNING;
    // Done is for FinishJob to say.
    case Phase::kPublishing:
    case Phase::kEvaluating:
    case Phase::kDone:
      return v1::JOB_STATE_PUBLISHING;
  }
  return v1::JOB_STATE_UNSPECIFIED;
}

v1::Progress ToProgress(const Progress& progress) {
  v1::Progress result;
  result.set_tensors_done(progress.tensors_done);
  result.set_tensors_total(progress.tensors_total);
  result.set_read_bytes(progress.bytes_read);
  result.set_written_bytes(progress.bytes_written);
  result.set_total_bytes(progress.bytes_total);
  result.set_shards_reused(progress.shards_reused);
  result.set_elapsed_seconds(progress.seconds);
  result.set_written_bytes_per_second(progress.bytes_per_second);
  if (progress.seconds_left >= 0) result.set_remaining_seconds(progress.seconds_left);
  result.set_current_tensor(progress.current);
  result.set_stage(progress.stage);
  result.set_stages(progress.stages);
  result.set_stage_name(progress.stage_name);
  return result;
}

v1::JobOutput ToOutput(const PlacedManifest& placed) {
  const Manifest& manifest = placed.manifest;
  v1::JobOutput output;
  output.set_uri(placed.output);
  output.set_manifest_json(manifest.json);
  output.set_fingerprint(manifest.fingerprint);
  output.set_written_bytes(manifest.bytes_written);
  output.set_shards_reused(manifest.shards_reused);
  output.set_elapsed_seconds(manifest.seconds);
  output.set_reused(placed.reused);
  return output;
}

OnExisting ToOnExisting(v1::OnExisting on_existing) {
  switch (on_existing) {
    case v1::ON_EXISTING_REUSE_IF_IDENTICAL:
      return OnExisting::kReuseIfIdentical;
    case v1::ON_EXISTING_NEW_VERSION:
      return OnExisting::kNewVersion;
    default:
      return OnExisting::kFail;
  }
}

v1::MethodInfo ToMethodInfo(const MergeMethod& method) {
  v1::MethodInfo info;
  info.set_name(method.name);
  info.set_title(method.title);
  info.set_summary(method.summary);
  info.set_formula(method.formula);
  info.set_reference(method.reference);
  for (const Param& param : method.params) *info.add_params() = ToParamInfo(param);
  info.set_base_model_use(ToBaseModelUse(method.base));
  info.set_min_inputs(method.min_inputs);
  info.set_max_inputs(method.max_inputs);
  return info;
}

v1::MethodInfo ToMethodInfo(const AdapterMethod& method) {
  v1::MethodInfo info = ToMethodInfo(method.method);
  info.set_base_model_use(v1::BASE_MODEL_USE_NONE);
  return info;
}

v1::JobError ToJobError(const absl::Status& status) {
  v1::JobError error;
  error.set_code(status.raw_code());
  std::string reason = ReasonOf(status);
  if (reason.empty()) reason = AttachedReason(status);
  error.set_reason(reason.empty() ? std::string(ReasonForCode(status.code())) : reason);
  error.set_message(std::string(status.message()));
  return error;
}

std::vector<v1::Finding> ToFindings(const absl::Status& status) {
  const v1::JobError error = ToJobError(status);
  std::vector<v1::Finding> findings;
  for (const RecipeProblem& problem : ProblemsOf(status)) {
    v1::Finding& finding = findings.emplace_back();
    finding.set_severity(v1::FINDING_SEVERITY_ERROR);
    finding.set_code(error.code());
    finding.set_reason(error.reason());
    finding.set_message(problem.message);
    finding.set_line(problem.at.line);
    finding.set_column(problem.at.column);
  }
  return findings;
}

v1::Finding ToWarning(const std::string& message) {
  const TextPosition at = PositionIn(message);
  v1::Finding finding;
  finding.set_severity(v1::FINDING_SEVERITY_WARNING);
  finding.set_message(message);
  finding.set_line(at.line);
  finding.set_column(at.column);
  return finding;
}

v1::PlanSummary ToPlanSummary(const Plan& plan, int64_t first, int64_t count) {
  v1::PlanSummary summary;
  summary.set_method(plan.method);
  summary.set_architecture(plan.architecture);
  for (const PlanModel& model : plan.models) summary.add_models(model.ref);
  const int64_t end = std::min<int64_t>(plan.tensors.size(), first + count);
  for (int64_t i = first; i < end; ++i) {
    const PlanTensor& tensor = plan.tensors[i];
    v1::PlanTensor* out = summary.add_tensors();
    out->set_name(tensor.name);
    out->set_dtype(std::string(SafetensorsName(tensor.dtype)));
    for (const int64_t extent : tensor.shape.extents()) out->add_shape(extent);
    if (tensor.method != nullptr) out->set_method(tensor.method->name);
    SetParams(tensor.params, out->mutable_params());
    SetOrigins(tensor.origins, out->mutable_param_origins());
    if (tensor.layer >= 0) out->set_layer(tensor.layer);
    for (const std::string& note : tensor.notes) out->add_notes(note);
    for (const PlanInput& input : tensor.inputs) SetInput(input, out->add_inputs());
    if (tensor.base) SetInput(*tensor.base, out->mutable_base());
    out->set_shard(tensor.shard);
    out->set_size_bytes(tensor.bytes);
  }
  summary.set_tensors_total(static_cast<int64_t>(plan.tensors.size()));
  for (const PlanShard& shard : plan.shards) {
    v1::PlanShard* out = summary.add_shards();
    out->set_file(shard.file);
    out->set_size_bytes(shard.bytes);
    out->set_tensors(static_cast<int32_t>(shard.tensors.size()));
  }
  for (const PlanFile& file : plan.aux_files) summary.add_other_files(file.name);
  summary.set_read_bytes(plan.read_bytes);
  summary.set_write_bytes(plan.write_bytes);
  summary.set_peak_memory_bytes(plan.peak_bytes);
  summary.set_memory_bytes(plan.options.memory_bytes);
  summary.set_threads(plan.options.threads);
  summary.set_device(plan.options.device);
  for (const std::string& warning : plan.warnings) summary.add_warnings(warning);
  summary.set_fingerprint(plan.fingerprint);
  for (const auto& [model, tensors] : plan.unused_tensors) {
    v1::UnusedTensors* out = summary.add_unused_tensors();
    out->set_model(model);
    for (const std::string& tensor : tensors) out->add_tensors(tensor);
  }
  for (const std::string& tensor : plan.absent_tensors) summary.add_absent_tensors(tensor);
  for (const PlanStage& stage : plan.stages) {
    v1::PlanStage* out = summary.add_stages();
    out->set_name(stage.name);
    *out->mutable_plan() = ToPlanSummary(*stage.plan, 0, 0);
  }
  return summary;
}

}  // namespace pewter::server
