// The CPU's lanes of compute type: Simd<T>, 32 elements in as many native vectors as that takes,
// with the operators that kernels/ops need, and conversions from and to the stored formats.
//
// kernels.cc is compiled once for each instruction set and so is this; everything is in a namespace
// of that instruction set, so that no function compiled for one is linked into another.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "base/dtype.h"
#include "base/random.h"
#include "kernels/ops/float_formats.h"

#define PEWTER_INLINE inline __attribute__((always_inline))
#define PEWTER_UNROLL _Pragma("GCC unroll 32")

namespace pewter::kernels::cpu::PEWTER_CPU_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

inline constexpr int kLanes = 32;

// n elements in one vector of the compiler.
template <class T, int n>
using Vector __attribute__((vector_size(n * sizeof(T)))) = T;

template <class T>
PEWTER_INLINE T LoadUnaligned(const void* from) {
  T value;
  __builtin_memcpy(&value, from, sizeof(value));
  return value;
}

// One 32- or 64-bit integer a lane, all ones where true.
template <class T>
struct Mask;

template <class T>
struct Simd {
  using Scalar = T;
  static constexpr int kPartLanes = kVectorBytes / sizeof(T);
  static constexpr int kParts = kLanes / kPartLanes;
  using Part = Vector<T, kPartLanes>;
  Part part[kParts];

  static PEWTER_INLINE Simd Broadcast(T value) {
    Simd r;
    PEWTER_UNROLL for (int p = 0; p < kParts; ++p) r.part[p] = value - Part{};
    return r;
  }
};

template <class T>
struct IntegerOf;
template <>
struct IntegerOf<float> {
  using type = int32_t;
};
template <>
struct IntegerOf<double> {
  using type = int64_t;
};

template <class T>
struct Mask {
  using Integer = typename IntegerOf<T>::type;
  using Part = Vector<Integer, Simd<T>::kPartLanes>;
  Part part[Simd<T>::kParts];

  friend PEWTER_INLINE Mask operator&(const Mask& a, const Mask& b) {
    Mask r;
    PEWTER_UNROLL for (int p = 0; p < Simd<T>::kParts; ++p) r.part[p] = a.part[p] & b.part[p];
    return r;
  }
  friend PEWTER_INLINE Mask operator|(const Mask& a, const Mask& b) {
    Mask r;
    PEWTER_UNROLL for (int p = 0; p < Simd<T>::kParts; ++p) r.part[p] = a.part[p] | b.part[p];
    return r;
  }
};

#define PEWTER_SIMD_ARITHMETIC(op)                                                              \
  template <class T>                                                                            \
  PEWTER_INLINE Simd<T> operator op(const Simd<T>& a, const Simd<T>& b) {                       \
    Simd<T> r;                                                                                  \
    PEWTER_UNROLL for (int p = 0; p < Simd<T>::kParts; ++p) r.part[p] = a.part[p] op b.part[p]; \
    return r;                                                                                   \
  }                                                                                             \
  template <class T>                                                                            \
  PEWTER_INLINE Simd<T> operator op(const Simd<T>& a, typename Simd<T>::Scalar b) {             \
    Simd<T> r;                                                                                  \
    PEWTER_UNROLL for (int p = 0; p < Simd<T>::kParts; ++p) r.part[p] = a.part[p] op b;         \
    return r;                                                                                   \
  }
PEWTER_SIMD_ARITHMETIC(+)
PEWTER_SIMD_ARITHMETIC(-)
PEWTER_SIMD_ARITHMETIC(*)
PEWTER_SIMD_ARITHMETIC(/)
#undef PEWTER_SIMD_ARITHMETIC

#define PEWTER_SIMD_COMPARISON(op)                                                      \
  template <class T>                                                                    \
  PEWTER_INLINE Mask<T> operator op(const Simd<T>& a, typename Simd<T>::Scalar b) {     \
    Mask<T> r;                                                                          \
    PEWTER_UNROLL for (int p = 0; p < Simd<T>::kParts; ++p) r.part[p] = a.part[p] op b; \
    return r;                                                                           \
  }
