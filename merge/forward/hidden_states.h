// Means of hidden states over groups of texts: what routers of mixtures are made of.
#pragma once

#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "merge/forward/data.h"
#include "merge/forward/forward_pass.h"
#include "merge/forward/model.h"

namespace pewter {

// What a row of the data stands for: its last token, or the mean of its tokens (padding has none).
enum class RowState { kLast, kMean };

// [group][layer][feature]: the mean, over the rows of the data of each group, of the residual
// stream that enters each layer. `groups` has a group for each row, from 0, none of them empty.
// Sums are double. Errors: ForwardPass's.
absl::StatusOr<std::vector<std::vector<std::vector<double>>>> MeanHiddenStates(
    const ForwardModel& model, std::shared_ptr<const ForwardData> data,
    absl::Span<const int> groups, RowState state, const ForwardOptions& options);

}  // namespace pewter
