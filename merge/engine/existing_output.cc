#include "merge/engine/existing_output.h"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "base/status.h"
#include "merge/engine/manifest.h"
#include "store/object_store.h"

namespace pewter {
namespace {

// Of runs that take a version at the same time.
constexpr int kMostRaces = 100;
constexpr int64_t kMaxVersion = 999'999'999;

std::string VersionUri(const std::string& output, int64_t version) {
  return absl::StrCat(absl::StripSuffix(output, "/"), "/v", version);
}

// 0 when there is none. Whatever lies in a folder of that name counts.
absl::StatusOr<int64_t> NewestVersion(const std::string& output) {
  ASSIGN_OR_RETURN(const std::shared_ptr<ObjectStore> store, OpenStore(output));
  ASSIGN_OR_RETURN(const std::vector<ObjectEntry> entries, store->List(""));
  int64_t newest = 0;
  for (const ObjectEntry& entry : entries) {
    absl::string_view name = entry.key;
    const size_t slash = name.find('/');
    int64_t version = 0;
    if (slash != absl::string_view::npos && absl::ConsumePrefix(&name, "v") &&
        absl::SimpleAtoi(name.substr(0, slash - 1), &version) && version <= kMaxVersion) {
      newest = std::max(newest, version);
    }
  }
  return newest;
}

// What an earlier attempt or another run has left at options.output, when that is the result;
// changes options.mode when it is to be gone on with.
absl::StatusOr<std::optional<PlacedManifest>> Find(const Plan& plan, const ExistingOutput& existing,
                                                   RunOptions& options) {
  ASSIGN_OR_RETURN(const std::shared_ptr<ObjectStore> store, OpenStore(options.output));
  bool own = false;
  if (existing.own_finished) {
    const absl::StatusOr<ModelOrigin> there = OriginOfModel(*store);
    if (absl::IsUnavailable(there.status())) return there.status();
    own = there.ok() && there->fingerprint == plan.fingerprint && there->job == options.job;
  }
  // What the attempt had not removed of its stages, a run does.
  if (own && plan.stages.empty()) {
    RETURN_IF_ERROR(store->Remove(kStateFile));
  } else if (existing.own_unfinished) {
    const absl::StatusOr<RunState> state = RunState::Read(*store);
    if (state.ok() && state->fingerprint == plan.fingerprint) {
      options.mode = OutputMode::kResume;
      return std::nullopt;
    }
    if (absl::IsUnavailable(state.status())) return state.status();
  }
  if (!own && existing.on_existing != OnExisting::kReuseIfIdentical) {
    return std::nullopt;
  }
  ASSIGN_OR_RETURN(std::optional<std::string> json,
                   FindFinished(*store, plan.fingerprint, FileCheck::kSizes));
  if (!json) return std::nullopt;
  return PlacedManifest{
      .output = options.output,
      .manifest = {.json = *std::move(json), .fingerprint = plan.fingerprint, .warnings = {}},
      .reused = true};
}

}  // namespace

absl::StatusOr<PlacedManifest> RunPlanInto(const Plan& plan, RunOptions options,
                                           const ExistingOutput& existing) {
  if (existing.on_existing != OnExisting::kNewVersion) {
    ASSIGN_OR_RETURN(std::optional<PlacedManifest> found, Find(plan, existing, options));
    if (found) return *std::move(found);
    ASSIGN_OR_RETURN(Manifest manifest, RunPlan(plan, options));
    return PlacedManifest{.output = options.output, .manifest = std::move(manifest)};
  }

  const std::string output = options.output;
  ASSIGN_OR_RETURN(int64_t version, NewestVersion(output));
  if (version > 0 && (existing.own_unfinished || existing.own_finished)) {
    options.output = VersionUri(output, version);
    options.mode = OutputMode::kNew;
    ASSIGN_OR_RETURN(std::optional<PlacedManifest> found, Find(plan, existing, options));
    if (found) return *std::move(found);
    if (options.mode == OutputMode::kResume) --version;
  }
  for (int race = 0;; ++race) {
    options.output = VersionUri(output, ++version);
    absl::StatusOr<Manifest> manifest = RunPlan(plan, options);
    if (manifest.ok()) {
      return PlacedManifest{.output = options.output, .manifest = *std::move(manifest)};
    }
    // Another run has it.
    if (!absl::IsAlreadyExists(manifest.status()) || race == kMostRaces) return manifest.status();
    options.mode = OutputMode::kNew;
  }
}

}  // namespace pewter
