#include "client/job_report.h"

#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace pewter::client {
namespace {

using testing::HasSubstr;

v1::Job RunningJob() {
  v1::Job job;
  job.set_id("j-1");
  job.set_state(v1::JOB_STATE_RUNNING);
  job.set_destination_uri("/models/out");
  job.set_recipe("merge_method: linear\n");
  (*job.mutable_labels())["team"] = "nlp";
  (*job.mutable_labels())["run"] = "7";
  job.mutable_progress()->set_written_bytes(250);
  job.mutable_progress()->set_total_bytes(1000);
  job.mutable_create_time()->set_seconds(1'700'000'000);
  job.mutable_start_time()->set_seconds(1'700'000'001);
  return job;
}

TEST(JobReportTest, Ages) {
  EXPECT_EQ(FormatAge(-1), "0s");
  EXPECT_EQ(FormatAge(119), "119s");
  EXPECT_EQ(FormatAge(120), "2m");
  EXPECT_EQ(FormatAge(7200), "2h");
  EXPECT_EQ(FormatAge(3 * 86400), "3d");
}

TEST(JobReportTest, RowOfAJob) {
  const std::string text = JobsToText({RunningJob()});
  EXPECT_THAT(text, testing::StartsWith("ID   STATE    DONE  AGE"));
  EXPECT_THAT(text, HasSubstr("j-1  RUNNING   25%"));
  EXPECT_THAT(text, HasSubstr("/models/out  run=7,team=nlp\n"));
}

TEST(JobReportTest, WholeJob) {
  v1::Job job = RunningJob();
  job.set_state(v1::JOB_STATE_FAILED);
  job.mutable_end_time()->set_seconds(1'700'000'191);
  job.mutable_error()->set_message("model ./a: truncated");
  job.add_warnings("tensor x is not read");
  const std::string text = JobToText(job);
  EXPECT_THAT(text, HasSubstr("FAILED"));
  EXPECT_THAT(text, HasSubstr("3:10"));
  EXPECT_THAT(text, HasSubstr("model ./a: truncated"));
  EXPECT_THAT(text, HasSubstr("tensor x is not read"));
  EXPECT_THAT(text, HasSubstr("merge_method: linear"));
}

TEST(JobReportTest, JsonHasTheNamesOfTheProto) {
  const Json json = ToJson(RunningJob());
  EXPECT_EQ(json["state"], "JOB_STATE_RUNNING");
  EXPECT_EQ(json["destination_uri"], "/models/out");
  EXPECT_EQ(json["progress"]["total_bytes"], "1000");
  EXPECT_EQ(json["cancel_requested"], false);
}

TEST(JobStateTest, Names) {
  EXPECT_EQ(StateName(v1::JOB_STATE_QUEUED), "QUEUED");
  for (const char* text : {"running", "RUNNING", "JOB_STATE_RUNNING"}) {
    const auto state = ParseState(text);
    ASSERT_TRUE(state.ok()) << text;
    EXPECT_EQ(*state, v1::JOB_STATE_RUNNING);
  }
  const auto slip = ParseState("runing");
  EXPECT_TRUE(absl::IsInvalidArgument(slip.status()));
  EXPECT_THAT(std::string(slip.status().message()), HasSubstr("running"));
  EXPECT_FALSE(ParseState("unspecified").ok());
}

TEST(JobStateTest, OutcomesHaveTheCodesOfLocalMerges) {
  v1::JobStateChange change;
  change.set_state(v1::JOB_STATE_SUCCEEDED);
  EXPECT_TRUE(OutcomeOf(change).ok());
  change.set_state(v1::JOB_STATE_FAILED);
  EXPECT_FALSE(OutcomeOf(change).ok());  // whatever the error says
  change.mutable_error()->set_code(3);
  change.mutable_error()->set_message("recipe:1:1: no");
  EXPECT_EQ(OutcomeOf(change), absl::InvalidArgumentError("recipe:1:1: no"));
}

}  // namespace
}  // namespace pewter::client
