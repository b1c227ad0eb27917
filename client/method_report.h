// What `pewter methods` shows: views of the table of methods.
#pragma once

#include <string>

#include "client/output.h"
#include "merge/methods/method.h"

namespace pewter::client {

Json MethodToJson(const MergeMethod& method);
std::string MethodToText(const MergeMethod& method);
// A recipe that the method accepts, with every parameter that has an effect at its default.
std::string ExampleRecipe(const MergeMethod& method);
// docs/methods.md: every method in full.
std::string MethodsToMarkdown();
// "input" (one like the others), "optional" or "required".
const char* BaseName(BaseUse base);

}  // namespace pewter::client
