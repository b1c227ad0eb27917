// StoredSource: a tensor as it lies in a file.
#pragma once

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "merge/checkpoint/safetensors.h"
#include "merge/checkpoint/tensor_source.h"
#include "store/object_store.h"

namespace pewter {

// What every source demands of a Read: Internal when the range is outside the tensor or `out` has
// another size.
absl::Status CheckReadRange(const TensorSource& source, int64_t first, int64_t count, size_t bytes);

class StoredSource final : public TensorSource {
 public:
  // `file` is the index that a ReadObserver is given; `info.offset` counts from the file's start.
  StoredSource(std::shared_ptr<ObjectStore> store, std::string key, TensorInfo info,
               std::string name, int file);

  DType dtype() const override { return info_.dtype; }
  const Shape& shape() const override { return info_.shape; }
  const std::string& name() const override { return name_; }
  absl::Status Read(int64_t first, int64_t count, absl::Span<std::byte> out,
                    ReadObserver* observer) const override;
  void WillRead(ReadIntents& intents) const override;

 private:
  const std::shared_ptr<ObjectStore> store_;
  const std::string key_;
  const TensorInfo info_;
  const std::string name_;
  const int file_;
};

}  // namespace pewter
