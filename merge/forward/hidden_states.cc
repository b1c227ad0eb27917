#include "merge/forward/hidden_states.h"

#include <algorithm>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status.h"

namespace pewter {
namespace {

using Means = std::vector<std::vector<std::vector<double>>>;

class Observer final : public FeatureObserver {
 public:
  Observer(ForwardPass& pass, absl::Span<const int> groups, RowState state, Means& means)
      : pass_(pass), groups_(groups), state_(state), means_(means) {}

  // Before each run: the batch that it begins with.
  void SetFirstBatch(int64_t batch) { first_batch_ = batch; }

  absl::Status Begin(int64_t stage) override {
    stage_ = stage;
    batch_ = first_batch_;
    // The stream after the embedding is what layer 0 reads, the one after layer 0's feed-forward
    // what layer 1 does.
    site_ = absl::StrCat("residual.", 2 * stage);
    return absl::OkStatus();
  }
  bool Wants(const std::string& site) const override { return site == site_; }

  absl::Status Visit(const std::string&, absl::Span<const kernels::ConstFloats> features) override {
    kernels::Backend& backend = *pass_.options().backend;
    const Batch& batch = pass_.batches()[batch_++];
    const kernels::ConstFloats& from = features[0];
    values_.resize(batch.tokens() * from.columns);
    for (int64_t token = 0; token < batch.tokens(); ++token) {
      RETURN_IF_ERROR(backend.Download(from.data + token * from.stride,
                                       values_.data() + token * from.columns,
                                       from.columns * static_cast<int64_t>(sizeof(float))));
    }
    RETURN_IF_ERROR(backend.Synchronize());
    for (int64_t row = 0; row < batch.rows; ++row) {
      const int64_t end = batch.starts[row + 1];
      const int64_t begin = state_ == RowState::kLast ? end - 1 : batch.starts[row];
      std::vector<double>& sum = means_[groups_[batch.first_row + row]][stage_];
      sum.resize(from.columns, 0.0);
      for (int64_t token = begin; token < end; ++token) {
        const float* const state = values_.data() + token * from.columns;
        for (int64_t i = 0; i < from.columns; ++i) {
          sum[i] += double{state[i]} / static_cast<double>(end - begin);
        }
      }
    }
    return absl::OkStatus();
  }
  absl::Status End(int64_t) override { return absl::OkStatus(); }

 private:
  ForwardPass& pass_;
  const absl::Span<const int> groups_;
  const RowState state_;
  Means& means_;
  int64_t first_batch_ = 0, batch_ = 0, stage_ = 0;
  std::string site_;
  std::vector<float> values_;
};

}  // namespace

absl::StatusOr<Means> MeanHiddenStates(const ForwardModel& model,
                                       std::shared_ptr<const ForwardData> data,
                                       absl::Span<const int> groups, RowState state,
                                       const ForwardOptions& options) {
  ASSIGN_OR_RETURN(const auto pass, ForwardPass::Open({model}, std::move(data), options));
  const int64_t layers = pass->model(0).shape().layers;
  std::vector<int64_t> rows(*std::max_element(groups.begin(), groups.end()) + 1, 0);
  for (int group : groups) ++rows[group];
  Means means(rows.size(), std::vector<std::vector<double>>(layers));
  Observer observer(*pass, groups, state, means);
  const auto all = static_cast<int64_t>(pass->batches().size());
  for (int64_t first = 0; first < all;) {
    ASSIGN_OR_RETURN(const int64_t count,
                     pass->BatchesThatFit(first, [](int64_t) { return int64_t{0}; }));
    observer.SetFirstBatch(first);
    // The last layer's own output enters none.
    RETURN_IF_ERROR(pass->Run(first, first + count, layers - 1, &observer));
    first += count;
  }
  for (size_t group = 0; group < means.size(); ++group) {
    for (std::vector<double>& mean : means[group]) {
      for (double& value : mean) value /= static_cast<double>(rows[group]);
    }
  }
  return means;
}

}  // namespace pewter
