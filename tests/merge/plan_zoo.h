// Tiny models of several families, for tests of planning. Values hardly matter there.
#pragma once

#include <string>
#include <vector>

#include "tests/support/temp_folder.h"
#include "tests/support/tiny_model.h"

namespace pewter::testing {

// A folder of models and the test's working directory while it exists, so recipes name them as
// "./llama_a". What there is:
//
//   llama_base llama_a llama_b       2 layers, 6 tokens, width 4, F32, with a tokenizer
//   llama_3                          3 layers
//   llama_bf16                       BF16
//   llama_tied                       no lm_head
//   llama_headless                   no model.norm.weight, which is required
//   llama_wide                       width 8
//   llama_vocab8                     8 tokens, the first two swapped
//   llama_few                        2 tokens, one of them for padding
//   llama_odd                        a tokenizer that gives two tokens one id
//   llama_extra                      also tensors that the family does not have
//   granite_a granite_b granite_c    biases in b and c only
//   qwen2_a qwen2_b                  2 layers, layer_types, tied head
//   gpt2_a gpt2_short                the second without "transformer."
//   mistral_a                        another architecture
//   bert_a bert_old bert_ids         masked LM with position_ids; gamma and beta; other ids
//   encoder_a encoder_b              BertModel: no prefix; b with a pooler; sentence-transformers
//   mixtral_a mixtral_b              2 experts, stored one by one; mixtral_three has 3
//   mixtral_fused                    2 experts in one tensor
//   t5_a t5_gated                    2 encoder and 2 decoder layers; wi, or wi_0 and wi_1
//   strange_a strange_b              not a known architecture
//   strange_head strange_untied      the same with lm_head; without, and the configuration says so
//   t5ish                            unknown, two stacks
//   raw_a.safetensors raw_b.safetensors raw_more.safetensors
class PlanZoo {
 public:
  PlanZoo();
  ~PlanZoo();
  const std::string& path() const { return folder_.path(); }

 private:
  void Model(const std::string& name, const std::string& config,
             const std::vector<TinyTensor>& tensors);

  TempFolder folder_;
  std::string old_path_;
};

}  // namespace pewter::testing
