// Device memory for the time of a call, in the stream's order.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "kernels/cuda/stream.h"

namespace pewter::kernels::cuda {

class Scratch {
 public:
  explicit Scratch(Stream* stream) : stream_(stream) {}
  Scratch(const Scratch&) = delete;
  ~Scratch() {
    if (data_ != nullptr) cudaFreeAsync(data_, stream_->stream);
  }
  // Once.
  int Take(int64_t bytes) {
    RETURN_IF_CUDA_ERROR(
        cudaMallocAsync(&data_, static_cast<size_t>(std::max<int64_t>(bytes, 1)), stream_->stream));
    return cudaSuccess;
  }
  void* data() const { return data_; }
  float* floats() const { return static_cast<float*>(data_); }
  double* doubles() const { return static_cast<double*>(data_); }

 private:
  Stream* const stream_;
  void* data_ = nullptr;
};

}  // namespace pewter::kernels::cuda
