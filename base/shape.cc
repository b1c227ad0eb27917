#include "base/shape.h"

#include <cstdlib>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/units.h"

namespace pewter {

Shape::Shape(std::initializer_list<int64_t> extents) {
  absl::StatusOr<Shape> made = Make(absl::MakeConstSpan(extents.begin(), extents.size()));
  if (!made.ok()) std::abort();
  *this = *made;
}

absl::StatusOr<Shape> Shape::Make(absl::Span<const int64_t> extents) {
  if (extents.size() > kMaxRank) {
    return absl::InvalidArgumentError(absl::StrCat("more than ", kMaxRank, " dimensions"));
  }
  Shape shape;
  shape.rank_ = static_cast<int>(extents.size());
  for (int i = 0; i < shape.rank_; ++i) {
    if (extents[i] < 0) return absl::InvalidArgumentError("negative dimension");
    shape.extents_[i] = extents[i];
    absl::StatusOr<int64_t> elements = CheckedMul(shape.elements_, extents[i]);
    if (!elements.ok()) return absl::InvalidArgumentError("element count overflows 64 bits");
    shape.elements_ = *elements;
  }
  return shape;
}

std::string Shape::ToString() const {
  return absl::StrCat("[", absl::StrJoin(extents(), ", "), "]");
}

}  // namespace pewter
