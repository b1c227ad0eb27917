// ProjectPolicy: what each project may have of a service that projects share, and which project
// starts the next job.
//
// A rule is written "NAME:running=N,queued=N,weight=N", every part optional; NAME is a project, or
// "*" for each that has no rule of its own. Plain data; servers that share a database should have
// the same one.
#pragma once

#include <cstdint>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace pewter::server {

inline constexpr char kDefaultProject[] = "default";

// 1 to 63 of a-z, 0-9 and '-', beginning with a letter and not ending with '-'.
bool IsProjectId(absl::string_view text);

struct ProjectLimits {
  int64_t running = std::numeric_limits<int64_t>::max();  // jobs at the same time
  int64_t queued = std::numeric_limits<int64_t>::max();
  int64_t weight = 1;  // of its share
};

// A project that has jobs to start.
struct ProjectQueue {
  std::string project;
  int64_t priority = 0;  // the highest of these jobs
  absl::Time created;    // the oldest of that priority
  int64_t running = 0;
  absl::Time last_claim = absl::InfinitePast();  // of any of its jobs that the store still knows
};

class ProjectPolicy {
 public:
  // No limits, and equal weights.
  ProjectPolicy() = default;
  // InvalidArgument names the rule.
  static absl::StatusOr<ProjectPolicy> Make(const std::vector<std::string>& rules);

  const ProjectLimits& LimitsOf(absl::string_view project) const;
  // Whether any project may run only so many jobs.
  bool LimitsRunning() const;

  // The projects that may start a job, in the order in which they should: by priority, then the one
  // that runs the fewest jobs for its weight, then the one that has waited longest since it started
  // one, then the older job. A project that runs nothing gains one priority with each minute of
  // waiting, so that none is starved by others of higher priority. See docs/adr/0011.
  std::vector<std::string> InOrder(std::vector<ProjectQueue> queues, absl::Time now) const;

 private:
  std::map<std::string, ProjectLimits, std::less<>> rules_;
  ProjectLimits others_;
};

}  // namespace pewter::server
