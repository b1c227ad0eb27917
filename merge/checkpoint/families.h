// The families that are known by name: merge/checkpoint/architectures/*.json.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "merge/checkpoint/architecture_data.h"

namespace pewter {

struct KnownArchitecture;  // a head of a family; lives as long as the program

// Null when the name is not known. The same name in several families is told apart by model_type.
const KnownArchitecture* FindKnown(const std::string& name, const std::string& model_type);

// True when both have the same tensors: heads of one family under two names.
bool SameTensors(const KnownArchitecture& a, const KnownArchitecture& b);

// Its tensors, with as many experts as the inputs have. FailedPrecondition when an input numbers
// more of them than it has tensors.
absl::StatusOr<ArchitecturePtr> MakeKnown(const KnownArchitecture& known, Models inputs);

}  // namespace pewter
