// The token files of a checkpoint, read and edited: tokenizer.json, or vocab.json / vocab.txt, with
// added_tokens.json, tokenizer_config.json, special_tokens_map.json and chat_template.jinja.
//
// A tokenizer is two things here: a vocabulary, which rows of the embeddings follow, and files,
// which reach the output as they are or with a few members changed. What is read is a stranger's:
// malformed, oversized or contradictory files are DataLoss that names the file. Values are plain
// data; functions may be called from any thread.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "merge/checkpoint/checkpoint.h"

namespace pewter {

// Larger files are not read. The largest tokenizer.json in use are a quarter of this.
inline constexpr int64_t kMaxTokenizerBytes = int64_t{128} << 20;

// Token to id.
using Vocabulary = absl::flat_hash_map<std::string, int64_t>;

// A token that is found in the text before the tokenizer's model splits it.
struct AddedToken {
  std::string content;
  bool single_word = false;
  bool lstrip = false;
  bool rstrip = false;
  bool normalized = true;
  bool special = false;
  friend bool operator==(const AddedToken&, const AddedToken&) = default;
};

struct Tokenizer {
  Vocabulary vocabulary;                   // of ids below config.json's vocab_size
  std::map<int64_t, AddedToken> added;     // those of them that are added tokens, by id
  std::map<int64_t, AddedToken> implied;   // added tokens that no file gives an id: special tokens
  std::map<int64_t, std::string> surplus;  // the other ids: tokens that the model has no row for
  std::map<std::string, std::string> roles;  // "bos_token" -> "<s>"
};

// Nullopt when the model has no token files.
absl::StatusOr<std::optional<Tokenizer>> ReadTokenizer(const Checkpoint& model);

// True when two models' token files give different ids to some token. False when one has none.
absl::StatusOr<bool> VocabulariesDiffer(const Checkpoint& a, const Checkpoint& b);

// The template of the model's conversations ("default" where it has several).
absl::StatusOr<std::optional<std::string>> ReadChatTemplate(const Checkpoint& model);

// How a tokenizer's files differ from those of the model that they come from.
struct TokenizerEdit {
  std::map<int64_t, AddedToken> listed;    // added tokens that are such there, by id
  std::map<int64_t, AddedToken> added;     // further ones
  std::map<int64_t, std::string> surplus;  // tokens that are left out
  std::optional<std::string> chat_template;

  bool empty() const { return added.empty() && surplus.empty() && !chat_template; }
};

// The new text of `file`, nullopt when it stays as it is. An empty text: the file is left out, as
// it cannot agree with the others. Adds what is lost to `warnings`.
absl::StatusOr<std::optional<std::string>> EditTokenizerFile(const Checkpoint& model,
                                                             absl::string_view file,
                                                             const TokenizerEdit& edit,
                                                             std::vector<std::string>& warnings);

// added_tokens.json for a model that has none and whose other files cannot say what was added;
// nullopt when they can.
absl::StatusOr<std::optional<std::string>> MakeAddedTokensFile(const Checkpoint& model,
                                                               const TokenizerEdit& edit);

}  // namespace pewter
