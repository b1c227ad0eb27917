#include "server/jobs/project_policy.h"

#include <algorithm>
#include <tuple>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace pewter::server {
namespace {

constexpr size_t kMaxProjectId = 63;
constexpr int64_t kMaxWeight = 1'000'000;

}  // namespace

bool IsProjectId(absl::string_view text) {
  return !text.empty() && text.size() <= kMaxProjectId && absl::ascii_islower(text.front()) &&
         text.back() != '-' && std::all_of(text.begin(), text.end(), [](char c) {
           return absl::ascii_islower(c) || absl::ascii_isdigit(c) || c == '-';
         });
}

absl::StatusOr<ProjectPolicy> ProjectPolicy::Make(const std::vector<std::string>& rules) {
  ProjectPolicy policy;
  for (const std::string& rule : rules) {
    const auto fail = [&](absl::string_view why) {
      return absl::InvalidArgumentError(absl::StrCat(
          "project \"", rule, "\": ", why,
          "; write NAME:running=N,queued=N,weight=N, or *:... for projects without a rule"));
    };
    const std::pair<std::string, std::string> parts = absl::StrSplit(rule, absl::MaxSplits(':', 1));
    const auto& [name, settings] = parts;
    if (name != "*" && !IsProjectId(name)) {
      return fail("a project has 1 to 63 of a-z, 0-9 and '-', and begins with a letter");
    }
    if (policy.rules_.count(name) != 0) return fail("has a rule already");
    ProjectLimits limits;
    for (const absl::string_view setting : absl::StrSplit(settings, ',')) {
      const std::pair<absl::string_view, absl::string_view> pair =
          absl::StrSplit(setting, absl::MaxSplits('=', 1));
      int64_t value = 0;
      if (!absl::SimpleAtoi(pair.second, &value)) return fail("a setting is no number");
      if (pair.first == "running" && value >= 0) {
        limits.running = value;
      } else if (pair.first == "queued" && value >= 0) {
        limits.queued = value;
      } else if (pair.first == "weight" && value > 0 && value <= kMaxWeight) {
        limits.weight = value;
      } else {
        return fail(absl::StrCat("\"", setting, "\" is no setting"));
      }
    }
    policy.rules_[name] = limits;
  }
  if (const auto others = policy.rules_.extract("*"); !others.empty()) {
    policy.others_ = others.mapped();
  }
  return policy;
}

const ProjectLimits& ProjectPolicy::LimitsOf(absl::string_view project) const {
  const auto rule = rules_.find(project);
  return rule == rules_.end() ? others_ : rule->second;
}

bool ProjectPolicy::LimitsRunning() const {
  const int64_t none = ProjectLimits().running;
  return others_.running != none ||
         std::any_of(rules_.begin(), rules_.end(),
                     [&](const auto& rule) { return rule.second.running != none; });
}

std::vector<std::string> ProjectPolicy::InOrder(std::vector<ProjectQueue> queues,
                                                absl::Time now) const {
  std::erase_if(queues, [&](const ProjectQueue& queue) {
    return queue.running >= LimitsOf(queue.project).running;
  });
  for (ProjectQueue& queue : queues) {
    if (queue.running > 0) continue;
    const absl::Duration waited = now - std::max(queue.created, queue.last_claim);
    queue.priority += std::max<int64_t>(absl::ToInt64Minutes(waited), 0);
  }
  std::sort(queues.begin(), queues.end(), [&](const ProjectQueue& a, const ProjectQueue& b) {
    // Shares are compared as a.running / a.weight, without rounding.
    const int64_t share_a = a.running * LimitsOf(b.project).weight;
    const int64_t share_b = b.running * LimitsOf(a.project).weight;
    return std::tie(b.priority, share_a, a.last_claim, a.created, a.project) <
           std::tie(a.priority, share_b, b.last_claim, b.created, b.project);
  });
  std::vector<std::string> order;
  for (ProjectQueue& queue : queues) order.push_back(std::move(queue.project));
  return order;
}

}  // namespace pewter::server
