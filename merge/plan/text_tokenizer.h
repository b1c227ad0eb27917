// Splits a text into the tokens of a model: tokenizer.json as the tokenizers library runs it,
// without the special tokens that its post-processor adds.
//
//   added tokens -> normalizer -> pre-tokenizer -> model (BPE, WordPiece, Unigram, WordLevel)
//
// For short texts: prompts, and those that tokens stand for. What tokenizer.json asks for and is
// not known here is Unimplemented and named. Files are a stranger's: patterns run with a limit of
// time, and malformed files are DataLoss. Immutable; Encode may be called from any thread.
#pragma once

#include <cstdint>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "merge/checkpoint/checkpoint.h"

namespace pewter {

class TextTokenizer {
 public:
  static constexpr size_t kMaxTextBytes = size_t{64} << 10;

  // FailedPrecondition when the model has no tokenizer.json.
  static absl::StatusOr<std::shared_ptr<const TextTokenizer>> Read(const Checkpoint& model);
  // From the text of a tokenizer.json; messages begin with `name`.
  static absl::StatusOr<std::shared_ptr<const TextTokenizer>> Parse(absl::string_view name,
                                                                    absl::string_view text);
  static absl::StatusOr<std::shared_ptr<const TextTokenizer>> Make(absl::string_view name,
                                                                   const nlohmann::json& root);
  virtual ~TextTokenizer() = default;

  struct Encoded {
    std::vector<int32_t> ids;
    int64_t left_out = 0;  // characters without a token, where there is none for what is unknown
  };
  // InvalidArgument for text that is too long or not UTF-8.
  virtual absl::StatusOr<Encoded> Encode(absl::string_view text) const = 0;
};

}  // namespace pewter