PEWTER_SIMD_COMPARISON(>)
PEWTER_SIMD_COMPARISON(<)
PEWTER_SIMD_COMPARISON(>=)
PEWTER_SIMD_COMPARISON(==)
#undef PEWTER_SIMD_COMPARISON

template <class T>
PEWTER_INLINE Simd<T> Select(const Mask<T>& mask, const Simd<T>& a, const Simd<T>& b) {
  Simd<T> r;
  PEWTER_UNROLL for (int p = 0; p < Simd<T>::kParts; ++p) r.part[p] =
      mask.part[p] ? a.part[p] : b.part[p];
  return r;
}

template <class T>
PEWTER_INLINE Simd<T> Abs(const Simd<T>& a) {
  using Bits = typename Mask<T>::Part;
  using Integer = typename Mask<T>::Integer;
  constexpr Integer kNoSign = sizeof(T) == 4 ? 0x7fffffff : 0x7fffffffffffffff;
  Simd<T> r;
  PEWTER_UNROLL for (int p = 0; p < Simd<T>::kParts; ++p) r.part[p] =
      BitCast<typename Simd<T>::Part>(BitCast<Bits>(a.part[p]) & kNoSign);
  return r;
}

// Lanes with a number below `end`.
template <class T>
PEWTER_INLINE Mask<T> LanesBelow(int64_t end) {
  using Integer = typename Mask<T>::Integer;
  const Integer clamped = static_cast<Integer>(end < 0 ? 0 : end > kLanes ? kLanes : end);
  typename Mask<T>::Part lane;
  PEWTER_UNROLL for (int l = 0; l < Simd<T>::kPartLanes; ++l) lane[l] = l;
  Mask<T> r;
  PEWTER_UNROLL for (int p = 0; p < Simd<T>::kParts; ++p) r.part[p] =
      lane < clamped - p * Simd<T>::kPartLanes;
  return r;
}

// Bit l is lane l.
template <class T>
PEWTER_INLINE uint32_t Bits(const Mask<T>& mask) {
  uint32_t bits = 0;
  PEWTER_UNROLL for (int p = 0; p < Simd<T>::kParts; ++p) {
    uint32_t part = 0;
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) {
      part = _mm512_movepi32_mask(BitCast<__m512i>(mask.part[p]));
    } else {
      part = _mm512_movepi64_mask(BitCast<__m512i>(mask.part[p]));
    }
#elif defined(__AVX2__)
    if constexpr (sizeof(T) == 4) {
      part = _mm256_movemask_ps(BitCast<__m256>(mask.part[p]));
    } else {
      part = _mm256_movemask_pd(BitCast<__m256d>(mask.part[p]));
    }
#elif defined(__x86_64__)
    if constexpr (sizeof(T) == 4) {
      part = _mm_movemask_ps(BitCast<__m128>(mask.part[p]));
    } else {
      part = _mm_movemask_pd(BitCast<__m128d>(mask.part[p]));
    }
#else
    for (int l = 0; l < Simd<T>::kPartLanes; ++l) part |= (mask.part[p][l] & 1u) << l;
#endif
    bits |= part << (p * Simd<T>::kPartLanes);
  }
  return bits;
}

// --- Stored formats ---------------------------------------------------------------------------

