// Aligners that measure what the models' features do on calibration data: by activations alone, in
// stages (staged.h), and by linear maps (canonical_alignment.h).
//
// The data goes through both models once; what is kept of it is an artefact in the run's store
// (merge/forward/statistics.h), from which an interrupted run goes on.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "merge/align/aligner.h"
#include "merge/align/canonical_alignment.h"
#include "merge/align/pleas.h"
#include "merge/align/symmetry.h"
#include "merge/forward/collect.h"
#include "merge/forward/data.h"

namespace pewter {

struct DataAlignerOptions {
  std::shared_ptr<const ForwardData> data;
  std::shared_ptr<const ForwardData> objective =
      nullptr;  // stages are compared on it; null: `data`
  bool staged = false;
  bool orthogonal = false;                         // per-head maps, where they are a symmetry
  bool own_query_key = true;                       // ActivationMatchingOptions
  bool weights_last = false;                       // StagedOptions
  std::optional<CanonicalOptions> canonical = {};  // linear maps instead of orders
  std::vector<GroupKind> kinds;   // that may move; in stages only the residual stream is left out
  int ways = 1;                   // StagedOptions::ways
  std::optional<Ridge> fit = {};  // AlignerInputs::fit
  int64_t memory_bytes = 0;       // for the forward passes; 0: no bound
};

// Second moments of the reference and the model on the data, as an artefact of the run's store that
// an interrupted run goes on from.
absl::StatusOr<std::shared_ptr<const StatisticsReader>> CollectPair(
    const AlignerRun& run, std::shared_ptr<const ForwardData> data, Grams grams,
    int64_t memory_bytes);

// In stages, residual orders are compared by the loss half way between the models on the data,
// where it has labels, else by the distance of the weights.
std::shared_ptr<const Aligner> MakeDataAligner(DataAlignerOptions options);

}  // namespace pewter
