// libpewter_cuda.so: the kernels on CUDA and the table of functions around them (plugin.h).
//
// Map: a thread takes 8 elements, loaded 16 bytes at a time where the views are aligned, and the
// grid strides over the tensor. Reduce: a thread block sums one reduction block in the order that
// kernels/ops/reduce_ops.h states. Histogram: bins are private to a thread block, in shared memory,
// and lanes of a warp that hit the same bin are counted together. Sift: a warp takes room for the
// candidates of its lanes with one atomic addition.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <new>
#include <type_traits>
#include <variant>

#include "kernels/cuda/lanes.h"
#include "kernels/cuda/plugin.h"
#include "kernels/cuda/stream.h"
#include "kernels/ops/float_formats.h"

namespace pewter::kernels::cuda {

namespace {

constexpr int kRadixBins = 1 << 16;
constexpr int kMapLanes = 8;
constexpr int kReduceLanes = 4;
constexpr int kMapThreads = 256;
constexpr int kHistogramThreads = 1024;
// The sign is cleared, so the first digit has half the bins.
constexpr int kFirstBins = kRadixBins / 2;
constexpr int kSharedBinBytes = kFirstBins * sizeof(uint32_t);

// --- Formats ------------------------------------------------------------------------------------

template <DType kDType>
struct BitsOf {
  static constexpr int kWidth = static_cast<int>(ByteWidth(kDType));
  using type =
      std::conditional_t<kWidth == 8, uint64_t,
                         std::conditional_t<kWidth == 4, uint32_t,
                                            std::conditional_t<kWidth == 2, uint16_t, uint8_t>>>;
};

template <class T, DType kDType>
__device__ T Decode(typename BitsOf<kDType>::type bits) {
  if constexpr (kDType == DType::kF64) {
    return BitCast<double>(bits);
  } else if constexpr (kDType == DType::kF32) {
    return BitCast<float>(bits);
  } else if constexpr (kDType == DType::kBF16) {
    return FloatFromBF16<float>(static_cast<uint32_t>(bits));
  } else if constexpr (kDType == DType::kF16) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
  } else if constexpr (kDType == DType::kF8E4M3) {
    return FloatFromF8E4M3<float>(static_cast<uint32_t>(bits));
  } else {
    return FloatFromF8E5M2<float>(static_cast<uint32_t>(bits));
  }
}

template <DType kDType>
__device__ typename BitsOf<kDType>::type EncodeFloat(float value) {
  if constexpr (kDType == DType::kF32) {
    return BitCast<uint32_t>(value);
  } else if constexpr (kDType == DType::kBF16) {
    return static_cast<uint16_t>(BF16FromFloat<uint32_t>(value));
  } else if constexpr (kDType == DType::kF16) {
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
  } else if constexpr (kDType == DType::kF8E4M3) {
    return static_cast<uint8_t>(F8E4M3FromFloat<uint32_t>(value));
  } else {
    return static_cast<uint8_t>(F8E5M2FromFloat<uint32_t>(value));
  }
}

template <DType kDType, class T>
__device__ typename BitsOf<kDType>::type Encode(T value) {
  if constexpr (kDType == DType::kF64) {
    return BitCast<uint64_t>(static_cast<double>(value));
  } else if constexpr (sizeof(T) == 4 || kDType == DType::kF32) {
    return EncodeFloat<kDType>(static_cast<float>(value));
  } else {
    const float nearest = static_cast<float>(value);
    const auto adjustment =
        static_cast<uint32_t>(OddAdjustment<uint64_t>(value, static_cast<double>(nearest)));
    return EncodeFloat<kDType>(
        BitCast<float>(ApplyOddAdjustment(BitCast<uint32_t>(nearest), adjustment)));
  }
}

// The stored bits of n elements, moved in as few transactions as they allow.
template <DType kDType, int n>
struct alignas(n* BitsOf<kDType>::kWidth < 16 ? n * BitsOf<kDType>::kWidth : 16) Packet {
  typename BitsOf<kDType>::type lane[n];
};

// Whether element `at` of `data` starts a whole packet.
template <DType kDType, int n>
__host__ __device__ bool Aligned(const void* data, int64_t at) {
  using P = Packet<kDType, n>;
  return (reinterpret_cast<uintptr_t>(data) + at * BitsOf<kDType>::kWidth) % alignof(P) == 0;
}

// Elements [at, at + count) of `in`, count <= n; element `at` has index `index` in the tensor.
template <class T, DType kIn, int n>
struct Run {
  using Value = Lanes<T, n>;
  const void* const* in;
  int64_t at;
  int64_t index;
  int count;
  bool aligned;

