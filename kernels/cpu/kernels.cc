// Compiled once for each instruction set with PEWTER_CPU_ISA (a namespace and the name users see)
// and PEWTER_CPU_TABLE (the table that it defines). See kernels.h.
#include "kernels/cpu/kernels.h"

#include "kernels/cpu/simd.h"

#define PEWTER_STRING_INNER(x) #x
#define PEWTER_STRING(x) PEWTER_STRING_INNER(x)

namespace pewter::kernels::cpu {
namespace PEWTER_CPU_ISA {
namespace {

// --- Formats ----------------------------------------------------------------------------------

// A stored format known at compile time.
template <DType kDType>
struct Fixed {
  static constexpr int64_t width() { return ByteWidth(kDType); }
#if defined(__AVX512F__)
  static constexpr bool kGathers = kDType != DType::kF64;
  PEWTER_INLINE __m512 Gather(const void* from, __m512i index, __mmask16 lanes) const {
    return GatherFloats<kDType>(from, index, lanes);
  }
#endif
  template <class C>
  PEWTER_INLINE Simd<C> LoadLanes(const void* from) const {
    return Load<C, kDType>(from);
  }
  template <class C>
  PEWTER_INLINE C LoadElement(const void* from) const {
    return LoadOne<C, kDType>(from);
  }
  template <bool kStream, class C>
  PEWTER_INLINE void StoreLanes(void* to, const Simd<C>& value) const {
    Store<kDType, kStream>(to, value);
  }
};

// One of the formats, chosen at each load and store: for the rarer pairs.
class Dynamic {
 public:
#if defined(__AVX512F__)
  static constexpr bool kGathers = false;
#endif
  explicit Dynamic(DType dtype) : dtype_(dtype), width_(ByteWidth(dtype)) {}
  int64_t width() const { return width_; }
  template <class C>
  PEWTER_INLINE Simd<C> LoadLanes(const void* from) const {
    switch (dtype_) {
      case DType::kBF16:
        return Load<C, DType::kBF16>(from);
      case DType::kF16:
        return Load<C, DType::kF16>(from);
      case DType::kF8E4M3:
        return Load<C, DType::kF8E4M3>(from);
      case DType::kF8E5M2:
        return Load<C, DType::kF8E5M2>(from);
      default:
        return Load<C, DType::kF32>(from);
    }
  }
  template <class C>
  PEWTER_INLINE C LoadElement(const void* from) const {
    switch (dtype_) {
      case DType::kBF16:
        return LoadOne<C, DType::kBF16>(from);
      case DType::kF16:
        return LoadOne<C, DType::kF16>(from);
      case DType::kF8E4M3:
        return LoadOne<C, DType::kF8E4M3>(from);
      case DType::kF8E5M2:
        return LoadOne<C, DType::kF8E5M2>(from);
      default:
        return LoadOne<C, DType::kF32>(from);
    }
  }
  template <bool, class C>
  PEWTER_INLINE void StoreLanes(void* to, const Simd<C>& value) const {
    switch (dtype_) {
      case DType::kBF16:
        return Store<DType::kBF16, false>(to, value);
      case DType::kF16:
        return Store<DType::kF16, false>(to, value);
      case DType::kF8E4M3:
        return Store<DType::kF8E4M3, false>(to, value);
      case DType::kF8E5M2:
        return Store<DType::kF8E5M2, false>(to, value);
      case DType::kF64:
        return Store<DType::kF64, false>(to, value);
      default:
        return Store<DType::kF32, false>(to, value);
    }
  }

 private:
  DType dtype_;
  int64_t width_;
};

// Calls f(compute type, format).
template <class F>
PEWTER_INLINE void WithFormat(DType in, const F& f) {
  switch (in) {
    case DType::kF64:
      return f(double{}, Fixed<DType::kF64>{});
    case DType::kF32:
      return f(float{}, Fixed<DType::kF32>{});
    case DType::kBF16:
      return f(float{}, Fixed<DType::kBF16>{});
    case DType::kF16:
      return f(float{}, Fixed<DType::kF16>{});
    default:
      return f(float{}, Dynamic(in));
  }
}

// Calls f(compute type, input format, output format).
template <class F>
PEWTER_INLINE void WithFormats(DType in, DType out, const F& f) {
  if (in == out && ByteWidth(in) > 1) {
    WithFormat(in, [&](auto compute, auto format) { f(compute, format, format); });
  } else if (in == DType::kF64) {
    f(double{}, Fixed<DType::kF64>{}, Dynamic(out));
  } else {
    f(float{}, Dynamic(in), Dynamic(out));
  }
}

// --- Accessors (kernels/ops/op.h) -------------------------------------------------------------

// Elements whose draws are made at a time, all of one model after another.
inline constexpr int64_t kDrawRow = kReduceRow;

// The |model - base| of stored elements, counted from where the pointers point.
template <class C, class Format>
struct DeltaMagnitudes {
  using Scalar = C;
  Format format;
  const char* base;
  const char* model;

