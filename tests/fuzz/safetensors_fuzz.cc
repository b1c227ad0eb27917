// ParseSafetensorsHeader and ParseShardIndex on any bytes: no crash, every refusal is DataLoss, and
// what is accepted tiles the file and survives being laid out and parsed again.
//
// The first two bytes are the size of the data part, the rest is the JSON. The input as a whole is
// read as a file, too.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "merge/checkpoint/safetensors.h"
#include "merge/checkpoint/shard_index.h"
#include "store/object_store.h"

namespace {

void Require(bool condition) {
  if (!condition) abort();
}

// One object in memory.
class MemoryStore final : public pewter::ObjectStore {
 public:
  explicit MemoryStore(absl::string_view content) : content_(content) {}
  absl::StatusOr<pewter::ObjectStat> Stat(absl::string_view) override {
    return pewter::ObjectStat{.size = static_cast<int64_t>(content_.size())};
  }
  absl::Status ReadInto(absl::string_view, int64_t offset, absl::Span<std::byte> out) override {
    Require(offset >= 0 && offset + out.size() <= content_.size());  // never past the end
    std::memcpy(out.data(), content_.data() + offset, out.size());
    return absl::OkStatus();
  }
  absl::StatusOr<std::vector<pewter::ObjectEntry>> List(absl::string_view) override { abort(); }
  absl::Status Remove(absl::string_view) override { abort(); }
  absl::StatusOr<std::unique_ptr<pewter::ObjectWriter>> Create(absl::string_view) override {
    abort();
  }
  std::string Describe(absl::string_view key) const override { return std::string(key); }

 private:
  const absl::string_view content_;
};

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