  __device__ Value operator[](int i) const {
    using Bits = typename BitsOf<kIn>::type;
    const Bits* from = static_cast<const Bits*>(in[i]) + at;
    Value r;
    if (aligned && count == n) {
      const Packet<kIn, n> packet = *reinterpret_cast<const Packet<kIn, n>*>(from);
#pragma unroll
      for (int l = 0; l < n; ++l) r.lane[l] = Decode<T, kIn>(packet.lane[l]);
    } else {
#pragma unroll
      for (int l = 0; l < n; ++l) r.lane[l] = l < count ? Decode<T, kIn>(from[l]) : T{0};
    }
    return r;
  }
  __device__ Mask<n> IndexBelow(int64_t end) const {
    Mask<n> r;
#pragma unroll
    for (int l = 0; l < n; ++l) r.lane[l] = index + l < end;
    return r;
  }
  __device__ Mask<n> RandomBelow(int, PhiloxKey key, uint64_t below) const {
    Mask<n> r;
    static_assert(8 % n == 0);
    if (index % n == 0) {
      const auto upper_bound = static_cast<uint32_t>(below >> 16);
      uint32_t words[4];
      PhiloxBlock(key, static_cast<uint64_t>(index) / 8, 0, words);
#pragma unroll
      for (int l = 0; l < n; ++l) {
        const uint32_t upper = PhiloxHalf(words, (n == 8 ? 0 : index % 8) + l);
        r.lane[l] =
            upper < upper_bound ||
            (upper == upper_bound && PhiloxWord(key, static_cast<uint64_t>(index + l)) < below);
      }
    } else {
      for (int l = 0; l < n; ++l) {
        r.lane[l] = PhiloxWord(key, static_cast<uint64_t>(index + l)) < below;
      }
    }
    return r;
  }
  __device__ Mask<n> Outranks(int i, const RankedDraw& draw) const {
    using Bits = typename BitsOf<kIn>::type;
    const Bits* const base = static_cast<const Bits*>(in[0]);
    const Bits* const model = static_cast<const Bits*>(in[1 + i]);
    Mask<n> r;
    for (int l = 0; l < n; ++l) {
      r.lane[l] = false;
      if (l >= count) continue;
      const int64_t place = (index + l) % draw.row;
      const int64_t row = at + l - place;
      const auto magnitude = [&](int64_t p) {
        const T delta = Decode<T, kIn>(model[row + p]) - Decode<T, kIn>(base[row + p]);
        return delta < 0 ? -delta : delta;
      };
      r.lane[l] = draw.Stays(PhiloxWord(draw.key, static_cast<uint64_t>(index + l)), place,
                             magnitude(place), magnitude);
    }
    return r;
  }
  __device__ Value Of(const AxisValues& axis, int i) const {
    Value r;
#pragma unroll
    for (int l = 0; l < n; ++l) {
      const int64_t element = index + (l < count ? l : 0);
      r.lane[l] = static_cast<T>(
          axis.columns ? axis.values[i * axis.row + element % axis.row]
                       : axis.values[(element / axis.row - axis.first) * axis.count + i]);
    }
    return r;
  }
};

template <DType kOut, class T, int n>
__device__ void Store(void* out, int64_t at, int count, bool aligned, const Lanes<T, n>& value) {
  using Bits = typename BitsOf<kOut>::type;
  Bits* to = static_cast<Bits*>(out) + at;
  Packet<kOut, n> packet;
#pragma unroll
  for (int l = 0; l < n; ++l) packet.lane[l] = Encode<kOut>(value.lane[l]);
  if (aligned && count == n) {
    *reinterpret_cast<Packet<kOut, n>*>(to) = packet;
  } else {
#pragma unroll
    for (int l = 0; l < n; ++l) {
      if (l < count) to[l] = packet.lane[l];
    }
  }
}

// Calls f(compute type, a type that holds the stored type).
template <DType kDType>
struct Stored {
  static constexpr DType kValue = kDType;
};
template <class F>
int WithFormat(DType in, const F& f) {
  switch (in) {
    case DType::kF64:
      return f(double{}, Stored<DType::kF64>{});
    case DType::kF32:
      return f(float{}, Stored<DType::kF32>{});
    case DType::kF16:
      return f(float{}, Stored<DType::kF16>{});
    case DType::kBF16:
      return f(float{}, Stored<DType::kBF16>{});
    case DType::kF8E4M3:
      return f(float{}, Stored<DType::kF8E4M3>{});
    case DType::kF8E5M2:
      return f(float{}, Stored<DType::kF8E5M2>{});
    default:
      return cudaErrorInvalidValue;
  }
}

// Calls f with the op that `data` holds, of the `place`-th type of the list.
template <class... Ops, class F>
int WithOp(const std::variant<Ops...>*, int place, const void* data, const F& f) {
  int error = cudaErrorInvalidValue;
  int i = 0;
  ((i++ == place ? void(error = f(*static_cast<const Ops*>(data))) : void()), ...);
  return error;
}

struct Inputs {
  const void* in[kMaxInputs];
};

// --- Map ----------------------------------------------------------------------------------------

struct MapParams {
  Inputs inputs;
  void* out;
  DType out_dtype;
  int64_t first;
  int64_t size;
  bool in_aligned;
  bool out_aligned;
};

template <class Op, class T, DType kIn>
__global__ void __launch_bounds__(kMapThreads)
    MapKernel(const __grid_constant__ Op op, const __grid_constant__ MapParams p) {
  const int64_t step = int64_t{gridDim.x} * kMapThreads * kMapLanes;
  for (int64_t at = (int64_t{blockIdx.x} * kMapThreads + threadIdx.x) * kMapLanes; at < p.size;
       at += step) {
    const int count = static_cast<int>(min(static_cast<int64_t>(kMapLanes), p.size - at));
    const Run<T, kIn, kMapLanes> run{p.inputs.in, at, p.first + at, count, p.in_aligned};
    const Lanes<T, kMapLanes> value = op(run);
    switch (p.out_dtype) {
      case DType::kF64:
        Store<DType::kF64>(p.out, at, count, p.out_aligned, value);
        break;
      case DType::kF32:
        Store<DType::kF32>(p.out, at, count, p.out_aligned, value);
        break;
      case DType::kF16:
        Store<DType::kF16>(p.out, at, count, p.out_aligned, value);
        break;
      case DType::kBF16:
        Store<DType::kBF16>(p.out, at, count, p.out_aligned, value);
        break;
      case DType::kF8E4M3:
        Store<DType::kF8E4M3>(p.out, at, count, p.out_aligned, value);
        break;
      default:
        Store<DType::kF8E5M2>(p.out, at, count, p.out_aligned, value);
    }
  }
}

template <class Call>
Inputs InputsOf(const Call& call) {
  Inputs inputs = {};
  std::copy(call.in, call.in + call.inputs, inputs.in);
  return inputs;
}

template <DType kDType, int n, class Call>
bool InputsAligned(const Call& call) {
  return std::all_of(call.in, call.in + call.inputs,
                     [](const void* in) { return Aligned<kDType, n>(in, 0); });
}

bool OutputAligned(const MapCall& call) {
  return WithFormat(call.out_dtype, [&](auto, auto stored) {
           return Aligned<decltype(stored)::kValue, kMapLanes>(call.out, 0) ? 1 : 0;
         }) == 1;
}

int Map(Stream* stream, const MapCall* call) {
  if (call->size == 0) return cudaSuccess;
  RETURN_IF_CUDA_ERROR(cudaSetDevice(stream->ordinal));
  return WithOp(static_cast<MapOp*>(nullptr), call->op, call->op_data, [&](const auto& op) {
    return WithFormat(call->in_dtype, [&](auto compute, auto stored) -> int {
      using Op = std::remove_cvref_t<decltype(op)>;
      constexpr DType kIn = decltype(stored)::kValue;
      const MapParams params = {.inputs = InputsOf(*call),
                                .out = call->out,
                                .out_dtype = call->out_dtype,
                                .first = call->first,
                                .size = call->size,
                                .in_aligned = InputsAligned<kIn, kMapLanes>(*call),
                                .out_aligned = OutputAligned(*call)};
      const int64_t wanted = (call->size + kMapThreads * kMapLanes - 1) / (kMapThreads * kMapLanes);
      const auto blocks =
          static_cast<unsigned>(std::min<int64_t>(wanted, int64_t{stream->processors} * 32));
      MapKernel<Op, decltype(compute), kIn><<<blocks, kMapThreads, 0, stream->stream>>>(op, params);
      return cudaGetLastError();
    });
  });
}

// Scratch of at least `bytes` in both memories.
int Reserve(Stream* stream, int64_t bytes) {
  if (bytes <= stream->scratch_bytes) return cudaSuccess;
  RETURN_IF_CUDA_ERROR(cudaStreamSynchronize(stream->stream));
  cudaFree(stream->device_scratch);
  cudaFreeHost(stream->host_scratch);
  stream->device_scratch = stream->host_scratch = nullptr;
  stream->scratch_bytes = 0;
  RETURN_IF_CUDA_ERROR(cudaMalloc(&stream->device_scratch, bytes));
  RETURN_IF_CUDA_ERROR(cudaMallocHost(&stream->host_scratch, bytes));
  stream->scratch_bytes = bytes;
  return cudaSuccess;
}

// Copies the first `bytes` of scratch to the host and waits.
int FetchScratch(Stream* stream, int64_t bytes) {
  RETURN_IF_CUDA_ERROR(cudaMemcpyAsync(stream->host_scratch, stream->device_scratch, bytes,
                                       cudaMemcpyDeviceToHost, stream->stream));
  RETURN_IF_CUDA_ERROR(cudaStreamSynchronize(stream->stream));
  return cudaSuccess;
}

// --- Reduce -------------------------------------------------------------------------------------

constexpr int kRows = static_cast<int>(kReduceBlock / kReduceRow);
constexpr int kThreadsOfRow = 32 / kReduceLanes;
constexpr int kReduceThreads = kRows * kThreadsOfRow;

struct ReduceParams {
  Inputs inputs;
  int count;
  int64_t first;
  int64_t size;
  int64_t block;
  int terms;
  double* sums;
};

// Whether an op's terms are not summed but the largest is taken.
template <class Op>
__device__ constexpr bool kTakesLargest = requires {
  Op::kLargest;
};

template <class Op>
__device__ double Nothing() {
  return kTakesLargest<Op> ? -INFINITY : 0.0;
}

template <class Op>
__device__ double Joined(double a, double b) {
  if constexpr (kTakesLargest<Op>) {
    return b > a ? b : a;
  } else {
    return a + b;
  }
}

// One thread block a reduction block, kReduceBlock elements at a time. Eight threads share a row;
// each holds 4 of its 32 lanes, so a block of four random words is made once.
template <class Op, class T, DType kIn>
__global__ void __launch_bounds__(kReduceThreads)
    ReduceKernel(const __grid_constant__ Op op, const __grid_constant__ ReduceParams p) {
  __shared__ double row_sums[Op::kTerms][kRows];
  const int64_t block = p.first / p.block + blockIdx.x;
  const int64_t begin = max(p.first, block * p.block);
  const int64_t size = min(p.first + p.size, (block + 1) * p.block) - begin;
  const int64_t offset = begin - p.first;
  bool aligned = true;
  for (int i = 0; i < p.count; ++i) {
    aligned = aligned && Aligned<kIn, kReduceLanes>(p.inputs.in[i], offset);
  }
  const int row = threadIdx.x / kThreadsOfRow;
  const int place = threadIdx.x % kThreadsOfRow;
  for (int g = 0; g < op.groups(); ++g) {
    double sum = Nothing<Op>();  // of thread t < kTerms: term t
    for (int64_t rows = 0; rows < size; rows += kReduceBlock) {
      double sums[Op::kTerms][kReduceLanes];
#pragma unroll
      for (int t = 0; t < Op::kTerms; ++t) {
#pragma unroll
        for (int l = 0; l < kReduceLanes; ++l) sums[t][l] = Nothing<Op>();
      }
      for (int64_t step = 0; step < kReduceRow; step += 32) {
        const int64_t at = rows + row * kReduceRow + step + place * kReduceLanes;
        if (at >= size) break;
        const int count = static_cast<int>(min(static_cast<int64_t>(kReduceLanes), size - at));
        const Run<T, kIn, kReduceLanes> run{p.inputs.in, offset + at, begin + at, count, aligned};
        Lanes<T, kReduceLanes> terms[Op::kTerms];
        op(run, g, run[op.first(g)], run[op.second(g)], terms);
#pragma unroll
        for (int t = 0; t < Op::kTerms; ++t) {
#pragma unroll
          for (int l = 0; l < kReduceLanes; ++l) {
            if (l < count) {
              sums[t][l] = Joined<Op>(sums[t][l], static_cast<double>(terms[t].lane[l]));
            }
          }
        }
      }
      __syncthreads();  // the row sums of before have been read
#pragma unroll
      for (int t = 0; t < Op::kTerms; ++t) {
#pragma unroll
        for (int distance = kThreadsOfRow / 2; distance > 0; distance /= 2) {
#pragma unroll
          for (int l = 0; l < kReduceLanes; ++l) {
            sums[t][l] = Joined<Op>(sums[t][l], __shfl_xor_sync(0xffffffffu, sums[t][l], distance));
          }
        }
        if (place == 0) {
          row_sums[t][row] =
              Joined<Op>(Joined<Op>(sums[t][0], sums[t][2]), Joined<Op>(sums[t][1], sums[t][3]));
        }
      }
      __syncthreads();
      if (threadIdx.x < Op::kTerms) {
        for (int r = 0; r < kRows; ++r) sum = Joined<Op>(sum, row_sums[threadIdx.x][r]);
      }
    }
    if (threadIdx.x < Op::kTerms) {
      p.sums[blockIdx.x * p.terms + g * Op::kTerms + threadIdx.x] = sum;
    }
  }
}

// A thread a column, down its rows.
template <class Op, class T, DType kIn>
__global__ void __launch_bounds__(kMapThreads)
    ReduceColumnsKernel(const __grid_constant__ Op op, const __grid_constant__ ReduceParams p) {
  const int64_t columns = p.block;
  const int64_t column = int64_t{blockIdx.x} * kMapThreads + threadIdx.x;
  if (column >= columns) return;
  for (int g = 0; g < op.groups(); ++g) {
    double sums[Op::kTerms];
#pragma unroll
    for (int t = 0; t < Op::kTerms; ++t) sums[t] = Nothing<Op>();
    for (int64_t at = column; at < p.size; at += columns) {
      const Run<T, kIn, 1> run{p.inputs.in, at, p.first + at, 1, false};
      Lanes<T, 1> terms[Op::kTerms];
      op(run, g, run[op.first(g)], run[op.second(g)], terms);
#pragma unroll
      for (int t = 0; t < Op::kTerms; ++t) {
        sums[t] = Joined<Op>(sums[t], static_cast<double>(terms[t].lane[0]));
      }
    }
#pragma unroll
    for (int t = 0; t < Op::kTerms; ++t) p.sums[(g * Op::kTerms + t) * columns + column] = sums[t];
  }
}

int Reduce(Stream* stream, const ReduceCall* call) {
  const int64_t values = (call->by_columns ? call->block : call->blocks) * call->terms;
  if (values == 0) return cudaSuccess;
  RETURN_IF_CUDA_ERROR(cudaSetDevice(stream->ordinal));
  const int64_t bytes = values * static_cast<int64_t>(sizeof(double));
  if (const int error = Reserve(stream, bytes); error != 0) return error;
  const int error =
      WithOp(static_cast<ReduceOp*>(nullptr), call->op, call->op_data, [&](const auto& op) {
        return WithFormat(call->in_dtype, [&](auto compute, auto stored) -> int {
          using Op = std::remove_cvref_t<decltype(op)>;
          const ReduceParams params = {.inputs = InputsOf(*call),
                                       .count = call->inputs,
                                       .first = call->first,
                                       .size = call->size,
                                       .block = call->block,
                                       .terms = call->terms,
                                       .sums = static_cast<double*>(stream->device_scratch)};
          using T = decltype(compute);
          constexpr DType kIn = decltype(stored)::kValue;
          if (call->by_columns) {
            const auto blocks =
                static_cast<unsigned>((call->block + kMapThreads - 1) / kMapThreads);
            ReduceColumnsKernel<Op, T, kIn><<<blocks, kMapThreads, 0, stream->stream>>>(op, params);
          } else {
            ReduceKernel<Op, T, kIn>
                <<<static_cast<unsigned>(call->blocks), kReduceThreads, 0, stream->stream>>>(
                    op, params);
          }
          return cudaGetLastError();
        });
      });
  if (error != 0) return error;
  if (const int fetched = FetchScratch(stream, bytes); fetched != 0) return fetched;
  const auto* sums = static_cast<const double*>(stream->host_scratch);
  std::copy(sums, sums + values, call->sums);
  return cudaSuccess;
}

// --- Histogram ----------------------------------------------------------------------------------

struct HistogramParams {
  Inputs inputs;
  int64_t first;
  int64_t size;
  bool aligned;
  int shift;
  bool all;  // the first digit: there is no prefix
  uint64_t prefix;
  unsigned long long* bins;
};

// Counts one key a lane of the warp where `active`. Most checkpoints' deltas are zero or one of few
// values in many elements: lanes with a zero, and lanes with the first other key, are counted at
// once, which bounds how many additions meet in one bin.
template <class Bin>
__device__ void CountWarp(Bin* bins, uint32_t key, bool active) {
  const int lane = threadIdx.x % 32;
  const unsigned zeros = __ballot_sync(0xffffffffu, active && key == 0);
  if (zeros != 0 && lane == __ffs(zeros) - 1) atomicAdd(bins, static_cast<Bin>(__popc(zeros)));
  active = active && key != 0;
  const unsigned rest = __ballot_sync(0xffffffffu, active);
  if (rest == 0) return;
  const int leader = __ffs(rest) - 1;
  const bool same = active && key == __shfl_sync(0xffffffffu, key, leader);
  const unsigned equal = __ballot_sync(0xffffffffu, same);
  if (lane == leader) {
    atomicAdd(bins + key, static_cast<Bin>(__popc(equal)));
  } else if (active && !same) {
    atomicAdd(bins + key, static_cast<Bin>(1));
  }
}

template <class Op, class T, DType kIn, bool kShared>
__global__ void __launch_bounds__(kHistogramThreads)
    HistogramKernel(const __grid_constant__ Op op, const __grid_constant__ HistogramParams p) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  extern __shared__ uint32_t shared[];
  if constexpr (kShared) {
    for (int bin = threadIdx.x; bin < kFirstBins; bin += kHistogramThreads) shared[bin] = 0;
    __syncthreads();
  }
  const int64_t step = int64_t{gridDim.x} * kHistogramThreads * kMapLanes;
  // Whole warps go round together, so that their lanes can vote.
  const int64_t thread = int64_t{blockIdx.x} * kHistogramThreads + threadIdx.x;
  for (int64_t warp_at = thread / 32 * 32 * kMapLanes; warp_at < p.size; warp_at += step) {
    const int64_t at = warp_at + thread % 32 * kMapLanes;
    const int count =
        static_cast<int>(max(int64_t{0}, min(static_cast<int64_t>(kMapLanes), p.size - at)));
    const Run<T, kIn, kMapLanes> run{p.inputs.in, at, p.first + at, count, p.aligned};
    const Lanes<T, kMapLanes> magnitude = op(run);
#pragma unroll
    for (int l = 0; l < kMapLanes; ++l) {
      const Bits bits = BitCast<Bits>(magnitude.lane[l]) >> p.shift;
      const bool active = l < count && (p.all || bits >> 16 == p.prefix);
      const auto key = static_cast<uint32_t>(bits & 0xffff);
      if constexpr (kShared) {
        CountWarp(shared, key, active);
      } else if (__any_sync(0xffffffffu, active)) {
        CountWarp(p.bins, key, active);
      }
    }
  }
  if constexpr (kShared) {
    __syncthreads();
    for (int bin = threadIdx.x; bin < kFirstBins; bin += kHistogramThreads) {
      if (shared[bin] != 0) {
        atomicAdd(p.bins + bin, static_cast<unsigned long long>(shared[bin]));
      }
    }
  }
}