  PEWTER_INLINE C operator[](int64_t i) const {
    const C delta = format.template LoadElement<C>(model + i * format.width()) -
                    format.template LoadElement<C>(base + i * format.width());
    return delta < 0 ? -delta : delta;
  }
  PEWTER_INLINE Simd<C> Lanes(int64_t i) const {
    return Abs(format.template LoadLanes<C>(model + i * format.width()) -
               format.template LoadLanes<C>(base + i * format.width()));
  }
#if defined(__AVX512F__)
  static constexpr bool kGathers = Format::kGathers && sizeof(C) == 4;
  bool Aligned() const {
    return (reinterpret_cast<uintptr_t>(base) | reinterpret_cast<uintptr_t>(model)) %
               format.width() ==
           0;
  }
  // Those of elements from + index[l], of the `lanes`; of aligned elements.
  PEWTER_INLINE __m512 Gather(int64_t from, __m512i index, __mmask16 lanes) const {
    const int64_t offset = from * format.width();
    return _mm512_abs_ps(_mm512_sub_ps(format.Gather(model + offset, index, lanes),
                                       format.Gather(base + offset, index, lanes)));
  }
#endif
};

// The draws of an op for a row of elements; ops without draws have none.
class Draws {
 public:
  explicit Draws(const TaskVectorSum& task) : task_(task) {}

  // For `count` elements from element `at` of the views `in` on, which is element `first` of the
  // tensor.
  template <class C, class Format>
  void Make(Format format, const void* const* in, int64_t at, int64_t first, int64_t count) {
    for (int i = 0; i < task_.count; ++i) {
      const TaskVectorSum::Model& model = task_.model[i];
      if (model.keep == Keep::kRandom) {
        DrawBits(model.key, model.draw_below, first, count, bits_[i]);
      } else if (model.keep == Keep::kRanked) {
        const auto from = [&](const void* view) {
          return static_cast<const char*>(view) + at * format.width();
        };
        const DeltaMagnitudes<C, Format> magnitudes{format, from(in[0]), from(in[1 + i])};
        RankedDrawBits(model.ranked, magnitudes, first, count, bits_[i]);
      }
    }
  }
  template <class C>
  PEWTER_INLINE Mask<C> Lanes(int i, int64_t at) const {
    return FromBits<C>(bits_[i][at / kLanes]);
  }

 private:
  const TaskVectorSum& task_;
  uint32_t bits_[kMaxInputs - 1][(kDrawRow + kDraws) / 32 + 1];
};

struct NoDraws {
  template <class Op>
  explicit NoDraws(const Op&) {}
  template <class C, class Format>
  void Make(Format, const void* const*, int64_t, int64_t, int64_t) {}
  template <class C>
  PEWTER_INLINE Mask<C> Lanes(int, int64_t) const {
    return {};
  }
};

PEWTER_INLINE Draws DrawsOf(const TaskVectorSum& op) { return Draws(op); }
PEWTER_INLINE Draws DrawsOf(const DeltaAbsSums& op) { return Draws(op.task); }
template <class Op>
PEWTER_INLINE NoDraws DrawsOf(const Op& op) {
  return NoDraws(op);
}

// 32 elements: from element `at` of `in`, which is element `index` of the tensor and `in_row` of
// the row that `draws` holds.
template <class C, class Format, class DrawsType>
struct Run {
  using Value = Simd<C>;
  const void* const* in;
  int64_t at;
  int64_t index;
  int64_t in_row;
  int64_t end;  // of the view's elements, as `index` counts
  Format format;
  const DrawsType& draws;

