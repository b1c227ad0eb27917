// Symmetry: which features of a model may be reordered without changing what it computes, and
// where in its tensors they lie.
//
// A group is a set of features that move together: the hidden units of one feed-forward block, the
// query and key features of one attention, the residual stream. Tensors carry groups on their axes.
// The families' tables are data: merge/align/symmetries.json (compiled in; format: table.h).
//
// A permutation q of a group is a gather: feature i of the reference pairs with feature q[i] of the
// model that is aligned, and its aligned tensors are W'[i] = W[q[i]] on every axis of the group.
//
// Immutable values made from headers and configurations only. Errors are FailedPrecondition and
// name the model, tensor or key.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "base/dtype.h"
#include "base/shape.h"
#include "merge/checkpoint/architecture.h"
#include "merge/checkpoint/checkpoint.h"

namespace pewter {

enum class GroupKind {
  kResidual,     // "res"
  kFfn,          // "ff.L"
  kQueryKey,     // "qk.L": query and key features where one order serves both
  kValueOutput,  // "vo.L": rows of the value projection, columns of the output projection
  kQuery,        // "q.L", "k.L", "v.L", "o.L": where query heads share keys and values
  kKey,
  kValue,
  kOutput,
  kHeads,   // "heads.enc": the order of heads itself, of all attentions that it is head_order of
  kPooler,  // "pool"
  kHead,    // "head": between the layers of an output head that is not tied to the embeddings
};
// "feed-forward", "query/key": for messages.
absl::string_view GroupKindName(GroupKind kind);

struct SymmetryGroup {
  std::string name;
  GroupKind kind = GroupKind::kResidual;
  int64_t width = 0;   // features
  int64_t layer = -1;  // within its stack ("qk.dec.3": 3); -1: of no layer
  int attention = -1;  // index into Symmetry::attentions(); -1: any order is allowed
};

// What binds the groups of one attention: features move in whole heads, and heads with their keys
// and values.
struct Attention {
  std::string name;   // "attn.3", "attn.enc.3", "attn.x.3"
  int64_t layer = 0;  // within its stack
  // Groups. query == key and value == output where each head has keys and values of its own and the
  // order of its features is free.
  int query = -1, key = -1, value = -1, output = -1;
  int64_t heads = 0;     // of queries; kv_heads divides it
  int64_t kv_heads = 0;  // query heads [g * heads / kv_heads, ...) read keys and values of head g
  int64_t head_dim = 0;
  bool rotary = false;  // RoPE: the order inside a query or key head is fixed
  bool normed = false;  // queries and keys pass a norm (Qwen3): no linear maps of them
  int head_order = -1;  // group of kind kHeads that orders the heads of several attentions at once
};

// An order of an attention's features that its symmetry allows, as gathers.
struct AttentionOrder {
  std::vector<int32_t> kv_heads;  // [kv_heads]
  std::vector<int32_t> heads;     // [heads]; heads[h] belongs to kv head kv_heads[h / r]
  // [kv_heads * head_dim]: entries [g * head_dim, ...) order the features inside the head that slot
  // g takes, and are in [0, head_dim). Those of the r query heads of a kv head are the same.
  std::vector<int32_t> query_key;     // the identity under RoPE
  std::vector<int32_t> value_output;  // likewise
};
AttentionOrder IdentityOrder(const Attention& attention);
// Permutations of the groups query, key, value and output.
struct AttentionPermutations {
  std::vector<int32_t> query, key, value, output;
};
AttentionPermutations Expand(const Attention& attention, const AttentionOrder& order);
// The reverse. FailedPrecondition when the permutations are not one the attention allows: "attn.3:
// features leave their head", "... the order inside a query head is fixed by RoPE".
absl::StatusOr<AttentionOrder> ToOrder(const Attention& attention,
                                       const AttentionPermutations& permutations);

// How a tensor takes a linear map T of a group (features x' = T x) instead of a permutation.
enum class FeatureRole {
  kOrdered,   // one value a feature (a norm's weight): permutations only
  kProduced,  // rows of a weight, a bias: T W
  kConsumed,  // columns: W T^-1
  kDual,      // rows of the key projection in a group shared with the queries: T^-T W
};
// A part of an axis that one group orders.
struct AxisSegment {
  int group = -1;  // index into Symmetry::groups()
  FeatureRole role = FeatureRole::kOrdered;
  // The values do not change what the model computes (a key's bias without RoPE): evidence for no
  // order.
  bool redundant = false;
};

struct SymmetricTensor {
  ArchTensor tensor;          // the name is the architecture's
  DType dtype = DType::kF32;  // as is the shape, of the first model that stores it
  Shape shape;
  // [axis]: empty where nothing moves, else segments that follow each other, each as long as its
  // group is wide.
  std::vector<std::vector<AxisSegment>> axes;
};

class Symmetry {
 public:
  // Of models that are to be aligned with each other; `architecture` is what
  // ResolveArchitecture gives for them. FailedPrecondition for a family without a table (the
  // message names those that have one), a tensor that the table does not know, head counts, layers
  // or widths that differ between the models.
  static absl::StatusOr<Symmetry> Make(const Architecture& architecture,
                                       absl::Span<const std::shared_ptr<const Checkpoint>> models);

  const std::string& family() const { return family_; }  // "bert"
  const std::vector<SymmetryGroup>& groups() const { return groups_; }
  const std::vector<Attention>& attentions() const { return attentions_; }
  // All that some model stores, in the architecture's order.
  const std::vector<SymmetricTensor>& tensors() const { return tensors_; }

  // Groups that are another one because the output head is tied to the embeddings: head -> res.
  const std::map<std::string, std::string>& tied() const { return tied_; }

  int FindGroup(absl::string_view name) const;                  // -1 when there is none
  const SymmetricTensor* Find(absl::string_view tensor) const;  // null when there is none

 private:
  friend class SymmetryReader;

  std::string family_;
  std::vector<SymmetryGroup> groups_;
  std::vector<Attention> attentions_;
  std::vector<SymmetricTensor> tensors_;
  std::map<std::string, std::string> tied_;
  std::map<std::string, int, std::less<>> group_index_, tensor_index_;
};

}  // namespace pewter
