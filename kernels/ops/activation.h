// Activations of feed-forward blocks, over the lanes of kernels/ops/op.h: one formula on all
// backends. Errors are a few units in the last place, also in the tails.
#pragma once

#include "kernels/ops/elementary.h"

namespace pewter::kernels {

enum class Activation : int {
  kNone,
  kGelu,       // x Phi(x)
  kGeluTanh,   // its approximation by tanh: "gelu_new", "gelu_pytorch_tanh"
  kQuickGelu,  // x sigmoid(1.702 x)
  kRelu,
  kSilu,
  kTanh,
};

// exp(z^2) erfc(z) = t P(t) with t = 1 / (1 + 0.4 z): P of degree 8, fitted for 0 <= z <= 9.6 at
// Chebyshev nodes by least squares of the relative error, which is at most 6.3e-8.
struct ScaledErfcSeries {
  static constexpr double kRate = 0.4;
  static consteval double Of(int k) {
    constexpr double kCoefficients[] = {
        0.22563166293131787, 0.22648231270909108,  0.20163890465371145,
        0.19425206908132273, 0.07798440401287932,  0.09020870916286249,
        0.08227806297587599, -0.13960168825064442, 0.041125625242307284};
    return kCoefficients[k];
  }
};

template <class V>
PEWTER_HD V Sigmoid(const V& x) {
  // exp does not overflow: beyond 80 the result is 1 in float anyway.
  const V zero = V::Broadcast(0);
  const V bounded = Select(x < -80.f, V::Broadcast(-80), x);
  return V::Broadcast(1) / (Exp(zero - bounded) + 1.f);
}

// The probability that a standard normal variable is below x.
template <class V>
PEWTER_HD V NormalBelow(const V& x) {
  const V one = V::Broadcast(1);
  const V t =
      one / (Abs(x) * static_cast<float>(ScaledErfcSeries::kRate * 0.7071067811865476) + 1.f);
  const V tail = Exp(x * x * -0.5f) * t * Polynomial<ScaledErfcSeries, 9>(t) * 0.5f;
  return Select(x < 0.f, tail, one - tail);
}

template <Activation kActivation, class V>
PEWTER_HD V Activate(const V& x) {
  if constexpr (kActivation == Activation::kGelu) {
    return x * NormalBelow(x);
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    // (1 + tanh u) / 2 = sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3).
    return x * Sigmoid((x + x * x * x * 0.044715f) * 1.5957691216057308f);
  } else if constexpr (kActivation == Activation::kQuickGelu) {
    return x * Sigmoid(x * 1.702f);
  } else if constexpr (kActivation == Activation::kRelu) {
    return Select(x < 0.f, V::Broadcast(0), x);  // NaN stays
  } else if constexpr (kActivation == Activation::kSilu) {
    return x * Sigmoid(x);
  } else if constexpr (kActivation == Activation::kTanh) {
    // Exact near 0, where the sigmoid would cancel.
    const V grown = ExpMinusOne(Select(x < 0.f, x, V::Broadcast(0) - x) * 2.f);  // in (-1, 0]
    const V size = (V::Broadcast(0) - grown) / (grown + 2.f);
    return Select(x < 0.f, V::Broadcast(0) - size, size);
  } else {
    return x;
  }
}

}  // namespace pewter::kernels
