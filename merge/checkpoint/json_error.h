// What the JSON library says about malformed text, as it appears in our messages.
#pragma once

#include <cstddef>
#include <string>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

namespace pewter {

// `what` is like "[json.exception.parse_error.101] parse error at line 1, column 2: syntax error
// ...": what comes before the colon is said already, the rest may quote any bytes of the text.
inline std::string JsonErrorText(size_t position, absl::string_view what) {
  if (const size_t colon = what.find(": "); colon != absl::string_view::npos) {
    what.remove_prefix(colon + 2);
  }
  return absl::StrCat("bad JSON at byte ", position, ": ", absl::CHexEscape(what.substr(0, 200)));
}

}  // namespace pewter
