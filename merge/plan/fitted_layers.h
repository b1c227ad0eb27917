// PLeaS in a plan (merge/align/pleas.h): of the tensors of two models that a method merges,
// one of them aligned with the other, the linear layers whose inputs the calibration data shows
// are fitted by tasks, each with its bias. With a budget above 1 the feed-forward units that are
// least alike stay apart, of all layers as many, since config.json has one width for all: the plan
// fixes how many, the run which ones.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <string>

#include "absl/status/statusor.h"
#include "merge/align/pleas.h"
#include "merge/plan/plan.h"

namespace pewter {

struct LayerFits {
  const PlanAlignment& alignment;
  const std::set<std::string>& sites;  // that the statistics will have
};

// Of the method's parameters.
Ridge RidgeOf(const ParamValues& params);

// Gives the plan's tensors their tasks and widths. What config.json says of widths that changed, by
// key. FailedPrecondition for a budget that the models cannot use: groups that no fitted layer
// bounds, layers of different widths, a family without a key for the width.
absl::StatusOr<std::map<std::string, int64_t>> FitPlannedLayers(const LayerFits& fits, Plan& plan);

}  // namespace pewter