  PEWTER_INLINE Value operator[](int i) const {
    return format.template LoadLanes<C>(static_cast<const char*>(in[i]) + at * format.width());
  }
  PEWTER_INLINE Mask<C> IndexBelow(int64_t end) const { return LanesBelow<C>(end - index); }
  PEWTER_INLINE Mask<C> RandomBelow(int i, PhiloxKey, uint64_t) const {
    return draws.template Lanes<C>(i, in_row);
  }
  PEWTER_INLINE Mask<C> Outranks(int i, const RankedDraw&) const {
    return draws.template Lanes<C>(i, in_row);
  }
  PEWTER_INLINE Value Of(const AxisValues& axis, int i) const {
    const int64_t row = index / axis.row, column = index - row * axis.row;
    if (!axis.columns && column + kLanes <= axis.row) {
      return Value::Broadcast(static_cast<C>(axis.values[(row - axis.first) * axis.count + i]));
    }
    alignas(64) C lanes[kLanes];
    if (axis.columns && column + kLanes <= axis.row) {
      const double* const values = axis.values + i * axis.row + column;
      for (int l = 0; l < kLanes; ++l) lanes[l] = static_cast<C>(values[l]);
    } else {
      for (int l = 0; l < kLanes; ++l) {
        const int64_t element = index + l < end ? index + l : end - 1;
        const int64_t of_row = element / axis.row;
        lanes[l] =
            static_cast<C>(axis.columns ? axis.values[i * axis.row + element % axis.row]
                                        : axis.values[(of_row - axis.first) * axis.count + i]);
      }
    }
    return LoadUnaligned<Value>(lanes);
  }
};

// Copies of fewer than 32 elements of each input, padded with zeros: what a Run reads at the ends
// of a view, so that an op is compiled once for whole and partial runs.
struct Padded {
  alignas(64) char lanes[kMaxInputs][kLanes * 8];
  const void* in[kMaxInputs];

