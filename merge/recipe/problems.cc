#include "merge/recipe/problems.h"

#include <algorithm>
#include <tuple>
#include <utility>

#include "absl/strings/cord.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"

namespace pewter {
namespace {

// Messages, each ended by NUL, which no message holds.
constexpr char kPayload[] = "pewter.dev/recipe-problems";
constexpr size_t kMaxProblems = 100;

}  // namespace

TextPosition PositionIn(absl::string_view message) {
  TextPosition at;
  if (!absl::ConsumePrefix(&message, "recipe:")) return at;
  const std::vector<absl::string_view> parts = absl::StrSplit(message, absl::MaxSplits(':', 2));
  if (parts.size() < 2 || !absl::SimpleAtoi(parts[0], &at.line)) return {};
  if (!absl::SimpleAtoi(parts[1], &at.column)) at.column = 0;
  return at;
}

absl::Status JoinProblems(const std::vector<absl::Status>& problems) {
  std::vector<std::string> messages;
  const absl::Status* first = nullptr;
  for (const absl::Status& problem : problems) {
    for (RecipeProblem& one : ProblemsOf(problem)) {
      if (first == nullptr) first = &problem;
      if (messages.size() < kMaxProblems &&
          std::find(messages.begin(), messages.end(), one.message) == messages.end()) {
        messages.push_back(std::move(one.message));
      }
    }
  }
  if (messages.size() <= 1) return first == nullptr ? absl::OkStatus() : *first;
  std::stable_sort(messages.begin(), messages.end(),
                   [](const std::string& a, const std::string& b) {
                     const TextPosition at_a = PositionIn(a), at_b = PositionIn(b);
                     return std::tie(at_a.line, at_a.column) < std::tie(at_b.line, at_b.column);
                   });
  absl::Status joined(first->code(), absl::StrJoin(messages, "\n"));
  joined.SetPayload(kPayload, absl::Cord(absl::StrJoin(messages, absl::string_view("\0", 1))));
  return joined;
}

std::vector<RecipeProblem> ProblemsOf(const absl::Status& status) {
  if (status.ok()) return {};
  std::vector<std::string> messages = {std::string(status.message())};
  if (const auto payload = status.GetPayload(kPayload)) {
    messages = absl::StrSplit(std::string(*payload), '\0');
  }
  std::vector<RecipeProblem> problems;
  for (std::string& message : messages) {
    const TextPosition at = PositionIn(message);
    problems.push_back({.message = std::move(message), .at = at});
  }
  return problems;
}

}  // namespace pewter
