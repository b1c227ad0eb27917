// The lanes that ops are written in (kernels/ops/op.h) on CUDA: a few elements a thread.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/ops/float_formats.h"

namespace pewter::kernels::cuda {

template <int n>
struct Mask {
  bool lane[n];

  __device__ friend Mask operator&(const Mask& a, const Mask& b) {
    Mask r;
#pragma unroll
    for (int l = 0; l < n; ++l) r.lane[l] = a.lane[l] && b.lane[l];
    return r;
  }
  __device__ friend Mask operator|(const Mask& a, const Mask& b) {
    Mask r;
#pragma unroll
    for (int l = 0; l < n; ++l) r.lane[l] = a.lane[l] || b.lane[l];
    return r;
  }
};

template <class T, int n>
struct Lanes {
  using Scalar = T;
  T lane[n];

  __device__ static Lanes Broadcast(T value) {
    Lanes r;
#pragma unroll
    for (int l = 0; l < n; ++l) r.lane[l] = value;
    return r;
  }
};

#define PEWTER_LANES_ARITHMETIC(op)                                                          \
  template <class T, int n>                                                                  \
  __device__ Lanes<T, n> operator op(const Lanes<T, n>& a, const Lanes<T, n>& b) {           \
    Lanes<T, n> r;                                                                           \
    _Pragma("unroll") for (int l = 0; l < n; ++l) r.lane[l] = a.lane[l] op b.lane[l];        \
    return r;                                                                                \
  }                                                                                          \
  template <class T, int n>                                                                  \
  __device__ Lanes<T, n> operator op(const Lanes<T, n>& a, typename Lanes<T, n>::Scalar b) { \
    Lanes<T, n> r;                                                                           \
    _Pragma("unroll") for (int l = 0; l < n; ++l) r.lane[l] = a.lane[l] op b;                \
    return r;                                                                                \
  }
PEWTER_LANES_ARITHMETIC(+)
PEWTER_LANES_ARITHMETIC(-)
PEWTER_LANES_ARITHMETIC(*)
PEWTER_LANES_ARITHMETIC(/)
#undef PEWTER_LANES_ARITHMETIC

#define PEWTER_LANES_COMPARISON(op)                                                      \
  template <class T, int n>                                                              \
  __device__ Mask<n> operator op(const Lanes<T, n>& a, typename Lanes<T, n>::Scalar b) { \
    Mask<n> r;                                                                           \
    _Pragma("unroll") for (int l = 0; l < n; ++l) r.lane[l] = a.lane[l] op b;            \
    return r;                                                                            \
  }
PEWTER_LANES_COMPARISON(>)
PEWTER_LANES_COMPARISON(<)
PEWTER_LANES_COMPARISON(>=)
PEWTER_LANES_COMPARISON(==)
#undef PEWTER_LANES_COMPARISON

template <class T, int n>
__device__ Lanes<T, n> Select(const Mask<n>& mask, const Lanes<T, n>& a, const Lanes<T, n>& b) {
  Lanes<T, n> r;
#pragma unroll
  for (int l = 0; l < n; ++l) r.lane[l] = mask.lane[l] ? a.lane[l] : b.lane[l];
  return r;
}

template <class T, int n>
__device__ Lanes<T, n> Abs(const Lanes<T, n>& a) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  Lanes<T, n> r;
#pragma unroll
  for (int l = 0; l < n; ++l) r.lane[l] = BitCast<T>(BitCast<Bits>(a.lane[l]) & (~Bits{0} >> 1));
  return r;
}

// 2^v of integral v within the exponents of normal numbers.
template <class T, int n>
__device__ Lanes<T, n> PowerOfTwo(const Lanes<T, n>& v) {
  using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  constexpr int kFraction = sizeof(T) == 4 ? 23 : 52, kBias = sizeof(T) == 4 ? 127 : 1023;
  Lanes<T, n> r;
#pragma unroll
  for (int l = 0; l < n; ++l) {
    r.lane[l] = BitCast<T>((static_cast<Bits>(v.lane[l]) + kBias) << kFraction);
  }
  return r;
}

// The exponent of normal v > 0; v = mantissa 2^exponent with a mantissa in [1, 2).
template <class T, int n>
__device__ Lanes<T, n> SplitExponent(const Lanes<T, n>& v, Lanes<T, n>* mantissa) {
  using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  constexpr int kFraction = sizeof(T) == 4 ? 23 : 52, kBias = sizeof(T) == 4 ? 127 : 1023;
  Lanes<T, n> r;
#pragma unroll
  for (int l = 0; l < n; ++l) {
    const Bits bits = BitCast<Bits>(v.lane[l]);
    r.lane[l] = static_cast<T>((bits >> kFraction) - kBias);
    mantissa->lane[l] =
        BitCast<T>((bits & ((Bits{1} << kFraction) - 1)) | (static_cast<Bits>(kBias) << kFraction));
  }
  return r;
}

}  // namespace pewter::kernels::cuda
