// A forward pass's operations of the plugin: products by cuBLAS, the rest by kernels. Sums have one
// fixed order: a thread block sums what belongs together in shared memory, and nothing is added
// atomically.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kernels/cuda/lanes.h"
#include "kernels/cuda/plugin.h"
#include "kernels/cuda/scratch.h"
#include "kernels/cuda/stream.h"

namespace pewter::kernels::cuda {
namespace {

#define RETURN_IF_NONZERO(call)                                \
  do {                                                         \
    if (const int error_ = (call); error_ != 0) return error_; \
  } while (false)

constexpr int kThreads = 256;
constexpr unsigned kMostBlocks = 1 << 16;
// Scores of some queries of all heads.
constexpr int64_t kScoreElements = int64_t{1} << 25;
constexpr int64_t kGramElements = int64_t{1} << 24;

unsigned Blocks(int64_t elements) {
  return static_cast<unsigned>(
      std::clamp<int64_t>((elements + kThreads - 1) / kThreads, 1, kMostBlocks));
}
unsigned RowBlocks(int64_t rows) {
  return static_cast<unsigned>(std::clamp<int64_t>(rows, 1, kMostBlocks));
}

// --- Elementwise --------------------------------------------------------------------------------

template <Activation f>
__device__ float ActivateOne(float x) {
  return Activate<f>(Lanes<float, 1>{{x}}).lane[0];
}

// y = f(y + bias)
template <Activation f>
__global__ void FinishKernel(FloatsArg y, const float* bias) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x, size = y.rows * y.columns;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < size; i += step) {
    const int64_t column = i % y.columns;
    float& value = y.data[i / y.columns * y.stride + column];
    value = ActivateOne<f>(bias != nullptr ? value + bias[column] : value);
  }
}

// gate = f(gate) up
template <Activation f>
__global__ void GateKernel(FloatsArg up, FloatsArg gate) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x, size = gate.rows * gate.columns;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < size; i += step) {
    const int64_t row = i / gate.columns, column = i % gate.columns;
    float& value = gate.data[row * gate.stride + column];
    value = ActivateOne<f>(value) * up.data[row * up.stride + column];
  }
}

// Calls f with the activation as a constant; gives its result.
template <class F>
int WithActivation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::kNone:
      return f(std::integral_constant<Activation, Activation::kNone>{});
    case Activation::kGelu:
      return f(std::integral_constant<Activation, Activation::kGelu>{});
    case Activation::kGeluTanh:
      return f(std::integral_constant<Activation, Activation::kGeluTanh>{});
    case Activation::kQuickGelu:
      return f(std::integral_constant<Activation, Activation::kQuickGelu>{});
    case Activation::kRelu:
      return f(std::integral_constant<Activation, Activation::kRelu>{});
    case Activation::kSilu:
      return f(std::integral_constant<Activation, Activation::kSilu>{});
    case Activation::kTanh:
      return f(std::integral_constant<Activation, Activation::kTanh>{});
  }
  return cudaErrorInvalidValue;
}

__global__ void RotateKernel(RotateCall call) {
  const int64_t heads = call.x.columns / call.head;
  const int64_t step = int64_t{gridDim.x} * blockDim.x, size = call.x.rows * heads * call.pairs;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < size; i += step) {
    const int64_t pair = i % call.pairs, head = i / call.pairs % heads;
    const int64_t row = i / call.pairs / heads;
    const int64_t at = int64_t{call.positions[row]} * call.pairs + pair;
    float* const low = call.x.data + row * call.x.stride + head * call.head + pair;
    const float a = low[0], b = low[call.pairs], cos = call.cos[at], sin = call.sin[at];
    low[0] = a * cos - b * sin;
    low[call.pairs] = b * cos + a * sin;
  }
}

__global__ void GatherKernel(GatherCall call) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x, size = call.y.rows * call.y.columns;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < size; i += step) {
    const int64_t row = i / call.y.columns, column = i % call.y.columns;
    call.y.data[row * call.y.stride + column] =
        call.x.data[int64_t{call.rows[row]} * call.x.stride + column];
  }
}

