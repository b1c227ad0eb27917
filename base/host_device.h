// PEWTER_HD marks what g++ and nvcc both compile, for host and device.
#pragma once

#ifdef __CUDACC__
#define PEWTER_HD __host__ __device__ __forceinline__
#else
#define PEWTER_HD inline __attribute__((always_inline))
#endif