int Histogram(Stream* stream, const HistogramCall* call) {
  if (call->size == 0) return cudaSuccess;
  RETURN_IF_CUDA_ERROR(cudaSetDevice(stream->ordinal));
  constexpr int64_t kBytes = kRadixBins * sizeof(uint64_t);
  if (const int error = Reserve(stream, kBytes); error != 0) return error;
  RETURN_IF_CUDA_ERROR(cudaMemsetAsync(stream->device_scratch, 0, kBytes, stream->stream));
  const int error =
      WithOp(static_cast<MagnitudeOp*>(nullptr), call->op, call->op_data, [&](const auto& op) {
        return WithFormat(call->in_dtype, [&](auto compute, auto stored) -> int {
          using Op = std::remove_cvref_t<decltype(op)>;
          using T = decltype(compute);
          constexpr DType kIn = decltype(stored)::kValue;
          const HistogramParams params = {
              .inputs = InputsOf(*call),
              .first = call->first,
              .size = call->size,
              .aligned = InputsAligned<kIn, kMapLanes>(*call),
              .shift = static_cast<int>(8 * sizeof(T)) - 16 * (call->level + 1),
              .all = call->level == 0,
              .prefix = call->prefix,
              .bins = static_cast<unsigned long long*>(stream->device_scratch)};
          constexpr int64_t kPerBlock = 1 << 16;  // worth a block's bins
          const auto blocks = static_cast<unsigned>(std::min<int64_t>(
              (call->size + kPerBlock - 1) / kPerBlock, int64_t{stream->processors} * 2));
          if (params.all && stream->shared_bins) {
            const auto kernel = &HistogramKernel<Op, T, kIn, true>;
            RETURN_IF_CUDA_ERROR(cudaFuncSetAttribute(
                kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBinBytes));
            kernel<<<blocks, kHistogramThreads, kSharedBinBytes, stream->stream>>>(op, params);
          } else {
            HistogramKernel<Op, T, kIn, false>
                <<<blocks, kHistogramThreads, 0, stream->stream>>>(op, params);
          }
          return cudaGetLastError();
        });
      });
  if (error != 0) return error;
  if (const int fetched = FetchScratch(stream, kBytes); fetched != 0) return fetched;
  const auto* counts = static_cast<const uint64_t*>(stream->host_scratch);
  for (int bin = 0; bin < kRadixBins; ++bin) call->bins[bin] += counts[bin];
  return cudaSuccess;
}

