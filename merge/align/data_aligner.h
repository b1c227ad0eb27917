// Aligners that measure what the models' features do on calibration data: by activations alone, and
// in stages (staged.h).
//
// The data goes through both models once; what is kept of it is an artefact in the run's store
// (merge/forward/statistics.h), from which an interrupted run goes on.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "merge/align/aligner.h"
#include "merge/align/symmetry.h"
#include "merge/forward/data.h"

namespace pewter {

struct DataAlignerOptions {
  std::shared_ptr<const ForwardData> data;
  bool staged = false;
  bool orthogonal = false;       // per-head maps, where they are a symmetry
  std::vector<GroupKind> kinds;  // that may move; in stages only the residual stream is left out
  int ways = 1;                  // StagedOptions::ways
  int64_t memory_bytes = 0;      // for the forward passes; 0: no bound
};

// In stages, residual orders are compared by the loss half way between the models on the data,
// where it has labels, else by the distance of the weights.
std::shared_ptr<const Aligner> MakeDataAligner(DataAlignerOptions options);

}  // namespace pewter
