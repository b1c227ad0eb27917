// Text to token ids, for prompts: as transformers 5 encodes them, which loads a tokenizer.json with
// settings of its own for Llama's and Qwen's classes and knows the special tokens of
// tokenizer_config.json. Immutable; may be used from any thread.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "merge/checkpoint/checkpoint.h"
#include "merge/plan/text_tokenizer.h"

namespace pewter {

class PromptTokenizer {
 public:
  // FailedPrecondition when the model has no tokenizer.json, or one that Pewter cannot encode with;
  // DataLoss when it is malformed.
  static absl::StatusOr<PromptTokenizer> Make(const Checkpoint& model);

  // tokenizer_config.json's bos_token; empty when there is none.
  const std::string& bos() const { return bos_; }

  // As TextTokenizer's.
  absl::StatusOr<TextTokenizer::Encoded> Encode(absl::string_view text) const {
    return tokenizer_->Encode(text);
  }

 private:
  std::shared_ptr<const TextTokenizer> tokenizer_;
  std::string bos_;
};

}  // namespace pewter
