#include "merge/methods/method.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "base/nearest.h"

namespace pewter {
namespace {

double AsNumber(const ParamValue& value) {
  if (const double* number = std::get_if<double>(&value)) return *number;
  if (const int64_t* number = std::get_if<int64_t>(&value)) return static_cast<double>(*number);
  return std::get<bool>(value) ? 1 : 0;
}

}  // namespace

absl::StatusOr<const MergeMethod*> FindMethod(absl::string_view name) {
  std::vector<std::string> names;
  for (const MergeMethod* method : Methods()) {
    if (name == method->name) return method;
    names.emplace_back(method->name);
  }
  return absl::InvalidArgumentError(absl::StrCat("unknown merge method \"", name, "\"",
                                                 DidYouMean(name, names),
                                                 "; `pewter methods` lists all"));
}

double MethodContext::number(absl::string_view param) const { return AsNumber(*shared(param)); }
bool MethodContext::flag(absl::string_view param) const { return AsNumber(*shared(param)) != 0; }
double MethodContext::number(int input, absl::string_view param) const {
  return AsNumber(*of_input(input, param));
}

int64_t MethodContext::row_elements() const {
  const int rank = shape().rank();
  return rank == 0 ? 1 : std::max<int64_t>(1, shape()[rank - 1]);
}

int64_t MethodContext::columns() const {
  return shape().rank() == 0 ? 1 : shape().elements() / std::max<int64_t>(1, shape()[0]);
}

std::vector<int> MethodContext::AllOperands() const {
  std::vector<int> operands;
  if (has_base()) operands.push_back(kBase);
  for (int i = 0; i < inputs(); ++i) operands.push_back(i);
  return operands;
}

}  // namespace pewter