// --- Sift ---------------------------------------------------------------------------------------

struct SiftParams {
  Inputs inputs;
  int64_t first;
  int64_t size;
  bool aligned;
  SiftWindow window;
  unsigned long long* counts;  // above, common, candidates
  SiftCandidate* candidates;
};

template <class Op, class T, DType kIn>
__global__ void __launch_bounds__(kMapThreads)
    SiftKernel(const __grid_constant__ Op op, const __grid_constant__ SiftParams p) {
  const int lane = threadIdx.x % 32;
  const T low = static_cast<T>(p.window.low), high = static_cast<T>(p.window.high),
          most = static_cast<T>(p.window.common);
  unsigned above = 0, common = 0;
  const int64_t step = int64_t{gridDim.x} * kMapThreads * kMapLanes;
  const int64_t thread = int64_t{blockIdx.x} * kMapThreads + threadIdx.x;
  // Whole warps go round together: a warp takes room for its candidates at once.
  for (int64_t warp_at = thread / 32 * 32 * kMapLanes; warp_at < p.size; warp_at += step) {
    const int64_t at = warp_at + lane * kMapLanes;
    const int count =
        static_cast<int>(max(int64_t{0}, min(static_cast<int64_t>(kMapLanes), p.size - at)));
    const Run<T, kIn, kMapLanes> run{p.inputs.in, at, p.first + at, count, p.aligned};
    const Lanes<T, kMapLanes> magnitude = op(run);
    unsigned inside = 0;
#pragma unroll
    for (int l = 0; l < kMapLanes; ++l) {
      const T value = magnitude.lane[l];
      const bool exists = l < count;
      above += exists && !(value <= high);
      common += exists && value == most;
      inside |= static_cast<unsigned>(exists && value >= low && value <= high && value != most)
                << l;
    }
    if (!__any_sync(0xffffffffu, inside != 0)) continue;
    const int mine = __popc(inside);
    int before = mine;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, before, distance);
      if (lane >= distance) before += other;
    }
    unsigned long long place = 0;
    if (lane == 31) place = atomicAdd(p.counts + 2, static_cast<unsigned long long>(before));
    place = __shfl_sync(0xffffffffu, place, 31) + before - mine;
