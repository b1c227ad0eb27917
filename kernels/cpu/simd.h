// The CPU's lanes of compute type: Simd<T>, 32 elements in as many native vectors as that takes,
// with the operators that kernels/ops need, and conversions from and to the stored formats.
//
// kernels.cc is compiled once for each instruction set and so is this; everything is in a namespace
// of that instruction set, so that no function compiled for one is linked into another.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "base/dtype.h"
#include "base/random.h"
#include "kernels/ops/float_formats.h"
#include "kernels/ops/ranked_draw.h"

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

template <class V, class F, size_t... l>
PEWTER_INLINE V MakeLanes(F f, std::index_sequence<l...>) {
  return V{static_cast<std::remove_cvref_t<decltype(V{}[0])>>(f(l))...};
}
// f(0), f(1), ...: a constant, where f's values are.
template <class V, class F>
PEWTER_INLINE V MakeLanes(F f) {
  constexpr size_t kCount = sizeof(V) / sizeof(V{}[0]);
  return MakeLanes<V>(f, std::make_index_sequence<kCount>());
}

template <class T>
PEWTER_INLINE T LoadUnaligned(const void* from) {
  T value;
  __builtin_memcpy(&value, from, sizeof(value));
  return value;
}

// __builtin_convertvector, with the instructions that GCC 12 makes two or more of.
template <class To, class From>
PEWTER_INLINE To ConvertVector(From from) {
  using Element = std::remove_cvref_t<decltype(from[0])>;
  using Result = std::remove_cvref_t<decltype(std::declval<To>()[0])>;
  constexpr bool kHalves = std::is_same_v<Element, uint16_t> && std::is_same_v<Result, uint32_t>;
  constexpr bool kFromBytes = std::is_same_v<Element, uint8_t> && std::is_same_v<Result, uint32_t>;
  constexpr bool kToBytes = std::is_same_v<Element, uint32_t> && std::is_same_v<Result, uint8_t>;
  constexpr bool kWiden = std::is_same_v<Element, float> && std::is_same_v<Result, double>;
  constexpr bool kNarrow = std::is_same_v<Element, double> && std::is_same_v<Result, float>;
  static_cast<void>(kHalves), static_cast<void>(kFromBytes), static_cast<void>(kToBytes);
  static_cast<void>(kWiden), static_cast<void>(kNarrow);
#if defined(__AVX512F__)
  if constexpr (sizeof(To) == 64 && kFromBytes) {
    return BitCast<To>(_mm512_cvtepu8_epi32(BitCast<__m128i>(from)));
  }
  if constexpr (sizeof(From) == 64 && kToBytes) {
    return BitCast<To>(_mm512_cvtepi32_epi8(BitCast<__m512i>(from)));
  }
  if constexpr (sizeof(To) == 64 && kHalves) {
    return BitCast<To>(_mm512_cvtepu16_epi32(BitCast<__m256i>(from)));
  }
  if constexpr (sizeof(To) == 64 && kWiden) {
    return BitCast<To>(_mm512_cvtps_pd(BitCast<__m256>(from)));
  }
  if constexpr (sizeof(From) == 64 && kNarrow) {
    return BitCast<To>(_mm512_cvtpd_ps(BitCast<__m512d>(from)));
  }
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(To) == 32 && kHalves) {
    return BitCast<To>(_mm256_cvtepu16_epi32(BitCast<__m128i>(from)));
  }
  if constexpr (sizeof(To) == 32 && kWiden) {
    return BitCast<To>(_mm256_cvtps_pd(BitCast<__m128>(from)));
  }
  if constexpr (sizeof(From) == 32 && kNarrow) {
    return BitCast<To>(_mm256_cvtpd_ps(BitCast<__m256d>(from)));
  }
#endif
  return __builtin_convertvector(from, To);
}

