// Characters of UTF-8 text, and the alphabet in which byte-level tokenizers write bytes.
#pragma once

#include <optional>
#include <string>

#include "absl/strings/string_view.h"

namespace pewter {

// Nullopt for what is not UTF-8.
std::optional<std::u32string> DecodeUtf8(absl::string_view text);
std::string EncodeUtf8(char32_t character);

// GPT-2's alphabet: a printable character for each byte, "Ġ" for the space.
std::string EncodeByteLevel(absl::string_view bytes);
// Nullopt when a character is not of the alphabet.
std::optional<std::string> DecodeByteLevel(absl::string_view text);

}  // namespace pewter
