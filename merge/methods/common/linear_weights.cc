#include "merge/methods/common/linear_weights.h"

#include <re2/re2.h>

#include <algorithm>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "kernels/linear_algebra.h"

namespace pewter::methods {
namespace {

// As far as names tell.
bool IsVocabulary(const TensorFacts& tensor) {
  if (tensor.vocabulary) return true;
  for (absl::string_view part : {"embed", "lm_head", "wte", "wpe", "text_projection"}) {
    if (absl::StrContains(tensor.name, part)) return true;
  }
  return false;
}

}  // namespace

std::vector<Param> LinearWeightParams() {
  return {{.name = "linear_include",
           .help = "which weights with two axes are linear: names must begin with what a pattern "
                   "matches",
           .type = ParamType::kPatterns,
           .fallback = ".*"},
          {.name = "linear_exclude",
           .help = "which are not; unset: embeddings and output heads",
           .type = ParamType::kPatterns,
           .fallback = Unset{}}};
}

bool PatternMatches(const TensorFacts& tensor, const char* param, bool unset) {
  const auto found = tensor.params.find(param);
  if (found == tensor.params.end()) return unset;
  const RE2 pattern(std::get<std::string>(found->second));
  return pattern.Match(re2::StringPiece(tensor.name.data(), tensor.name.size()), 0,
                       tensor.name.size(), RE2::ANCHOR_START, nullptr, 0);
}

bool IsLinearWeight(const TensorFacts& tensor) {
  return tensor.shape.rank() == 2 && tensor.shape.elements() > 0 &&
         PatternMatches(tensor, "linear_include", true) &&
         !PatternMatches(tensor, "linear_exclude", IsVocabulary(tensor));
}

absl::Status CheckOrder(int64_t order, absl::string_view hint) {
  if (order <= kernels::kMaxExtent) return absl::OkStatus();
  return absl::ResourceExhaustedError(absl::StrCat("it is to be factored as a matrix of order ",
                                                   order, ", and the limit is ",
                                                   kernels::kMaxExtent, "; ", hint));
}

absl::Status RunMeanOfTaskVectors(MethodContext& context, double factor) {
  kernels::ElectedMean op;
  op.count = context.inputs();
  op.from_base = true;
  op.elect = false;
  op.disjoint = false;
  std::fill_n(op.weight, op.count, factor);
  return context.Map(op, context.AllOperands());
}

}  // namespace pewter::methods
