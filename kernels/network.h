// Network: what a transformer's forward pass is made of (Backend::network()), in float32.
//
// Matrices are row-major in the backend's memory and their rows are tokens; a matrix may be some
// columns of a wider one. Products are summed in float32 by the BLAS, elementwise formulas are
// kernels/ops/activation.h's, sums of moments are double. On the CPU work is cut into pieces that
// depend on shapes alone, so bits do not depend on the number of threads; they do on the processor
// and on the backend, which agree within rounding.
//
// Order, threads and ownership are the Backend's. Errors: Internal for arguments that do not fit
// together; the Backend's for the rest. Values are not looked at: NaN gives NaN.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kernels/linear_algebra.h"
#include "kernels/ops/activation.h"

namespace pewter::kernels {

// Element (i, j) is at data[i * stride + j].
struct ConstFloats {
  const float* data = nullptr;
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t stride = 0;

  ConstFloats Columns(int64_t first, int64_t count) const {
    return {data + first, rows, count, stride};
  }
};
struct Floats {
  float* data = nullptr;
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t stride = 0;

  operator ConstFloats() const { return {data, rows, columns, stride}; }
  Floats Columns(int64_t first, int64_t count) const { return {data + first, rows, count, stride}; }
  Floats Rows(int64_t first, int64_t count) const {
    return {data + first * stride, count, columns, stride};
  }
};

// What is known of a row's prediction when some of the classes have been seen: `largest` is a
// logit, `sum` that of exp(logit - largest), `label` the label's logit, `best` the first class with
// the largest. So -log p(label) = largest + log(sum) - label.
struct Prediction {
  double sum = 0;
  float largest = -__builtin_inff();
  float label = 0;
  int32_t best = -1;
  int32_t unused = 0;
};

class Network {
 public:
  virtual ~Network() = default;

  // y = f(x op(w) + bias), or y += x op(w) + bias with `add` (then f is kNone). `bias` has
  // y.columns values or is null.
  struct LinearCall {
    ConstFloats x;
    Transpose transpose_w = Transpose::kYes;  // kYes: w is [outputs, inputs]
    ConstFloats w;
    const float* bias = nullptr;
    Activation activation = Activation::kNone;
    bool add = false;
    Floats y;
  };
  virtual absl::Status Linear(const LinearCall& call) = 0;

  // gate = f(gate) up, element by element.
  virtual absl::Status Gate(Activation activation, const ConstFloats& up, const Floats& gate) = 0;

  // Rows to mean 0 (only with `centre`) and mean square 1, times weight, plus bias if it is not
  // null: LayerNorm, or RMSNorm without `centre`. y may be x.
  struct NormCall {
    bool centre = true;
    float epsilon = 0;  // added to the mean square
    ConstFloats x;
    const float* weight = nullptr;
    const float* bias = nullptr;
    Floats y;
  };
  virtual absl::Status Normalize(const NormCall& call) = 0;

  // Rotary positions: of each head of `head` columns of x, columns i and i + pairs (i < pairs) turn
  // by the angle whose cosine and sine are cos[p * pairs + i] and sin[p * pairs + i], p the row's
  // position.
  struct RotateCall {
    Floats x;
    int64_t head = 0;
    int64_t pairs = 0;
    const int32_t* positions = nullptr;
    const float* cos = nullptr;
    const float* sin = nullptr;
  };
  virtual absl::Status Rotate(const RotateCall& call) = 0;

  // Of each sequence and head: out = softmax(scale q k^T + bias) v. Query head h belongs to key
  // head h / (heads / key_heads). A key counts for a query at most when it is not after it
  // (`causal`) and when their positions are less than `window` apart (0: no bound).
  struct AttentionCall {
    ConstFloats q;  // [tokens, heads * head]
    ConstFloats k;  // [tokens, key_heads * head]
    ConstFloats v;
    Floats out;  // [tokens, heads * head]
    int64_t heads = 0, key_heads = 0, head = 0;
    float scale = 1;
    bool causal = false;
    int64_t window = 0;
    const int32_t* positions = nullptr;  // backend's memory; rising within a sequence
    // Null, or for each head values for the distances key position - query position from
    // -(distances - 1) to distances - 1, in the backend's memory.
    const float* bias = nullptr;
    int64_t distances = 0;
    // Host memory: sequence s has rows starts[s] to starts[s + 1].
    absl::Span<const int64_t> starts;
  };
  virtual absl::Status Attention(const AttentionCall& call) = 0;

  // Row i of y is row rows[i] of x.
  virtual absl::Status Gather(const ConstFloats& x, const int32_t* rows, const Floats& y) = 0;

  // The logits of classes [first, first + logits.columns) of every row join its prediction;
  // labels[i] is the class that row i should have.
  virtual absl::Status Predict(const ConstFloats& logits, int64_t first, const int32_t* labels,
                               Prediction* predictions) = 0;

  // y = x - row, which has x.columns values. y may be x.
  virtual absl::Status Subtract(const ConstFloats& x, const float* row, const Floats& y) = 0;
  // sums[j] += sum of column j, squares[j] += sum of its squares.
  virtual absl::Status AddMoments(const ConstFloats& x, double* sums, double* squares) = 0;
  // gram += a^T b, row-major [a.columns, b.columns]; products of the rows given are summed in
  // float32. Of a with itself only the lower triangle is written.
  virtual absl::Status AddGram(const ConstFloats& a, const ConstFloats& b, double* gram) = 0;
};

}  // namespace pewter::kernels
