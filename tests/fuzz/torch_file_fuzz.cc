// ReadTorchFile and Pickle::Parse on any bytes: no crash, bounded time, every refusal is DataLoss
// or FailedPrecondition (and OutOfRange of a pickle that is cut off); what is accepted lies in the
// file and can be read without leaving it.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/strings/string_view.h"
#include "base/status.h"
#include "merge/checkpoint/pickle.h"
#include "merge/checkpoint/strided.h"
#include "merge/checkpoint/torch_file.h"
#include "tests/fuzz/memory_store.h"

namespace {

using pewter::TensorInfo;
using pewter::fuzz::MemoryStore;
using pewter::fuzz::Require;

constexpr int64_t kMostElements = 1 << 16;

void CheckTensor(const TensorInfo& tensor, MemoryStore& store, int64_t file_size) {
  const int64_t elements = tensor.shape.elements();
  Require(!tensor.name.empty() || tensor.bytes >= 0);
  Require(tensor.bytes == elements * pewter::ByteWidth(tensor.dtype));
  Require(tensor.offset >= 0 && tensor.offset <= file_size);
  if (tensor.strides.empty()) {
    Require(tensor.bytes <= file_size - tensor.offset);
    return;
  }
  Require(static_cast<int>(tensor.strides.size()) == tensor.shape.rank());
  const int64_t count = std::min(elements, kMostElements);
  std::vector<std::byte> out(count * pewter::ByteWidth(tensor.dtype));
  for (const int64_t first : {int64_t{0}, elements - count}) {
    Require(pewter::ReadStrided(tensor, first, count, absl::MakeSpan(out),
                                [&](int64_t offset, absl::Span<std::byte> bytes) {
                                  return store.ReadInto("x", offset, bytes);
                                })
                .ok());
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const absl::string_view input(reinterpret_cast<const char*>(data), size);
  const absl::StatusOr<pewter::Pickle> pickle = pewter::Pickle::Parse(input);
  if (!pickle.ok()) {
    Require(absl::IsDataLoss(pickle.status()) || absl::IsOutOfRange(pickle.status()) ||
            absl::IsFailedPrecondition(pickle.status()));
  }
  MemoryStore store(input);
  const auto file = pewter::ReadTorchFile(store, "x", static_cast<int64_t>(size));
  if (!file.ok()) {
    Require(absl::IsDataLoss(file.status()) || absl::IsFailedPrecondition(file.status()));
    return 0;
  }
  for (const TensorInfo& tensor : file->tensors) {
    CheckTensor(tensor, store, static_cast<int64_t>(size));
  }
  for (const pewter::HeaderRange& range : file->header) {
    Require(range.offset >= 0 && range.bytes > 0 &&
            range.offset + range.bytes <= static_cast<int64_t>(size));
  }
  return 0;
}
