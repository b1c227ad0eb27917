#include "merge/plan/utf8.h"

#include <array>
#include <cstdint>

namespace pewter {
namespace {

// Bytes that are not printable in Latin-1 get the characters from U+0100 on, in their order.
const std::array<char32_t, 256>& ByteAlphabet() {
  static const std::array<char32_t, 256> alphabet = [] {
    std::array<char32_t, 256> characters{};
    char32_t next = 256;
    for (char32_t byte = 0; byte < 256; ++byte) {
      const bool printable = (byte >= '!' && byte <= '~') || (byte >= 0xa1 && byte != 0xad);
      characters[byte] = printable ? byte : next++;
    }
    return characters;
  }();
  return alphabet;
}

}  // namespace

std::optional<std::u32string> DecodeUtf8(absl::string_view text) {
  std::u32string characters;
  for (size_t i = 0; i < text.size();) {
    const auto first = static_cast<unsigned char>(text[i]);
    const int more = first < 0x80             ? 0
                     : (first & 0xe0) == 0xc0 ? 1
                     : (first & 0xf0) == 0xe0 ? 2
                     : (first & 0xf8) == 0xf0 ? 3
                                              : -1;
    if (more < 0 || i + more >= text.size()) return std::nullopt;
    char32_t character = more == 0 ? first : first & (0x3fu >> more);
    for (int j = 1; j <= more; ++j) {
      const auto next = static_cast<unsigned char>(text[i + j]);
      if ((next & 0xc0) != 0x80) return std::nullopt;
      character = character << 6 | (next & 0x3fu);
    }
    constexpr char32_t kLeast[] = {0, 0x80, 0x800, 0x10000};
    if (character < kLeast[more] || character > 0x10ffff ||
        (character >= 0xd800 && character < 0xe000)) {
      return std::nullopt;
    }
    characters += character;
    i += more + 1;
  }
  return characters;
}

std::string EncodeUtf8(char32_t character) {
  const auto tail = [&](int shift) {
    return static_cast<char>(0x80 | (character >> shift & 0x3f));
  };
  if (character < 0x80) return {static_cast<char>(character)};
  if (character < 0x800) return {static_cast<char>(0xc0 | character >> 6), tail(0)};
  if (character < 0x10000) return {static_cast<char>(0xe0 | character >> 12), tail(6), tail(0)};
  return {static_cast<char>(0xf0 | character >> 18), tail(12), tail(6), tail(0)};
}

std::string EncodeByteLevel(absl::string_view bytes) {
  std::string text;
  for (char byte : bytes) text += EncodeUtf8(ByteAlphabet()[static_cast<unsigned char>(byte)]);
  return text;
}

std::optional<std::string> DecodeByteLevel(absl::string_view text) {
  static const std::array<int16_t, 512> bytes = [] {
    std::array<int16_t, 512> table{};
    table.fill(-1);
    for (int byte = 0; byte < 256; ++byte) table[ByteAlphabet()[byte]] = static_cast<int16_t>(byte);
    return table;
  }();
  const std::optional<std::u32string> characters = DecodeUtf8(text);
  if (!characters) return std::nullopt;
  std::string decoded;
  for (char32_t character : *characters) {
    if (character >= bytes.size() || bytes[character] < 0) return std::nullopt;
    decoded += static_cast<char>(bytes[character]);
  }
  return decoded;
}

}  // namespace pewter