#pragma unroll
    for (int l = 0; l < kMapLanes; ++l) {
      if (inside >> l & 1) {
        p.candidates[place++] = {static_cast<float>(magnitude.lane[l]),
                                 static_cast<uint32_t>(at + l)};
      }
    }
  }
  above = __reduce_add_sync(0xffffffffu, above);
  common = __reduce_add_sync(0xffffffffu, common);
  if (lane == 0) {
    if (above != 0) atomicAdd(p.counts, static_cast<unsigned long long>(above));
    if (common != 0) atomicAdd(p.counts + 1, static_cast<unsigned long long>(common));
  }
}

int Sift(Stream* stream, SiftCall* call) {
  call->counts = {};
  if (call->size == 0) return cudaSuccess;
  RETURN_IF_CUDA_ERROR(cudaSetDevice(stream->ordinal));
  constexpr int64_t kHead = 64;  // the counts, and then the candidates
  static_assert(kHead >= static_cast<int64_t>(sizeof(SiftCounts)));
  constexpr auto kCandidate = static_cast<int64_t>(sizeof(SiftCandidate));
  if (const int error = Reserve(stream, kHead + call->size * kCandidate); error != 0) return error;
  auto* device = static_cast<char*>(stream->device_scratch);
  RETURN_IF_CUDA_ERROR(cudaMemsetAsync(device, 0, kHead, stream->stream));
  const int error =
      WithOp(static_cast<MagnitudeOp*>(nullptr), call->op, call->op_data, [&](const auto& op) {
        return WithFormat(call->in_dtype, [&](auto compute, auto stored) -> int {
          using Op = std::remove_cvref_t<decltype(op)>;
          constexpr DType kIn = decltype(stored)::kValue;
          const SiftParams params = {
              .inputs = InputsOf(*call),
              .first = call->first,
              .size = call->size,
              .aligned = InputsAligned<kIn, kMapLanes>(*call),
              .window = call->window,
              .counts = reinterpret_cast<unsigned long long*>(device),
              .candidates = reinterpret_cast<SiftCandidate*>(device + kHead)};
          const int64_t wanted =
              (call->size + kMapThreads * kMapLanes - 1) / (kMapThreads * kMapLanes);
          const auto blocks =
              static_cast<unsigned>(std::min<int64_t>(wanted, int64_t{stream->processors} * 32));
          SiftKernel<Op, decltype(compute), kIn>
              <<<blocks, kMapThreads, 0, stream->stream>>>(op, params);
          return cudaGetLastError();
        });
      });
  if (error != 0) return error;
  if (const int fetched = FetchScratch(stream, kHead); fetched != 0) return fetched;
  const auto* counts = static_cast<const int64_t*>(stream->host_scratch);
  call->counts = {.above = counts[0], .common = counts[1], .candidates = counts[2]};
  if (counts[2] == 0) return cudaSuccess;
  RETURN_IF_CUDA_ERROR(cudaMemcpyAsync(call->candidates, device + kHead, counts[2] * kCandidate,
                                       cudaMemcpyDeviceToHost, stream->stream));
  RETURN_IF_CUDA_ERROR(cudaStreamSynchronize(stream->stream));
  return cudaSuccess;
}

