// How names that come from a checkpoint's bytes appear in messages.
#pragma once

#include <string>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

namespace pewter {

// `name` in quotes, control characters escaped, and cut when long: a hostile name neither writes to
// the terminal nor fills the log.
inline std::string Printable(absl::string_view name) {
  constexpr size_t kLimit = 200;
  return absl::StrCat("\"", absl::Utf8SafeCHexEscape(name.substr(0, kLimit)),
                      name.size() > kLimit ? "...\"" : "\"");
}

}  // namespace pewter