__global__ void SubtractKernel(SubtractCall call) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x, size = call.x.rows * call.x.columns;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < size; i += step) {
    const int64_t row = i / call.x.columns, column = i % call.x.columns;
    call.y.data[row * call.y.stride + column] =
        call.x.data[row * call.x.stride + column] - call.row[column];
  }
}

// --- By rows ------------------------------------------------------------------------------------

struct Plus {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Maximum {
  __device__ float operator()(float a, float b) const { return a > b ? a : b; }
};

// The fold of all threads' values, given to all of them.
template <class T, class F>
__device__ T FoldBlock(T value, T* shared, const F& f) {
  __syncthreads();  // the last fold has been read
  shared[threadIdx.x] = value;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) {
      shared[threadIdx.x] = f(shared[threadIdx.x], shared[threadIdx.x + half]);
    }
    __syncthreads();
  }
  return shared[0];
}

__global__ void __launch_bounds__(kThreads) NormKernel(NormCall call) {
  __shared__ float shared[kThreads];
  const int64_t columns = call.x.columns;
  for (int64_t row = blockIdx.x; row < call.x.rows; row += gridDim.x) {
    const float* const x = call.x.data + row * call.x.stride;
    float* const y = call.y.data + row * call.y.stride;
    float mean = 0;
    if (call.centre) {
      float sum = 0;
      for (int64_t j = threadIdx.x; j < columns; j += kThreads) sum += x[j];
      mean = FoldBlock(sum, shared, Plus{}) / static_cast<float>(columns);
    }
    float squares = 0;
    for (int64_t j = threadIdx.x; j < columns; j += kThreads) {
      squares += (x[j] - mean) * (x[j] - mean);
    }
    squares = FoldBlock(squares, shared, Plus{});
    const float scale = 1 / sqrtf(squares / static_cast<float>(columns) + call.epsilon);
    for (int64_t j = threadIdx.x; j < columns; j += kThreads) {
      const float v = (x[j] - mean) * scale * call.weight[j];
      y[j] = call.bias != nullptr ? v + call.bias[j] : v;
    }
  }
}

// Softmax of scores [heads, rows, keys] of queries from `first` on in a sequence whose positions
// begin at `positions`.
struct SoftmaxParams {
  float* scores;
  int64_t heads, rows, keys, first;
  bool causal;
  int64_t window;
  const int32_t* positions;
  const float* bias;
  int64_t distances;
};
__global__ void __launch_bounds__(kThreads) SoftmaxKernel(SoftmaxParams params) {
  __shared__ float shared[kThreads];
  const float lowest = -INFINITY;
  for (int64_t item = blockIdx.x; item < params.heads * params.rows; item += gridDim.x) {
    float* const row = params.scores + item * params.keys;
    const int64_t query = params.first + item % params.rows;
    const float* const bias = params.bias == nullptr
                                  ? nullptr
                                  : params.bias + item / params.rows * (2 * params.distances - 1) +
                                        params.distances - 1 - params.positions[query];
    float largest = lowest;
    for (int64_t key = threadIdx.x; key < params.keys; key += kThreads) {
      float score = row[key];
      bool seen = !params.causal || key <= query;
      if (params.window > 0) {
        const int64_t apart = int64_t{params.positions[query]} - params.positions[key];
        seen = seen && apart < params.window && -apart < params.window;
      }
      if (bias != nullptr) score += bias[params.positions[key]];
      row[key] = seen ? score : lowest;
      largest = Maximum{}(row[key], largest);
    }
    largest = FoldBlock(largest, shared, Maximum{});
    float sum = 0;
    for (int64_t key = threadIdx.x; key < params.keys; key += kThreads) {
      const float e = Exp(Lanes<float, 1>{{row[key] - largest}}).lane[0];
      row[key] = e;
      sum += e;
    }
    sum = FoldBlock(sum, shared, Plus{});
    const float scale = 1 / sum;
    for (int64_t key = threadIdx.x; key < params.keys; key += kThreads) row[key] *= scale;
  }
}

