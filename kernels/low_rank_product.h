// LowRankProduct: elements of scale * L R, in float32, for matrices L [rows, rank] and R [rank,
// cols].
//
// An element is the sum over k = 0, 1, ... of L[i,k] * R[k,j], each product and each sum rounded,
// times scale. So its bits depend on neither the range that is asked for nor the instruction set.
// R is kept in strips of kStrip columns, each contiguous over k: a strip stays in the first level
// cache while the rows go by, whatever power of two the row length is.
#pragma once

#include <cstdint>
#include <vector>

namespace pewter::kernels {

class LowRankProduct {
 public:
  // `left` is row-major [rows, rank], `right` row-major [rank, cols].
  LowRankProduct(std::vector<float> left, const std::vector<float>& right, int64_t rank,
                 float scale);

  int64_t bytes() const { return Bytes(rows_, rank_, cols_); }
  static int64_t Bytes(int64_t rows, int64_t rank, int64_t cols);
  // Elements [first, first + count) in row-major order. Whole rows, four or more at once, are the
  // fastest.
  void Compute(int64_t first, int64_t count, float* out) const;

 private:
  static constexpr int64_t kStrip = 32;
  // A rectangle of the result, written with `out_stride` floats from row to row.
  struct Rectangle {
    int64_t row, rows, column, columns;
    float* out;
    int64_t out_stride;
  };
  template <int kLanes>
  void ComputeRectangle(const Rectangle& rectangle) const;
  template <int kRows, int kLanes>
  void ComputeStrip(const float* strip, int64_t row, float* out, int64_t out_stride) const;
  void ComputeAvx512(const Rectangle& rectangle) const;
  void ComputeAvx2(const Rectangle& rectangle) const;
  void ComputeBaseline(const Rectangle& rectangle) const;

  std::vector<float> left_;
  std::vector<float> strips_;  // [ceil(cols / kStrip)][rank][kStrip], zero padded
  int64_t rows_, rank_, cols_;
  float scale_;
};

}  // namespace pewter::kernels
