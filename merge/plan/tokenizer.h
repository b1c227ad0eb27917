// The tokenizer stage: models whose tokens have different ids are merged token by token.
//
// The output takes one model's tokenizer. Each model's vocabulary tensors become views whose row i
// is the row of the output's token i: the model's own where it has the token; else the only other
// model's that has it; else the base's; else the mean over the models that have it; zeros when none
// does. Rows beyond the output's vocabulary are dropped. Everything here is immutable after
// construction and may be used from any thread.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "merge/checkpoint/checkpoint.h"
#include "merge/checkpoint/tensor_source.h"

namespace pewter {

// Token to id.
using Vocabulary = absl::flat_hash_map<std::string, int64_t>;

// From tokenizer.json, or vocab.json / vocab.txt with added_tokens.json. Nullopt when the model has
// none of them; DataLoss when they are malformed.
absl::StatusOr<std::optional<Vocabulary>> ReadVocabulary(const Checkpoint& model);

// True when two models' token files give different ids to some token. False when one has none.
absl::StatusOr<bool> VocabulariesDiffer(const Checkpoint& a, const Checkpoint& b);

// Rows of the output's vocabulary tensors, for every model.
class TokenAlignment {
 public:
  // `tokenizer` is the model whose vocabulary the output has; `base` an index into `models`, or -1.
  // A model without token files is taken to have those of `fallback`. FailedPrecondition when
  // `tokenizer` has no readable vocabulary or one that exceeds its vocab_size.
  static absl::StatusOr<TokenAlignment> Make(
      absl::Span<const std::shared_ptr<const Checkpoint>> models, int base,
      const Checkpoint& tokenizer, const Checkpoint& fallback, std::vector<std::string>& warnings);

  int64_t rows() const { return rows_; }

  // One view for each of `sources`, the same vocabulary tensor (rows along axis 0) of the models
  // with indices `models`; all have one dtype. FailedPrecondition when rows differ in size.
  absl::StatusOr<std::vector<std::shared_ptr<const TensorSource>>> Align(
      absl::Span<const int> models,
      absl::Span<const std::shared_ptr<const TensorSource>> sources) const;

 private:
  int64_t rows_ = 0;
  int base_ = -1;
  std::vector<std::vector<int64_t>> own_;  // [model][output row]: the model's row, -1 for none
};

}  // namespace pewter