// Prediction of kernels/network.h.
struct PredictionState {
  double sum;
  float largest, label;
  int32_t best, unused;
};
__global__ void __launch_bounds__(kThreads) PredictKernel(PredictCall call) {
  __shared__ float shared[kThreads];
  __shared__ double wide[kThreads];
  __shared__ int first_place[kThreads];
  auto* const predictions = static_cast<PredictionState*>(call.predictions);
  const int64_t columns = call.logits.columns;
  for (int64_t row = blockIdx.x; row < call.logits.rows; row += gridDim.x) {
    const float* const logits = call.logits.data + row * call.logits.stride;
    const PredictionState before = predictions[row];
    float here = -INFINITY;
    for (int64_t j = threadIdx.x; j < columns; j += kThreads) here = Maximum{}(logits[j], here);
    here = FoldBlock(here, shared, Maximum{});
    const bool larger = here > before.largest;
    const float largest = larger ? here : before.largest;
    double sum = 0;
    int place = static_cast<int>(columns);
    for (int64_t j = threadIdx.x; j < columns; j += kThreads) {
      sum += Exp(Lanes<float, 1>{{logits[j] - largest}}).lane[0];
      if (logits[j] == here && j < place) place = static_cast<int>(j);
    }
    sum = FoldBlock(sum, wide, Plus{});
    place = FoldBlock(place, first_place, [](int a, int b) { return a < b ? a : b; });
    if (threadIdx.x == 0) {
      PredictionState now = before;
      if (larger) {
        if (before.best >= 0) now.sum *= exp(double{before.largest} - double{here});
        now.largest = here;
        now.best = static_cast<int32_t>(call.first + place);
      }
      now.sum += sum;
      const int64_t label = call.labels[row] - call.first;
      if (label >= 0 && label < columns) now.label = logits[label];
      predictions[row] = now;
    }
    __syncthreads();
  }
}

// --- Moments ------------------------------------------------------------------------------------

constexpr int kMomentColumns = 32, kMomentRows = 8;

__global__ void MomentsKernel(MomentsCall call) {
  __shared__ double sums[kMomentRows][kMomentColumns], squares[kMomentRows][kMomentColumns];
  const int64_t column = int64_t{blockIdx.x} * kMomentColumns + threadIdx.x;
  double sum = 0, square = 0;
  if (column < call.x.columns) {
    for (int64_t row = threadIdx.y; row < call.x.rows; row += kMomentRows) {
      const double x = call.x.data[row * call.x.stride + column];
      sum += x;
      square += x * x;
    }
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  squares[threadIdx.y][threadIdx.x] = square;
  __syncthreads();
  if (threadIdx.y != 0 || column >= call.x.columns) return;
  for (int row = 1; row < kMomentRows; ++row) {
    sum += sums[row][threadIdx.x];
    square += squares[row][threadIdx.x];
  }
  call.sums[column] += sum;
  call.squares[column] += square;
}

// gram += product, whose rows are those of the Gram matrix from `first` on.
__global__ void AddProductKernel(const float* product, int64_t first, int64_t rows, int64_t columns,
                                 bool lower_only, double* gram) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < rows * columns; i += step) {
    const int64_t row = first + i / columns, column = i % columns;
    if (lower_only && column > row) continue;
    gram[row * columns + column] += product[i];
  }
}

}  // namespace

// --- The functions of the table -----------------------------------------------------------------

int Linear(Stream* stream, const LinearCall* call) {
  RETURN_IF_CUDA_ERROR(cudaSetDevice(stream->ordinal));
  const FloatsArg &x = call->x, &w = call->w, &y = call->y;
  if (y.rows == 0 || y.columns == 0) return 0;
  RETURN_IF_NONZERO(MultiplyFloats(stream, {.transpose_a = false,
                                            .transpose_b = call->transpose_w,
                                            .rows = y.rows,
                                            .columns = y.columns,
                                            .inner = x.columns,
                                            .alpha = 1,
                                            .a = x.data,
                                            .a_stride = x.stride,
                                            .a_next = 0,
                                            .b = w.data,
                                            .b_stride = w.stride,
                                            .b_next = 0,
                                            .beta = call->add ? 1.f : 0.f,
                                            .c = y.data,
                                            .c_stride = y.stride,
                                            .c_next = 0,
                                            .batch = 1}));
  if (call->bias == nullptr && call->activation == Activation::kNone) return 0;
  return WithActivation(call->activation, [&](auto f) -> int {
    FinishKernel<decltype(f)::value>
        <<<Blocks(y.rows * y.columns), kThreads, 0, stream->stream>>>(y, call->bias);
    RETURN_IF_CUDA_ERROR(cudaGetLastError());
    return cudaSuccess;
  });
}