// --- Devices, memory, streams -------------------------------------------------------------------

const char* Describe(int error) {
  return error >= kLibrariesMissing ? DescribeLinearAlgebra(error)
                                    : cudaGetErrorString(static_cast<cudaError_t>(error));
}

int DeviceCount(int* count) {
  RETURN_IF_CUDA_ERROR(cudaGetDeviceCount(count));
  return cudaSuccess;
}

int DeviceName(int ordinal, char* name, int64_t bytes) {
  cudaDeviceProp properties;
  RETURN_IF_CUDA_ERROR(cudaGetDeviceProperties(&properties, ordinal));
  std::snprintf(name, bytes, "%s", properties.name);
  return cudaSuccess;
}

void Close(Stream* stream) {
  cudaSetDevice(stream->ordinal);
  if (stream->stream != nullptr) {
    cudaStreamSynchronize(stream->stream);
    CloseLinearAlgebra(stream);
    cudaStreamDestroy(stream->stream);
  }
  cudaFree(stream->device_scratch);
  cudaFreeHost(stream->host_scratch);
  delete stream;
}

int Open(int ordinal, Stream** opened) {
  RETURN_IF_CUDA_ERROR(cudaSetDevice(ordinal));
  int processors = 0, shared_bytes = 0;
  RETURN_IF_CUDA_ERROR(
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, ordinal));
  RETURN_IF_CUDA_ERROR(
      cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, ordinal));
  auto* stream = new (std::nothrow) Stream;
  if (stream == nullptr) return cudaErrorMemoryAllocation;
  stream->ordinal = ordinal;
  stream->processors = processors;
  stream->shared_bins = shared_bytes >= kSharedBinBytes;
  if (const cudaError_t error = cudaStreamCreateWithFlags(&stream->stream, cudaStreamNonBlocking);
      error != cudaSuccess) {
    cudaGetLastError();
    delete stream;
    return error;
  }
  *opened = stream;
  return cudaSuccess;
}

