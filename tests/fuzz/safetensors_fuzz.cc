// ParseSafetensorsHeader and ParseShardIndex on any bytes: no crash, every refusal is DataLoss, and
// what is accepted tiles the file and survives being laid out and parsed again.
//
// The first two bytes are the size of the data part, the rest is the JSON. The input as a whole is
// read as a file, too.
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "merge/checkpoint/safetensors.h"
#include "merge/checkpoint/shard_index.h"
#include "tests/fuzz/memory_store.h"

namespace {

using pewter::fuzz::MemoryStore;
using pewter::fuzz::Require;

void Check(const absl::StatusOr<pewter::SafetensorsHeader>& header, int64_t file_size) {
  if (!header.ok()) {
    Require(absl::IsDataLoss(header.status()) && !header.status().message().empty());
    return;
  }
  int64_t end = header->data_begin;
  for (const pewter::TensorInfo& tensor : header->tensors) {
    Require(tensor.offset == end && tensor.bytes >= 0);
    Require(tensor.bytes == tensor.shape.elements() * pewter::ByteWidth(tensor.dtype));
    end += tensor.bytes;
  }
  Require(end == file_size);

  std::vector<pewter::TensorInfo> tensors = header->tensors;
  const absl::StatusOr<std::string> layout = pewter::LayOutSafetensors(tensors, header->metadata);
  Require(layout.ok());
  const int64_t begin = static_cast<int64_t>(layout->size());
  const absl::StatusOr<pewter::SafetensorsHeader> again = pewter::ParseSafetensorsHeader(
      absl::string_view(*layout).substr(8), begin, begin + file_size - header->data_begin);
  Require(again.ok() && again->metadata == header->metadata);
  Require(again->tensors.size() == tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    Require(again->tensors[i].bytes == header->tensors[i].bytes);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const absl::string_view input(reinterpret_cast<const char*>(data), size);
  MemoryStore store(input);
  Check(pewter::ReadSafetensorsHeader(store, "x", static_cast<int64_t>(size)),
        static_cast<int64_t>(size));
  if (size < 2) return 0;
  const absl::string_view json = input.substr(2);
  const int64_t data_begin = 8 + static_cast<int64_t>(json.size());
  const int64_t file_size = data_begin + (data[0] | data[1] << 8);
  Check(pewter::ParseSafetensorsHeader(json, data_begin, file_size), file_size);

  const absl::StatusOr<pewter::ShardIndex> index = pewter::ParseShardIndex(json);
  if (!index.ok()) {
    Require(absl::IsDataLoss(index.status()) && !index.status().message().empty());
  } else {
    for (const auto& [tensor, file] : index->file_of) {
      Require(!file.empty() && file.find('/') == std::string::npos && file != "..");
    }
  }
  return 0;
}
