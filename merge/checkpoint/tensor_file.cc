#include "merge/checkpoint/tensor_file.h"

#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/status.h"

namespace pewter {

bool IsTensorFile(absl::string_view key) {
  return absl::EndsWith(key, ".safetensors") || IsTorchFile(key);
}

absl::StatusOr<TensorFile> ReadTensorFile(std::shared_ptr<ObjectStore> store,
                                          absl::string_view key) {
  ASSIGN_OR_RETURN(const ObjectStat stat, store->Stat(key));
  TensorFile result{.file = {.store = store, .key = std::string(key), .stat = stat}};
  if (IsTorchFile(key)) {
    ASSIGN_OR_RETURN(TorchFile file, ReadTorchFile(*store, key, stat.size));
    result.file.header = std::move(file.header);
    result.tensors = std::move(file.tensors);
    for (const std::string& warning : file.warnings) {
      result.warnings.push_back(absl::StrCat(store->Describe(key), ": ", warning));
    }
    return result;
  }
  ASSIGN_OR_RETURN(SafetensorsHeader header, ReadSafetensorsHeader(*store, key, stat.size));
  result.file.header = {{.bytes = header.data_begin, .crc32c = header.crc32c}};
  result.tensors = std::move(header.tensors);
  return result;
}

}  // namespace pewter