int Allocate(int ordinal, int64_t bytes, void** data) {
  RETURN_IF_CUDA_ERROR(cudaSetDevice(ordinal));
  RETURN_IF_CUDA_ERROR(cudaMalloc(data, std::max<int64_t>(bytes, 1)));
  return cudaSuccess;
}

void Release(int ordinal, void* data) {
  cudaSetDevice(ordinal);
  cudaFree(data);
}

int AllocateHost(int ordinal, int64_t bytes, void** data) {
  RETURN_IF_CUDA_ERROR(cudaSetDevice(ordinal));
  RETURN_IF_CUDA_ERROR(cudaMallocHost(data, std::max<int64_t>(bytes, 1)));
  return cudaSuccess;
}

void ReleaseHost(int ordinal, void* data) {
  cudaSetDevice(ordinal);
  cudaFreeHost(data);
}

int CopyBytes(Stream* stream, const void* from, void* to, int64_t bytes, cudaMemcpyKind kind) {
  if (bytes == 0) return cudaSuccess;
  RETURN_IF_CUDA_ERROR(cudaSetDevice(stream->ordinal));
  RETURN_IF_CUDA_ERROR(cudaMemcpyAsync(to, from, bytes, kind, stream->stream));
  return cudaSuccess;
}

int Upload(Stream* stream, const void* host, void* device, int64_t bytes) {
  return CopyBytes(stream, host, device, bytes, cudaMemcpyHostToDevice);
}

