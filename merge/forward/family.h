// Families of networks whose forward pass Pewter knows, as data: what their tensors are called and
// how the pieces are put together; and a model's dimensions, from its config.json.
//
// All are stacks of the same block: attention, then feed-forward, each with a norm and a skip
// connection. They differ in where the norms stand, how positions come in, in names, and in the
// head. A setting that would change results and is not known here is refused by name.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/ops/activation.h"

namespace pewter {

enum class PositionKind {
  kLearned,   // a table that is added to the embedding
  kRotary,    // query and key are rotated
  kRelative,  // a bias for each distance and head (T5)
};

// Linear layers, norms and tables by name, without ".weight" and ".bias"; null: there is none.
// "{layer}" stands for the layer's number.
struct Family {
  const char* model_type;  // config.json's
  // What stands in front of all names but the heads': the first with which the embedding is there.
  const char* prefixes[3] = {"", nullptr, nullptr};

  bool post_norm =
      false;           // norms after the skip connections, else before attention and feed-forward
  bool centre = true;  // LayerNorm, else RMSNorm
  bool causal = false;
  bool transposed = false;  // weights are [inputs, outputs]
  bool scaled = true;       // scores are divided by the root of a head's width
  PositionKind positions = PositionKind::kLearned;
  // RoBERTa numbers the tokens that are not padding from pad_token_id + 1 on.
  bool positions_skip_padding = false;

  // The embedding of tokens, or of an image's patches.
  const char* words = nullptr;
  const char* words_alias = nullptr;
  const char* patches = nullptr;      // a convolution
  const char* class_token = nullptr;  // whole names, as the next
  const char* position_table = nullptr;
  const char* types = nullptr;
  const char* embedding_norm = nullptr;

  const char* layer = nullptr;  // in front of the next ones
  // Without `key`, `query` is query, key and value in one.
  const char *query = nullptr, *key = nullptr, *value = nullptr;
  const char *query_norm = nullptr, *key_norm = nullptr;  // of each head
  const char *attention_out = nullptr, *attention_norm = nullptr;
  // Gated: down(f(gate) up); else down(f(up)), where `plain` is the name instead of `up` if set.
  const char *gate = nullptr, *up = nullptr, *plain = nullptr, *down = nullptr;
  const char* ffn_norm = nullptr;
  const char* relative_bias = nullptr;
  const char* final_norm = nullptr;

  // Heads, with full names. Masked: decode(norm(f(transform))); the bias a name of its own.
  const char *transform = nullptr, *transform_norm = nullptr, *decoder = nullptr,
             *decoder_bias = nullptr;
  // Classifier: classes(f(pooler(first token))); `pooler` after the prefix if `pooler_inside`.
  const char *pooler = nullptr, *classifier = nullptr;
  bool pooler_inside = false;
  kernels::Activation pooler_activation = kernels::Activation::kTanh;

  // config.json's keys.
  const char *width_key = "hidden_size", *layers_key = "num_hidden_layers",
             *heads_key = "num_attention_heads", *inner_key = "intermediate_size",
             *positions_key = "max_position_embeddings", *epsilon_key = "layer_norm_eps",
             *activation_key = "hidden_act";
  // What stands for absent keys.
  const char* activation = "gelu";
  double epsilon = 1e-12;
  int64_t inner_per_width = 0;  // 0: inner_key must be there
};

// Of every known family.
const std::vector<Family>& Families();

enum class HeadKind { kNone, kMasked, kCausal, kClassifier };
const char* HeadName(HeadKind head);  // "masked language model", ...

// A model's dimensions and settings.
struct NetworkShape {
  const Family* family = nullptr;
  HeadKind head_kind = HeadKind::kNone;
  int64_t layers = 0, width = 0;
  int64_t heads = 0, key_heads = 0, head = 0;  // head: columns of one
  int64_t inner = 0;                           // feed-forward columns
  bool gated = false;
  kernels::Activation activation = kernels::Activation::kGelu;
  float epsilon = 0;
  std::vector<float> scales;     // of the scores, by layer
  std::vector<int64_t> windows;  // keys that a query sees, by layer; 0: all

  int64_t vocabulary = 0;
  int64_t positions = 0;      // longest row; 0: any
  int64_t position_rows = 0;  // of their table
  int64_t types = 0;          // token types; 0: there are none
  int64_t first_position = 0;
  int32_t padding = -1;                    // pad_token_id; -1: none
  bool tied = false, tie_is_said = false;  // tie_word_embeddings, and whether config.json has it
  int64_t channels = 0, image_height = 0, image_width = 0, patch_height = 0, patch_width = 0;

  // Rotary: the frequencies of the pairs, and what cosines and sines are multiplied by.
  std::vector<float> frequencies;
  float rotary_scale = 1;
  // Relative: buckets of distances.
  int64_t buckets = 0, farthest = 0;

  int64_t tokens_of_image() const {
    return 1 + (image_height / patch_height) * (image_width / patch_width);
  }
};

// FailedPrecondition, naming the key, for what is missing, cannot be, or is not known here.
absl::StatusOr<NetworkShape> ParseNetworkShape(absl::string_view config_json);

// The bucket of a key `distance` after the query, of a bidirectional stack (T5).
int64_t RelativeBucket(int64_t distance, int64_t buckets, int64_t farthest);

}  // namespace pewter