// n stored elements, widened to float.
template <DType kStored, int n>
PEWTER_INLINE Vector<float, n> LoadFloats(const void* from) {
  using F = Vector<float, n>;
  using U = Vector<uint32_t, n>;
  if constexpr (kStored == DType::kF32) {
    return LoadUnaligned<F>(from);
  } else if constexpr (ByteWidth(kStored) == 2) {
    using Half = Vector<uint16_t, n>;
    const Half bits = LoadUnaligned<Half>(from);
    if constexpr (kStored == DType::kF16) {
#if defined(__AVX512F__)
      if constexpr (n == 16) return BitCast<F>(_mm512_cvtph_ps(BitCast<__m256i>(bits)));
#endif
#if defined(__F16C__)
      if constexpr (n == 8) return BitCast<F>(_mm256_cvtph_ps(BitCast<__m128i>(bits)));
      if constexpr (n == 4) {
        return BitCast<F>(_mm_cvtph_ps(_mm_cvtsi64_si128(BitCast<long long>(bits))));
      }
#endif
      return FloatFromF16<F>(__builtin_convertvector(bits, U));
    } else {
      return FloatFromBF16<F>(__builtin_convertvector(bits, U));
    }
  } else {
    U bits = {};
    for (int l = 0; l < n; ++l) bits[l] = static_cast<const uint8_t*>(from)[l];
    return kStored == DType::kF8E4M3 ? FloatFromF8E4M3<F>(bits) : FloatFromF8E5M2<F>(bits);
  }
}

template <class Compute, DType kStored>
PEWTER_INLINE Simd<Compute> Load(const void* from) {
  using V = Simd<Compute>;
  V r;
  const char* bytes = static_cast<const char*>(from);
  PEWTER_UNROLL for (int p = 0; p < V::kParts; ++p) {
    const char* at = bytes + p * V::kPartLanes * ByteWidth(kStored);
    if constexpr (kStored == DType::kF64) {
      static_assert(sizeof(Compute) == 8, "float64 is computed with in float64");
      r.part[p] = LoadUnaligned<typename V::Part>(at);
    } else if constexpr (sizeof(Compute) == 4) {
      r.part[p] = LoadFloats<kStored, V::kPartLanes>(at);
    } else {
      r.part[p] = __builtin_convertvector(LoadFloats<kStored, V::kPartLanes>(at), typename V::Part);
    }
  }
  return r;
}

// Writes one part; past the caches when kStream (`to` is then aligned to sizeof(T)).
template <bool kStream, class T>
PEWTER_INLINE void StorePart(void* to, T value) {
#if defined(__x86_64__)
  if constexpr (kStream) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 64) {
      return _mm512_stream_si512(static_cast<__m512i*>(to), BitCast<__m512i>(value));
    }
#endif
#if defined(__AVX2__)
    if constexpr (sizeof(T) == 32) {
      return _mm256_stream_si256(static_cast<__m256i*>(to), BitCast<__m256i>(value));
    }
#endif
    if constexpr (sizeof(T) == 16) {
      return _mm_stream_si128(static_cast<__m128i*>(to), BitCast<__m128i>(value));
    }
    if constexpr (sizeof(T) == 8) {
      return _mm_stream_si64(static_cast<long long*>(to), BitCast<long long>(value));
    }
  }
#endif
  __builtin_memcpy(to, &value, sizeof(value));
}

template <DType kStored, bool kStream, int n>
PEWTER_INLINE void StoreFloats(void* to, Vector<float, n> value) {
  using U = Vector<uint32_t, n>;
  if constexpr (kStored == DType::kF32) {
    StorePart<kStream>(to, value);
  } else if constexpr (ByteWidth(kStored) == 2) {
    using Half = Vector<uint16_t, n>;
    if constexpr (kStored == DType::kF16) {
#if defined(__AVX512F__)
      if constexpr (n == 16) {
        return StorePart<kStream>(
            to, _mm512_cvtps_ph(BitCast<__m512>(value), _MM_FROUND_TO_NEAREST_INT));
      }
#endif
#if defined(__F16C__)
      if constexpr (n == 8) {
        return StorePart<kStream>(
            to, _mm256_cvtps_ph(BitCast<__m256>(value), _MM_FROUND_TO_NEAREST_INT));
      }
      if constexpr (n == 4) {
        return StorePart<kStream>(
            to, _mm_cvtsi128_si64(_mm_cvtps_ph(BitCast<__m128>(value), _MM_FROUND_TO_NEAREST_INT)));
      }
#endif
      StorePart<kStream>(to, __builtin_convertvector(F16FromFloat<U>(value), Half));
    } else {
      StorePart<kStream>(to, __builtin_convertvector(BF16FromFloat<U>(value), Half));
    }
  } else {
    const U bits =
        kStored == DType::kF8E4M3 ? F8E4M3FromFloat<U>(value) : F8E5M2FromFloat<U>(value);
    for (int l = 0; l < n; ++l) static_cast<uint8_t*>(to)[l] = static_cast<uint8_t>(bits[l]);
  }
}