int Download(Stream* stream, const void* device, void* host, int64_t bytes) {
  return CopyBytes(stream, device, host, bytes, cudaMemcpyDeviceToHost);
}

int Copy(Stream* stream, const void* from, void* to, int64_t bytes) {
  return CopyBytes(stream, from, to, bytes, cudaMemcpyDeviceToDevice);
}

int Synchronize(Stream* stream) {
  RETURN_IF_CUDA_ERROR(cudaSetDevice(stream->ordinal));
  RETURN_IF_CUDA_ERROR(cudaStreamSynchronize(stream->stream));
  return cudaSuccess;
}

constexpr Plugin kPlugin = {.describe = &Describe,
                            .device_count = &DeviceCount,
                            .device_name = &DeviceName,
                            .open = &Open,
                            .close = &Close,
                            .allocate = &Allocate,
                            .release = &Release,
                            .allocate_host = &AllocateHost,
                            .release_host = &ReleaseHost,
                            .upload = &Upload,
                            .download = &Download,
                            .copy = &Copy,
                            .synchronize = &Synchronize,
                            .map = &Map,
                            .reduce = &Reduce,
                            .histogram = &Histogram,
                            .sift = &Sift,
                            .open_linear_algebra = &OpenLinearAlgebra,
                            .multiply = &Multiply,
                            .eigen = &Eigen,
                            .svd = &Svd,
                            .qr = &Qr,
                            .solve_pos_def = &SolvePosDef,
                            .linear = &Linear,
                            .gate = &Gate,
                            .normalize = &Normalize,
                            .rotate = &Rotate,
                            .attention = &Attention,
                            .gather = &Gather,
                            .predict = &Predict,
                            .subtract = &Subtract,
                            .add_moments = &AddMoments,
                            .add_gram = &AddGram};

}  // namespace

extern "C" __attribute__((visibility("default"))) const Plugin* pewter_cuda_plugin(uint64_t abi) {
  return abi == kPluginAbi ? &kPlugin : nullptr;
}

}  // namespace pewter::kernels::cuda