  __attribute__((noinline)) void Fill(const void* const* from, int inputs, int64_t at, int64_t size,
                                      int64_t width) {
    for (int i = 0; i < inputs; ++i) {
      __builtin_memset(lanes[i], 0, sizeof(lanes[i]));
      __builtin_memcpy(lanes[i], static_cast<const char*>(from[i]) + at * width, size * width);
      in[i] = lanes[i];
    }
  }
};

// --- Map --------------------------------------------------------------------------------------

struct Identity {
  int inputs() const { return 1; }
  template <class X>
  PEWTER_INLINE typename X::Value operator()(const X& x) const {
    return x[0];
  }
};

template <class C, class Op, class In, class Out>
void MapFormats(const Op& shared_op, In in, Out out, const MapArgs& shared_args) {
  // Copies, so that the compiler knows that storing results changes neither.
  const Op op = shared_op;
  const MapArgs args = shared_args;
  auto draws = DrawsOf(op);
  Padded padded;
  // Streaming stores need whole lines, so the elements before the first of them are a row of their
  // own.
  const int64_t misaligned = reinterpret_cast<uintptr_t>(args.out) % 64;
  const bool stream = args.stream && misaligned % out.width() == 0;
  int64_t end = stream && misaligned != 0 ? (64 - misaligned) / out.width() : kDrawRow;
  for (int64_t row = 0; row < args.size; row = end, end += kDrawRow) {
    if (end > args.size) end = args.size;
    draws.template Make<C>(in, args.in, row, args.first + row, end - row);
    for (int64_t at = row; at < end; at += kLanes) {
      const bool whole = end - at >= kLanes;
      if (!whole) [[unlikely]]
        padded.Fill(args.in, op.inputs(), at, end - at, in.width());
      const Run<C, In, decltype(draws)> run{.in = whole ? args.in : padded.in,
                                            .at = whole ? at : 0,
                                            .index = args.first + at,
                                            .in_row = at - row,
                                            .end = args.first + args.size,
                                            .format = in,
                                            .draws = draws};
      const Simd<C> value = op(run);
      char* const to = static_cast<char*>(args.out) + at * out.width();
      if (stream && whole) {
        out.template StoreLanes<true>(to, value);
      } else {
        alignas(64) char lanes[kLanes * 8];
        out.template StoreLanes<false>(whole ? to : lanes, value);
        if (!whole) [[unlikely]]
          __builtin_memcpy(to, lanes, (end - at) * out.width());
      }
    }
  }
#if defined(__x86_64__)
  if (stream) _mm_sfence();
#endif
}

template <class Op>
void Map(const void* erased, const MapArgs& args) {
  const Op& op = *static_cast<const Op*>(erased);
  WithFormats(args.in_dtype, args.out_dtype, [&]<class C, class In, class Out>(C, In in, Out out) {
    MapFormats<C>(op, in, out, args);
  });
}

void ConvertElements(const void* in, DType in_dtype, void* out, DType out_dtype, int64_t size) {
  const MapArgs args = {.in = {in},
                        .in_dtype = in_dtype,
                        .out = out,
                        .out_dtype = out_dtype,
                        .first = 0,
                        .size = size,
                        .stream = false};
  const Identity identity;
  Map<Identity>(&identity, args);
}

// --- Reduce -----------------------------------------------------------------------------------

// Whether an op's terms are not summed but the largest is taken.
template <class Op>
inline constexpr bool kTakesLargest = requires {
  Op::kLargest;
};
template <class Op>
inline constexpr double kNothing = kTakesLargest<Op> ? -__builtin_inf() : 0.0;

template <class Op, class T>
PEWTER_INLINE T Joined(T a, T b) {
  if constexpr (kTakesLargest<Op>) {
    return b > a ? b : a;
  } else {
    return a + b;
  }
}

template <class Op, class C>
PEWTER_INLINE void Accumulate(Simd<double>& sum, const Simd<C>& terms) {
  if constexpr (sizeof(C) == 8) {
    PEWTER_UNROLL for (int p = 0; p < Simd<double>::kParts; ++p) sum.part[p] =
        Joined<Op>(sum.part[p], terms.part[p]);
  } else {
    PEWTER_UNROLL for (int p = 0; p < Simd<float>::kParts; ++p) {
      Simd<double>::Part low, high;
      WidenHalves(terms.part[p], low, high);
      sum.part[2 * p] = Joined<Op>(sum.part[2 * p], low);
      sum.part[2 * p + 1] = Joined<Op>(sum.part[2 * p + 1], high);
    }
  }
}

// Lane l + lane l ^ 16, then 8, 4, 2, 1: the order that CUDA's shuffles have, too.
template <class Op>
PEWTER_INLINE double JoinLanes(Simd<double> sum) {
  double lane[kLanes];
  PEWTER_UNROLL for (int p = 0; p < Simd<double>::kParts; ++p) {
    __builtin_memcpy(lane + p * Simd<double>::kPartLanes, &sum.part[p], sizeof(sum.part[p]));
  }
  PEWTER_UNROLL for (int width = kLanes / 2; width > 0; width /= 2) {
    PEWTER_UNROLL for (int l = 0; l < width; ++l) lane[l] = Joined<Op>(lane[l], lane[l + width]);
  }
  return lane[0];
}

template <class Op>
void Reduce(const void* erased, const ReduceArgs& args) {
  const Op& op = *static_cast<const Op*>(erased);
  auto draws = DrawsOf(op);
  Padded padded;
  for (int i = 0; i < op.groups() * Op::kTerms; ++i) args.sums[i] = kNothing<Op>;
  WithFormat(args.in_dtype, [&]<class C, class Format>(C, Format format) {
    using V = Simd<C>;
    for (int64_t row = 0; row < args.size; row += kReduceRow) {
      const int64_t end = row + kReduceRow < args.size ? row + kReduceRow : args.size;
      draws.template Make<C>(format, args.in, row, args.first + row, end - row);
      for (int g = 0; g < op.groups(); ++g) {
        Simd<double> sums[Op::kTerms];
        PEWTER_UNROLL for (Simd<double>& sum : sums) sum = Simd<double>::Broadcast(kNothing<Op>);
        V terms[Op::kTerms];
        for (int64_t at = row; at < end; at += kLanes) {
          const bool whole = end - at >= kLanes;
          if (!whole) [[unlikely]]
            padded.Fill(args.in, op.inputs(), at, end - at, format.width());
          const Run<C, Format, decltype(draws)> run{.in = whole ? args.in : padded.in,
                                                    .at = whole ? at : 0,
                                                    .index = args.first + at,
                                                    .in_row = at - row,
                                                    .end = args.first + args.size,
                                                    .format = format,
                                                    .draws = draws};
          op(run, g, run[op.first(g)], run[op.second(g)], terms);
          if (!whole) [[unlikely]] {
            const Mask<C> exists = LanesBelow<C>(end - at);
            PEWTER_UNROLL for (V& term : terms) term =
                Select(exists, term, V::Broadcast(static_cast<C>(kNothing<Op>)));
          }
          PEWTER_UNROLL for (int t = 0; t < Op::kTerms; ++t) Accumulate<Op>(sums[t], terms[t]);
        }
        PEWTER_UNROLL for (int t = 0; t < Op::kTerms; ++t) {
          double& sum = args.sums[g * Op::kTerms + t];
          sum = Joined<Op>(sum, JoinLanes<Op>(sums[t]));
        }
      }
    }
  });
}

// One row after another, so the order within a column is theirs.
template <class Op>
void ReduceColumns(const void* erased, const ReduceColumnsArgs& args) {
  const Op& op = *static_cast<const Op*>(erased);
  auto draws = DrawsOf(op);
  Padded padded;
  const int terms_in_all = op.groups() * Op::kTerms;
  for (int t = 0; t < terms_in_all; ++t) {
    for (int64_t c = args.begin; c < args.end; ++c) args.sums[t * args.columns + c] = kNothing<Op>;
  }
  WithFormat(args.in_dtype, [&]<class C, class Format>(C, Format format) {
    Simd<C> terms[Op::kTerms];
    for (int64_t row = 0; row < args.rows; ++row) {
      for (int64_t column = args.begin; column < args.end; column += kLanes) {
        const int64_t at = row * args.columns + column;
        const int64_t count = args.end - column < kLanes ? args.end - column : kLanes;
        const bool whole = count == kLanes;
        if (!whole) [[unlikely]]
          padded.Fill(args.in, op.inputs(), at, count, format.width());
        draws.template Make<C>(format, args.in, at, args.first + at, count);
        const Run<C, Format, decltype(draws)> run{.in = whole ? args.in : padded.in,
                                                  .at = whole ? at : 0,
                                                  .index = args.first + at,
                                                  .in_row = 0,
                                                  .end = args.first + args.rows * args.columns,
                                                  .format = format,
                                                  .draws = draws};
        for (int g = 0; g < op.groups(); ++g) {
          op(run, g, run[op.first(g)], run[op.second(g)], terms);
          for (int t = 0; t < Op::kTerms; ++t) {
            double* const sums = args.sums + (g * Op::kTerms + t) * args.columns + column;
            Simd<double> sum = Simd<double>::Broadcast(kNothing<Op>);
            __builtin_memcpy(&sum, sums, count * sizeof(double));
            Accumulate<Op>(sum, terms[t]);
            __builtin_memcpy(sums, &sum, count * sizeof(double));
          }
        }
      }
    }
  });
}

// --- Histogram --------------------------------------------------------------------------------

// Bit l says that lane l of `parts` is `value`.
template <class C, class Part>
PEWTER_INLINE uint32_t LanesEqual(const Part (&parts)[Simd<C>::kParts], uint64_t value) {
  using Element = std::remove_cvref_t<decltype(parts[0][0])>;
  Mask<C> equal;
  PEWTER_UNROLL for (int p = 0; p < Simd<C>::kParts; ++p) {
    equal.part[p] = parts[p] == static_cast<Element>(value);
  }
  return Bits(equal);
}

// Counts `lanes` of `magnitude` whose bits above the digit at `shift` are `prefix` (or `all`).
template <class C>
PEWTER_INLINE void CountRun(const Simd<C>& magnitude, uint32_t lanes, int shift, bool all,
                            uint64_t prefix, uint64_t* bins) {
  using Integer = std::conditional_t<sizeof(C) == 4, uint32_t, uint64_t>;
  using Part = Vector<Integer, Simd<C>::kPartLanes>;
  constexpr int kParts = Simd<C>::kParts;
  Part keys[kParts];
  PEWTER_UNROLL for (int p = 0; p < kParts; ++p) {
    keys[p] = BitCast<Part>(magnitude.part[p]) >> shift;
  }
  if (!all) {
    Part above[kParts];
    PEWTER_UNROLL for (int p = 0; p < kParts; ++p) above[p] = keys[p] >> 16;
    lanes &= LanesEqual<C>(above, prefix);
    if (lanes == 0) return;
    PEWTER_UNROLL for (int p = 0; p < kParts; ++p) keys[p] &= 0xffffu;
  }
  // Deltas of checkpoints are full of zeros and of a few repeated values. Counting those lanes
  // together avoids chains of increments that each wait for the one before.
  const uint32_t zeros = LanesEqual<C>(keys, 0) & lanes;
  bins[0] += __builtin_popcount(zeros);
  lanes &= ~zeros;
  if (lanes == 0) return;
  uint32_t bin[kLanes];
  PEWTER_UNROLL for (int p = 0; p < kParts; ++p) {
    const auto narrow = __builtin_convertvector(keys[p], Vector<uint32_t, Simd<C>::kPartLanes>);
    __builtin_memcpy(bin + p * Simd<C>::kPartLanes, &narrow, sizeof(narrow));
  }
  asm volatile("" : "+m"(bin));  // not taken from the vectors lane by lane
  constexpr int kMany = 4;
  const uint32_t leader = bin[__builtin_ctz(lanes)];
  const uint32_t equal = LanesEqual<C>(keys, leader) & lanes;
  if (const int count = __builtin_popcount(equal); count > kMany) {
    bins[leader] += count;
    lanes &= ~equal;
  }
  if (lanes == 0xffffffffu) {
    PEWTER_UNROLL for (int l = 0; l < kLanes; ++l)++ bins[bin[l]];
  } else {
    for (; lanes != 0; lanes &= lanes - 1) ++bins[bin[__builtin_ctz(lanes)]];
  }
}

// Calls f(op of 32 elements, bits of those that exist, where the first is) along the views of
// `args`.
template <class C, class Op, class Format, class Args, class F>
PEWTER_INLINE void ForEachRun(const Op& op, Format format, const Args& args, const F& f) {
  const NoDraws draws(op);
  Padded padded;
  for (int64_t at = 0; at < args.size; at += kLanes) {
    const int64_t rest = args.size - at;
    const bool whole = rest >= kLanes;
    if (!whole) [[unlikely]]
      padded.Fill(args.in, op.inputs(), at, rest, format.width());
    const Run<C, Format, NoDraws> run{.in = whole ? args.in : padded.in,
                                      .at = whole ? at : 0,
                                      .index = args.first + at,
                                      .in_row = 0,
                                      .end = args.first + args.size,
                                      .format = format,
                                      .draws = draws};
    f(op(run), whole ? 0xffffffffu : (1u << rest) - 1, at);
  }
}

template <class Op>
void Histogram(const void* erased, const HistogramArgs& args) {
  const Op& op = *static_cast<const Op*>(erased);
  WithFormat(args.in_dtype, [&]<class C, class Format>(C, Format format) {
    const int shift = static_cast<int>(8 * sizeof(C)) - 16 * (args.level + 1);
    ForEachRun<C>(op, format, args, [&](const Simd<C>& magnitude, uint32_t lanes, int64_t) {
      CountRun<C>(magnitude, lanes, shift, args.level == 0, args.prefix, args.bins);
    });
  });
}

// --- Sift -------------------------------------------------------------------------------------

template <class Op>
SiftCounts Sift(const void* erased, const SiftArgs& args) {
  const Op& op = *static_cast<const Op*>(erased);
  SiftCounts counts;
  SiftCandidate* to = args.candidates;
  WithFormat(args.in_dtype, [&]<class C, class Format>(C, Format format) {
    const C low = static_cast<C>(args.window.low), high = static_cast<C>(args.window.high),
            most = static_cast<C>(args.window.common);
    ForEachRun<C>(op, format, args, [&](const Simd<C>& magnitude, uint32_t lanes, int64_t at) {
      const uint32_t below = Bits(magnitude < low) & lanes;
      const uint32_t common = Bits(magnitude == most) & lanes;
      const uint32_t up_to_high = Bits((magnitude < high) | (magnitude == high)) & lanes;
      counts.above += __builtin_popcount(lanes & ~up_to_high);
      counts.common += __builtin_popcount(common);
      uint32_t inside = up_to_high & ~below & ~common;
      if (inside == 0) return;
      C lane[kLanes];
      __builtin_memcpy(lane, &magnitude, sizeof(lane));
      for (; inside != 0; inside &= inside - 1) {
        const int l = __builtin_ctz(inside);
        *to++ = {static_cast<float>(lane[l]), args.in_views + static_cast<uint32_t>(at + l)};
      }
    });
  });
  counts.candidates = to - args.candidates;
  return counts;
}

// --- Checks -----------------------------------------------------------------------------------

// Index of the first element whose bits without the sign exceed `largest`. I: signed.
template <class I>
int64_t FirstAbove(const void* data, int64_t size, I no_sign, I largest) {
  constexpr int kPartLanes = kVectorBytes / sizeof(I);
  constexpr int64_t kStep = 16 * kPartLanes;
  using Part = Vector<I, kPartLanes>;
  const char* bytes = static_cast<const char*>(data);
  int64_t at = 0;
  for (; at + kStep <= size; at += kStep) {
    Part bad = {};
    PEWTER_UNROLL for (int p = 0; p < 16; ++p) {
      bad |= (LoadUnaligned<Part>(bytes + (at + p * kPartLanes) * sizeof(I)) & no_sign) > largest;
    }
    uint64_t any = 0;
    const auto words = BitCast<Vector<uint64_t, kVectorBytes / 8>>(bad);
    PEWTER_UNROLL for (int w = 0; w < kVectorBytes / 8; ++w) any |= words[w];
    if (any != 0) break;
  }
  for (; at < size; ++at) {
    if ((LoadUnaligned<I>(bytes + at * sizeof(I)) & no_sign) > largest) return at;
  }
  return -1;
}

int64_t FindNonFinite(const void* data, DType dtype, int64_t size) {
  switch (dtype) {
    case DType::kF64:
      return FirstAbove<int64_t>(data, size, 0x7fffffffffffffff, 0x7fefffffffffffff);
    case DType::kF32:
      return FirstAbove<int32_t>(data, size, 0x7fffffff, 0x7f7fffff);
    case DType::kF16:
      return FirstAbove<int16_t>(data, size, 0x7fff, 0x7bff);
    case DType::kBF16:
      return FirstAbove<int16_t>(data, size, 0x7fff, 0x7f7f);
    case DType::kF8E4M3:
      return FirstAbove<int8_t>(data, size, 0x7f, 0x7e);
    case DType::kF8E5M2:
      return FirstAbove<int8_t>(data, size, 0x7f, 0x7b);
    default:
      return -1;
  }
}

template <class... Ops>
constexpr KernelTable WithMaps(KernelTable table, const std::variant<Ops...>*) {
  int i = 0;
  ((table.map[i++] = &Map<Ops>), ...);
  return table;
}
template <class... Ops>
constexpr KernelTable WithReductions(KernelTable table, const std::variant<Ops...>*) {
  int i = 0, j = 0;
  ((table.reduce[i++] = &Reduce<Ops>), ...);
  ((table.reduce_columns[j++] = &ReduceColumns<Ops>), ...);
  return table;
}
template <class... Ops>
constexpr KernelTable WithSelections(KernelTable table, const std::variant<Ops...>*) {
  int i = 0, j = 0;
  ((table.histogram[i++] = &Histogram<Ops>), ...);
  ((table.sift[j++] = &Sift<Ops>), ...);
  return table;
}

}  // namespace
}  // namespace PEWTER_CPU_ISA

extern constinit const KernelTable PEWTER_CPU_TABLE = PEWTER_CPU_ISA::WithSelections(
    PEWTER_CPU_ISA::WithReductions(
        PEWTER_CPU_ISA::WithMaps({.isa = PEWTER_STRING(PEWTER_CPU_ISA),
                                  .map = {},
                                  .reduce = {},
                                  .reduce_columns = {},
                                  .histogram = {},
                                  .sift = {},
                                  .convert = &PEWTER_CPU_ISA::ConvertElements,
                                  .find_non_finite = &PEWTER_CPU_ISA::FindNonFinite},
                                 static_cast<MapOp*>(nullptr)),
        static_cast<ReduceOp*>(nullptr)),
    static_cast<MagnitudeOp*>(nullptr));

}  // namespace pewter::kernels::cpu
