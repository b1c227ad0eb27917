// Suggestions for mistyped names.
#pragma once

#include <string>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace pewter {

// The known name with the least edit distance to `name`, when near enough to be a likely slip; else
// empty.
std::string NearestName(absl::string_view name, absl::Span<const std::string> known);

// "; did you mean \"ties\"?", or empty when nothing is near.
std::string DidYouMean(absl::string_view name, absl::Span<const std::string> known);

}  // namespace pewter
