// A file that tensors are read from, of any format: .safetensors, or of torch.save (.bin, .pt,
// .pth).
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "merge/checkpoint/safetensors.h"
#include "merge/checkpoint/torch_file.h"
#include "store/object_store.h"

namespace pewter {

// Such a file, with what identifies it.
struct InputFile {
  std::shared_ptr<ObjectStore> store;
  std::string key;
  ObjectStat stat;
  std::vector<HeaderRange> header;  // what was read to open it
  std::string Describe() const { return store->Describe(key); }
};

struct TensorFile {
  InputFile file;
  std::vector<TensorInfo> tensors;    // by offset
  std::vector<std::string> warnings;  // they name the file
};

// By the name's ending.
bool IsTensorFile(absl::string_view key);

// Errors name the file.
absl::StatusOr<TensorFile> ReadTensorFile(std::shared_ptr<ObjectStore> store,
                                          absl::string_view key);

}  // namespace pewter
