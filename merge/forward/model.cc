#include "merge/forward/model.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "base/digest.h"

namespace pewter {

absl::StatusOr<ForwardModel> MakeForwardModel(std::shared_ptr<const Checkpoint> checkpoint) {
  const std::string name = checkpoint->ref().ToString();
  if (checkpoint->raw()) {
    return absl::FailedPreconditionError(absl::StrCat(
        "model ", name, " has no config.json, which says how its tensors make a network"));
  }
  Sha256 identity;
  identity.Update(checkpoint->config_json());
  for (const InputFile& file : checkpoint->files()) {
    identity.Update(absl::StrCat("\n", file.Describe(), "\n", file.stat.size, "\n",
                                 file.stat.mtime_ns, "\n", file.stat.etag));
  }
  const auto lookup =
      [checkpoint](
          absl::string_view tensor) -> absl::StatusOr<std::shared_ptr<const TensorSource>> {
    if (checkpoint->Find(tensor) == nullptr) return nullptr;
    return checkpoint->OpenTensor(tensor, /*file_base=*/0);
  };
  return ForwardModel{.name = name,
                      .config_json = checkpoint->config_json(),
                      .tensors = lookup,
                      .identity = identity.Finish()};
}

}  // namespace pewter