template <DType kStored, bool kStream, class Compute>
PEWTER_INLINE void Store(void* to, const Simd<Compute>& value) {
  using V = Simd<Compute>;
  constexpr int n = V::kPartLanes;
  char* bytes = static_cast<char*>(to);
  PEWTER_UNROLL for (int p = 0; p < V::kParts; ++p) {
    char* at = bytes + p * n * ByteWidth(kStored);
    if constexpr (sizeof(Compute) == 4 && kStored == DType::kF64) {
      constexpr int half = n / 2;
      using Wide = Vector<double, half>;
      Vector<float, half> parts[2];
      __builtin_memcpy(parts, &value.part[p], sizeof(parts));
      StorePart<kStream>(at, __builtin_convertvector(parts[0], Wide));
      StorePart<kStream>(at + sizeof(Wide), __builtin_convertvector(parts[1], Wide));
    } else if constexpr (sizeof(Compute) == 4) {
      StoreFloats<kStored, kStream, n>(at, value.part[p]);
    } else if constexpr (kStored == DType::kF64) {
      StorePart<kStream>(at, value.part[p]);
    } else {
      using F = Vector<float, n>;
      F nearest = __builtin_convertvector(value.part[p], F);
      if constexpr (kStored != DType::kF32) {
        using W = Vector<uint64_t, n>;
        using U = Vector<uint32_t, n>;
        const W adjustment =
            OddAdjustment<W>(value.part[p], __builtin_convertvector(nearest, typename V::Part));
        nearest = BitCast<F>(
            ApplyOddAdjustment(BitCast<U>(nearest), __builtin_convertvector(adjustment, U)));
      }
      StoreFloats<kStored, kStream, n>(at, nearest);
    }
  }
}

// --- Random words -----------------------------------------------------------------------------

// The keys of each Philox round, widened: made once for a call.
struct PhiloxRoundKeys {
  uint64_t k0[PhiloxConstants::kRounds];
  uint64_t k1[PhiloxConstants::kRounds];

  PhiloxRoundKeys() = default;
  explicit PhiloxRoundKeys(PhiloxKey key) {
    for (int round = 0; round < PhiloxConstants::kRounds; ++round) {
      k0[round] = key.k0;
      k1[round] = key.k1;
      key.k0 += PhiloxConstants::kW0;
      key.k1 += PhiloxConstants::kW1;
    }
  }
};

using Wide = Vector<uint64_t, kVectorBytes / 8>;
using Words = Vector<uint32_t, kVectorBytes / 4>;

// Products of the low halves of 64-bit lanes.
PEWTER_INLINE Wide MultiplyLow(Wide a, uint64_t b) {
#if defined(__AVX512F__)
  return BitCast<Wide>(_mm512_mul_epu32(BitCast<__m512i>(a), _mm512_set1_epi64(b)));
#elif defined(__AVX2__)
  return BitCast<Wide>(_mm256_mul_epu32(BitCast<__m256i>(a), _mm256_set1_epi64x(b)));
#elif defined(__x86_64__)
  return BitCast<Wide>(_mm_mul_epu32(BitCast<__m128i>(a), _mm_set1_epi64x(b)));
#else
  return (a & 0xffffffffu) * b;
#endif
}

