#include "kernels/network.h"

#include <limits>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "kernels/network_arguments.h"

namespace pewter::kernels {
namespace {

std::string Describe(const ConstFloats& m) {
  return absl::StrCat("[", m.rows, ", ", m.columns, "] with rows ", m.stride, " apart");
}

absl::Status CheckFloats(const ConstFloats& m, absl::string_view what) {
  if (m.rows >= 0 && m.columns >= 0 && m.stride >= m.columns &&
      m.rows <= std::numeric_limits<int32_t>::max() &&
      m.stride <= std::numeric_limits<int32_t>::max()) {
    return absl::OkStatus();
  }
  return absl::InternalError(absl::StrCat(what, " is ", Describe(m)));
}

absl::Status CheckShape(const ConstFloats& m, int64_t rows, int64_t columns,
                        absl::string_view what) {
  RETURN_IF_ERROR(CheckFloats(m, what));
  if (m.rows == rows && m.columns == columns) return absl::OkStatus();
  return absl::InternalError(
      absl::StrCat(what, " is ", Describe(m), " and not [", rows, ", ", columns, "]"));
}

}  // namespace

absl::Status CheckLinear(const Network::LinearCall& call) {
  RETURN_IF_ERROR(CheckFloats(call.x, "a layer's input"));
  if (call.transpose_w == Transpose::kYes) {
    RETURN_IF_ERROR(CheckShape(call.w, call.y.columns, call.x.columns, "a layer's weight"));
  } else {
    RETURN_IF_ERROR(CheckShape(call.w, call.x.columns, call.y.columns, "a layer's weight"));
  }
  if (call.add && call.activation != Activation::kNone) {
    return absl::InternalError("a layer with an activation adds to nothing");
  }
  return CheckShape(call.y, call.x.rows, call.y.columns, "a layer's output");
}

absl::Status CheckGate(const ConstFloats& up, const Floats& gate) {
  RETURN_IF_ERROR(CheckFloats(up, "a gated input"));
  return CheckShape(gate, up.rows, up.columns, "a gate");
}

absl::Status CheckNorm(const Network::NormCall& call) {
  RETURN_IF_ERROR(CheckFloats(call.x, "a norm's input"));
  if (call.weight == nullptr) return absl::InternalError("a norm without weight");
  return CheckShape(call.y, call.x.rows, call.x.columns, "a norm's output");
}

absl::Status CheckRotate(const Network::RotateCall& call) {
  RETURN_IF_ERROR(CheckFloats(call.x, "what is rotated"));
  if (call.head < 1 || call.x.columns % call.head != 0 || call.pairs < 1 ||
      2 * call.pairs > call.head) {
    return absl::InternalError(absl::StrCat(call.pairs, " pairs of a head of ", call.head, " of ",
                                            Describe(call.x), " cannot be rotated"));
  }
  return absl::OkStatus();
}

absl::Status CheckAttention(const Network::AttentionCall& call) {
  if (call.heads < 1 || call.key_heads < 1 || call.heads % call.key_heads != 0 || call.head < 1) {
    return absl::InternalError(absl::StrCat("attention of ", call.heads, " heads of ", call.head,
                                            " with ", call.key_heads, " key heads"));
  }
  const int64_t tokens = call.q.rows;
  RETURN_IF_ERROR(CheckShape(call.q, tokens, call.heads * call.head, "the query"));
  RETURN_IF_ERROR(CheckShape(call.k, tokens, call.key_heads * call.head, "the key"));
  RETURN_IF_ERROR(CheckShape(call.v, tokens, call.key_heads * call.head, "the value"));
  RETURN_IF_ERROR(CheckShape(call.out, tokens, call.heads * call.head, "attention's output"));
  int64_t last = 0;
  bool rising = !call.starts.empty() && call.starts.front() == 0 && call.starts.back() == tokens;
  for (const int64_t start : call.starts) {
    rising = rising && start >= last;
    last = start;
  }
  if (!rising) return absl::InternalError("sequences that do not cover the tokens in order");
  if ((call.window > 0 || call.bias != nullptr) && call.positions == nullptr) {
    return absl::InternalError("attention by distance without positions");
  }
  return absl::OkStatus();
}

absl::Status CheckGather(const ConstFloats& x, const Floats& y) {
  RETURN_IF_ERROR(CheckFloats(x, "what rows are taken of"));
  return CheckShape(y, y.rows, x.columns, "the rows that are taken");
}

absl::Status CheckPredict(const ConstFloats& logits, int64_t first) {
  RETURN_IF_ERROR(CheckFloats(logits, "logits"));
  if (first >= 0 && first <= std::numeric_limits<int32_t>::max() - logits.columns) {
    return absl::OkStatus();
  }
  return absl::InternalError(absl::StrCat("classes from ", first, " on"));
}

absl::Status CheckSubtract(const ConstFloats& x, const Floats& y) {
  RETURN_IF_ERROR(CheckFloats(x, "what is subtracted from"));
  return CheckShape(y, x.rows, x.columns, "a difference");
}

absl::Status CheckMoments(const ConstFloats& x) { return CheckFloats(x, "features"); }

absl::Status CheckAddGram(const ConstFloats& a, const ConstFloats& b) {
  RETURN_IF_ERROR(CheckFloats(a, "features"));
  return CheckShape(b, a.rows, b.columns, "features");
}

bool SameFeatures(const ConstFloats& a, const ConstFloats& b) {
  return a.data == b.data && a.columns == b.columns && a.stride == b.stride;
}

}  // namespace pewter::kernels
