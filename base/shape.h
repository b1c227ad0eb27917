// Tensor extents: at most 8 dimensions, int64, products checked.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace pewter {

class Shape {
 public:
  static constexpr int kMaxRank = 8;

  Shape() = default;  // a scalar: rank 0, one element
  // For extents known to be good; aborts otherwise.
  Shape(std::initializer_list<int64_t> extents);
  // InvalidArgument when the rank is above kMaxRank, an extent is negative, or the element count
  // overflows int64.
  static absl::StatusOr<Shape> Make(absl::Span<const int64_t> extents);

  int rank() const { return rank_; }
  int64_t operator[](int axis) const { return extents_[axis]; }
  int64_t elements() const { return elements_; }
  absl::Span<const int64_t> extents() const { return {extents_, static_cast<size_t>(rank_)}; }
  std::string ToString() const;  // "[32000, 2048]"

  friend bool operator==(const Shape& a, const Shape& b) { return a.extents() == b.extents(); }

 private:
  int rank_ = 0;
  int64_t extents_[kMaxRank] = {};
  int64_t elements_ = 1;
};

}  // namespace pewter
