// How a run uses its memory: decided from the plan alone, so that planning can state and refuse
// what running will do.
#pragma once

#include <cstdint>

#include "absl/status/statusor.h"
#include "merge/plan/plan.h"

namespace pewter {

struct Sizing {
  int64_t tile_elements =
      0;  // a multiple of kernels::kReduceBlock; never depends on memory or threads
  int lanes = 1;
  int open_shards = 1;
  int64_t window_bytes = 0;      // finished tiles of one shard that wait to be written
  int64_t candidate_bytes = 0;   // elements near a threshold, of all tensors in flight
  int64_t task_bytes = 0;        // of all tasks at a time
  int64_t read_ahead_bytes = 0;  // of inputs in distant stores; 0: there are none
  int64_t peak_bytes = 0;        // anonymous memory of all that
};

// Fits lanes and windows into plan.options.memory_bytes (resolved, with device and threads).
// ResourceExhausted when one lane does not fit, or a method's whole-tensor need for the largest of
// its tensors does not.
absl::StatusOr<Sizing> SizeRun(const Plan& plan);

}  // namespace pewter