int Gate(Stream* stream, const GateCall* call) {
  RETURN_IF_CUDA_ERROR(cudaSetDevice(stream->ordinal));
  if (call->gate.rows == 0) return 0;
  return WithActivation(call->activation, [&](auto f) -> int {
    GateKernel<decltype(f)::value>
        <<<Blocks(call->gate.rows * call->gate.columns), kThreads, 0, stream->stream>>>(call->up,
                                                                                        call->gate);
    RETURN_IF_CUDA_ERROR(cudaGetLastError());
    return cudaSuccess;
  });
}

int Normalize(Stream* stream, const NormCall* call) {
  RETURN_IF_CUDA_ERROR(cudaSetDevice(stream->ordinal));
  if (call->x.rows == 0) return 0;
  NormKernel<<<RowBlocks(call->x.rows), kThreads, 0, stream->stream>>>(*call);
  RETURN_IF_CUDA_ERROR(cudaGetLastError());
  return cudaSuccess;
}

int Rotate(Stream* stream, const RotateCall* call) {
  RETURN_IF_CUDA_ERROR(cudaSetDevice(stream->ordinal));
  const int64_t pairs = call->x.rows * (call->x.columns / call->head) * call->pairs;
  if (pairs == 0) return 0;
  RotateKernel<<<Blocks(pairs), kThreads, 0, stream->stream>>>(*call);
  RETURN_IF_CUDA_ERROR(cudaGetLastError());
  return cudaSuccess;
}

int Attention(Stream* stream, const AttentionCall* call) {
  RETURN_IF_CUDA_ERROR(cudaSetDevice(stream->ordinal));
  const int64_t sharing = call->heads / call->key_heads, head = call->head;
  int64_t longest = 0;
  for (int64_t s = 0; s < call->sequences; ++s) {
    longest = std::max(longest, call->starts[s + 1] - call->starts[s]);
  }
  if (longest == 0) return 0;
  const int64_t most = std::clamp<int64_t>(kScoreElements / (call->heads * longest), 1, longest);
  Scratch scratch(stream);
  RETURN_IF_NONZERO(scratch.Take(call->heads * most * longest * sizeof(float)));
  float* const scores = scratch.floats();
  for (int64_t s = 0; s < call->sequences; ++s) {
    const int64_t begin = call->starts[s], keys = call->starts[s + 1] - begin;
    for (int64_t first = 0; first < keys; first += most) {
      const int64_t rows = std::min(most, keys - first);
      // The query heads of a key head are a batch that shares its keys; without sharing, all heads.
      const int64_t batch = sharing == 1 ? call->heads : sharing;
      const int64_t next_key = sharing == 1 ? head : 0;
      for (int64_t h = 0; h < call->heads; h += batch) {
        RETURN_IF_NONZERO(
            MultiplyFloats(stream, {.transpose_a = false,
                                    .transpose_b = true,
                                    .rows = rows,
                                    .columns = keys,
                                    .inner = head,
                                    .alpha = call->scale,
                                    .a = call->q.data + (begin + first) * call->q.stride + h * head,
                                    .a_stride = call->q.stride,
                                    .a_next = head,
                                    .b = call->k.data + begin * call->k.stride + h / sharing * head,
                                    .b_stride = call->k.stride,
                                    .b_next = next_key,
                                    .beta = 0,
                                    .c = scores + h * rows * keys,
                                    .c_stride = keys,
                                    .c_next = rows * keys,
                                    .batch = batch}));
      }
      SoftmaxKernel<<<RowBlocks(call->heads * rows), kThreads, 0, stream->stream>>>(
          {.scores = scores,
           .heads = call->heads,
           .rows = rows,
           .keys = keys,
           .first = first,
           .causal = call->causal,
           .window = call->window,
           .positions = call->positions == nullptr ? nullptr : call->positions + begin,
           .bias = call->bias,
           .distances = call->distances});
      RETURN_IF_CUDA_ERROR(cudaGetLastError());
      for (int64_t h = 0; h < call->heads; h += batch) {
        RETURN_IF_NONZERO(MultiplyFloats(
            stream, {.transpose_a = false,
                     .transpose_b = false,
                     .rows = rows,
                     .columns = head,
                     .inner = keys,
                     .alpha = 1,
                     .a = scores + h * rows * keys,
                     .a_stride = keys,
                     .a_next = rows * keys,
                     .b = call->v.data + begin * call->v.stride + h / sharing * head,
                     .b_stride = call->v.stride,
                     .b_next = next_key,
                     .beta = 0,
                     .c = call->out.data + (begin + first) * call->out.stride + h * head,
                     .c_stride = call->out.stride,
                     .c_next = head,
                     .batch = batch}));
      }
    }
  }
  return cudaSuccess;
}