// The two halves of a part of floats, as doubles.
template <class Float>
PEWTER_INLINE void WidenHalves(Float from, Vector<double, sizeof(Float) / 8>& low,
                               Vector<double, sizeof(Float) / 8>& high) {
  constexpr int n = sizeof(Float) / 8;
  using Half [[maybe_unused]] = Vector<float, n>;
  using Wide = Vector<double, n>;
#if defined(__AVX512F__)
  low = ConvertVector<Wide>(BitCast<Half>(_mm512_castps512_ps256(BitCast<__m512>(from))));
  high = ConvertVector<Wide>(BitCast<Half>(_mm512_extractf32x8_ps(BitCast<__m512>(from), 1)));
#elif defined(__AVX2__)
  low = ConvertVector<Wide>(BitCast<Half>(_mm256_castps256_ps128(BitCast<__m256>(from))));
  high = ConvertVector<Wide>(BitCast<Half>(_mm256_extractf128_ps(BitCast<__m256>(from), 1)));
#else
  low = ConvertVector<Wide>(__builtin_shufflevector(from, from, 0, 1));
  high = ConvertVector<Wide>(__builtin_shufflevector(from, from, 2, 3));
#endif
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

// 2^v of integral v within the exponents of normal numbers.
template <class T>
PEWTER_INLINE Simd<T> PowerOfTwo(const Simd<T>& v) {
  using Bits = typename Mask<T>::Part;
  constexpr int kFraction = sizeof(T) == 4 ? 23 : 52, kBias = sizeof(T) == 4 ? 127 : 1023;
  Simd<T> r;
  PEWTER_UNROLL for (int p = 0; p < Simd<T>::kParts; ++p) r.part[p] =
      BitCast<typename Simd<T>::Part>((__builtin_convertvector(v.part[p], Bits) + kBias)
                                      << kFraction);
  return r;
}

// The exponent of normal v > 0; v = mantissa 2^exponent with a mantissa in [1, 2).
template <class T>
PEWTER_INLINE Simd<T> SplitExponent(const Simd<T>& v, Simd<T>* mantissa) {
  using Bits = typename Mask<T>::Part;
  using Integer = typename Mask<T>::Integer;
  constexpr int kFraction = sizeof(T) == 4 ? 23 : 52, kBias = sizeof(T) == 4 ? 127 : 1023;
  constexpr Integer kFractionBits = (Integer{1} << kFraction) - 1;
  Simd<T> r;
  PEWTER_UNROLL for (int p = 0; p < Simd<T>::kParts; ++p) {
    const Bits bits = BitCast<Bits>(v.part[p]);
    r.part[p] = __builtin_convertvector((bits >> kFraction) - kBias, typename Simd<T>::Part);
    mantissa->part[p] = BitCast<typename Simd<T>::Part>((bits & kFractionBits) |
                                                        (static_cast<Integer>(kBias) << kFraction));
  }
  return r;
}

// Lanes with a number below `end`.
template <class T>
PEWTER_INLINE Mask<T> LanesBelow(int64_t end) {
  using Integer = typename Mask<T>::Integer;
  const Integer clamped = static_cast<Integer>(end < 0 ? 0 : end > kLanes ? kLanes : end);
  const auto lane = MakeLanes<typename Mask<T>::Part>([](size_t l) { return l; });
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
      return FloatFromF16<F>(ConvertVector<U>(bits));
    } else {
      return FloatFromBF16<F>(ConvertVector<U>(bits));
    }
  } else {
    const U bits = ConvertVector<U>(LoadUnaligned<Vector<uint8_t, n>>(from));
    return kStored == DType::kF8E4M3 ? FloatFromF8E4M3<F>(bits) : FloatFromF8E5M2<F>(bits);
  }
}

// One stored element, widened.
template <class Compute, DType kStored>
PEWTER_INLINE Compute LoadOne(const void* from) {
  if constexpr (kStored == DType::kF64) {
    return LoadUnaligned<double>(from);
  } else if constexpr (kStored == DType::kF32) {
    return LoadUnaligned<float>(from);
  } else if constexpr (kStored == DType::kF16) {
    return FloatFromF16<float>(static_cast<uint32_t>(LoadUnaligned<uint16_t>(from)));
  } else if constexpr (kStored == DType::kBF16) {
    return FloatFromBF16<float>(static_cast<uint32_t>(LoadUnaligned<uint16_t>(from)));
  } else if constexpr (kStored == DType::kF8E4M3) {
    return FloatFromF8E4M3<float>(static_cast<uint32_t>(LoadUnaligned<uint8_t>(from)));
  } else {
    return FloatFromF8E5M2<float>(static_cast<uint32_t>(LoadUnaligned<uint8_t>(from)));
  }
}

