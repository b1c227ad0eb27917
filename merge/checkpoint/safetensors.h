// The safetensors format:
//
//   u64 little endian N | N bytes of JSON | tensor data
//   JSON: {"__metadata__": {string: string}, NAME: {"dtype": "BF16", "shape": [..], "data_offsets":
//   [begin, end]}, ...}
//
// Offsets count from the end of the JSON. They must not overlap, must leave no hole and must end
// with the file, as the format's reference implementation demands. N is at most 100 MB. User bytes
// never abort: every fault is a Status that names the tensor.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "base/dtype.h"
#include "base/shape.h"
#include "store/object_store.h"

namespace pewter {

struct TensorInfo {
  std::string name;
  DType dtype = DType::kF32;
  Shape shape;
  int64_t offset = 0;  // from the start of the file
  int64_t bytes = 0;
  // Elements from one index to the next, by axis, where the tensor does not lie in row-major order;
  // else empty, as always in safetensors.
  std::vector<int64_t> strides = {};
};

struct SafetensorsHeader {
  std::vector<TensorInfo> tensors;  // by offset
  std::map<std::string, std::string> metadata;
  int64_t data_begin = 0;
  uint32_t crc32c = 0;  // of everything before data_begin
};

// `json` is the JSON part; `data_begin` and `file_size` place and bound the data. DataLoss on
// anything malformed.
absl::StatusOr<SafetensorsHeader> ParseSafetensorsHeader(absl::string_view json, int64_t data_begin,
                                                         int64_t file_size);
// Reads and parses the header of one file. DataLoss for a truncated file or a header larger than
// it.
absl::StatusOr<SafetensorsHeader> ReadSafetensorsHeader(ObjectStore& store, absl::string_view key,
                                                        int64_t file_size);

// Lays the tensors out one after the other in the given order and returns the bytes before the data
// (length, JSON padded with spaces to a multiple of 8). Sets each tensor's offset and bytes.
absl::StatusOr<std::string> LayOutSafetensors(std::vector<TensorInfo>& tensors,
                                              const std::map<std::string, std::string>& metadata);

}  // namespace pewter
