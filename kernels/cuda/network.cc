#include "kernels/cuda/network.h"

#include <utility>

#include "base/status.h"
#include "kernels/cuda/linear_algebra.h"
#include "kernels/network_arguments.h"

namespace pewter::kernels::cuda {
namespace {

FloatsArg Arg(const ConstFloats& m) {
  return {
      .data = const_cast<float*>(m.data), .rows = m.rows, .columns = m.columns, .stride = m.stride};
}

class CudaNetwork : public Network {
 public:
  CudaNetwork(const Plugin& plugin, Stream* stream, std::string name)
      : plugin_(plugin), stream_(stream), name_(std::move(name)) {}

  absl::Status Linear(const Network::LinearCall& call) override {
    RETURN_IF_ERROR(CheckLinear(call));
    const cuda::LinearCall args = {.x = Arg(call.x),
                                   .w = Arg(call.w),
                                   .y = Arg(call.y),
                                   .transpose_w = call.transpose_w == Transpose::kYes,
                                   .bias = call.bias,
                                   .activation = call.activation,
                                   .add = call.add};
    return Status(plugin_.linear(stream_, &args), "a layer");
  }

  absl::Status Gate(Activation activation, const ConstFloats& up, const Floats& gate) override {
    RETURN_IF_ERROR(CheckGate(up, gate));
    const GateCall args = {.up = Arg(up), .gate = Arg(gate), .activation = activation};
    return Status(plugin_.gate(stream_, &args), "a gate");
  }

  absl::Status Normalize(const Network::NormCall& call) override {
    RETURN_IF_ERROR(CheckNorm(call));
    const cuda::NormCall args = {.centre = call.centre,
                                 .epsilon = call.epsilon,
                                 .x = Arg(call.x),
                                 .y = Arg(call.y),
                                 .weight = call.weight,
                                 .bias = call.bias};
    return Status(plugin_.normalize(stream_, &args), "a norm");
  }

  absl::Status Rotate(const Network::RotateCall& call) override {
    RETURN_IF_ERROR(CheckRotate(call));
    const cuda::RotateCall args = {.x = Arg(call.x),
                                   .head = call.head,
                                   .pairs = call.pairs,
                                   .positions = call.positions,
                                   .cos = call.cos,
                                   .sin = call.sin};
    return Status(plugin_.rotate(stream_, &args), "rotary positions");
  }

  absl::Status Attention(const Network::AttentionCall& call) override {
    RETURN_IF_ERROR(CheckAttention(call));
    const cuda::AttentionCall args = {.q = Arg(call.q),
                                      .k = Arg(call.k),
                                      .v = Arg(call.v),
                                      .out = Arg(call.out),
                                      .heads = call.heads,
                                      .key_heads = call.key_heads,
                                      .head = call.head,
                                      .scale = call.scale,
                                      .causal = call.causal,
                                      .window = call.window,
                                      .positions = call.positions,
                                      .bias = call.bias,
                                      .distances = call.distances,
                                      .starts = call.starts.data(),
                                      .sequences = static_cast<int64_t>(call.starts.size()) - 1};
    return Status(plugin_.attention(stream_, &args), "attention");
  }

  absl::Status Gather(const ConstFloats& x, const int32_t* rows, const Floats& y) override {
    RETURN_IF_ERROR(CheckGather(x, y));
    const GatherCall args = {.x = Arg(x), .y = Arg(y), .rows = rows};
    return Status(plugin_.gather(stream_, &args), "taking rows");
  }

  absl::Status Predict(const ConstFloats& logits, int64_t first, const int32_t* labels,
                       Prediction* predictions) override {
    RETURN_IF_ERROR(CheckPredict(logits, first));
    const PredictCall args = {
        .logits = Arg(logits), .first = first, .labels = labels, .predictions = predictions};
    return Status(plugin_.predict(stream_, &args), "predictions");
  }

  absl::Status Subtract(const ConstFloats& x, const float* row, const Floats& y) override {
    RETURN_IF_ERROR(CheckSubtract(x, y));
    const SubtractCall args = {.x = Arg(x), .y = Arg(y), .row = row};
    return Status(plugin_.subtract(stream_, &args), "a difference");
  }

  absl::Status AddMoments(const ConstFloats& x, double* sums, double* squares) override {
    RETURN_IF_ERROR(CheckMoments(x));
    const MomentsCall args = {.x = Arg(x), .sums = sums, .squares = squares};
    return Status(plugin_.add_moments(stream_, &args), "moments");
  }

  absl::Status AddGram(const ConstFloats& a, const ConstFloats& b, double* gram) override {
    RETURN_IF_ERROR(CheckAddGram(a, b));
    const GramCall args = {
        .a = Arg(a), .b = Arg(b), .gram = gram, .lower_only = SameFeatures(a, b)};
    return Status(plugin_.add_gram(stream_, &args), "a Gram matrix");
  }

 private:
  absl::Status Status(int error, absl::string_view doing) const {
    return Annotate(ToStatus(plugin_, error, doing), name_);
  }

  const Plugin& plugin_;
  Stream* const stream_;
  const std::string name_;
};

}  // namespace

std::unique_ptr<Network> MakeNetwork(const Plugin& plugin, Stream* stream, std::string name) {
  return std::make_unique<CudaNetwork>(plugin, stream, std::move(name));
}

}  // namespace pewter::kernels::cuda