#if defined(__AVX512F__)
// The stored elements number index[l] from `from` on, negative ones before it, widened; of the
// `lanes` only. Those of 16 bits are read in aligned words, so never beyond the page of an element.
template <DType kStored>
PEWTER_INLINE __m512 GatherFloats(const void* from, __m512i index, __mmask16 lanes) {
  if constexpr (kStored == DType::kF32) {
    return _mm512_mask_i32gather_ps(__m512{}, lanes, index, from, 4);
  } else {
    static_assert(ByteWidth(kStored) == 2);
    const auto address = reinterpret_cast<uintptr_t>(from);
    const auto aligned = reinterpret_cast<const void*>(address & ~uintptr_t{3});
    const __m512i half = _mm512_add_epi32(index, _mm512_set1_epi32((address & 2) / 2));
    const __m512i word =
        _mm512_mask_i32gather_epi32(__m512i{}, lanes, _mm512_srai_epi32(half, 1), aligned, 4);
    const __m512i shift = _mm512_slli_epi32(_mm512_and_epi32(half, _mm512_set1_epi32(1)), 4);
    const __m512i bits = _mm512_srlv_epi32(word, shift);
    if constexpr (kStored == DType::kBF16) {
      return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
    } else {
      return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(bits));
    }
  }
}
#endif

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
      r.part[p] = ConvertVector<typename V::Part>(LoadFloats<kStored, V::kPartLanes>(at));
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
      StorePart<kStream>(to, ConvertVector<Half>(F16FromFloat<U>(value)));
    } else {
      StorePart<kStream>(to, ConvertVector<Half>(BF16FromFloat<U>(value)));
    }
  } else {
    const U bits =
        kStored == DType::kF8E4M3 ? F8E4M3FromFloat<U>(value) : F8E5M2FromFloat<U>(value);
    StorePart<false>(to, ConvertVector<Vector<uint8_t, n>>(bits));
  }
}

template <DType kStored, bool kStream, class Compute>
PEWTER_INLINE void Store(void* to, const Simd<Compute>& value) {
  using V = Simd<Compute>;
  constexpr int n = V::kPartLanes;
  char* bytes = static_cast<char*>(to);
#if defined(__AVX512F__)
  if constexpr (sizeof(Compute) == 4 && kStored == DType::kBF16) {
    // One permutation takes the upper halves of both parts.
    using U = Vector<uint32_t, n>;
    const auto odd = MakeLanes<Vector<uint16_t, 32>>([](size_t l) { return 2 * l + 1; });
    return StorePart<kStream>(
        to, _mm512_permutex2var_epi16(BitCast<__m512i>(RoundedToBF16<U>(value.part[0])),
                                      BitCast<__m512i>(odd),
                                      BitCast<__m512i>(RoundedToBF16<U>(value.part[1]))));
  }
#endif
  PEWTER_UNROLL for (int p = 0; p < V::kParts; ++p) {
    char* at = bytes + p * n * ByteWidth(kStored);
    if constexpr (sizeof(Compute) == 4 && kStored == DType::kF64) {
      Vector<double, n / 2> low, high;
      WidenHalves(value.part[p], low, high);
      StorePart<kStream>(at, low);
      StorePart<kStream>(at + sizeof(low), high);
    } else if constexpr (sizeof(Compute) == 4) {
      StoreFloats<kStored, kStream, n>(at, value.part[p]);
    } else if constexpr (kStored == DType::kF64) {
      StorePart<kStream>(at, value.part[p]);
    } else {
      using F = Vector<float, n>;
      F nearest = ConvertVector<F>(value.part[p]);
      if constexpr (kStored != DType::kF32) {
        using W = Vector<uint64_t, n>;
        using U = Vector<uint32_t, n>;
        const W adjustment =
            OddAdjustment<W>(value.part[p], ConvertVector<typename V::Part>(nearest));
        nearest = BitCast<F>(ApplyOddAdjustment(BitCast<U>(nearest), ConvertVector<U>(adjustment)));
      }
      StoreFloats<kStored, kStream, n>(at, nearest);
    }
  }
}

// --- Random draws -----------------------------------------------------------------------------

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

PEWTER_INLINE Wide Xor3(Wide a, Wide b, uint64_t c) {
#if defined(__AVX512F__)
  return BitCast<Wide>(_mm512_ternarylogic_epi64(BitCast<__m512i>(a), BitCast<__m512i>(b),
                                                 _mm512_set1_epi64(c), 0x96));
#else
  return a ^ b ^ c;
#endif
}

