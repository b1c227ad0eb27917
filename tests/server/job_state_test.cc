#include "server/jobs/job_state.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>
#include <utility>

namespace pewter::server {
namespace {

// All pairs, written out once more by hand: a row is `from`, an x is allowed.
//                           U  Q  P  R  B  S  F  C
constexpr const char* kExpected[8] = {
    /* UNSPECIFIED */ "........",
    /* QUEUED      */ "..x...xx",
    /* PLANNING    */ ".x.x..xx",
    /* RUNNING     */ ".x..x.xx",
    /* PUBLISHING  */ ".x...xxx",
    /* SUCCEEDED   */ "........",
    /* FAILED      */ "........",
    /* CANCELLED   */ "........",
};

v1::JobState State(int number) { return static_cast<v1::JobState>(number); }

TEST(JobState, TableIsExactlyThis) {
  ASSERT_EQ(v1::JobState_MAX, 7);
  for (int from = 0; from <= v1::JobState_MAX; ++from) {
    for (int to = 0; to <= v1::JobState_MAX; ++to) {
      EXPECT_EQ(IsAllowed(State(from), State(to)), kExpected[from][to] == 'x')
          << v1::JobState_Name(State(from)) << " to " << v1::JobState_Name(State(to));
    }
  }
}

TEST(JobState, TableHasNoDoubles) {
  std::set<std::pair<int, int>> seen;
  for (const StateChange& change : kStateChanges) {
    EXPECT_TRUE(seen.emplace(change.from, change.to).second);
  }
}

TEST(JobState, FinalStatesAreThoseWithoutAWayOut) {
  for (int from = v1::JOB_STATE_QUEUED; from <= v1::JobState_MAX; ++from) {
    bool has_way_out = false;
    for (const StateChange& change : kStateChanges) has_way_out |= change.from == from;
    EXPECT_EQ(IsFinal(State(from)), !has_way_out) << v1::JobState_Name(State(from));
  }
}

TEST(JobState, HeldStatesMayGoBackToTheQueue) {
  for (int state = 0; state <= v1::JobState_MAX; ++state) {
    EXPECT_EQ(IsHeld(State(state)), IsAllowed(State(state), v1::JOB_STATE_QUEUED));
  }
}

TEST(JobState, NextStatesAreAllowedAndEndInSuccess) {
  v1::JobState state = v1::JOB_STATE_QUEUED;
  int steps = 0;
  while (!IsFinal(state)) {
    ASSERT_TRUE(IsAllowed(state, NextState(state)));
    state = NextState(state);
    ASSERT_LE(++steps, 4);
  }
  EXPECT_EQ(state, v1::JOB_STATE_SUCCEEDED);
  EXPECT_EQ(NextState(v1::JOB_STATE_SUCCEEDED), v1::JOB_STATE_UNSPECIFIED);
}

}  // namespace
}  // namespace pewter::server
