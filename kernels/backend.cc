#include "kernels/backend.h"

#include "absl/strings/str_cat.h"
#include "base/dtype_names.h"
#include "base/status.h"
#include "kernels/arguments.h"

namespace pewter::kernels {
namespace {

absl::Status CheckInputs(int wanted, absl::Span<const ConstView> in, int64_t first) {
  if (wanted < 1 || wanted > kMaxInputs) {
    return absl::InternalError(
        absl::StrCat("an op with ", wanted, " inputs; 1 to ", kMaxInputs, " are possible"));
  }
  if (static_cast<int>(in.size()) != wanted) {
    return absl::InternalError(absl::StrCat("an op takes ", wanted, " inputs, not ", in.size()));
  }
  for (const ConstView& view : in) {
    if (view.size != in[0].size || view.size < 0) {
      return absl::InternalError(
          absl::StrCat("inputs of ", in[0].size, " and ", view.size, " elements"));
    }
    if (view.dtype != in[0].dtype || !IsFloat(view.dtype)) {
      return absl::InternalError(absl::StrCat("inputs of types ", SafetensorsName(in[0].dtype),
                                              " and ", SafetensorsName(view.dtype)));
    }
  }
  if (first < 0) return absl::InternalError(absl::StrCat("element index ", first));
  return absl::OkStatus();
}

// What all kinds of ops ask of their inputs.
template <class Op>
absl::Status CheckOp(const Op& op, absl::Span<const ConstView> in, int64_t first) {
  RETURN_IF_ERROR(
      CheckInputs(std::visit([](const auto& held) { return held.inputs(); }, op), in, first));
  const int64_t row = std::visit([](const auto& held) { return WholeRows(held); }, op);
  if (row > 0 && (first % row != 0 || in[0].size % row != 0)) {
    return absl::InternalError(
        absl::StrCat(in[0].size, " elements from ", first, " on are not whole rows of ", row));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckMap(const MapOp& op, absl::Span<const ConstView> in, View out, int64_t first) {
  RETURN_IF_ERROR(CheckOp(op, in, first));
  if (out.size != in[0].size || !IsFloat(out.dtype)) {
    return absl::InternalError(absl::StrCat("an output of ", out.size, " ",
                                            SafetensorsName(out.dtype), " for inputs of ",
                                            in[0].size, " elements"));
  }
  return absl::OkStatus();
}

absl::Status CheckReduce(const ReduceOp& op, absl::Span<const ConstView> in, int64_t first,
                         int64_t block) {
  RETURN_IF_ERROR(CheckOp(op, in, first));
  if (block < 1) return absl::InternalError(absl::StrCat("a block of ", block, " elements"));
  return absl::OkStatus();
}

absl::Status CheckReduceColumns(const ReduceOp& op, absl::Span<const ConstView> in, int64_t first,
                                int64_t columns) {
  RETURN_IF_ERROR(CheckReduce(op, in, first, columns));
  if (first % columns != 0 || in[0].size % columns != 0) {
    return absl::InternalError(
        absl::StrCat(in[0].size, " elements from ", first, " on in ", columns, " columns"));
  }
  return absl::OkStatus();
}

absl::Status CheckHistogram(const MagnitudeOp& op, absl::Span<const ConstView> in, int64_t first,
                            RadixLevel level, absl::Span<const uint64_t> bins) {
  RETURN_IF_ERROR(CheckOp(op, in, first));
  const int levels = in[0].dtype == DType::kF64 ? 4 : 2;
  if (level.level < 0 || level.level >= levels) {
    return absl::InternalError(absl::StrCat("radix level ", level.level, " of ", levels));
  }
  if (bins.size() != kRadixBins) {
    return absl::InternalError(absl::StrCat("a histogram of ", bins.size(), " bins"));
  }
  return absl::OkStatus();
}

absl::Status CheckSift(const MagnitudeOp& op, absl::Span<const ConstView> in, int64_t first,
                       absl::Span<const SiftCandidate> candidates) {
  RETURN_IF_ERROR(CheckOp(op, in, first));
  if (static_cast<int64_t>(candidates.size()) < in[0].size || in[0].size > UINT32_MAX) {
    return absl::InternalError(
        absl::StrCat("room for ", candidates.size(), " candidates of ", in[0].size));
  }
  return absl::OkStatus();
}

int Terms(const ReduceOp& op) {
  return std::visit([](const auto& held) { return held.groups() * held.kTerms; }, op);
}

}  // namespace pewter::kernels