// Elements whose draws are made together: several independent chains of multiplications hide each
// other's latency.
#if defined(__AVX2__) && !defined(__AVX512F__)
inline constexpr int kDrawVectors = 2;  // more do not fit in the registers
#else
inline constexpr int kDrawVectors = 4;
#endif
inline constexpr int kDraws = kDrawVectors * kVectorBytes / 8 * 8;
static_assert(kDraws % 32 == 0);

// words: those of kDraws / 8 blocks of a stream in order. One block a 64-bit lane: the
// halves above the state's 32 bits hold rubbish, which neither a product's low half nor the result
// sees.
PEWTER_INLINE void PhiloxWords(PhiloxKey key, uint64_t block, uint32_t stream,
                               Words words[2 * kDrawVectors]) {
  constexpr int kBlocks = kVectorBytes / 8;
  const auto lane = MakeLanes<Wide>([](size_t l) { return l; });
  Wide c0[kDrawVectors], c1[kDrawVectors], c2[kDrawVectors], c3[kDrawVectors];
  PEWTER_UNROLL for (int v = 0; v < kDrawVectors; ++v) {
    c0[v] = lane + (block + v * kBlocks);
    c1[v] = c0[v] >> 32;
    c2[v] = Wide{} + stream;
    c3[v] = Wide{};
  }
  PEWTER_UNROLL for (int round = 0; round < PhiloxConstants::kRounds; ++round) {
    PEWTER_UNROLL for (int v = 0; v < kDrawVectors; ++v) {
      const Wide p0 = MultiplyLow(c0[v], PhiloxConstants::kM0);
      const Wide p1 = MultiplyLow(c2[v], PhiloxConstants::kM1);
      c0[v] = Xor3(p1 >> 32, c1[v], key.k0);
      c1[v] = p1;
      c2[v] = Xor3(p0 >> 32, c3[v], key.k1);
      c3[v] = p0;
    }
    key.k0 += PhiloxConstants::kW0;
    key.k1 += PhiloxConstants::kW1;
  }
  PEWTER_UNROLL for (int v = 0; v < kDrawVectors; ++v) {
    const Wide w01 = (c0[v] & 0xffffffffu) | (c1[v] << 32);
    const Wide w23 = (c2[v] & 0xffffffffu) | (c3[v] << 32);
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

// Bit l says that half l of `words`, the low half of a word first, is below `bound`, or equals it.
template <bool kEqual>
PEWTER_INLINE uint32_t BitsOfHalves(Words words, uint16_t bound) {
  using Halves [[maybe_unused]] = Vector<uint16_t, kVectorBytes / 2>;
#if defined(__AVX512BW__)
  const __m512i halves = BitCast<__m512i>(words), bounds = _mm512_set1_epi16(bound);
  return kEqual ? _mm512_cmpeq_epu16_mask(halves, bounds) : _mm512_cmplt_epu16_mask(halves, bounds);
#else
  const Halves halves = BitCast<Halves>(words);
  const auto holds = kEqual ? halves == bound : halves < bound;
#if defined(__AVX2__)
  const __m256i both = BitCast<__m256i>(holds);
  return _mm_movemask_epi8(
      _mm_packs_epi16(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1)));
#elif defined(__x86_64__)
  return _mm_movemask_epi8(_mm_packs_epi16(BitCast<__m128i>(holds), _mm_setzero_si128()));
#else
  uint32_t bits = 0;
  for (int l = 0; l < kVectorBytes / 2; ++l) bits |= (holds[l] != 0 ? 1u : 0u) << l;
  return bits;
#endif
#endif
}

// Of the draws from `element` on whose upper half equals the bound's, those that are below it.
__attribute__((noinline)) inline uint32_t BelowByLowerHalf(PhiloxKey key, uint64_t element,
                                                           uint32_t below, uint32_t equal) {
  uint32_t bits = 0;
  for (; equal != 0; equal &= equal - 1) {
    const int l = __builtin_ctz(equal);
    if (PhiloxWord(key, element + l) < below) bits |= 1u << l;
  }
  return bits;
}

// Drops the first `shift` (below 8) of the bits before the `count` that are wanted.
PEWTER_INLINE void DropBits(int shift, int64_t count, uint32_t* bits) {
  if (shift == 0) return;
  for (int64_t word = 0; word * 32 < count; ++word) {
    bits[word] = bits[word] >> shift | bits[word + 1] << (32 - shift);
  }
}

// Draws for `count` elements from element `first`: bit i % 32 of bits[i / 32] says that the Philox
// word of element first + i is < below. `bits` has room for kDraws more.
inline void DrawBits(PhiloxKey key, uint64_t below, int64_t first, int64_t count, uint32_t* bits) {
  constexpr int kHalves = kVectorBytes / 2;
  const int shift = static_cast<int>(first % 8);
  const int64_t end = count + shift;
  const bool all = below > 0xffffffffu;
  const auto bound = static_cast<uint16_t>(below >> 16);
  const bool exact = all || (below & 0xffffu) == 0;  // the upper half tells
  for (int64_t at = 0; at < end; at += kDraws) {
    const uint64_t element = static_cast<uint64_t>(first - shift + at);
    Words words[2 * kDrawVectors];
    PhiloxWords(key, element / 8, 0, words);
    uint64_t packed[(kDraws + 63) / 64] = {};
    PEWTER_UNROLL for (int v = 0; v < 2 * kDrawVectors; ++v) {
      uint32_t kept = BitsOfHalves<false>(words[v], bound);
      if (!exact) {
        const uint32_t equal = BitsOfHalves<true>(words[v], bound);
        if (equal != 0) [[unlikely]] {
          kept |= BelowByLowerHalf(key, element + v * kHalves, static_cast<uint32_t>(below), equal);
        }
      }
      if (all) kept = (uint64_t{1} << kHalves) - 1;
      packed[v * kHalves / 64] |= static_cast<uint64_t>(kept) << (v * kHalves % 64);
    }
    __builtin_memcpy(bits + at / 32, packed, kDraws / 8);
  }
  DropBits(shift, count, bits);
}

// Those of kDraws elements that a rival decides, and magnitudes.
template <class C>
struct Undecided {
  uint32_t bits[kDraws / 32];
  C own[kDraws];
};

// own[l]: the magnitude of element at + l, of 32 those within [0, count). Bits tell which of them
// are not zero.
template <class Magnitudes>
PEWTER_INLINE uint32_t NonZero(const Magnitudes& magnitudes, int64_t at, int64_t count,
                               typename Magnitudes::Scalar* own) {
  using C = typename Magnitudes::Scalar;
  if (at >= 0 && at + kLanes <= count) [[likely]] {
    const Simd<C> lanes = magnitudes.Lanes(at);
    __builtin_memcpy(own, &lanes, sizeof(lanes));
    return Bits(lanes > C{0});
  }
  uint32_t bits = 0;
  for (int l = 0; l < kLanes; ++l) {
    if (at + l < 0 || at + l >= count) continue;
    own[l] = magnitudes[at + l];
    bits |= static_cast<uint32_t>(own[l] > 0) << l;
  }
  return bits;
}

// The undecided elements of a block of kDraws, whose first is element `begin` of `magnitudes` and
// at `place` of its row: bit l of undecided[l / 32] says that element l is. upper, lower: the
// halves of the elements' words. Sets the bits of those that stay.
template <class Magnitudes>
PEWTER_INLINE void MeetRivals(const RankedDraw& draw, const Magnitudes& magnitudes, int64_t begin,
                              int64_t place, const uint16_t* upper, const uint16_t* lower,
                              const Undecided<typename Magnitudes::Scalar>& undecided,
                              uint32_t* stay) {
  for (int group = 0; group < kDraws / 32; ++group) {
    for (uint32_t left = undecided.bits[group]; left != 0; left &= left - 1) {
      const int l = group * 32 + __builtin_ctz(left);
      const int64_t own_place = place + l < draw.row ? place + l : (place + l) % draw.row;
      const uint32_t word = static_cast<uint32_t>(upper[l]) << 16 | lower[l];
      const int64_t row = begin + l - own_place;
      const bool kept = draw.Stays(word, own_place, undecided.own[l],
                                   [&](int64_t rival) { return magnitudes[row + rival]; });
      stay[group] |= static_cast<uint32_t>(kept) << l % 32;
    }
  }
}

#if defined(__AVX512F__)
// As MeetRivals, sixteen at a time, for what RankedDrawBits checks.
template <class Magnitudes>
PEWTER_INLINE void GatherRivals(const RankedDraw& draw, const Magnitudes& magnitudes, int64_t begin,
                                int64_t place, const uint16_t* upper, const uint16_t* lower,
                                const Undecided<float>& undecided, uint32_t* stay) {
  // The undecided ones without gaps, and room for a vector that is stored whole.
  uint32_t words[kDraws + 16], elements[kDraws + 16];
  float own[kDraws + 16];
  int found = 0;
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int l = 0; l < kDraws; l += 16) {
    const auto lanes = static_cast<__mmask16>(undecided.bits[l / 32] >> l % 32);
    const __m512i high = _mm512_cvtepu16_epi32(LoadUnaligned<__m256i>(upper + l));
    const __m512i half = _mm512_cvtepu16_epi32(LoadUnaligned<__m256i>(lower + l));
    const __m512i word = _mm512_or_epi32(_mm512_slli_epi32(high, 16), half);
    const __m512i element = _mm512_add_epi32(lane, _mm512_set1_epi32(l));
    _mm512_storeu_epi32(words + found, _mm512_maskz_compress_epi32(lanes, word));
    _mm512_storeu_epi32(elements + found, _mm512_maskz_compress_epi32(lanes, element));
    _mm512_storeu_ps(own + found,
                     _mm512_maskz_compress_ps(lanes, _mm512_loadu_ps(undecided.own + l)));
    found += __builtin_popcount(lanes);
  }
  uint16_t kept[kDraws / 16 + 4];  // and room for the last bits to be read with 64
  const __m512i row = _mm512_set1_epi32(static_cast<int>(draw.row));
  const __m512i step = _mm512_set1_epi64(static_cast<int64_t>(draw.step));
  const __m512i low = _mm512_set1_epi32(static_cast<int>(draw.low));
  const __m512i last_inside = _mm512_set1_epi32(static_cast<int>(draw.high - draw.low - 1));
  for (int i = 0; i < found; i += 16) {
    const auto lanes = static_cast<__mmask16>(found - i >= 16 ? 0xffff : (1 << (found - i)) - 1);
    const __m512i element = _mm512_loadu_epi32(elements + i);
    __m512i own_place = _mm512_add_epi32(element, _mm512_set1_epi32(static_cast<int>(place)));
    own_place =
        _mm512_mask_sub_epi32(own_place, _mm512_cmpge_epi32_mask(own_place, row), own_place, row);
    // As RankedDraw::Stays and Rival.
    const __m512i word = _mm512_loadu_epi32(words + i);
    const __m512i inside = _mm512_sub_epi32(word, low);
    const __mmask16 decided = _mm512_mask_cmple_epu32_mask(lanes, inside, last_inside);
    const __m512i even = _mm512_srli_epi64(_mm512_mul_epu32(inside, step), 32);
    const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(inside, 32), step);
    const __m512i other = _mm512_mask_blend_epi32(0xaaaa, even, odd);
    const __m512i rival = _mm512_mask_add_epi32(other, _mm512_cmpge_epi32_mask(other, own_place),
                                                other, _mm512_set1_epi32(1));
    const __m512i at = _mm512_add_epi32(_mm512_sub_epi32(rival, own_place), element);
    const __m512 magnitude = magnitudes.Gather(begin, at, decided);
    const __m512 mine = _mm512_loadu_ps(own + i);
    const __mmask16 outranks = _mm512_cmp_ps_mask(mine, magnitude, _CMP_GT_OQ) |
                               (_mm512_cmp_ps_mask(mine, magnitude, _CMP_EQ_OQ) &
                                _mm512_cmplt_epi32_mask(own_place, rival));
    kept[i / 16] = (decided & outranks) | (~decided & _mm512_cmplt_epu32_mask(word, low));
  }
  int read = 0;
  for (int group = 0; group < kDraws / 32; ++group) {
    const uint32_t bits = undecided.bits[group];
    const auto from = reinterpret_cast<const char*>(kept) + read / 8;
    stay[group] |=
        _pdep_u32(static_cast<uint32_t>(LoadUnaligned<uint64_t>(from) >> read % 8), bits);
    read += __builtin_popcount(bits);
  }
}
#endif

