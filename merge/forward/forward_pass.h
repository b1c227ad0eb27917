// ForwardPass: models in lock-step over the same data, layer by layer.
//
// All batches of a run go through one block before the next one's weights are read, so that memory
// holds one block of each model, what the batches are about to read, and one batch's features. An
// observer is shown the features of all models at a site (statistics.h names them) batch by batch.
// Used by one thread, the backend's.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <stop_token>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/backend.h"
#include "merge/forward/data.h"
#include "merge/forward/model.h"
#include "merge/forward/transformer.h"

namespace pewter {

struct ForwardOptions {
  kernels::Backend* backend = nullptr;
  // Of the backend's; a pass that needs more is refused before it begins. 0: no bound.
  int64_t memory_bytes = 0;
  // That go through a block together. Results depend on it in the last bits alone; they do not
  // depend on memory or threads.
  int64_t batch_tokens = 4096;
  std::stop_token stop;  // Cancelled
  // Of blocks times batches. Called from the thread of the pass.
  std::function<void(int64_t done, int64_t total)> progress = nullptr;
};

// Stage 0 is the embedding, stages 1 to layers the blocks, the last one the head.
class FeatureObserver {
 public:
  virtual ~FeatureObserver() = default;
  virtual absl::Status Begin(int64_t stage) = 0;
  // Features are computed for the head alone where somebody wants them.
  virtual bool Wants(const std::string& site) const = 0;
  // `features` of each model, for the same rows; valid until it returns.
  virtual absl::Status Visit(const std::string& site,
                             absl::Span<const kernels::ConstFloats> features) = 0;
  virtual absl::Status End(int64_t stage) = 0;
};

// A site and its width in each model.
struct Site {
  std::string name;
  std::vector<int64_t> widths;
};

class ForwardPass {
 public:
  // FailedPrecondition when a model is not known to the forward pass (transformer.h), cannot read
  // the data, or when models have other sites: another number of layers, another head, norms
  // elsewhere.
  static absl::StatusOr<std::unique_ptr<ForwardPass>> Open(absl::Span<const ForwardModel> models,
                                                           std::shared_ptr<const ForwardData> data,
                                                           ForwardOptions options);

  const ForwardData& data() const { return *data_; }
  const ForwardOptions& options() const { return options_; }
  const std::vector<Batch>& batches() const { return batches_; }
  int64_t models() const { return static_cast<int64_t>(models_.size()); }
  Transformer& model(int64_t i) { return *models_[i]; }
  int64_t stages() const { return models_[0]->shape().layers + 2; }
  // What a stage visits, in order.
  std::vector<Site> SitesOf(int64_t stage) const;

  // Bytes of the backend's memory for a run over that many tokens.
  int64_t Bytes(int64_t tokens) const;
  // How many batches from `first` on go into one run, when the caller takes extra_bytes(last) for
  // batches [first, last). ResourceExhausted when not even one does.
  absl::StatusOr<int64_t> BatchesThatFit(
      int64_t first, absl::FunctionRef<int64_t(int64_t last)> extra_bytes) const;

  // Batches [first, last) through the stages up to `last_stage`. The observer may be null. After
  // the last stage the streams are what the head reads.
  absl::Status Run(int64_t first, int64_t last, int64_t last_stage, FeatureObserver* observer);
  // Of a batch of the last run.
  kernels::Floats stream(int64_t model, int64_t batch) const;

 private:
  ForwardPass() = default;
  absl::Status RunEmbedding(FeatureObserver* observer);
  absl::Status RunLayer(int64_t layer, FeatureObserver* observer);
  absl::Status RunHead(FeatureObserver* observer);
  template <class Features>
  absl::Status Visit(FeatureObserver* observer, const std::string& site, const Features& features);
  template <class F>
  absl::Status ForModels(const F& step);
  absl::Status Advance();
  int64_t length() const;

  std::vector<std::unique_ptr<Transformer>> models_;
  std::shared_ptr<const ForwardData> data_;
  ForwardOptions options_;
  std::vector<Batch> batches_;
  int64_t largest_batch_ = 0;  // tokens

  int64_t first_ = 0, last_ = 0;  // of the run
  int64_t done_ = 0, total_ = 0;  // for progress
  // [model][batch - first_]
  std::vector<std::vector<FloatBuffer>> streams_;
  std::vector<std::unique_ptr<kernels::Buffer>> positions_;  // [batch - first_]
};

// Host values in the backend's memory.
absl::StatusOr<std::unique_ptr<kernels::Buffer>> UploadIntegers(kernels::Backend& backend,
                                                                absl::Span<const int32_t> values);

}  // namespace pewter
