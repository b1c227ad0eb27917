// Plain references for the kernels, written apart from them: number formats by their definition
// (sign, exponent, fraction; nearest representable value by division), ops element by element.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "base/dtype.h"
#include "base/random.h"
#include "kernels/ops/op_list.h"

namespace pewter::kernels::reference {

struct Format {
  int exponent_bits;
  int fraction_bits;
  bool infinities;  // else only all ones is special, and NaN
};

inline Format FormatOf(DType dtype) {
  switch (dtype) {
    case DType::kF64:
      return {11, 52, true};
    case DType::kF32:
      return {8, 23, true};
    case DType::kF16:
      return {5, 10, true};
    case DType::kBF16:
      return {8, 7, true};
    case DType::kF8E5M2:
      return {5, 2, true};
    default:
      return {4, 3, false};
  }
}

inline double Decode(DType dtype, uint64_t bits) {
  if (dtype == DType::kF64) return std::bit_cast<double>(bits);
  const Format f = FormatOf(dtype);
  const int bias = (1 << (f.exponent_bits - 1)) - 1;
  const int64_t fraction = bits & ((uint64_t{1} << f.fraction_bits) - 1);
  const int exponent = (bits >> f.fraction_bits) & ((1 << f.exponent_bits) - 1);
  const bool negative = bits >> (f.fraction_bits + f.exponent_bits) & 1;
  double value;
  if (exponent == (1 << f.exponent_bits) - 1 &&
      (f.infinities || fraction == (1 << f.fraction_bits) - 1)) {
    value = f.infinities && fraction == 0 ? INFINITY : NAN;
  } else if (exponent == 0) {
    value = std::ldexp(static_cast<double>(fraction), 1 - bias - f.fraction_bits);
  } else {
    value = std::ldexp(static_cast<double>((int64_t{1} << f.fraction_bits) + fraction),
                       exponent - bias - f.fraction_bits);
  }
  return negative ? -value : value;
}

// Nearest, ties to even; a NaN has any NaN's bits.
inline uint64_t Encode(DType dtype, double value) {
  if (dtype == DType::kF64) return std::bit_cast<uint64_t>(value);
  const Format f = FormatOf(dtype);
  const int bias = (1 << (f.exponent_bits - 1)) - 1;
  const uint64_t sign = static_cast<uint64_t>(std::signbit(value))
                        << (f.exponent_bits + f.fraction_bits);
  const uint64_t all_ones = (uint64_t{1} << (f.exponent_bits + f.fraction_bits)) - 1;
  const uint64_t infinity =
      f.infinities ? all_ones ^ ((uint64_t{1} << f.fraction_bits) - 1) : all_ones;
  if (std::isnan(value)) return sign | all_ones;
  if (std::isinf(value)) return sign | infinity;
  if (value == 0) return sign;
  int exponent;
  std::frexp(value, &exponent);  // |value| in [2^(exponent-1), 2^exponent)
  exponent = std::max(exponent - 1, 1 - bias);
  // In units of the last place; an even count is an even fraction.
  const auto units = static_cast<uint64_t>(
      std::nearbyint(std::ldexp(std::abs(value), f.fraction_bits - exponent)));
  // Counting on from the smallest number of the binade carries into the exponent by itself.
  const uint64_t bits = (static_cast<uint64_t>(exponent + bias - 1) << f.fraction_bits) + units;
  return sign | std::min(bits, infinity);
}

inline uint64_t ReadBits(DType dtype, const void* at) {
  uint64_t bits = 0;
  std::memcpy(&bits, at, ByteWidth(dtype));
  return bits;
}
inline void WriteBits(DType dtype, uint64_t bits, void* at) {
  std::memcpy(at, &bits, ByteWidth(dtype));
}

inline bool SameValue(DType dtype, uint64_t a, uint64_t b) {
  return a == b || (std::isnan(Decode(dtype, a)) && std::isnan(Decode(dtype, b)));
}

// Model i's delta with what is not kept zeroed.
template <class T>
T KeptDelta(const TaskVectorSum::Model& model, T base, T x, int64_t index) {
  const T delta = x - base;
  switch (model.keep) {
    case Keep::kAll:
      return delta;
    case Keep::kNone:
      return 0;
    case Keep::kMagnitude:
    case Keep::kBand: {
      const auto largest = [&](double threshold, int64_t ties_end) {
        const T value = static_cast<T>(threshold);
        return std::abs(delta) > value || (std::abs(delta) == value && index < ties_end);
      };
      const bool kept = largest(model.threshold, model.ties_end) &&
                        !(model.keep == Keep::kBand && largest(model.ceiling, model.ceiling_end));
      return kept ? delta : 0;
    }
    case Keep::kRandom:
      return PhiloxWord(model.key, static_cast<uint64_t>(index)) < model.draw_below ? delta : 0;
    case Keep::kRanked:  // needs the row: RankedTest
      break;
  }
  return 0;
}

template <class T>
T Evaluate(const WeightedSum& op, const std::vector<T>& x, int64_t) {
  T sum = 0;
  for (int i = 0; i < op.count; ++i) {
    const T product = x[i] * static_cast<T>(op.weight[i]);
    sum = i == 0 ? product : sum + product;
  }
  return op.divisor == 1 ? sum : sum / static_cast<T>(op.divisor);
}

template <class T>
T Evaluate(const TaskVectorSum& op, const std::vector<T>& x, int64_t index) {
  std::vector<T> d(op.count);
  T sum = 0;
  for (int i = 0; i < op.count; ++i) {
    d[i] = KeptDelta(op.model[i], x[0], x[1 + i], index);
    d[i] = d[i] * static_cast<T>(op.model[i].scale);
    d[i] = d[i] * static_cast<T>(op.model[i].weight);
    sum += d[i];
  }
  T mixed = sum;
  T divisor = static_cast<T>(op.weight_sum);
  if (op.elect_sign) {
    mixed = divisor = 0;
    for (int i = 0; i < op.count; ++i) {
      if (sum >= 0 ? d[i] > 0 : d[i] < 0) {
        mixed += d[i];
        divisor += static_cast<T>(op.model[i].weight);
      }
    }
    if (divisor == 0) divisor = 1;
  }
  if (op.normalize) mixed = mixed / divisor;
  return x[0] + mixed * static_cast<T>(op.lambda);
}

template <class T>
T Evaluate(const NearSwap& op, const std::vector<T>& x, int64_t) {
  const T distance = std::max(std::abs(x[1] - x[0]), static_cast<T>(1e-6));
  const T w = std::clamp(static_cast<T>(op.t) / distance, T{0}, T{1});
  const T swapped = w * x[1], kept = (1 - w) * x[0];
  return swapped + kept;
}

template <class T>
std::vector<bool> Active(const OverlapMean& op, const std::vector<T>& x) {
  std::vector<bool> active;
  for (int i = 0; i < op.count; ++i) {
    active.push_back(std::abs(x[1 + i] - x[0]) > static_cast<T>(op.epsilon));
  }
  return active;
}

template <class T>
T Evaluate(const OverlapMean& op, const std::vector<T>& x, int64_t) {
  const std::vector<bool> active = Active(op, x);
  const auto count = std::count(active.begin(), active.end(), true);
  T sum = 0;
  for (int i = 0; i < op.count; ++i) {
    const T delta = x[1 + i] - x[0];
    if (active[i]) sum += count == 1 ? delta * static_cast<T>(op.unique_scale[i]) : delta;
  }
  return x[0] + (count > 1 ? sum / static_cast<T>(count) : sum);
}

template <class T>
std::vector<T> EvaluateTerms(const Gram& op, const std::vector<T>& x, int64_t) {
  std::vector<T> terms;
  for (int i = 0; i < op.count; ++i) {
    for (int j = 0; j <= i; ++j) {
      terms.push_back(op.from_base ? (x[1 + i] - x[0]) * (x[1 + j] - x[0]) : x[i] * x[j]);
    }
  }
  return terms;
}
template <class T>
std::vector<T> EvaluateTerms(const OverlapCounts& op, const std::vector<T>& x, int64_t) {
  const std::vector<bool> active = Active(op.task, x);
  const auto count = std::count(active.begin(), active.end(), true);
  std::vector<T> terms;
  for (bool is : active) {
    terms.push_back(is && count > 1 ? 1 : 0);
    terms.push_back(is && count == 1 ? 1 : 0);
  }
  return terms;
}
template <class T>
std::vector<T> EvaluateTerms(const DotNorms&, const std::vector<T>& x, int64_t) {
  return {x[0] * x[0], x[1] * x[1], x[0] * x[1]};
}
template <class T>
std::vector<T> EvaluateTerms(const DeltaAbsSums& op, const std::vector<T>& x, int64_t index) {
  std::vector<T> terms;
  for (int i = 0; i < op.task.count; ++i) {
    terms.push_back(std::abs(x[1 + i] - x[0]));
    terms.push_back(std::abs(KeptDelta(op.task.model[i], x[0], x[1 + i], index)));
  }
  return terms;
}
template <class T>
T Variance(int count, const std::vector<T>& x) {
  T mean = 0, variance = 0;
  for (int i = 0; i < count; ++i) mean += x[1 + i] - x[0];
  mean /= static_cast<T>(count);
  for (int i = 0; i < count; ++i) {
    const T distance = (x[1 + i] - x[0]) - mean;
    variance += distance * distance;
  }
  return variance / static_cast<T>(count);
}

template <class T>
bool Selected(const SelectedMean& op, const std::vector<T>& x, int64_t index) {
  if (op.select_all) return true;
  const T variance = Variance(op.count, x), least = static_cast<T>(op.threshold);
  return variance > least || (variance == least && index < op.ties_end);
}

template <class T>
T Evaluate(const SelectedMean& op, const std::vector<T>& x, int64_t index) {
  if (!Selected(op, x, index)) return x[0] + T{0};
  T sum = 0, counted = 0, weights = 0;
  for (int i = 0; i < op.count; ++i) sum += x[1 + i] - x[0];
  for (int i = 0; i < op.count; ++i) {
    const T delta = x[1 + i] - x[0], weight = static_cast<T>(op.weight[i]);
    if (sum >= 0 ? !(delta > 0) : !(delta < 0)) continue;
    counted += delta * weight;
    weights += weight;
  }
  const T least = static_cast<T>(1e-6);
  return x[0] + counted / (weights > least ? weights : least);
}

template <class T>
std::vector<T> EvaluateTerms(const SelectedSquares& op, const std::vector<T>& x, int64_t index) {
  std::vector<T> terms;
  for (int i = 0; i < op.task.count; ++i) {
    const T delta = x[1 + i] - x[0];
    terms.push_back(Selected(op.task, x, index) ? delta * delta : 0);
  }
  terms.resize((op.task.count + 3) / 4 * 4);
  return terms;
}
template <class T>
std::vector<T> EvaluateTerms(const CountVarying& op, const std::vector<T>& x, int64_t) {
  return {Variance(op.variance.count, x) > 0 ? T{1} : T{0}};
}

// Value i of the row or column of element `index`.
template <class T>
T Of(const AxisValues& axis, int64_t index, int i) {
  const int64_t row = index / axis.row, column = index % axis.row;
  return static_cast<T>(axis.columns ? axis.values[i * axis.row + column]
                                     : axis.values[(row - axis.first) * axis.count + i]);
}

template <class T>
T Evaluate(const AxisCombination& op, const std::vector<T>& x, int64_t index) {
  T sum = 0;
  for (int i = 0; i < op.count; ++i) {
    const T coefficient = Of<T>(op.axis, index, i);
    const T term = (op.from_base ? x[1 + i] - x[0] : x[i]) * coefficient;
    sum = i == 0 && !op.from_base ? term : sum + term;
  }
  return op.from_base ? x[0] + sum : sum;
}

template <class T>
T Evaluate(const ImportantElements& op, const std::vector<T>& x, int64_t index) {
  const T importance = std::abs(x[1] - x[0]) * Of<T>(op.importance.axis, index, 0);
  return importance >= static_cast<T>(op.threshold) ? x[1] : x[0];
}

// What is kept of each model's value.
template <class T>
std::vector<T> Kept(const ElectedMean& op, const std::vector<T>& x, int64_t index) {
  std::vector<T> kept;
  for (int t = 0; t < op.count; ++t) {
    const T value = op.from_base ? x[1 + t] - x[0] : x[t];
    const T least = static_cast<T>(op.threshold[t]);
    bool stays = !(least > 0) || std::abs(value) >= least;
    if (op.scaled) {
      const T magnitude = std::abs(value) * Of<T>(op.axis, index, t);
      stays = magnitude >= least && magnitude > 0;
    }
    kept.push_back(stays ? value : T{0});
  }
  return kept;
}

template <class T>
T Evaluate(const ElectedMean& op, const std::vector<T>& x, int64_t index) {
  const std::vector<T> kept = Kept(op, x, index);
  T mass = kept[0], sum = 0;
  for (size_t t = 1; t < kept.size(); ++t) mass += kept[t];
  const double sign = mass > 0 ? 1 : mass < 0 ? -1 : mass == 0 ? op.sign_of_zero : 0;
  int terms = 0;
  for (size_t t = 0; t < kept.size(); ++t) {
    const bool counts = kept[t] > 0   ? !op.elect || sign > 0
                        : kept[t] < 0 ? !op.elect || sign < 0
                                      : false;
    const T term = counts ? kept[t] * static_cast<T>(op.weight[t]) : T{0};
    sum += term;
    terms += std::abs(term) > 0;
  }
  const T mean = sum / static_cast<T>(op.disjoint ? std::max(terms, 1) : op.count);
  return op.from_base ? x[0] + mean : mean;
}

template <class T>
std::vector<T> EvaluateTerms(const ElectedSigns& op, const std::vector<T>& x, int64_t index) {
  const std::vector<T> kept = Kept(op.task, x, index);
  T mass = kept[0];
  for (size_t t = 1; t < kept.size(); ++t) mass += kept[t];
  return {mass > 0 ? T{1} : mass < 0 ? T{-1} : T{0}};
}

template <class T>
T Evaluate(const FisherMean& op, const std::vector<T>& x, int64_t) {
  T sum = 0, divisor = 0, plain = 0, weights = 0;
  for (int i = 0; i < op.count; ++i) {
    const T weight = static_cast<T>(op.weight[i]);
    const T certainty = (x[op.count + i] + static_cast<T>(op.epsilon)) * weight;
    sum += x[i] * certainty;
    divisor += certainty;
    plain += x[i] * weight;
    weights += weight;
  }
  return divisor == 0 ? plain / weights : sum / divisor;
}

template <class T>
std::vector<T> EvaluateTerms(const FisherSums& op, const std::vector<T>& x, int64_t) {
  std::vector<T> terms;
  for (int i = 0; i < op.count; ++i) {
    terms.push_back(x[i] * x[i]);
    terms.push_back(x[i] < 0 ? T{1} : T{0});
  }
  return terms;
}

}  // namespace pewter::kernels::reference
