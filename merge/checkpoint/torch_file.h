// Files of torch.save, read without running anything.
//
// Since PyTorch 1.6, a ZIP archive whose entries are all stored (not compressed):
//
//   ROOT/data.pkl     the object; a tensor in it is a view of a storage (pickle.h)
//   ROOT/byteorder    "little"; absent from older files
//   ROOT/data/KEY     the bytes of storage KEY
//   ROOT/...          versions and the like
//
// Before, one after the other:
//
//   pickles           magic number | protocol | machine | the object | list of storage keys
//   for each key      u64 number of elements | the storage's bytes
//
// Tensors may share a storage. User bytes never abort: malformed ones are DataLoss, what is not
// supported FailedPrecondition.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "merge/checkpoint/safetensors.h"
#include "store/object_store.h"

namespace pewter {

// Bytes of a file that were read to know its tensors.
struct HeaderRange {
  int64_t offset = 0;
  int64_t bytes = 0;
  uint32_t crc32c = 0;
};

struct TorchFile {
  std::vector<TensorInfo> tensors;    // by offset
  std::vector<HeaderRange> header;    // all of the file but storages; sorted
  std::vector<std::string> warnings;  // what was left out; without the file's name
};

// By the name's ending: .bin, .pt, .pth.
bool IsTorchFile(absl::string_view key);

// The tensors of a state dict: a dict of names and tensors, or one whose entry "state_dict",
// "model_state_dict" or "model" is that. Errors name the file, and the tensor.
absl::StatusOr<TorchFile> ReadTorchFile(ObjectStore& store, absl::string_view key,
                                        int64_t file_size);

}  // namespace pewter
