// Pewter's public door. Start here.
//
//   Recipe --MakePlan--> Plan --RunPlan--> model + manifest
//   MoeRecipe --MakeMoePlan--> the same
//
// ParseRecipe reads text only. MakePlan reads the checkpoints' headers and refuses whatever can be
// refused before a tensor byte is read. RunPlan streams. All three are thread-safe and keep no
// global state.
#pragma once

#include "merge/engine/existing_output.h"  // IWYU pragma: export
#include "merge/engine/run.h"              // IWYU pragma: export
#include "merge/plan/moe.h"                // IWYU pragma: export
#include "merge/plan/plan.h"               // IWYU pragma: export
#include "merge/recipe/recipe.h"           // IWYU pragma: export
