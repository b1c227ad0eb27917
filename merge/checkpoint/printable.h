// How names that come from a checkpoint's bytes appear in messages.
#pragma once

#include <string>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

namespace pewter {

// `name`, which is UTF-8, in quotes, with control characters escaped, and cut when long: a hostile
// name neither writes to the terminal nor fills the log.
inline std::string Printable(absl::string_view name) {
  constexpr size_t kLimit = 200;
  if (name.size() <= kLimit) return absl::StrCat("\"", absl::Utf8SafeCHexEscape(name), "\"");
  size_t end = kLimit;
  while (end > 0 && (name[end] & 0xc0) == 0x80) --end;  // not within a character
  return absl::StrCat("\"", absl::Utf8SafeCHexEscape(name.substr(0, end)), "...\"");
}

}  // namespace pewter
