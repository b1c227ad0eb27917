#include "merge/checkpoint/stored_source.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status.h"

namespace pewter {

absl::Status CheckReadRange(const TensorSource& source, int64_t first, int64_t count,
                            size_t bytes) {
  const int64_t elements = source.shape().elements();
  if (first >= 0 && count >= 0 && first <= elements && count <= elements - first &&
      bytes == static_cast<size_t>(count * ByteWidth(source.dtype()))) {
    return absl::OkStatus();
  }
  return absl::InternalError(absl::StrCat(source.name(), ": bad range: ", count, " elements from ",
                                          first, " of ", elements, " into ", bytes, " bytes"));
}

StoredSource::StoredSource(std::shared_ptr<ObjectStore> store, std::string key, TensorInfo info,
                           std::string name, int file)
    : store_(std::move(store)),
      key_(std::move(key)),
      info_(std::move(info)),
      name_(std::move(name)),
      file_(file) {}

absl::Status StoredSource::Read(int64_t first, int64_t count, absl::Span<std::byte> out,
                                ReadObserver* observer) const {
  RETURN_IF_ERROR(CheckReadRange(*this, first, count, out.size()));
  const int64_t offset = info_.offset + first * ByteWidth(info_.dtype);
  if (absl::Status read = store_->ReadInto(key_, offset, out); !read.ok()) {
    return Annotate(read, name_);
  }
  if (observer != nullptr) observer->OnRead(file_, offset, out);
  return absl::OkStatus();
}

}  // namespace pewter
