#include "merge/methods/adapter_method.h"

#include <set>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/nearest.h"

namespace pewter {

double AdapterInput::number(absl::string_view param) const {
  return std::get<double>(params.at(std::string(param)));
}

const ParamValue* AdapterModule::Find(absl::string_view param) const {
  const auto found = params.find(std::string(param));
  return found == params.end() ? nullptr : &found->second;
}

absl::StatusOr<const AdapterMethod*> FindAdapterMethod(absl::string_view name) {
  std::vector<std::string> names;
  for (const AdapterMethod* adapter : AdapterMethods()) {
    if (name == adapter->method.name) return adapter;
    names.emplace_back(adapter->method.name);
  }
  if (FindMethod(name).ok()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "merge method \"", name, "\" merges models, not adapters; the methods for `output: ",
        "{format: lora}` are ", absl::StrJoin(names, ", ")));
  }
  return absl::InvalidArgumentError(absl::StrCat("unknown merge method \"", name, "\"",
                                                 DidYouMean(name, names),
                                                 "; `pewter methods` lists all"));
}

std::vector<std::string> MethodNames() {
  std::set<std::string> names;
  for (const MergeMethod* method : Methods()) names.insert(method->name);
  for (const AdapterMethod* adapter : AdapterMethods()) names.insert(adapter->method.name);
  return {names.begin(), names.end()};
}

}  // namespace pewter
