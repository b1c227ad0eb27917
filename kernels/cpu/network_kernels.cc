// Compiled once for each instruction set with PEWTER_CPU_ISA (a namespace) and
// PEWTER_CPU_TABLE (the table that it defines). See network_kernels.h.
#include "kernels/cpu/network_kernels.h"

#include "kernels/cpu/simd.h"

namespace pewter::kernels::cpu {
namespace PEWTER_CPU_ISA {
namespace {

using V = Simd<float>;

PEWTER_INLINE V LoadFull(const float* from) { return LoadUnaligned<V>(from); }
PEWTER_INLINE void StoreFull(float* to, const V& value) {
  __builtin_memcpy(to, &value, sizeof(value));
}
// `count` elements, the other lanes `fill`.
PEWTER_INLINE V LoadSome(const float* from, int64_t count, float fill) {
  float lane[kLanes];
  for (int l = 0; l < kLanes; ++l) lane[l] = fill;
  __builtin_memcpy(lane, from, count * sizeof(float));
  return LoadUnaligned<V>(lane);
}
PEWTER_INLINE void StoreSome(float* to, const V& value, int64_t count) {
  __builtin_memcpy(to, &value, count * sizeof(float));
}

// to[j] = f(from[j]) for the lanes of j; the loaders are called with (j, count).
template <class F>
PEWTER_INLINE void ForLanes(int64_t count, const F& f) {
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) f(j, int64_t{kLanes});
  if (j < count) f(j, count - j);
}
PEWTER_INLINE V LoadAt(const float* from, int64_t j, int64_t count, float fill = 0) {
  return count == kLanes ? LoadFull(from + j) : LoadSome(from + j, count, fill);
}
PEWTER_INLINE void StoreAt(float* to, int64_t j, const V& value, int64_t count) {
  if (count == kLanes) {
    StoreFull(to + j, value);
  } else {
    StoreSome(to + j, value, count);
  }
}

PEWTER_INLINE V Larger(const V& a, const V& b) {
  V r;
  PEWTER_UNROLL for (int p = 0; p < V::kParts; ++p) r.part[p] =
      a.part[p] > b.part[p] ? a.part[p] : b.part[p];
  return r;
}

template <class T, class F>
PEWTER_INLINE T Fold(const T* lanes, const F& f) {
  T lane[kLanes];
  __builtin_memcpy(lane, lanes, sizeof(lane));
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) lane[l] = f(lane[l], lane[l + half]);
  }
  return lane[0];
}
PEWTER_INLINE float Sum(const V& v) {
  float lane[kLanes];
  StoreFull(lane, v);
  return Fold(lane, [](float a, float b) { return a + b; });
}
PEWTER_INLINE float Largest(const V& v) {
  float lane[kLanes];
  StoreFull(lane, v);
  return Fold(lane, [](float a, float b) { return a > b ? a : b; });
}

// Lanes of doubles that floats are added to.
struct Accumulator {
  using Wide = Vector<double, V::kPartLanes / 2>;
  Wide low[V::kParts] = {}, high[V::kParts] = {};

  PEWTER_INLINE void Add(const V& v) {
    PEWTER_UNROLL for (int p = 0; p < V::kParts; ++p) {
      Wide a, b;
      WidenHalves(v.part[p], a, b);
      low[p] += a;
      high[p] += b;
    }
  }
  PEWTER_INLINE void AddSquare(const V& v) {
    PEWTER_UNROLL for (int p = 0; p < V::kParts; ++p) {
      Wide a, b;
      WidenHalves(v.part[p], a, b);
      low[p] += a * a;
      high[p] += b * b;
    }
  }
  PEWTER_INLINE void Store(double* to) const {
    PEWTER_UNROLL for (int p = 0; p < V::kParts; ++p) {
      __builtin_memcpy(to + p * V::kPartLanes, &low[p], sizeof(Wide));
      __builtin_memcpy(to + p * V::kPartLanes + V::kPartLanes / 2, &high[p], sizeof(Wide));
    }
  }
};

// Calls f with the activation as a constant.
template <class F>
PEWTER_INLINE void WithActivation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::kNone:
      return f([](const V& x) { return x; });
    case Activation::kGelu:
      return f([](const V& x) { return Activate<Activation::kGelu>(x); });
    case Activation::kGeluTanh:
      return f([](const V& x) { return Activate<Activation::kGeluTanh>(x); });
    case Activation::kQuickGelu:
      return f([](const V& x) { return Activate<Activation::kQuickGelu>(x); });
    case Activation::kRelu:
      return f([](const V& x) { return Activate<Activation::kRelu>(x); });
    case Activation::kSilu:
      return f([](const V& x) { return Activate<Activation::kSilu>(x); });
    case Activation::kTanh:
      return f([](const V& x) { return Activate<Activation::kTanh>(x); });
  }
}

void Finish(float* y, int64_t rows, int64_t columns, int64_t stride, const float* bias,
            Activation activation) {
  WithActivation(activation, [&](auto f) {
    for (int64_t i = 0; i < rows; ++i) {
      float* const row = y + i * stride;
      ForLanes(columns, [&](int64_t j, int64_t count) {
        V v = LoadAt(row, j, count);
        if (bias != nullptr) v = v + LoadAt(bias, j, count);
        StoreAt(row, j, f(v), count);
      });
    }
  });
}

void Gate(float* gate, const float* up, int64_t count, Activation activation) {
  WithActivation(activation, [&](auto f) {
    ForLanes(count, [&](int64_t j, int64_t lanes) {
      StoreAt(gate, j, f(LoadAt(gate, j, lanes)) * LoadAt(up, j, lanes), lanes);
    });
  });
}

