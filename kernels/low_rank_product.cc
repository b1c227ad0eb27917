#include "kernels/low_rank_product.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace pewter::kernels {
namespace {

template <int kLanes>
struct VectorOf {
  typedef float type __attribute__((vector_size(kLanes * sizeof(float))));
};

}  // namespace

int64_t LowRankProduct::Bytes(int64_t rows, int64_t rank, int64_t cols) {
  return (rows + (cols + kStrip - 1) / kStrip * kStrip) * rank * int64_t{sizeof(float)};
}

LowRankProduct::LowRankProduct(std::vector<float> left, const std::vector<float>& right,
                               int64_t rank, float scale)
    : left_(std::move(left)),
      rows_(static_cast<int64_t>(left_.size()) / rank),
      rank_(rank),
      cols_(static_cast<int64_t>(right.size()) / rank),
      scale_(scale) {
  strips_.resize((cols_ + kStrip - 1) / kStrip * kStrip * rank_);
  for (int64_t column = 0; column < cols_; column += kStrip) {
    const int64_t width = std::min(kStrip, cols_ - column);
    for (int64_t k = 0; k < rank_; ++k) {
      std::copy_n(right.data() + k * cols_ + column, width,
                  strips_.data() + column * rank_ + k * kStrip);
    }
  }
}

// kRows rows of one strip, two vectors at a time, so that the sums stay in registers.
template <int kRows, int kLanes>
inline __attribute__((always_inline)) void LowRankProduct::ComputeStrip(const float* strip,
                                                                        int64_t row, float* out,
                                                                        int64_t out_stride) const {
  using Vector = typename VectorOf<kLanes>::type;
  constexpr int kVectors = 2;
  const float* left = left_.data() + row * rank_;
  for (int64_t column = 0; column < kStrip; column += kVectors * kLanes) {
    Vector sums[kRows][kVectors] = {};
    for (int64_t k = 0; k < rank_; ++k) {
      for (int v = 0; v < kVectors; ++v) {
        Vector right;
        std::memcpy(&right, strip + k * kStrip + column + v * kLanes, sizeof(right));
        for (int r = 0; r < kRows; ++r) sums[r][v] += left[r * rank_ + k] * right;
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        const Vector scaled = sums[r][v] * scale_;
        std::memcpy(out + r * out_stride + column + v * kLanes, &scaled, sizeof(scaled));
      }
    }
  }
}

template <int kLanes>
inline __attribute__((always_inline)) void LowRankProduct::ComputeRectangle(
    const Rectangle& rectangle) const {
  constexpr int kRows = 4;
  const int64_t end = rectangle.column + rectangle.columns;
  for (int64_t column = rectangle.column / kStrip * kStrip; column < end; column += kStrip) {
    const float* strip = strips_.data() + column * rank_;
    // The part of the strip that is wanted.
    const int64_t from = std::max(column, rectangle.column);
    const int64_t width = std::min(column + kStrip, end) - from;
    float* out = rectangle.out + (from - rectangle.column);
    for (int64_t r = 0; r < rectangle.rows;) {
      const int64_t rows = rectangle.rows - r >= kRows ? kRows : 1;
      float* target = out + r * rectangle.out_stride;
      float spill[kRows * kStrip];
      const bool whole = width == kStrip;
      float* written = whole ? target : spill;
      const int64_t stride = whole ? rectangle.out_stride : kStrip;
      if (rows == kRows) {
        ComputeStrip<kRows, kLanes>(strip, rectangle.row + r, written, stride);
      } else {
        ComputeStrip<1, kLanes>(strip, rectangle.row + r, written, stride);
      }
      for (int64_t i = 0; !whole && i < rows; ++i) {
        std::copy_n(spill + i * kStrip + (from - column), width, target + i * rectangle.out_stride);
      }
      r += rows;
    }
  }
}

__attribute__((target("avx512f"))) void LowRankProduct::ComputeAvx512(
    const Rectangle& rectangle) const {
  ComputeRectangle<16>(rectangle);
}
__attribute__((target("avx2"))) void LowRankProduct::ComputeAvx2(const Rectangle& rectangle) const {
  ComputeRectangle<8>(rectangle);
}
void LowRankProduct::ComputeBaseline(const Rectangle& rectangle) const {
  ComputeRectangle<4>(rectangle);
}

void LowRankProduct::Compute(int64_t first, int64_t count, float* out) const {
  static const auto compute = __builtin_cpu_supports("avx512f") ? &LowRankProduct::ComputeAvx512
                              : __builtin_cpu_supports("avx2")  ? &LowRankProduct::ComputeAvx2
                                                                : &LowRankProduct::ComputeBaseline;
  while (count > 0) {
    const int64_t row = first / cols_;
    const int64_t column = first % cols_;
    const bool whole_rows = column == 0 && count >= cols_;
    const int64_t rows = whole_rows ? count / cols_ : 1;
    const int64_t columns = whole_rows ? cols_ : std::min(count, cols_ - column);
    (this->*compute)({.row = row,
                      .rows = rows,
                      .column = column,
                      .columns = columns,
                      .out = out,
                      .out_stride = cols_});
    first += rows * columns;
    count -= rows * columns;
    out += rows * columns;
  }
}

}  // namespace pewter::kernels
