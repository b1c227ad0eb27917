// The rule for object keys, checked by every store.
#pragma once

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace pewter {

// InvalidArgument for a key that is empty, absolute, has an empty, "." or ".." part, or a NUL byte.
absl::Status ValidateKey(absl::string_view key);

}  // namespace pewter
