#include "server/jobs/project_policy.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "tests/support/matchers.h"

namespace pewter::server {
namespace {

using ::pewter::testing::IsOk;
using ::pewter::testing::StatusIs;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

const absl::Time kNow = absl::FromUnixSeconds(1'000'000'000);

ProjectPolicy Make(const std::vector<std::string>& rules) {
  const auto policy = ProjectPolicy::Make(rules);
  EXPECT_THAT(policy, IsOk());
  return policy.value_or(ProjectPolicy());
}

TEST(ProjectPolicy, IdsAreNarrow) {
  for (const char* id : {"a", "nlp-2", "default"}) EXPECT_TRUE(IsProjectId(id)) << id;
  EXPECT_TRUE(IsProjectId(std::string(63, 'a')));
  for (const char* id : {"", "A", "1a", "-a", "a-", "a_b", "a b", "\xC3\xA4", "a/b", "*"}) {
    EXPECT_FALSE(IsProjectId(id)) << id;
  }
  EXPECT_FALSE(IsProjectId(std::string(64, 'a')));
}

TEST(ProjectPolicy, RulesAreOfOneProjectOrOfTheOthers) {
  const ProjectPolicy policy = Make({"nlp:running=4,queued=100,weight=2", "*:queued=7"});
  EXPECT_EQ(policy.LimitsOf("nlp").running, 4);
  EXPECT_EQ(policy.LimitsOf("nlp").queued, 100);
  EXPECT_EQ(policy.LimitsOf("nlp").weight, 2);
  EXPECT_EQ(policy.LimitsOf("else").queued, 7);
  EXPECT_EQ(policy.LimitsOf("else").weight, 1);
  EXPECT_TRUE(policy.LimitsRunning());
  EXPECT_FALSE(Make({"*:queued=7"}).LimitsRunning());
  EXPECT_FALSE(ProjectPolicy().LimitsRunning());
}

TEST(ProjectPolicy, RefusesRulesThatAreNone) {
  for (const char* rule : {"", "nlp", "nlp:", "nlp:running", "nlp:running=", "nlp:running=-1",
                           "nlp:running=x", "nlp:weight=0", "nlp:weight=1.5", "nlp:size=1",
                           "NLP:running=1", "nlp:running=1,", "nlp:running=99999999999999999999"}) {
    EXPECT_THAT(ProjectPolicy::Make({rule}),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("NAME:running=N")))
        << rule;
  }
  EXPECT_THAT(ProjectPolicy::Make({"a:running=1", "a:queued=1"}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("already")));
}

TEST(ProjectPolicy, AProjectThatRunsNothingGainsOnePriorityAMinute) {
  const ProjectQueue busy = {.project = "busy", .priority = 5, .created = kNow, .running = 3};
  ProjectQueue starved = {.project = "starved", .priority = 0, .created = kNow - absl::Minutes(4)};
  EXPECT_THAT(ProjectPolicy().InOrder({starved, busy}, kNow), ElementsAre("busy", "starved"));
  starved.created -= absl::Minutes(1);  // 5 by now, and the smaller share
  EXPECT_THAT(ProjectPolicy().InOrder({busy, starved}, kNow), ElementsAre("starved", "busy"));
  // It has started a job since, or runs one.
  starved.last_claim = kNow - absl::Minutes(2);
  EXPECT_THAT(ProjectPolicy().InOrder({busy, starved}, kNow), ElementsAre("busy", "starved"));
  starved.last_claim = absl::InfinitePast();
  starved.running = 1;
  EXPECT_THAT(ProjectPolicy().InOrder({busy, starved}, kNow), ElementsAre("busy", "starved"));
}

TEST(ProjectPolicy, SharesAreCompared) {
  const ProjectPolicy policy = Make({"a:weight=3", "b:weight=2", "full:running=2"});
  const auto queue = [](const char* project, int64_t running) {
    return ProjectQueue{.project = project, .created = kNow, .running = running};
  };
  EXPECT_THAT(policy.InOrder({queue("a", 5), queue("b", 3), queue("c", 1)}, kNow),
              ElementsAre("c", "b", "a"));
  EXPECT_THAT(policy.InOrder({queue("full", 2), queue("c", 9)}, kNow), ElementsAre("c"));
}

}  // namespace
}  // namespace pewter::server
