// RunPlan: streams the plan's tensors through a Backend into the output.
#pragma once

#include <cstdint>
#include <functional>
#include <stop_token>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "merge/engine/observer.h"
#include "merge/plan/plan.h"

namespace pewter {

enum class OutputMode {
  kNew,        // AlreadyExists when the output folder holds anything
  kResume,     // adopt the finished shards of an interrupted run of the same plan (else
               // FailedPrecondition), or start
  kOverwrite,  // the old model is unpublished first
};

// What is about to become visible at the output.
enum class WriteKind {
  kPart,      // a file of a model that is not one yet
  kManifest,  // which makes it a model
};

struct RunOptions {
  std::string output;  // URI or folder
  OutputMode mode = OutputMode::kNew;
  bool allow_nonfinite = false;  // NaN or infinity in an input is a warning, not DataLoss
  bool hash_output =
      true;  // off only to measure what hashing costs; the manifest then has no SHA-256
  // Where the models of the plan's stages go, each in a folder of its name; empty: OUTPUT.stages.
  std::string stages;
  bool keep_stages = false;  // else removed when the output is there
  // Whose the model will be, for its manifest: of those that publish at one place, only runs of the
  // same plan and job agree.
  std::string job;
  Observer* observer = nullptr;
  std::stop_token stop;  // Cancelled; finished shards stay for a resume
  // Asked, from any thread, right before each file becomes visible at the output; an error ends the
  // run with it. For a worker that may have lost its job to another one.
  std::function<absl::Status(WriteKind)> may_write;
};

// What was written; also the content of pewter_manifest.json.
struct Manifest {
  std::string json;
  std::string fingerprint;
  int64_t bytes_written = 0;
  int64_t shards_reused = 0;
  double seconds = 0;
  std::vector<std::string> warnings;
  std::string evaluation_json;  // of a plan with an evaluation; also a file of the output
};

// Stages are merged first. One that an earlier run has left finished is used again when its
// manifest has the plan's fingerprint and its files the manifest's digests, whatever the mode; an
// unfinished one of the same plan is resumed.
//
// Order of publishing: shards as they finish, then aux files, config.json, index, what an
// evaluation of the model found, manifest. So the output is a loadable model only when all of it is
// there. Errors leave finished shards and a state file for OutputMode::kResume.
absl::StatusOr<Manifest> RunPlan(const Plan& plan, const RunOptions& options);

}  // namespace pewter
