// What one open Stream of the plugin owns, and how its functions pass errors on.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/plugin.h"

#define RETURN_IF_CUDA_ERROR(call)                                  \
  do {                                                              \
    if (const cudaError_t error_ = (call); error_ != cudaSuccess) { \
      cudaGetLastError();                                           \
      return error_;                                                \
    }                                                               \
  } while (false)

namespace pewter::kernels::cuda {

struct LinearHandles;  // of cuBLAS and cuSOLVER

struct Stream {
  int ordinal = 0;
  cudaStream_t stream = nullptr;
  int processors = 0;
  bool shared_bins = false;  // a histogram's bins fit in shared memory
  // Scratch for results that go to the host: the same size in both memories.
  void* device_scratch = nullptr;
  void* host_scratch = nullptr;
  int64_t scratch_bytes = 0;
  LinearHandles* linear = nullptr;  // from the first use on
};

// linear_algebra.cu.
void CloseLinearAlgebra(Stream* stream);
int OpenLinearAlgebra(Stream* stream);
int Multiply(Stream* stream, const MultiplyCall* call);
int Eigen(Stream* stream, const EigenCall* call);
int Svd(Stream* stream, const SvdCall* call);
int Qr(Stream* stream, const QrCall* call);
int SolvePosDef(Stream* stream, const SolveCall* call);
const char* DescribeLinearAlgebra(int error);
// c = alpha op(a) op(b) + beta c in float, `batch` times: the i-th of each begins i strides later.
struct FloatProduct {
  bool transpose_a, transpose_b;
  int64_t rows, columns, inner;
  float alpha;
  const float* a;
  int64_t a_stride, a_next;
  const float* b;
  int64_t b_stride, b_next;
  float beta;
  float* c;
  int64_t c_stride, c_next;
  int64_t batch;
};
int MultiplyFloats(Stream* stream, const FloatProduct& product);

// network.cu.
int Linear(Stream* stream, const LinearCall* call);
int Gate(Stream* stream, const GateCall* call);
int Normalize(Stream* stream, const NormCall* call);
int Rotate(Stream* stream, const RotateCall* call);
int Attention(Stream* stream, const AttentionCall* call);
int Gather(Stream* stream, const GatherCall* call);
int Predict(Stream* stream, const PredictCall* call);
int Subtract(Stream* stream, const SubtractCall* call);
int AddMoments(Stream* stream, const MomentsCall* call);
int AddGram(Stream* stream, const GramCall* call);

}  // namespace pewter::kernels::cuda
