#include "merge/align/aligned_model.h"

#include <map>
#include <string>
#include <utility>

#include "base/status.h"

namespace pewter {

absl::StatusOr<ForwardModel> AlignedModel(std::shared_ptr<const Symmetry> symmetry,
                                          std::shared_ptr<const Checkpoint> model,
                                          std::shared_ptr<const AlignmentSlot> slot) {
  ASSIGN_OR_RETURN(ForwardModel aligned, MakeForwardModel(model));
  std::map<std::string, const SymmetricTensor*, std::less<>> known;  // by the stored name
  for (const SymmetricTensor& tensor : symmetry->tensors()) {
    known[StoredName(*model, tensor.tensor, /*with_tied=*/false)] = &tensor;
  }
  aligned.identity.clear();
  aligned.tensors =
      [symmetry = std::move(symmetry), slot = std::move(slot), known = std::move(known),
       stored = std::move(aligned.tensors)](
          absl::string_view name) -> absl::StatusOr<std::shared_ptr<const TensorSource>> {
    ASSIGN_OR_RETURN(std::shared_ptr<const TensorSource> source, stored(name));
    const auto tensor = known.find(name);
    if (source == nullptr || tensor == known.end()) return source;
    return AlignLater(symmetry, *tensor->second, slot, std::move(source));
  };
  return aligned;
}

absl::StatusOr<ForwardModel> AlignedModel(std::shared_ptr<const Symmetry> symmetry,
                                          std::shared_ptr<const Checkpoint> model,
                                          Alignment alignment) {
  RETURN_IF_ERROR(CheckAlignment(*symmetry, alignment));
  auto slot = std::make_shared<AlignmentSlot>();
  slot->Set(std::make_shared<const Alignment>(std::move(alignment)));
  return AlignedModel(std::move(symmetry), std::move(model), std::move(slot));
}

}  // namespace pewter
