// The grammar of recipes as a JSON Schema (draft 7), for editors.
#pragma once

#include "client/output.h"

namespace pewter::client {

// Keys and their forms; names, types, ranges and choices of parameters from the table of methods,
// by `merge_method`. Stricter than the parser where mergekit is lax: unknown keys are errors.
Json RecipeSchema();

}  // namespace pewter::client
