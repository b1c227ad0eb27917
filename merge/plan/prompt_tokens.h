// Text to token ids, for prompts: the BPE of a tokenizer.json, as the tokenizers library encodes
// it, and as transformers 5 loads it, which has settings of its own for Llama's and Qwen's classes.
//
// Read are the kinds of today's decoders: without a pre-tokenizer or with Metaspace (SentencePiece
// models such as Llama 2 and Mistral), and ByteLevel, alone or after a split by a regular
// expression that ends as GPT-2's does (Llama 3, Qwen). Normal form C is applied by leaving texts
// alone that it does not change. WordPiece, Unigram and whatever else is refused by name, and never
// guessed at. Immutable; may be used from any thread.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "merge/checkpoint/checkpoint.h"

namespace pewter {

class PromptTokenizer {
 public:
  // FailedPrecondition when the model has no tokenizer.json, or one of another kind; DataLoss when
  // it is malformed.
  static absl::StatusOr<PromptTokenizer> Make(const Checkpoint& model);

  // tokenizer_config.json's bos_token; empty when there is none.
  const std::string& bos() const;

  struct Encoded {
    std::vector<int64_t> ids;
    int64_t left_out = 0;  // characters without a token, where there is none for what is unknown
  };
  // InvalidArgument when the text is longer than 64 KiB or not UTF-8; FailedPrecondition when it
  // needs what Make could not refuse.
  absl::StatusOr<Encoded> Encode(absl::string_view text) const;

 private:
  struct Data;
  std::shared_ptr<const Data> data_;
};

}  // namespace pewter