void Normalize(const float* x, int64_t columns, bool centre, float epsilon, const float* weight,
               const float* bias, float* y) {
  float mean = 0;
  if (centre) {
    V sum = V::Broadcast(0);
    ForLanes(columns, [&](int64_t j, int64_t count) { sum = sum + LoadAt(x, j, count); });
    mean = Sum(sum) / static_cast<float>(columns);
  }
  V squares = V::Broadcast(0);
  ForLanes(columns, [&](int64_t j, int64_t count) {
    const V deviation = LoadAt(x, j, count, mean) - mean;
    squares = squares + deviation * deviation;
  });
  const float scale = 1 / __builtin_sqrtf(Sum(squares) / static_cast<float>(columns) + epsilon);
  ForLanes(columns, [&](int64_t j, int64_t count) {
    V v = (LoadAt(x, j, count) - mean) * scale * LoadAt(weight, j, count);
    if (bias != nullptr) v = v + LoadAt(bias, j, count);
    StoreAt(y, j, v, count);
  });
}

void Rotate(float* x, int64_t heads, int64_t head, int64_t pairs, const float* cos,
            const float* sin) {
  for (int64_t h = 0; h < heads; ++h) {
    float* const low = x + h * head;
    float* const high = low + pairs;
    for (int64_t i = 0; i < pairs; ++i) {
      const float a = low[i], b = high[i];
      low[i] = a * cos[i] - b * sin[i];
      high[i] = b * cos[i] + a * sin[i];
    }
  }
}

void Softmax(float* row, int64_t begin, int64_t end, int64_t count) {
  constexpr float kLowest = -__builtin_inff();
  float* const from = row + begin;
  const int64_t size = end - begin;
  V most = V::Broadcast(kLowest);
  ForLanes(size,
           [&](int64_t j, int64_t lanes) { most = Larger(LoadAt(from, j, lanes, kLowest), most); });
  const float largest = Largest(most);
  V total = V::Broadcast(0);
  ForLanes(size, [&](int64_t j, int64_t lanes) {
    const V e = Exp(LoadAt(from, j, lanes, kLowest) - largest);
    total = total + e;
    StoreAt(from, j, e, lanes);
  });
  const float scale = 1 / Sum(total);
  ForLanes(size, [&](int64_t j, int64_t lanes) {
    StoreAt(from, j, LoadAt(from, j, lanes) * scale, lanes);
  });
  for (int64_t j = 0; j < begin; ++j) row[j] = 0;
  for (int64_t j = end; j < count; ++j) row[j] = 0;
}

void Predict(const float* logits, int64_t count, int64_t first, double* sum, float* largest,
             int32_t* best) {
  constexpr float kLowest = -__builtin_inff();
  V most = V::Broadcast(kLowest);
  ForLanes(count, [&](int64_t j, int64_t lanes) {
    most = Larger(LoadAt(logits, j, lanes, kLowest), most);
  });
  const float here = Largest(most);
  if (here > *largest) {
    if (*best >= 0) *sum *= __builtin_exp(double{*largest} - double{here});
    *largest = here;
    for (int64_t j = 0; j < count; ++j) {
      if (logits[j] == here) {
        *best = static_cast<int32_t>(first + j);
        break;
      }
    }
  }
  Accumulator total;
  ForLanes(count, [&](int64_t j, int64_t lanes) {
    total.Add(Exp(LoadAt(logits, j, lanes, kLowest) - *largest));
  });
  double lane[kLanes];
  total.Store(lane);
  *sum += Fold(lane, [](double a, double b) { return a + b; });
}

void Subtract(const float* x, const float* row, int64_t count, float* y) {
  ForLanes(count, [&](int64_t j, int64_t lanes) {
    StoreAt(y, j, LoadAt(x, j, lanes) - LoadAt(row, j, lanes), lanes);
  });
}

void AddMoments(const float* x, int64_t rows, int64_t columns, int64_t stride, double* sums,
                double* squares) {
  ForLanes(columns, [&](int64_t j, int64_t count) {
    Accumulator sum, square;
    for (int64_t i = 0; i < rows; ++i) {
      const V v = LoadAt(x + i * stride, j, count);
      sum.Add(v);
      square.AddSquare(v);
    }
    double lane[kLanes];
    sum.Store(lane);
    for (int64_t l = 0; l < count; ++l) sums[j + l] += lane[l];
    square.Store(lane);
    for (int64_t l = 0; l < count; ++l) squares[j + l] += lane[l];
  });
}

void Add(const float* from, int64_t count, double* to) {
  for (int64_t j = 0; j < count; ++j) to[j] += static_cast<double>(from[j]);
}

}  // namespace
}  // namespace PEWTER_CPU_ISA

namespace network {

extern constinit const NetworkKernels PEWTER_CPU_TABLE = {
    .finish = &PEWTER_CPU_ISA::Finish,
    .gate = &PEWTER_CPU_ISA::Gate,
    .normalize = &PEWTER_CPU_ISA::Normalize,
    .rotate = &PEWTER_CPU_ISA::Rotate,
    .softmax = &PEWTER_CPU_ISA::Softmax,
    .predict = &PEWTER_CPU_ISA::Predict,
    .subtract = &PEWTER_CPU_ISA::Subtract,
    .add_moments = &PEWTER_CPU_ISA::AddMoments,
    .add = &PEWTER_CPU_ISA::Add};

}  // namespace network

}  // namespace pewter::kernels::cpu
