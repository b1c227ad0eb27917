#include "server/admission.h"

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "base/status.h"
#include "merge/recipe/problems.h"
#include "server/convert.h"
#include "server/digest.h"
#include "server/errors.h"
#include "server/random_token.h"
#include "store/artifact_store.h"

namespace pewter::server {
namespace {

constexpr size_t kMaxRecipeBytes = 1 << 20;
constexpr size_t kMaxLabels = 64;
constexpr size_t kMaxLabelKey = 63;
constexpr size_t kMaxLabelValue = 255;
constexpr size_t kMaxRequestId = 128;
constexpr size_t kMaxUri = 4096;
constexpr int kMaxPriority = 1000;
constexpr int kMaxThreads = 1024;
constexpr int kMaxOverrides = 1000;
constexpr int64_t kMaxDeadlineSeconds = 10 * 366 * 86'400;

class Violations {
 public:
  void Add(absl::string_view reason, absl::string_view field, std::string description,
           TextPosition at = {}) {
    if (list_.empty()) reason_ = std::string(reason);
    list_.push_back({std::string(field), std::move(description), at.line, at.column});
  }
  // Of the recipe's text.
  void AddProblems(const absl::Status& status) {
    for (RecipeProblem& problem : ProblemsOf(status)) {
      Add("RECIPE_INVALID", "recipe", std::move(problem.message), problem.at);
    }
  }
  // The reason is that of the first violation.
  absl::Status ToStatus() const {
    return list_.empty() ? absl::OkStatus() : BadRequestError(reason_, list_);
  }

