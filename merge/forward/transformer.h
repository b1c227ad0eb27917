// Transformer: one model of a forward pass, on one backend: the steps of its blocks, with the
// weights of one block at a time.
//
// A batch is some rows of the data without their padding: all tokens one after the other, which
// changes nothing for the tokens that are left, as each keeps its position. The caller goes through
// the steps in order and may look at the features between them; a feature is overwritten by the
// same step of the next batch. Used by one thread, the backend's; `Backend` and model must outlive
// it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/network.h"
#include "merge/forward/data.h"
#include "merge/forward/family.h"
#include "merge/forward/model.h"

namespace pewter {

// Rows [first_row, first_row + rows) of the data, as tokens.
struct Batch {
  int64_t first_row = 0;
  int64_t rows = 0;
  std::vector<int64_t> starts;   // of each row's tokens, and the end
  std::vector<int32_t> columns;  // where in its row a token is
  int64_t tokens() const { return starts.back(); }
};

// Whole rows of at most `tokens` tokens together, or single longer ones.
std::vector<Batch> MakeBatches(const ForwardData& data, const NetworkShape& shape, int64_t tokens);

// Float32 in the backend's memory.
class FloatBuffer {
 public:
  FloatBuffer() = default;
  static absl::StatusOr<FloatBuffer> Make(kernels::Backend& backend, int64_t elements);
  float* data() const {
    return buffer_ == nullptr ? nullptr : static_cast<float*>(buffer_->data());
  }
  kernels::Floats View(int64_t rows, int64_t columns) const {
    return {data(), rows, columns, columns};
  }
  bool empty() const { return buffer_ == nullptr; }

 private:
  std::unique_ptr<kernels::Buffer> buffer_;
};

class Transformer {
 public:
  // Looks everything up that the blocks need, and the head's tensors where it has one.
  // FailedPrecondition, naming the model, for a family or setting that is not known, a tensor that
  // is missing or has another shape than config.json says.
  static absl::StatusOr<std::unique_ptr<Transformer>> Open(const ForwardModel& model,
                                                           kernels::Backend& backend);
  ~Transformer();

  const std::string& name() const;
  const NetworkShape& shape() const;
  // Classes of the head: the vocabulary, or a classifier's; 0 without.
  int64_t classes() const;

  // FailedPrecondition when the model cannot read the data: ids beyond its vocabulary, rows longer
  // than its positions, another size of images.
  absl::Status Check(const ForwardData& data) const;

  // Bytes of the backend's memory: of features for batches of that many tokens in rows of at most
  // `length`, and of the weights that are there at once.
  int64_t FeatureBytes(int64_t tokens, int64_t length) const;
  int64_t WeightBytes(int64_t length) const;
  // Takes the memory for features.
  absl::Status Reserve(int64_t tokens);

  // The embedding, into `stream` [tokens, width]: between BeginEmbedding and EndEmbedding.
  absl::Status BeginEmbedding(int64_t length);
  absl::Status Embed(const ForwardData& data, const Batch& batch, const kernels::Floats& stream);
  absl::Status EndEmbedding();

  absl::Status LoadLayer(int64_t layer, int64_t length);
  // The steps of the loaded block. `positions` are the batch's columns in the backend's memory.
  absl::Status ReadForAttention(const kernels::Floats& stream);
  absl::Status Project();
  absl::Status Attend(const Batch& batch, const int32_t* positions);
  absl::Status AddAttention(const kernels::Floats& stream);
  absl::Status ReadForFeedForward(const kernels::Floats& stream);
  absl::Status Expand();
  absl::Status AddFeedForward(const kernels::Floats& stream);

  // Features, as the step before left them.
  kernels::ConstFloats input() const;  // of ReadForAttention or ReadForFeedForward
  kernels::ConstFloats query() const;
  kernels::ConstFloats key() const;
  kernels::ConstFloats value() const;
  kernels::ConstFloats context() const;
  kernels::ConstFloats inner() const;

  // What follows the blocks. FinishStream is the last norm, where there is one.
  absl::Status LoadHead();
  absl::Status FinishStream(const kernels::Floats& stream);
  // What the head's last layer reads, of rows of the finished stream; `out` is [rows, width].
  absl::Status ReadForHead(const kernels::ConstFloats& stream, const kernels::Floats& out);
  // Takes memory for classes [first, first + count) and loads them.
  absl::Status LoadClasses(int64_t first, int64_t count);
  // Their logits.
  absl::Status Classify(const kernels::ConstFloats& input, const kernels::Floats& logits);

 private:
  struct Data;
  explicit Transformer(std::unique_ptr<Data> data);
  std::unique_ptr<Data> data_;
};

}  // namespace pewter
