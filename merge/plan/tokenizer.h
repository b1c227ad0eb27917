// The tokenizer stage: models whose tokens have different ids are merged token by token.
//
// The output takes one model's tokenizer, or the base's with the tokens that only other models
// have. Each model's vocabulary tensors become views whose row i is the row of the output's token
// i: the model's own where it has the token (and the recipe does not force another); else the one
// that the recipe names; else the only other model's that has it; else the base's; else the mean
// over the models that have it; zeros when none does. Rows that belong to no token (padding to a
// multiple, gaps between ids) are the mean of the view's other rows. Everything here is immutable
// after construction and may be used from any thread.
//
// With `approximate` the output's tokenizer is that of another model, the donor, and a row that a
// model has not is made from the donor's rows instead (row_approximator.h). Tokens are then
// compared as what they stand for (token_match.h).
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "merge/checkpoint/checkpoint.h"
#include "merge/checkpoint/tensor_source.h"
#include "merge/plan/row_approximator.h"
#include "merge/plan/text_tokenizer.h"
#include "merge/plan/token_match.h"
#include "merge/plan/tokenizer_files.h"
#include "merge/recipe/recipe.h"

namespace pewter {

// What one model's token ids become.
struct TokenIds {
  absl::flat_hash_map<int64_t, std::string> tokens;  // of the model, by id
  Vocabulary output;
  std::map<std::string, std::string> roles;  // of the output: "eos_token" -> "</s>"
};

// The matrices whose rows are a model's tokens; `head` is null where it is the embedding.
struct VocabularyMatrices {
  std::shared_ptr<const TensorSource> embedding, head;
};

// Rows of the output's vocabulary tensors, for every model.
class TokenAlignment {
 public:
  // `models` are the merge's inputs, `base` an index into them, or -1. `source` is the model whose
  // tokenizer the output has or extends. A model without token files is taken to have those of
  // `donor`, which is the base or the first. `matrices` are those of `models`, then of `source`;
  // only `magikarp` reads them. Errors begin with the place in the recipe.
  static absl::StatusOr<TokenAlignment> Make(
      const RecipeTokenizer& recipe, absl::Span<const std::shared_ptr<const Checkpoint>> models,
      int base, const Checkpoint& source, const Checkpoint& donor,
      std::vector<std::string>& warnings, absl::Span<const VocabularyMatrices> matrices = {});

  int64_t rows() const { return rows_; }
  // How the output's tokenizer files differ from those of `source`.
  const TokenizerEdit& edit() const { return edit_; }
  // For the ids in `donor`'s configuration.
  const TokenIds& ids() const { return ids_; }

  // Where rows are made from, for `approximate`: the matrix of the tokenizer's model that stands
  // for the aligned tensor (null: rows are zeros), and how.
  struct Donor {
    std::shared_ptr<const TensorSource> rows;
    bool head = false;  // an output head, else an embedding
    std::string device = "cpu";
    int threads = 1;
    uint64_t seed = 0;
    std::string name;  // with the seed: which draws are taken
  };
  // One view for each of `sources`, the same vocabulary tensor (rows along axis 0) of the models
  // with indices `models`; all have one dtype. FailedPrecondition when rows differ in size or a row
  // that the recipe names is not there.
  absl::StatusOr<std::vector<std::shared_ptr<const TensorSource>>> Align(
      absl::Span<const int> models, absl::Span<const std::shared_ptr<const TensorSource>> sources,
      const Donor& donor, std::vector<std::string>& warnings) const;

 private:
  // What the recipe says about a row.
  struct Rule {
    std::string token;
    int model = -1;  // -1: zeros
    int64_t row = 0;
    bool force = false;
    TextPosition at;
  };
  class Builder;

  static constexpr int64_t kJunk = -2;
  int64_t LikeRow(int model, int64_t row, bool head) const;
  absl::StatusOr<std::vector<std::vector<int32_t>>> PiecesOf(int model,
                                                             absl::Span<const int32_t> wanted,
                                                             const TensorSource& source) const;
  absl::StatusOr<int64_t> RuleRow(
      const Rule& rule, absl::Span<const int> models,
      absl::Span<const std::shared_ptr<const TensorSource>> sources) const;

  int64_t rows_ = 0;
  int base_ = -1;
  std::optional<TokenApproximation> approximate_;
  TokenizerEdit edit_;
  TokenIds ids_;
  std::vector<std::string> models_;           // names
  std::vector<std::string> tokens_;           // by output row
  std::vector<bool> is_token_;                // by output row; shorter than rows_ with padding
  std::vector<std::vector<int64_t>> own_;     // [model][output row]: the model's row, -1 for none
  absl::flat_hash_map<int64_t, Rule> rules_;  // by output row
  // For `approximate`, by model; of heads_ the last is the tokenizer's.
  int64_t donor_tokens_ = 0;
  std::vector<TokenMatches> matches_;  // without what own_ has
  std::vector<RotaryHeads> heads_;
  std::vector<std::shared_ptr<const TextTokenizer>> texts_;  // of subword, as written_
  std::vector<std::string> written_;                         // by output row: the text of a token
};

// A view of the first `rows` rows of `source`, which has as many or more.
absl::StatusOr<std::shared_ptr<const TensorSource>> FirstRows(
    std::shared_ptr<const TensorSource> source, int64_t rows);

}  // namespace pewter
