// Which tokens of two tokenizers are the same, by what they stand for: "Ġof" and "▁of" are one, and
// so are the tokens with which texts end. For models that get another one's tokens (`approximate`).
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "merge/checkpoint/tensor_source.h"
#include "merge/plan/tokenizer_files.h"
#include "merge/recipe/recipe.h"

namespace pewter {

// What the tokens of one tokenizer stand for.
class TokenMeanings {
 public:
  explicit TokenMeanings(const Tokenizer& tokenizer);

  // Equal for tokens of any tokenizers that stand for the same.
  std::string Of(absl::string_view token) const;
  // The text that a token is written for; of one with a role (bos_token) the role's name.
  std::string Text(absl::string_view token) const;

 private:
  std::map<std::string, std::string> roles_;  // by token
  absl::string_view space_;                   // what a word's first token begins with
};

// Rows of a model for another one's tokens, by the other's ids; -1 for none.
struct TokenMatches {
  std::vector<int64_t> same;
  std::vector<int64_t> byte;    // empty: not asked for
  std::vector<int64_t> prefix;  // likewise
  std::vector<bool> junk;       // tokens that neither model was trained on; empty: none
};

// Rows of the vocabulary tensors that training has reached, by id ("Fishing for Magikarp",
// arXiv:2405.05417): those whose norm is above the lowest hundredth and which are not like the mean
// of rows that no token has. Reads both tensors; `head` may be null. In double.
absl::StatusOr<std::vector<bool>> TrainedRows(const Vocabulary& vocabulary,
                                              const TensorSource& embedding,
                                              const TensorSource* head);

// `trained_own` and `trained_other` are by id; null: all are.
TokenMatches MatchTokens(const TokenApproximation& how, const Tokenizer& own,
                         const Tokenizer& other, const std::vector<bool>* trained_own,
                         const std::vector<bool>* trained_other);

}  // namespace pewter
