// The statistics pass: second moments of features of models over the same data (statistics.h).
//
// Features are float32. Products are summed in float32 over one batch, of features from which the
// first batch's mean has been taken, because a mean far larger than the deviations would leave them
// few digits; batches are summed in double, and the means are put back in double at the end. Sums
// and squares are double throughout. Every token that is not padding counts, special ones too.
//
// The moments of a layer are written when all batches have gone through it, to an object of their
// own beside the artefact (KEY.part-N), so that memory holds those of one layer. The artefact is
// put together of them at the end. A pass that was killed is resumed when it is started again with
// the same models, data and choice: the features of finished layers are computed again, their
// moments are not. The bytes are the same, resumed or not.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "merge/forward/data.h"
#include "merge/forward/forward_pass.h"
#include "merge/forward/model.h"
#include "store/object_store.h"

namespace pewter {

// What is collected of a site.
enum class Grams {
  kNone,       // nothing
  kDiagonals,  // sums and squares of each model
  kOwn,        // and the Gram matrix of each model
  kCross,      // or those of each model with each later one
  kAll,        // or both
};

struct StatisticsOptions {
  ForwardOptions forward;
  // By the site's name.
  std::function<Grams(absl::string_view site)> choose;
  bool overwrite = false;  // an artefact of something else
};

struct StatisticsResult {
  bool reused = false;         // it was there already
  int64_t layers_resumed = 0;  // stages of which moments were found finished
};

// Writes the artefact `key` of `store`. AlreadyExists when there is one of other models, data or
// choices; ResourceExhausted when the features of all data, one layer's weights and moments do not
// fit in memory; else ForwardPass's errors, before anything is computed.
absl::StatusOr<StatisticsResult> CollectStatistics(absl::Span<const ForwardModel> models,
                                                   std::shared_ptr<const ForwardData> data,
                                                   const StatisticsOptions& options,
                                                   std::shared_ptr<ObjectStore> store,
                                                   absl::string_view key);

}  // namespace pewter
