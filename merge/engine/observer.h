// Observer: what a running merge tells its caller. base, kernels, store and merge never log; they
// call this.
#pragma once

#include <cstdint>
#include <string>

#include "absl/strings/string_view.h"

namespace pewter {

enum class Phase { kPlanning, kMerging, kPublishing, kEvaluating, kDone };
absl::string_view PhaseName(Phase phase);  // "planning", ...

// A snapshot: latest wins.
struct Progress {
  Phase phase = Phase::kPlanning;
  int64_t tensors_done = 0, tensors_total = 0;
  int64_t bytes_read = 0;
  int64_t bytes_written = 0, bytes_total = 0;  // of the output
  int64_t shards_reused = 0;                   // found finished by a resume
  double seconds = 0;                          // since the merge began
  double bytes_per_second = 0;                 // written, over the last few seconds
  double seconds_left = -1;                    // negative: unknown
  std::string current;                         // a tensor being merged
  // Of a recipe with stages: which one all of the above is about, from 1 (the output is the last),
  // and its name (empty for the output). 0 of 0 without stages.
  int stage = 0, stages = 0;
  std::string stage_name;
};

// Called from any thread, at most about ten times a second for progress. Must not block.
class Observer {
 public:
  virtual ~Observer() = default;
  virtual void OnProgress(const Progress& progress) {}
  virtual void OnWarning(absl::string_view message) {}
};

}  // namespace pewter
