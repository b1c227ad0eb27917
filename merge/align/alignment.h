// Alignment: for the features of one model, the order (or the linear maps) in which they pair with
// those of a reference; and the view of the model's tensors that it makes.
//
// A model seen through its alignment computes the same function as before, with its features where
// the reference has theirs. An alignment is a plain value; in a file it is
//
//   alignment.safetensors
//     GROUP.permutation   I32 [width]               aligned feature i is the model's feature q[i]
//     GROUP.transform     F64 [blocks, dim, dim]    then, in each run of dim features, x' = T x
//     GROUP.inverse       F64 [blocks, dim, dim]    T^-1
//     metadata            format, version, family, reference and model (their references and the
//                         digests of their tensors' names, types and shapes), method, function
//                         ("kept" or "changed"), inexact (JSON, where changed), report (JSON)
//
// A group that is not there keeps its order. Groups are those of symmetry.h. Linear maps of groups
// that are `inexact` are no symmetry: with those the aligned model computes another function, and
// values that scale features one by one are mapped as the diagonal matrix that they stand for, of
// which the diagonal is kept: v'_i = (T diag(v) T^-1)_ii.
//
// Errors: FailedPrecondition for an alignment that does not fit the model or that the model's
// architecture does not allow, DataLoss for a damaged file. Values and views may be shared between
// threads once made.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "merge/align/symmetry.h"
#include "merge/checkpoint/tensor_source.h"
#include "store/object_store.h"

namespace pewter {

// Square matrices on the diagonal: one a head, or one for a whole group.
struct BlockTransform {
  int64_t blocks = 0;
  int64_t dim = 0;
  std::vector<double> forward;  // [blocks, dim, dim], row-major: T
  std::vector<double> inverse;  // likewise: T^-1
};

struct GroupAlignment {
  std::vector<int32_t> permutation;  // [width]; empty: the identity
  BlockTransform transform;          // blocks == 0: none. After the permutation
};

struct Alignment {
  std::string family;                            // Symmetry::family()
  std::string reference, reference_fingerprint;  // which model the features are those of
  std::string model, model_fingerprint;          // which model is aligned
  std::string method;                            // "permutation by weights": for messages
  std::string report;                            // JSON object: objectives, stages; may be empty
  std::map<std::string, GroupAlignment> groups;  // by SymmetryGroup::name
  std::vector<std::string> inexact;              // groups whose linear maps are no symmetry

  bool keeps_function() const { return inexact.empty(); }
};

// What an alignment remembers of a model: a digest of the tensors' names, types and shapes.
std::string AlignmentFingerprint(const Symmetry& symmetry, const Checkpoint& model);

// That every group exists and has its width, permutations are permutations, transforms have their
// inverses, and features stay within what the symmetry allows: in their heads, in the order that
// RoPE fixes, heads with their keys and values, one order for heads that share a table. Transforms
// are allowed where no tensor takes the group by kOrdered, and where the group is inexact.
absl::Status CheckAlignment(const Symmetry& symmetry, const Alignment& alignment);

// `first`, and `second` on what it gives: Apply(Compose(first, second)) is Apply(second) after
// Apply(first). Of permutations followed by transforms; a permutation of `second` that moves
// features out of the blocks of a transform of `first` is FailedPrecondition.
absl::StatusOr<Alignment> Compose(const Alignment& first, const Alignment& second);
// The alignment that undoes it.
absl::StatusOr<Alignment> Inverse(const Alignment& alignment);

absl::StatusOr<std::string> SerializeAlignment(const Alignment& alignment);
// `key` of `store`. Sizes are checked before anything is allocated.
absl::StatusOr<Alignment> ReadAlignment(ObjectStore& store, absl::string_view key);

// A tensor of the aligned model. Elements that are only moved keep their bits and their type;
// linear maps compute in double and round once to the stored type. `tensor` is the symmetry's
// description of `source`; the alignment has been checked. Returns `source` itself where nothing
// changes; resident_bytes() counts the view's orders and maps, and the rows that a Read holds.
absl::StatusOr<std::shared_ptr<const TensorSource>> AlignSource(
    const Symmetry& symmetry, const SymmetricTensor& tensor, const Alignment& alignment,
    std::shared_ptr<const TensorSource> source);

}  // namespace pewter
