#include "base/units.h"

#include <array>
#include <cmath>
#include <limits>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace pewter {

absl::StatusOr<int64_t> CheckedMul(int64_t a, int64_t b) {
  int64_t product;
  if (__builtin_mul_overflow(a, b, &product))
    return absl::InvalidArgumentError("size overflows 64 bits");
  return product;
}

absl::StatusOr<int64_t> CheckedAdd(int64_t a, int64_t b) {
  int64_t sum;
  if (__builtin_add_overflow(a, b, &sum))
    return absl::InvalidArgumentError("size overflows 64 bits");
  return sum;
}

absl::StatusOr<int64_t> ParseBytes(absl::string_view text) {
  const absl::Status bad = absl::InvalidArgumentError(
      absl::StrCat("\"", text, "\" is not a size; write for example 4GiB, 512MiB or 5GB"));
  absl::string_view trimmed = absl::StripAsciiWhitespace(text);
  const size_t unit_at = trimmed.find_first_not_of("0123456789.");
  double number;
  if (!absl::SimpleAtod(trimmed.substr(0, unit_at), &number)) return bad;
  std::string unit;
  if (unit_at != absl::string_view::npos) {
    unit = absl::AsciiStrToLower(absl::StripAsciiWhitespace(trimmed.substr(unit_at)));
  }
  if (absl::EndsWith(unit, "b")) unit.pop_back();
  const double base = absl::EndsWith(unit, "i") ? 1024 : 1000;
  if (absl::EndsWith(unit, "i")) unit.pop_back();
  constexpr absl::string_view kPowers = "kmgt";
  double bytes = number;
  if (!unit.empty()) {
    const size_t power = unit.size() == 1 ? kPowers.find(unit[0]) : absl::string_view::npos;
    if (power == absl::string_view::npos) return bad;
    bytes *= std::pow(base, static_cast<double>(power + 1));
  } else if (base == 1024) {
    return bad;
  }
  if (!(bytes < static_cast<double>(std::numeric_limits<int64_t>::max()))) return bad;
  return static_cast<int64_t>(bytes);
}

std::string FormatBytes(int64_t bytes) {
  constexpr std::array<absl::string_view, 5> kUnits = {"B", "KiB", "MiB", "GiB", "TiB"};
  double value = static_cast<double>(bytes);
  size_t unit = 0;
  while (value >= 1024 && unit + 1 < kUnits.size()) {
    value /= 1024;
    ++unit;
  }
  const int decimals = unit == 0 || value >= 100 ? 0 : 1;
  return absl::StrFormat("%.*f %s", decimals, value, kUnits[unit]);
}

}  // namespace pewter
