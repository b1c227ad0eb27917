#include "merge/checkpoint/held_source.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/dtype_names.h"
#include "base/status.h"
#include "kernels/backend.h"
#include "merge/checkpoint/stored_source.h"

namespace pewter {

absl::StatusOr<std::shared_ptr<const TensorSource>> HeldSource::Hold(const TensorSource& source) {
  const int64_t count = source.shape().elements();
  std::vector<std::byte> bytes(count * ByteWidth(source.dtype()));
  RETURN_IF_ERROR(source.Read(0, count, absl::MakeSpan(bytes), nullptr));
  return std::make_shared<HeldSource>(source.name(), source.dtype(), source.shape(),
                                      std::move(bytes));
}

HeldSource::HeldSource(std::string name, DType dtype, Shape shape, std::vector<std::byte> bytes)
    : name_(std::move(name)), dtype_(dtype), shape_(std::move(shape)), bytes_(std::move(bytes)) {}

absl::Status HeldSource::Read(int64_t first, int64_t count, absl::Span<std::byte> out,
                              ReadObserver* observer) const {
  RETURN_IF_ERROR(CheckReadRange(*this, first, count, out.size()));
  const int64_t width = ByteWidth(dtype_);
  std::copy_n(bytes_.begin() + first * width, count * width, out.begin());
  return absl::OkStatus();
}

absl::Status ReadDoubles(const TensorSource& source, int64_t first, absl::Span<double> out) {
  if (!IsFloat(source.dtype())) {
    return absl::FailedPreconditionError(
        absl::StrCat(source.name(), " is ", SafetensorsName(source.dtype()), " and not floating"));
  }
  const auto count = static_cast<int64_t>(out.size());
  std::vector<std::byte> bytes(count * ByteWidth(source.dtype()));
  RETURN_IF_ERROR(source.Read(first, count, absl::MakeSpan(bytes), nullptr));
  kernels::Convert({bytes.data(), source.dtype(), count}, {out.data(), DType::kF64, count});
  return absl::OkStatus();
}

absl::StatusOr<std::vector<double>> ReadDoubles(const TensorSource& source) {
  std::vector<double> values(source.shape().elements());
  RETURN_IF_ERROR(ReadDoubles(source, 0, absl::MakeSpan(values)));
  return values;
}

}  // namespace pewter
