#include "merge/engine/observer.h"

namespace pewter {

absl::string_view PhaseName(Phase phase) {
  switch (phase) {
    case Phase::kPlanning:
      return "planning";
    case Phase::kMerging:
      return "merging";
    case Phase::kPublishing:
      return "publishing";
    case Phase::kEvaluating:
      return "evaluating";
    case Phase::kDone:
      return "done";
  }
  return "";
}

}  // namespace pewter