// Draws like DrawBits: whether an element stays by `draw`. magnitudes[i] is that of element first +
// i, for all i in the rows of these elements; magnitudes.Lanes(i) are 32 of them.
template <class Magnitudes>
PEWTER_INLINE void RankedDrawBits(const RankedDraw& draw, const Magnitudes& magnitudes,
                                  int64_t first, int64_t count, uint32_t* bits) {
  using C = typename Magnitudes::Scalar;
  constexpr int kHalves = kVectorBytes / 2;
  const int shift = static_cast<int>(first % 8);
  const int64_t end = count + shift;
  const auto low = static_cast<uint16_t>(draw.low >> 16);
  const auto high = static_cast<uint16_t>(draw.high >> 16);
  const bool to_the_end = draw.high > 0xffffffffu;
  for (int64_t at = 0; at < end; at += kDraws) {
    const uint64_t element = static_cast<uint64_t>(first - shift + at);
    Words upper[2 * kDrawVectors], lower[2 * kDrawVectors];
    PhiloxWords(draw.key, element / 8, 0, upper);
    PhiloxWords(draw.key, element / 8, 1, lower);
    // By the upper halves alone: those that stay, and those that may.
    uint64_t packed_stay[(kDraws + 63) / 64] = {}, packed_may[(kDraws + 63) / 64] = {};
    PEWTER_UNROLL for (int v = 0; v < 2 * kDrawVectors; ++v) {
      const uint32_t below = BitsOfHalves<false>(upper[v], low);
      const uint32_t inside =
          to_the_end ? static_cast<uint32_t>((uint64_t{1} << kHalves) - 1)
                     : BitsOfHalves<false>(upper[v], high) | BitsOfHalves<true>(upper[v], high);
      packed_stay[v * kHalves / 64] |= static_cast<uint64_t>(below) << (v * kHalves % 64);
      packed_may[v * kHalves / 64] |= static_cast<uint64_t>(inside & ~below) << (v * kHalves % 64);
    }
    uint32_t stay[kDraws / 32];
    Undecided<C> undecided;
    __builtin_memcpy(stay, packed_stay, sizeof(stay));
    __builtin_memcpy(undecided.bits, packed_may, sizeof(undecided.bits));
    uint16_t upper_halves[kDraws], lower_halves[kDraws];
    __builtin_memcpy(upper_halves, upper, sizeof(upper_halves));
    __builtin_memcpy(lower_halves, lower, sizeof(lower_halves));
    // Whether a zero stays makes no difference, and deltas of checkpoints are full of them.
    const int64_t begin = at - shift;
    for (int group = 0; group < kDraws / 32; ++group) {
      undecided.bits[group] &=
          NonZero(magnitudes, begin + group * 32, count, undecided.own + group * 32);
    }
    const auto place = static_cast<int64_t>(element % static_cast<uint64_t>(draw.row));
#if defined(__AVX512F__)
    if constexpr (Magnitudes::kGathers) {
      if (draw.row >= kDraws && draw.row < 1 << 30 && draw.step <= 0xffffffffu &&
          magnitudes.Aligned()) {
        GatherRivals(draw, magnitudes, begin, place, upper_halves, lower_halves, undecided, stay);
        __builtin_memcpy(bits + at / 32, stay, sizeof(stay));
        continue;
      }
    }
#endif
    MeetRivals(draw, magnitudes, begin, place, upper_halves, lower_halves, undecided, stay);
    __builtin_memcpy(bits + at / 32, stay, sizeof(stay));
  }
  DropBits(shift, count, bits);
}

// Lane l is bit l.
template <class T>
PEWTER_INLINE Mask<T> FromBits(uint32_t bits) {
  Mask<T> r;
  PEWTER_UNROLL for (int p = 0; p < Simd<T>::kParts; ++p) {
    using Part = typename Mask<T>::Part;
    const uint32_t part = bits >> (p * Simd<T>::kPartLanes);
#if defined(__AVX512F__)
    r.part[p] = sizeof(T) == 4 ? BitCast<Part>(_mm512_movm_epi32(static_cast<__mmask16>(part)))
                               : BitCast<Part>(_mm512_movm_epi64(static_cast<__mmask8>(part)));
#else
    const auto bit = MakeLanes<Part>([](size_t l) { return 1 << l; });
    r.part[p] = ((Part{} + static_cast<int32_t>(part & 0xff)) & bit) == bit;
#endif
  }
  return r;
}

}  // namespace pewter::kernels::cpu::PEWTER_CPU_ISA
