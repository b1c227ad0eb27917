// AdapterMethod: how LoRA adapters become one adapter, module by module. PEFT calls it a
// combination type (LoraModel.add_weighted_adapter), and its definitions are followed.
//
// An adapter adds s B A to a module's weight [out, in], with factors A [r, in] and B [out, r] and a
// scale s. A method gives the two factors of the output, whose scale is 1. To add one, add a file
// to merge/methods/adapters that defines it (see adapters/cat.cc): the table is generated from the
// files of that folder.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "merge/methods/method.h"
#include "merge/methods/tensor_task.h"

namespace pewter {

// What one adapter has for a module.
struct AdapterInput {
  int64_t rank = 0;
  double scale = 1;
  ParamValues params;  // of scope kModel

  double number(absl::string_view param) const;
};

// A module of the output. Of a task's operands, all of them F32, A of input i is number 2 i and B
// is 2 i + 1.
struct AdapterModule {
  std::string name;  // with the seed the key of random draws
  uint64_t seed = 0;
  int64_t out = 0;
  int64_t in = 0;  // with a kernel's extents
  int64_t rank = 0;
  std::vector<AdapterInput> inputs;
  ParamValues params;  // of scope kTensor

  // The parameter exists by the method's table; null: unset.
  const ParamValue* Find(absl::string_view param) const;
};

// PEFT's operations on tensors of one shape, element by element.
struct Elementwise {
  enum class Prune {
    kNone,
    kMagnitude,  // to the largest `density`
    kRandom,     // to `density` of them, and divides by it
  };
  Prune prune = Prune::kNone;
  // Of the terms that agree with the majority's sign the mean, else the sum of all.
  bool elect_sign = false;
};

struct AdapterMethod {
  // Its name, text and parameters; base, inputs and run mean nothing.
  MergeMethod method;
  // What the rank of a module is.
  enum class Rank {
    kSame,  // that of the inputs, which must agree
    kSum,   // of the inputs
    kSvd,   // `svd_rank`, else the largest of the adapters' configurations; at most LargestRank
  };
  Rank rank = Rank::kSame;
  // Also what becomes of a bias that an adapter adds to a module's (lora_bias).
  Elementwise elementwise;
  // The task that gives A [rank, in] and then B [out, rank].
  std::shared_ptr<const TensorTask> (*factors)(const AdapterMethod& method,
                                               const AdapterModule& module) = nullptr;
};

// All of them, sorted by name.
absl::Span<const AdapterMethod* const> AdapterMethods();
// InvalidArgument when there is none: one that says so of a method that only models have, and else
// the nearest names.
absl::StatusOr<const AdapterMethod*> FindAdapterMethod(absl::string_view name);

// The names of all methods, of models and of adapters, sorted.
std::vector<std::string> MethodNames();

// Of what a method that decomposes makes of the module's inputs, before it is cut to a rank.
// FailedPrecondition when that is too large to be decomposed.
absl::StatusOr<int64_t> LargestRank(const AdapterMethod& method, const AdapterModule& module);

// What the module's inputs add to a bias of `elements`: operand i is the bias of input i.
std::shared_ptr<const TensorTask> MakeBiasTask(const AdapterMethod& method,
                                               const AdapterModule& module, int64_t elements);

}  // namespace pewter