// The words of elements [4 * block, 4 * block + 32) in order. One block a 64-bit lane: the halves
// above the state's 32 bits hold rubbish, which neither a product's low half nor the result sees.
PEWTER_INLINE void PhiloxWords(const PhiloxRoundKeys& keys, uint64_t block,
                               Words words[kLanes * 4 / kVectorBytes]) {
  constexpr int kBlocks = kVectorBytes / 8;
  constexpr int kVectors = kLanes / 4 / kBlocks;
  Wide lane;
  PEWTER_UNROLL for (int l = 0; l < kBlocks; ++l) lane[l] = l;
  PEWTER_UNROLL for (int v = 0; v < kVectors; ++v) {
    const Wide counter = lane + (block + v * kBlocks);
    Wide c0 = counter, c1 = counter >> 32, c2 = {}, c3 = {};
    PEWTER_UNROLL for (int round = 0; round < PhiloxConstants::kRounds; ++round) {
      const Wide p0 = MultiplyLow(c0, PhiloxConstants::kM0);
      const Wide p1 = MultiplyLow(c2, PhiloxConstants::kM1);
      c0 = (p1 >> 32) ^ c1 ^ keys.k0[round];
      c1 = p1;
      c2 = (p0 >> 32) ^ c3 ^ keys.k1[round];
      c3 = p0;
    }
    const Wide w01 = (c0 & 0xffffffffu) | (c1 << 32);
    const Wide w23 = (c2 & 0xffffffffu) | (c3 << 32);
    Wide low, high;
#if defined(__AVX512F__)
    low = __builtin_shufflevector(w01, w23, 0, 8, 1, 9, 2, 10, 3, 11);
    high = __builtin_shufflevector(w01, w23, 4, 12, 5, 13, 6, 14, 7, 15);
#elif defined(__AVX2__)
    low = __builtin_shufflevector(w01, w23, 0, 4, 1, 5);
    high = __builtin_shufflevector(w01, w23, 2, 6, 3, 7);
#else
    low = __builtin_shufflevector(w01, w23, 0, 2);
    high = __builtin_shufflevector(w01, w23, 1, 3);
#endif
    words[2 * v] = BitCast<Words>(low);
    words[2 * v + 1] = BitCast<Words>(high);
  }
}

// Which of the 32 elements from `first` have a word < below.
template <class T>
PEWTER_INLINE Mask<T> PhiloxBelow(const PhiloxRoundKeys& keys, int64_t first, uint64_t below) {
  constexpr int kWordVectors = kLanes * 4 / kVectorBytes;
  Words words[kWordVectors];
  if (first % 4 == 0) [[likely]] {
    PhiloxWords(keys, static_cast<uint64_t>(first) / 4, words);
  } else {
    // The run straddles one block more: two aligned runs, shifted.
    Words aligned[2 * kWordVectors];
    PhiloxWords(keys, static_cast<uint64_t>(first) / 4, aligned);
    PhiloxWords(keys, static_cast<uint64_t>(first) / 4 + kLanes / 4, aligned + kWordVectors);
    __builtin_memcpy(words, reinterpret_cast<const uint32_t*>(aligned) + first % 4, sizeof(words));
  }
  Mask<T> r;
  if (below == 0) {
    PEWTER_UNROLL for (auto& part : r.part) part = typename Mask<T>::Part{};
    return r;
  }
  const uint32_t last = below > 0xffffffffu ? 0xffffffffu : static_cast<uint32_t>(below - 1);
  PEWTER_UNROLL for (int v = 0; v < kWordVectors; ++v) {
    const auto kept = words[v] <= last;
    if constexpr (sizeof(T) == 4) {
      r.part[v] = kept;
    } else {
      Vector<int32_t, kVectorBytes / 8> halves[2];
      __builtin_memcpy(halves, &kept, sizeof(halves));
      r.part[2 * v] = __builtin_convertvector(halves[0], typename Mask<T>::Part);
      r.part[2 * v + 1] = __builtin_convertvector(halves[1], typename Mask<T>::Part);
    }
  }
  return r;
}

}  // namespace pewter::kernels::cpu::PEWTER_CPU_ISA
