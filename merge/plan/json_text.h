// JSON that a model's author wrote: parsed within limits, and edited as text, so that an edit
// leaves every other byte as it is (order of keys, numbers as written, indentation).
#pragma once

#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "nlohmann/json.hpp"

namespace pewter {

// Depth and number of values of the largest tokenizers, with room: what a hostile text can make the
// parser allocate is bounded by them.
inline constexpr int kMaxJsonDepth = 64;
inline constexpr int64_t kMaxJsonValues = int64_t{1} << 23;

// DataLoss when `text` is not JSON or exceeds the limits.
absl::StatusOr<nlohmann::json> ParseBoundedJson(absl::string_view text);

// The functions below want the text of a JSON object that ParseBoundedJson takes. Of equal keys the
// last counts, as in the parser.

// The text of a member's value.
std::optional<absl::string_view> JsonMember(absl::string_view object, absl::string_view key);
// The object with the member's value replaced, or the member appended.
std::string SetJsonMember(absl::string_view object, absl::string_view key, absl::string_view value);
// The object without the member.
std::string RemoveJsonMember(absl::string_view object, absl::string_view key);
// A string literal; bytes that are not UTF-8 are replaced.
std::string JsonString(absl::string_view text);

}  // namespace pewter
