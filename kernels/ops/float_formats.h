// Conversions between float32 and the narrower floating formats, and from float64 to them, each
// rounding once to nearest even. Results are those of PyTorch's scalar conversions: a NaN stays a
// NaN; above its largest value, F8E4M3 (the "fn" variant, without infinities) gives NaN and
// F8E5M2 infinity.
//
// The functions are templates over one element (U = uint32_t, F = float) and the CPU's SIMD vectors
// of them, so that both have one formula. Narrow formats are held in the low bits of 32-bit lanes.
#pragma once

#include <cstdint>

#include "base/host_device.h"

namespace pewter::kernels {

template <class To, class From>
PEWTER_HD To BitCast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

template <class U>
PEWTER_HD U Constant(uint32_t value) {
  return U{} + value;
}

template <class F, class U>
PEWTER_HD F FloatFromBF16(U bits) {
  return BitCast<F>(bits << 16);
}

// Exponent and mantissa fields are shifted into place and the product mends the bias; it is exact,
// subnormal numbers included.
template <class F, class U>
PEWTER_HD F FloatFromF16(U bits) {
  const U magnitude = (bits & 0x7fffu) << 13;
  const U finite = BitCast<U>(BitCast<F>(magnitude) * 0x1p112f);
  const U quiet = (bits & 0x3ffu) != 0u ? Constant<U>(0x7fc00000u) : Constant<U>(0x7f800000u);
  const U value = (bits & 0x7c00u) == 0x7c00u ? (magnitude | quiet) : finite;
  return BitCast<F>(value | ((bits & 0x8000u) << 16));
}

template <class F, class U>
PEWTER_HD F FloatFromF8E5M2(U bits) {
  return FloatFromF16<F>(bits << 8);
}

template <class F, class U>
PEWTER_HD F FloatFromF8E4M3(U bits) {
  const U magnitude = (bits & 0x7fu) << 20;
  const U finite = BitCast<U>(BitCast<F>(magnitude) * 0x1p120f);
  const U value = (bits & 0x7fu) == 0x7fu ? Constant<U>(0x7fc00000u) : finite;
  return BitCast<F>(value | ((bits & 0x80u) << 24));
}

// bfloat16 in the upper half of each lane; the lower half is rubbish.
template <class U, class F>
PEWTER_HD U RoundedToBF16(F value) {
  const U bits = BitCast<U>(value);
  const U rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return value != value ? Constant<U>(0x7fc00000u) : rounded;
}

template <class U, class F>
PEWTER_HD U BF16FromFloat(F value) {
  return RoundedToBF16<U>(value) >> 16;
}

// The sum with a power of two chosen from the exponent makes the adder do the rounding.
template <class U, class F>
PEWTER_HD U F16FromFloat(F value) {
  const U bits = BitCast<U>(value);
  const U sign = (bits >> 16) & 0x8000u;
  const U magnitude = bits & 0x7fffffffu;
  const F scaled = (BitCast<F>(magnitude) * 0x1p112f) * 0x1p-110f;
  const U exponent = magnitude & 0x7f800000u;
  const U bias = exponent < 0x38800000u ? Constant<U>(0x38800000u) : exponent;
  const U sum = BitCast<U>(BitCast<F>(bias + 0x07800000u) + scaled);
  const U finite = ((sum >> 13) & 0x7c00u) + (sum & 0xfffu);
  const U nan = ((bits >> 13) & 0x3ffu) | 0x7e00u;
  return sign | (magnitude > 0x7f800000u ? nan : finite);
}

// Both 8-bit formats: `mantissa` bits, exponent bias `bias`; what is at least `limit` becomes
// `above`, NaN becomes 0x7f. Below the smallest normal number an adder does the rounding.
template <int kMantissa, int kBias, class U, class F>
PEWTER_HD U F8FromFloat(F value, uint32_t limit, uint32_t above) {
  constexpr uint32_t kShift = 23 - kMantissa;
  constexpr uint32_t kSmallestNormal = static_cast<uint32_t>(128 - kBias) << 23;
  constexpr uint32_t kAdder = static_cast<uint32_t>(128 - kBias + kShift) << 23;
  const U bits = BitCast<U>(value);
  const U sign = (bits >> 24) & 0x80u;
  const U magnitude = bits & 0x7fffffffu;
  const U adder = Constant<U>(kAdder);
  const U subnormal = BitCast<U>(BitCast<F>(magnitude) + BitCast<F>(adder)) - kAdder;
  const U normal = (magnitude - (static_cast<uint32_t>(127 - kBias) << 23) +
                    ((1u << (kShift - 1)) - 1u) + ((magnitude >> kShift) & 1u)) >>
                   kShift;
  const U finite = magnitude < kSmallestNormal ? subnormal : normal;
  const U result = magnitude >= limit ? Constant<U>(above) : finite;
  return sign | (magnitude > 0x7f800000u ? Constant<U>(0x7fu) : result);
}

template <class U, class F>
PEWTER_HD U F8E5M2FromFloat(F value) {
  return F8FromFloat<2, 15, U>(value, /*limit=*/143u << 23, /*above=*/0x7cu);
}

template <class U, class F>
PEWTER_HD U F8E4M3FromFloat(F value) {
  return F8FromFloat<3, 7, U>(value, /*limit=*/1087u << 20, /*above=*/0x7fu);
}

// float64 to float32 rounding to odd: inexact results get an odd last bit. A second rounding to any
// format of at most 22 mantissa bits then equals one rounding of the float64. `nearest` is `value`
// rounded to nearest and `back` that widened again; D is double, W uint64_t, or vectors of them.
template <class W, class D>
PEWTER_HD W OddAdjustment(D value, D back) {
  const W value_bits = BitCast<W>(value) & 0x7fffffffffffffffull;
  const W back_bits = BitCast<W>(back) & 0x7fffffffffffffffull;
  // 0: exact, 1: set the last bit, 2: step towards zero first.
  const W zero = W{};
  const W toward_zero = back_bits > value_bits ? zero + 2ull : zero + 1ull;
  return (back_bits == value_bits || value_bits > 0x7ff0000000000000ull) ? zero : toward_zero;
}

template <class U>
PEWTER_HD U ApplyOddAdjustment(U nearest_bits, U adjustment) {
  const U stepped = nearest_bits - (adjustment >> 1);
  return adjustment != 0u ? (stepped | 1u) : stepped;
}

}  // namespace pewter::kernels