 private:
  std::string reason_;
  std::vector<FieldViolation> list_;
};

bool IsUri(absl::string_view path) {
  return absl::StartsWith(path, "/") || absl::StartsWith(path, "file://") ||
         absl::StartsWith(path, "s3://") || absl::StartsWith(path, "hf://") ||
         absl::StartsWith(path, kArtifactScheme);
}

void CheckOptions(const v1::MergeOptions& options, Violations& violations) {
  constexpr absl::string_view kReason = "FIELD_INVALID";
  if (options.memory_bytes() < 0) {
    violations.Add(kReason, "options.memory_bytes", "must not be negative");
  }
  if (options.threads() < 0 || options.threads() > kMaxThreads) {
    violations.Add(kReason, "options.threads", absl::StrCat("must be 0 to ", kMaxThreads));
  }
  if (options.shard_bytes() < 0) {
    violations.Add(kReason, "options.shard_bytes", "must not be negative");
  }
  absl::string_view device = options.device();
  int index = 0;
  if (!device.empty() && device != "auto" && device != "cpu" && device != "cuda" &&
      !(absl::ConsumePrefix(&device, "cuda:") && absl::SimpleAtoi(device, &index) && index >= 0)) {
    violations.Add(kReason, "options.device",
                   absl::StrCat("\"", options.device(), "\": write auto, cpu, cuda or cuda:N"));
  }
  if (options.overrides_size() > kMaxOverrides) {
    violations.Add(kReason, "options.overrides", absl::StrCat("must be at most ", kMaxOverrides));
    return;
  }
  for (int i = 0; i < options.overrides_size(); ++i) {
    if (options.overrides(i).key().empty()) {
      violations.Add(kReason, absl::StrCat("options.overrides[", i, "].key"), "must not be empty");
    }
  }
}

bool CheckRecipeText(const std::string& recipe, Violations& violations) {
  if (recipe.empty()) {
    violations.Add("RECIPE_INVALID", "recipe", "must not be empty");
    return false;
  }
  if (recipe.size() > kMaxRecipeBytes) {
    violations.Add("RECIPE_INVALID", "recipe",
                   absl::StrCat("has ", recipe.size(), " bytes; at most 1 MiB is read"));
    return false;
  }
  return true;
}

void CheckPaths(const std::vector<RecipePath>& paths, Violations& violations) {
  for (const RecipePath& path : paths) {
    if (IsUri(path.path)) continue;
    violations.Add(
        "RELATIVE_PATH", "recipe",
        absl::StrCat(path.at.ToString(), ": model \"", path.path,
                     "\" is neither an absolute path nor a file://, s3://, hf:// or artifact:// "
                     "URI, and the server has no working directory of yours; write ",
                     "/PATH/", path.path, " or hf://", path.path),
        path.at);
  }
}

absl::Status CheckAccess(const std::vector<RecipePath>& paths, const AccessPolicy& access) {
  for (const RecipePath& path : paths) {
    RETURN_IF_ERROR(Annotate(access.CheckRead(path.path), path.at.ToString()));
  }
  return absl::OkStatus();
}

void CheckLabels(const google::protobuf::Map<std::string, std::string>& labels,
                 absl::string_view field, Violations& violations) {
  if (labels.size() > kMaxLabels) {
    violations.Add("FIELD_INVALID", field, absl::StrCat("must be at most ", kMaxLabels));
  }
  for (const auto& [key, value] : labels) {
    if (key.empty() || key.size() > kMaxLabelKey) {
      violations.Add("FIELD_INVALID", field,
                     absl::StrCat("keys have 1 to ", kMaxLabelKey, " bytes"));
    }
    if (value.size() > kMaxLabelValue) {
      violations.Add("FIELD_INVALID", absl::StrCat(field, "[", key.substr(0, kMaxLabelKey), "]"),
                     absl::StrCat("has more than ", kMaxLabelValue, " bytes"));
    }
  }
}

// Absent, or positive.
void CheckDeadline(bool given, const google::protobuf::Duration& deadline, absl::string_view field,
                   Violations& violations) {
  if (!given) return;
  const bool valid = deadline.seconds() >= 0 && deadline.seconds() <= kMaxDeadlineSeconds &&
                     deadline.nanos() >= 0 && deadline.nanos() < 1'000'000'000 &&
                     (deadline.seconds() > 0 || deadline.nanos() > 0);
  if (!valid) violations.Add("FIELD_INVALID", field, "must be positive, and at most ten years");
}

}  // namespace

absl::StatusOr<NewJob> Admit(const v1::CreateJobRequest& request, const AccessPolicy& access) {
  Violations violations;
  CheckOptions(request.options(), violations);
  CheckLabels(request.labels(), "labels", violations);
  if (std::abs(int64_t{request.priority()}) > kMaxPriority) {
    violations.Add("FIELD_INVALID", "priority",
                   absl::StrCat("must be -", kMaxPriority, " to ", kMaxPriority));
  }
  const std::string& request_id = request.request_id();
  if (request_id.size() > kMaxRequestId ||
      !std::all_of(request_id.begin(), request_id.end(), absl::ascii_isgraph)) {
    violations.Add("FIELD_INVALID", "request_id",
                   absl::StrCat("must be at most ", kMaxRequestId, " printable characters"));
  }

  const std::string project = request.project().empty() ? kDefaultProject : request.project();
  if (!IsProjectId(project)) {
    violations.Add("FIELD_INVALID", "project",
                   "must be 1 to 63 of a-z, 0-9 and '-', begin with a letter and not end with '-'");
  }
  CheckDeadline(request.has_queue_deadline(), request.queue_deadline(), "queue_deadline",
                violations);
  CheckDeadline(request.has_run_deadline(), request.run_deadline(), "run_deadline", violations);
  CheckDeadline(request.has_total_deadline(), request.total_deadline(), "total_deadline",
                violations);
  if (!v1::OnExisting_IsValid(request.on_existing())) {
    violations.Add("FIELD_INVALID", "on_existing",
                   absl::StrCat(request.on_existing(), " is not a value of OnExisting"));
  } else if (request.options().overwrite() &&
             request.on_existing() != v1::ON_EXISTING_UNSPECIFIED) {
    violations.Add("FIELD_INVALID", "on_existing",
                   "says what to do with what is there, and so does options.overwrite; give one");
  }

  const std::string& destination = request.destination_uri();
  std::optional<std::string> key;
  if (destination.empty()) {
    violations.Add("DESTINATION_INVALID", "destination_uri", "must not be empty");
  } else if (destination.size() > kMaxUri) {
    violations.Add("DESTINATION_INVALID", "destination_uri", "is too long");
  } else if (absl::StartsWith(destination, "hf://")) {
    violations.Add("DESTINATION_INVALID", "destination_uri",
                   "a hub is read-only; write an absolute path, a file://, an s3:// or an "
                   "artifact:// URI");
  } else if (absl::StartsWith(destination, kArtifactScheme)) {
    const absl::StatusOr<ArtifactUri> artifact = ParseArtifactUri(destination);
    if (!artifact.ok() || artifact->uploaded) {
      violations.Add("DESTINATION_INVALID", "destination_uri",
                     artifact.ok() ? "is named by its content, so nothing can be written to it; "
                                     "write artifact://NAME"
                                   : std::string(artifact.status().message()));
    } else {
      key = artifact->ToString();
      if (request.on_existing() == v1::ON_EXISTING_NEW_VERSION) {
        violations.Add("DESTINATION_INVALID", "destination_uri",
                       "an artifact has no versions below it; write a folder or an s3:// URI");
      }
    }
  } else {
    key = PlaceKey(destination);
    if (!key) {
      violations.Add(
          "DESTINATION_INVALID", "destination_uri",
          absl::StrCat("\"", destination,
                       "\" is neither an absolute path nor a file://, s3:// or artifact:// URI, "
                       "and the server has no working directory of yours"));
    } else if (*key == "/") {
      violations.Add("DESTINATION_INVALID", "destination_uri", "is the root folder");
    }
  }

  std::vector<RecipePath> paths;
  bool stages = false;
  if (CheckRecipeText(request.recipe(), violations)) {
    const absl::StatusOr<Recipe> recipe = ToRecipe(request.recipe(), request.options());
    if (!recipe.ok()) {
      violations.AddProblems(recipe.status());
    } else {
      stages = !recipe->stages.empty();
      paths = PathsOf(*recipe);
      CheckPaths(paths, violations);
      for (const RecipePath& path : paths) {
        if (key && PlaceKey(path.path) == key) {
          violations.Add("DESTINATION_INVALID", "destination_uri",
                         absl::StrCat("is an input of the recipe (", path.at.ToString(), ")"));
          break;
        }
      }
    }
  }
  if (absl::Status status = violations.ToStatus(); !status.ok()) return status;
  RETURN_IF_ERROR(CheckAccess(paths, access));
  RETURN_IF_ERROR(access.CheckWrite(destination));
  // Models on the way lie beside the output.
  if (stages) RETURN_IF_ERROR(access.CheckWrite(absl::StrCat(*key, ".stages")));

  NewJob admitted;
  admitted.job.set_id(absl::StrCat("j", RandomHex(10)));
  admitted.job.set_request_id(request.request_id());
  admitted.job.set_recipe(request.recipe());
  admitted.job.set_destination_uri(destination);
  *admitted.job.mutable_labels() = request.labels();
  admitted.job.set_priority(request.priority());
  *admitted.job.mutable_options() = request.options();
  admitted.job.set_project(project);
  if (request.has_queue_deadline()) {
    *admitted.job.mutable_queue_deadline() = request.queue_deadline();
  }
  if (request.has_run_deadline()) *admitted.job.mutable_run_deadline() = request.run_deadline();
  if (request.has_total_deadline()) {
    *admitted.job.mutable_total_deadline() = request.total_deadline();
  }
  admitted.job.set_on_existing(request.on_existing());
  v1::CreateJobRequest body = request;
  body.clear_request_id();
  admitted.request_digest = DigestOf(body);
  admitted.destination_key = *key;
  return admitted;
}

absl::StatusOr<NewJob> AdmitRetry(const v1::RetryJobRequest& request, const v1::Job& job,
                                  const AccessPolicy& access) {
  v1::CreateJobRequest again;
  again.set_recipe(job.recipe());
  again.set_destination_uri(job.destination_uri());
  again.set_request_id(request.request_id());
  *again.mutable_labels() = job.labels();
  again.set_priority(job.priority());
  *again.mutable_options() = job.options();
  again.set_project(job.project());
  if (job.has_queue_deadline()) *again.mutable_queue_deadline() = job.queue_deadline();
  if (job.has_run_deadline()) *again.mutable_run_deadline() = job.run_deadline();
  if (job.has_total_deadline()) *again.mutable_total_deadline() = job.total_deadline();
  again.set_on_existing(job.on_existing());
  ASSIGN_OR_RETURN(NewJob admitted, Admit(again, access));
  admitted.job.set_retry_of(job.id());
  // Not that of the CreateJob which would make the same job.
  v1::RetryJobRequest body = request;
  body.clear_request_id();
  admitted.request_digest = absl::StrCat("retry ", DigestOf(body));
  return admitted;
}

absl::Status CheckListJobs(const v1::ListJobsRequest& request) {
  Violations violations;
  if (request.page_size() < 0) {
    violations.Add("FIELD_INVALID", "page_size", "must not be negative");
  }
  CheckLabels(request.filter().labels(), "filter.labels", violations);
  if (const std::string& project = request.filter().project();
      !project.empty() && !IsProjectId(project)) {
    violations.Add("FIELD_INVALID", "filter.project", "is not a project");
  }
  for (const int state : request.filter().states()) {
    if (state == v1::JOB_STATE_UNSPECIFIED || !v1::JobState_IsValid(state)) {
      violations.Add("FIELD_INVALID", "filter.states",
                     absl::StrCat(state, " is not a state of a job"));
    }
  }
  return violations.ToStatus();
}

absl::Status CheckPlanMerge(const v1::PlanMergeRequest& request, const AccessPolicy& access) {
  Violations violations;
  if (request.page_size() < 0) {
    violations.Add("FIELD_INVALID", "page_size", "must not be negative");
  }
  CheckOptions(request.options(), violations);
  std::vector<RecipePath> paths;
  if (CheckRecipeText(request.recipe(), violations)) {
    const absl::StatusOr<Recipe> recipe = ToRecipe(request.recipe(), request.options());
    if (recipe.ok()) {
      paths = PathsOf(*recipe);
      CheckPaths(paths, violations);
    }
  }
  RETURN_IF_ERROR(violations.ToStatus());
  return CheckAccess(paths, access);
}

}  // namespace pewter::server
