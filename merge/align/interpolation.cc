#include "merge/align/interpolation.h"

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "kernels/backend.h"

namespace pewter {
namespace {

class MixedSource final : public TensorSource {
 public:
  MixedSource(std::shared_ptr<const TensorSource> a, std::shared_ptr<const TensorSource> b,
              double lambda)
      : a_(std::move(a)), b_(std::move(b)), lambda_(lambda) {}

  DType dtype() const override { return DType::kF32; }
  const Shape& shape() const override { return a_->shape(); }
  const std::string& name() const override { return b_->name(); }
  int64_t resident_bytes() const override { return a_->resident_bytes() + b_->resident_bytes(); }

  absl::Status Read(int64_t first, int64_t count, absl::Span<std::byte> out,
                    ReadObserver* observer) const override {
    constexpr int64_t kChunk = int64_t{1} << 14;
    std::vector<double> x, y;
    for (int64_t begin = 0; begin < count; begin += kChunk) {
      const int64_t size = std::min(kChunk, count - begin);
      RETURN_IF_ERROR(Widen(*a_, first + begin, size, observer, x));
      RETURN_IF_ERROR(Widen(*b_, first + begin, size, observer, y));
      for (int64_t i = 0; i < size; ++i) x[i] = lambda_ * x[i] + (1 - lambda_) * y[i];
      kernels::Convert({x.data(), DType::kF64, size},
                       {out.data() + begin * ByteWidth(DType::kF32), DType::kF32, size});
    }
    return absl::OkStatus();
  }

 private:
  static absl::Status Widen(const TensorSource& source, int64_t first, int64_t count,
                            ReadObserver* observer, std::vector<double>& values) {
    std::vector<std::byte> bytes(count * ByteWidth(source.dtype()));
    RETURN_IF_ERROR(source.Read(first, count, absl::MakeSpan(bytes), observer));
    values.resize(count);
    kernels::Convert({bytes.data(), source.dtype(), count}, {values.data(), DType::kF64, count});
    return absl::OkStatus();
  }

  const std::shared_ptr<const TensorSource> a_, b_;
  const double lambda_;
};

// What both models store, and how the symmetry knows it.
struct Shared {
  Symmetry symmetry;
  std::shared_ptr<const Checkpoint> reference, model;
  Alignment alignment;
  double lambda;
  std::map<std::string, int, std::less<>> tensors;  // stored name -> index into tensors()
};

}  // namespace

absl::StatusOr<ForwardModel> Interpolate(const Symmetry& symmetry,
                                         std::shared_ptr<const Checkpoint> reference,
                                         std::shared_ptr<const Checkpoint> model,
                                         const Alignment& alignment, double lambda) {
  RETURN_IF_ERROR(CheckAlignment(symmetry, alignment));
  ASSIGN_OR_RETURN(ForwardModel mixed, MakeForwardModel(reference));
  auto shared = std::make_shared<Shared>(Shared{symmetry, reference, model, alignment, lambda, {}});
  for (size_t t = 0; t < symmetry.tensors().size(); ++t) {
    const std::string stored =
        StoredName(*model, symmetry.tensors()[t].tensor, /*with_tied=*/false);
    if (!stored.empty()) shared->tensors[stored] = static_cast<int>(t);
  }
  mixed.name = absl::StrCat(lambda, " ", reference->ref().ToString(), " + ", 1 - lambda, " ",
                            model->ref().ToString());
  mixed.identity.clear();
  mixed.tensors =
      [shared, of_reference = mixed.tensors](
          absl::string_view name) -> absl::StatusOr<std::shared_ptr<const TensorSource>> {
    ASSIGN_OR_RETURN(std::shared_ptr<const TensorSource> a, of_reference(name));
    const bool there = shared->model->Find(name) != nullptr;
    if (a == nullptr && !there) return a;
    if (a == nullptr || !there) {
      return absl::FailedPreconditionError(
          absl::StrCat("only one of the models ", shared->reference->ref().ToString(), " and ",
                       shared->model->ref().ToString(), " has tensor ", name));
    }
    ASSIGN_OR_RETURN(std::shared_ptr<const TensorSource> b, shared->model->OpenTensor(name, 0));
    if (!(a->shape() == b->shape())) {
      return absl::FailedPreconditionError(absl::StrCat(a->name(), " is ", a->shape().ToString(),
                                                        ", ", b->name(), " is ",
                                                        b->shape().ToString()));
    }
    if (const auto known = shared->tensors.find(name); known != shared->tensors.end()) {
      ASSIGN_OR_RETURN(b, AlignSource(shared->symmetry, shared->symmetry.tensors()[known->second],
                                      shared->alignment, std::move(b)));
    }
    if (shared->lambda == 1) return a;
    if (shared->lambda == 0) return b;
    return std::make_shared<const MixedSource>(std::move(a), std::move(b), shared->lambda);
  };
  return mixed;
}

}  // namespace pewter
