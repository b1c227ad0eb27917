// Tensors in host memory: what is read whole because it is used several times, or made.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "base/dtype.h"
#include "base/shape.h"
#include "merge/checkpoint/tensor_source.h"

namespace pewter {

class HeldSource final : public TensorSource {
 public:
  // A copy of all elements.
  static absl::StatusOr<std::shared_ptr<const TensorSource>> Hold(const TensorSource& source);
  // `bytes` are shape.elements() elements, row-major.
  HeldSource(std::string name, DType dtype, Shape shape, std::vector<std::byte> bytes);

  DType dtype() const override { return dtype_; }
  const Shape& shape() const override { return shape_; }
  const std::string& name() const override { return name_; }
  absl::Status Read(int64_t first, int64_t count, absl::Span<std::byte> out,
                    ReadObserver* observer) const override;

 private:
  const std::string name_;
  const DType dtype_;
  const Shape shape_;
  const std::vector<std::byte> bytes_;
};

// Elements [first, first + out.size()) as doubles; FailedPrecondition for a type that is not
// floating.
absl::Status ReadDoubles(const TensorSource& source, int64_t first, absl::Span<double> out);
// All of them.
absl::StatusOr<std::vector<double>> ReadDoubles(const TensorSource& source);

}  // namespace pewter
