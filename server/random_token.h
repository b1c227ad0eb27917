// Unguessable text from the kernel's random generator.
#pragma once

#include <string>

#include "absl/strings/string_view.h"

namespace pewter::server {

// `bytes` random bytes as lower-case hex digits.
std::string RandomHex(int bytes);

// Takes the same time wherever the texts differ.
bool SecretsEqual(absl::string_view a, absl::string_view b);

}  // namespace pewter::server
