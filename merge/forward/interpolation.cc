#include "merge/forward/interpolation.h"

#include <algorithm>
#include <cstddef>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "kernels/backend.h"
#include "merge/checkpoint/checkpoint.h"

namespace pewter {
namespace {

// B's elements are read in runs that stay in the cache.
constexpr int64_t kRun = int64_t{64} << 10;

class Line final : public TensorSource {
 public:
  Line(std::shared_ptr<const TensorSource> a, std::shared_ptr<const TensorSource> b, double lambda)
      : a_(std::move(a)), b_(std::move(b)), lambda_(lambda) {}

  DType dtype() const override { return DType::kF32; }
  const Shape& shape() const override { return a_->shape(); }
  const std::string& name() const override { return a_->name(); }
  int64_t resident_bytes() const override { return a_->resident_bytes() + b_->resident_bytes(); }

  absl::Status Read(int64_t first, int64_t count, absl::Span<std::byte> out,
                    ReadObserver* observer) const override {
    RETURN_IF_ERROR(a_->Read(first, count, out, observer));
    const auto run = std::make_unique_for_overwrite<float[]>(std::min(count, kRun));
    auto* const values = reinterpret_cast<float*>(out.data());
    for (int64_t done = 0; done < count; done += kRun) {
      const int64_t elements = std::min(kRun, count - done);
      RETURN_IF_ERROR(b_->Read(
          first + done, elements,
          absl::MakeSpan(reinterpret_cast<std::byte*>(run.get()), elements * sizeof(float)),
          observer));
      for (int64_t i = 0; i < elements; ++i) {
        const double mixed = lambda_ * values[done + i] + (1 - lambda_) * run[i];
        values[done + i] = static_cast<float>(mixed);
      }
    }
    return absl::OkStatus();
  }

 private:
  const std::shared_ptr<const TensorSource> a_, b_;  // of kF32
  const double lambda_;
};

}  // namespace

ForwardModel Interpolate(const ForwardModel& a, const ForwardModel& b, double lambda) {
  if (lambda == 1) return a;
  if (lambda == 0) return b;
  ForwardModel model = a;
  model.name = absl::StrCat(lambda, " ", a.name, " + ", 1 - lambda, " ", b.name);
  model.identity.clear();
  model.tensors =
      [a, b,
       lambda](absl::string_view tensor) -> absl::StatusOr<std::shared_ptr<const TensorSource>> {
    ASSIGN_OR_RETURN(auto of_a, a.tensors(tensor));
    ASSIGN_OR_RETURN(auto of_b, b.tensors(tensor));
    if (of_a == nullptr && of_b == nullptr) return nullptr;
    if (of_a == nullptr || of_b == nullptr || of_a->shape() != of_b->shape()) {
      return absl::FailedPreconditionError(
          absl::StrCat("tensor ", tensor, ": ", a.name, " and ", b.name,
                       " do not both have it in one shape, so there is no line between them"));
    }
    return std::make_shared<const Line>(CastSource(std::move(of_a), DType::kF32),
                                        CastSource(std::move(of_b), DType::kF32), lambda);
  };
  return model;
}

}  // namespace pewter