int Gather(Stream* stream, const GatherCall* call) {
  RETURN_IF_CUDA_ERROR(cudaSetDevice(stream->ordinal));
  if (call->y.rows == 0) return 0;
  GatherKernel<<<Blocks(call->y.rows * call->y.columns), kThreads, 0, stream->stream>>>(*call);
  RETURN_IF_CUDA_ERROR(cudaGetLastError());
  return cudaSuccess;
}

int Predict(Stream* stream, const PredictCall* call) {
  RETURN_IF_CUDA_ERROR(cudaSetDevice(stream->ordinal));
  if (call->logits.rows == 0) return 0;
  PredictKernel<<<RowBlocks(call->logits.rows), kThreads, 0, stream->stream>>>(*call);
  RETURN_IF_CUDA_ERROR(cudaGetLastError());
  return cudaSuccess;
}

int Subtract(Stream* stream, const SubtractCall* call) {
  RETURN_IF_CUDA_ERROR(cudaSetDevice(stream->ordinal));
  if (call->x.rows == 0 || call->x.columns == 0) return 0;
  SubtractKernel<<<Blocks(call->x.rows * call->x.columns), kThreads, 0, stream->stream>>>(*call);
  RETURN_IF_CUDA_ERROR(cudaGetLastError());
  return cudaSuccess;
}

int AddMoments(Stream* stream, const MomentsCall* call) {
  RETURN_IF_CUDA_ERROR(cudaSetDevice(stream->ordinal));
  if (call->x.rows == 0 || call->x.columns == 0) return 0;
  const auto blocks =
      static_cast<unsigned>((call->x.columns + kMomentColumns - 1) / kMomentColumns);
  MomentsKernel<<<blocks, dim3(kMomentColumns, kMomentRows), 0, stream->stream>>>(*call);
  RETURN_IF_CUDA_ERROR(cudaGetLastError());
  return cudaSuccess;
}

int AddGram(Stream* stream, const GramCall* call) {
  RETURN_IF_CUDA_ERROR(cudaSetDevice(stream->ordinal));
  const FloatsArg &a = call->a, &b = call->b;
  if (a.rows == 0 || a.columns == 0 || b.columns == 0) return 0;
  const int64_t most = std::clamp<int64_t>(kGramElements / b.columns, 1, a.columns);
  Scratch product(stream);
  RETURN_IF_NONZERO(product.Take(most * b.columns * sizeof(float)));
  for (int64_t first = 0; first < a.columns; first += most) {
    const int64_t rows = std::min(most, a.columns - first);
    RETURN_IF_NONZERO(MultiplyFloats(stream, {.transpose_a = true,
                                              .transpose_b = false,
                                              .rows = rows,
                                              .columns = b.columns,
                                              .inner = a.rows,
                                              .alpha = 1,
                                              .a = a.data + first,
                                              .a_stride = a.stride,
                                              .a_next = 0,
                                              .b = b.data,
                                              .b_stride = b.stride,
                                              .b_next = 0,
                                              .beta = 0,
                                              .c = product.floats(),
                                              .c_stride = b.columns,
                                              .c_next = 0,
                                              .batch = 1}));
    AddProductKernel<<<Blocks(rows * b.columns), kThreads, 0, stream->stream>>>(
        product.floats(), first, rows, b.columns, call->lower_only, call->gram);
    RETURN_IF_CUDA_ERROR(cudaGetLastError());
  }
  return cudaSuccess;
}

}  // namespace pewter::kernels::cuda
