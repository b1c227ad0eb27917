#include "merge/checkpoint/stored_source.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "merge/checkpoint/strided.h"

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
  const auto read = [&](int64_t offset, absl::Span<std::byte> bytes) {
    return Annotate(store_->ReadInto(key_, offset, bytes), name_);
  };
  if (info_.strides.empty()) {
    const int64_t offset = info_.offset + first * ByteWidth(info_.dtype);
    RETURN_IF_ERROR(read(offset, out));
    if (observer != nullptr) observer->OnRead(file_, offset, out);
    return absl::OkStatus();
  }
  return ReadStrided(
      info_, first, count, out, [&](int64_t offset, absl::Span<std::byte> bytes) -> absl::Status {
        RETURN_IF_ERROR(read(offset, bytes));
        while (observer != nullptr && !bytes.empty()) {
          const int64_t block = std::min<int64_t>(static_cast<int64_t>(bytes.size()),
                                                  kStridedBlock - offset % kStridedBlock);
          observer->OnRead(file_, offset, bytes.first(block));
          offset += block;
          bytes.remove_prefix(block);
        }
        return absl::OkStatus();
      });
}

void StoredSource::WillRead(ReadIntents& intents) const {
  // Strides jump about.
  if (!info_.strides.empty()) return;
  if (auto intent = store_->WillRead(key_, info_.offset, info_.bytes)) {
    intents.push_back(std::move(intent));
  }
}

}  // namespace pewter
