// exp, log(1 + r) and what is made of them, over the lanes of kernels/ops/op.h. They are written
// out, in one order of operations, so that all backends give the same bits; relative errors are a
// few units in the last place.
#pragma once

#include "kernels/ops/op.h"

namespace pewter::kernels {

// sum_{k <= i < kTerms} Series::Of(i) v^(i - k)
template <class Series, int kTerms, int k = 0, class V>
PEWTER_HD V Polynomial(const V& v) {
  using T = typename V::Scalar;
  constexpr T kCoefficient = static_cast<T>(Series::Of(k));
  if constexpr (k == kTerms - 1) {
    return V::Broadcast(kCoefficient);
  } else {
    return Polynomial<Series, kTerms, k + 1>(v) * v + kCoefficient;
  }
}

// e^v
struct ExpSeries {
  static consteval double Of(int k) { return k < 2 ? 1 : Of(k - 1) / k; }
};
// (e^v - 1) / v
struct ExpMinusOneSeries {
  static consteval double Of(int k) { return ExpSeries::Of(k + 1); }
};
// atanh(s) / s, of s^2
struct AtanhSeries {
  static consteval double Of(int k) { return 1.0 / (2 * k + 1); }
};
// ((1 + r) log(1 + r) - r) / r^2
struct DivergenceSeries {
  static consteval double Of(int k) { return (k % 2 == 0 ? 1.0 : -1.0) / ((k + 1) * (k + 2)); }
};

template <class V>
inline constexpr bool kIsDouble = sizeof(typename V::Scalar) == 8;

// For |v| <= 0.35.
template <class V>
inline constexpr int kExpTerms = kIsDouble<V> ? 14 : 8;

// The integer nearest to v.
template <class V>
PEWTER_HD V Nearest(const V& v) {
  using T = typename V::Scalar;
  // Adding 1.5 * 2^fraction bits leaves no room for a fraction.
  constexpr T kRound = kIsDouble<V> ? T(0x1.8p52) : T(0x1.8p23f);
  return (v + kRound) - kRound;
}

// e^v; 0 below the smallest normal number, and v at most 0 or so that e^v is finite.
template <class V>
PEWTER_HD V Exp(const V& v) {
  using T = typename V::Scalar;
  constexpr T kLeast = kIsDouble<V> ? T(-708) : T(-87);
  const V zero = V::Broadcast(0);
  const V x = Select(v < kLeast, V::Broadcast(kLeast), v);
  const V n = Nearest(x * T(1.4426950408889634));
  // log 2 in two parts, so that the difference is exact.
  constexpr T kHigh = kIsDouble<V> ? T(0x1.62e42feep-1) : T(0x1.62e3p-1);
  constexpr T kLow = kIsDouble<V> ? T(0x1.a39ef35793c76p-33) : T(0x1.2fefa2p-17);
  const V rest = (x - n * kHigh) - n * kLow;
  const V exp = Polynomial<ExpSeries, kExpTerms<V>>(rest) * PowerOfTwo(n);
  return Select(v < kLeast, zero, exp);
}

// e^v - 1, exact near 0.
template <class V>
PEWTER_HD V ExpMinusOne(const V& v) {
  using T = typename V::Scalar;
  const V near = v * Polynomial<ExpMinusOneSeries, kExpTerms<V>>(v);
  return Select(Abs(v) < T(0.35), near, Exp(v) - T(1));
}

// log(v) of normal v > 0.
template <class V>
PEWTER_HD V Log(const V& v) {
  using T = typename V::Scalar;
  V mantissa;
  V exponent = SplitExponent(v, &mantissa);  // mantissa in [1, 2)
  const auto large = mantissa > T(1.4142135623730951);
  mantissa = Select(large, mantissa * T(0.5), mantissa);
  exponent = Select(large, exponent + T(1), exponent);
  // log m = 2 atanh s, |s| <= 0.172
  const V s = (mantissa - T(1)) / (mantissa + T(1));
  const V atanh = s * Polynomial < AtanhSeries, kIsDouble<V> ? 11 : 5 > (s * s);
  return exponent * T(0.6931471805599453) + atanh * T(2);
}

// (1 + r) log(1 + r) - r >= 0, of r > -1: without the cancellation that the formula has near 0.
template <class V>
PEWTER_HD V DivergenceTerm(const V& r) {
  using T = typename V::Scalar;
  const V one_plus = r + T(1);
  const V near = r * r * Polynomial < DivergenceSeries, kIsDouble<V> ? 18 : 8 > (r);
  return Select(Abs(r) < T(0.125), near, one_plus * Log(one_plus) - r);
}

}  // namespace pewter::kernels
