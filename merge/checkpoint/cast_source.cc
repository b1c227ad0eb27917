#include <algorithm>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/dtype_names.h"
#include "base/status.h"
#include "kernels/backend.h"
#include "merge/checkpoint/checkpoint.h"
#include "merge/checkpoint/stored_source.h"

namespace pewter {
namespace {

// Source elements are converted in runs that stay in the cache.
constexpr int64_t kScratchBytes = int64_t{256} << 10;

class CastView final : public TensorSource {
 public:
  CastView(std::shared_ptr<const TensorSource> source, DType dtype)
      : source_(std::move(source)), dtype_(dtype) {}

  DType dtype() const override { return dtype_; }
  const Shape& shape() const override { return source_->shape(); }
  const std::string& name() const override { return source_->name(); }
  int64_t resident_bytes() const override { return source_->resident_bytes(); }
  const LowRankUpdate* update() const override { return source_->update(); }
  void WillRead(ReadIntents& intents) const override { source_->WillRead(intents); }

  absl::Status Read(int64_t first, int64_t count, absl::Span<std::byte> out,
                    ReadObserver* observer) const override {
    if (!IsFloat(source_->dtype()) || !IsFloat(dtype_)) {
      return absl::FailedPreconditionError(
          absl::StrCat(name(), ": cannot convert ", SafetensorsName(source_->dtype()), " to ",
                       SafetensorsName(dtype_), "; only floating types are converted"));
    }
    RETURN_IF_ERROR(CheckReadRange(*this, first, count, out.size()));
    const int64_t from_width = ByteWidth(source_->dtype());
    const int64_t to_width = ByteWidth(dtype_);
    const int64_t run = std::min(count, kScratchBytes / from_width);
    const auto scratch = std::make_unique_for_overwrite<std::byte[]>(run * from_width);
    for (int64_t done = 0; done < count; done += run) {
      const int64_t elements = std::min(run, count - done);
      RETURN_IF_ERROR(source_->Read(
          first + done, elements, absl::MakeSpan(scratch.get(), elements * from_width), observer));
      kernels::Convert({.data = scratch.get(), .dtype = source_->dtype(), .size = elements},
                       {.data = out.data() + done * to_width, .dtype = dtype_, .size = elements});
    }
    return absl::OkStatus();
  }

 private:
  const std::shared_ptr<const TensorSource> source_;
  const DType dtype_;
};

}  // namespace

std::shared_ptr<const TensorSource> CastSource(std::shared_ptr<const TensorSource> source,
                                               DType dtype) {
  if (source->dtype() == dtype) return source;
  return std::make_shared<CastView>(std::move(source), dtype);
}

}  // namespace pewter
