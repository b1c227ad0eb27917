// What `pewter methods` shows: views of the tables of methods, of models and of adapters.
#pragma once

#include <string>

#include "client/output.h"
#include "merge/methods/adapter_method.h"
#include "merge/methods/method.h"

namespace pewter::client {

Json MethodToJson(const MergeMethod& method);
Json MethodToJson(const AdapterMethod& method);
std::string MethodToText(const MergeMethod& method);
std::string MethodToText(const AdapterMethod& method);
// A recipe that the method accepts, with every parameter that has an effect at its default.
std::string ExampleRecipe(const MergeMethod& method);
std::string ExampleRecipe(const AdapterMethod& method);
// docs/methods.md: every method in full.
std::string MethodsToMarkdown();
// "input" (one like the others), "optional" or "required".
const char* BaseName(BaseUse base);

}  // namespace pewter::client
