#include "merge/engine/stages.h"

#include <memory>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "merge/engine/manifest.h"
#include "merge/plan/stage_store.h"

namespace pewter {
namespace {

// Says which stage the progress is of. That one stage is published is nothing to the caller.
class StageObserver final : public Observer {
 public:
  StageObserver(Observer* observer, std::string name, int stage, int stages)
      : observer_(observer), name_(std::move(name)), stage_(stage), stages_(stages) {}

  void OnProgress(const Progress& progress) override {
    if (observer_ == nullptr) return;
    Progress staged = progress;
    staged.stage = stage_;
    staged.stages = stages_;
    staged.stage_name = name_;
    if (staged.phase != Phase::kPlanning) staged.phase = Phase::kMerging;
    observer_->OnProgress(staged);
  }
  void OnWarning(absl::string_view message) override {
    if (observer_ != nullptr) observer_->OnWarning(absl::StrCat("stage ", name_, ": ", message));
  }

 private:
  Observer* const observer_;
  const std::string name_;
  const int stage_;
  const int stages_;
};

absl::StatusOr<std::string> StagesFolder(const RunOptions& options) {
  if (!options.stages.empty()) return options.stages;
  std::string output = options.output;
  while (output.size() > 1 && output.back() == '/') output.pop_back();
  // Beside a bucket is another bucket.
  if (absl::StartsWith(output, "s3://") && output.find('/', 5) == std::string::npos) {
    return absl::InvalidArgumentError(absl::StrCat(
        "there is no place for the recipe's stages beside ", output,
        ", a whole bucket; name one with --intermediate-dir, or write to ", output, "/PREFIX"));
  }
  return absl::StrCat(output, ".stages");
}

// The manifest of the stage, which is in `folder` when this returns.
absl::StatusOr<std::string> MergeStage(const PlanStage& stage, ObjectStore& folder,
                                       RunOptions options) {
  auto finished = FindFinished(folder, stage.plan->fingerprint, FileCheck::kDigests);
  if (finished.ok() && finished->has_value()) return **std::move(finished);
  if (absl::IsDataLoss(finished.status())) {
    // Our own, and of no use.
    options.mode = OutputMode::kOverwrite;
  } else {
    RETURN_IF_ERROR(finished.status());
    const absl::StatusOr<RunState> state = RunState::Read(folder);
    if (state.ok() && state->fingerprint == stage.plan->fingerprint) {
      options.mode = OutputMode::kResume;
    }
  }
  ASSIGN_OR_RETURN(const Manifest manifest, RunPlan(*stage.plan, options));
  return manifest.json;
}

}  // namespace

absl::Status CheckStagesFolder(const Plan& plan, const RunOptions& options) {
  return plan.stages.empty() ? absl::OkStatus() : StagesFolder(options).status();
}

absl::StatusOr<std::vector<std::string>> MergeStages(const Plan& plan, const RunOptions& options) {
  std::vector<std::string> manifests;
  const int stages = static_cast<int>(plan.stages.size()) + 1;
  if (plan.stages.empty()) return manifests;
  ASSIGN_OR_RETURN(const std::string stages_folder, StagesFolder(options));
  for (const PlanStage& stage : plan.stages) {
    StageObserver observer(options.observer, stage.name, static_cast<int>(manifests.size()) + 1,
                           stages);
    RunOptions own = options;
    own.output = absl::StrCat(stages_folder, "/", stage.name);
    own.observer = &observer;
    ASSIGN_OR_RETURN(std::shared_ptr<ObjectStore> folder, OpenStore(own.output));
    auto manifest = MergeStage(stage, *folder, own);
    if (!manifest.ok()) return Annotate(manifest.status(), absl::StrCat("stage ", stage.name));
    manifests.push_back(*std::move(manifest));
    RETURN_IF_ERROR(stage.store->Bind(std::move(folder)));
  }
  return manifests;
}

void UnbindStages(const Plan& plan) {
  for (const PlanStage& stage : plan.stages) stage.store->Unbind();
}

absl::Status RemoveStages(const Plan& plan, absl::Span<const std::string> manifests,
                          const RunOptions& options) {
  if (options.keep_stages || !options.stages.empty() || plan.stages.empty()) {
    return absl::OkStatus();
  }
  // Opened above the folder, so that it goes with its last file.
  ASSIGN_OR_RETURN(const std::string folder, StagesFolder(options));
  const size_t name_at = folder.rfind('/') + 1;  // npos + 1 == 0
  ASSIGN_OR_RETURN(const std::shared_ptr<ObjectStore> store,
                   OpenStore(name_at == 0 ? "." : folder.substr(0, name_at)));
  for (size_t i = 0; i < manifests.size(); ++i) {
    if (!plan.stages[i].used) continue;
    for (const std::string& file : FilesOfManifest(manifests[i])) {
      RETURN_IF_ERROR(
          store->Remove(absl::StrCat(folder.substr(name_at), "/", plan.stages[i].name, "/", file)));
    }
  }
  return absl::OkStatus();
}

}  // namespace pewter
