#include "client/output.h"

#include <cmath>
#include <limits>

#include "absl/status/status.h"
#include "client/exit_code.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace pewter::client {
namespace {

TEST(TableTest, AlignsColumnsAndTrimsLines) {
  Table table({"NAME", "SIZE", "NOTE"});
  table.RightAlign(1);
  table.Add({"a", "1 KiB", ""});
  table.Add({"längeres", "12 B", "x"});
  EXPECT_EQ(table.rows(), 2);
  EXPECT_EQ(table.ToString(),
            "NAME       SIZE  NOTE\n"
            "a         1 KiB\n"
            "längeres   12 B  x\n");
}

TEST(FormatTest, Counts) {
  EXPECT_EQ(FormatCount(0), "0");
  EXPECT_EQ(FormatCount(999), "999");
  EXPECT_EQ(FormatCount(1000), "1,000");
  EXPECT_EQ(FormatCount(1234567), "1,234,567");
  EXPECT_EQ(FormatCount(-1234), "-1,234");
  EXPECT_EQ(FormatCount(-123), "-123");
  EXPECT_EQ(FormatCount(1, "tensor"), "1 tensor");
  EXPECT_EQ(FormatCount(1200, "tensor"), "1,200 tensors");
}

TEST(FormatTest, Seconds) {
  EXPECT_EQ(FormatSeconds(0.04), "0.0 s");
  EXPECT_EQ(FormatSeconds(9.94), "9.9 s");
  EXPECT_EQ(FormatSeconds(9.96), "10 s");
  EXPECT_EQ(FormatSeconds(59.4), "59 s");
  EXPECT_EQ(FormatSeconds(59.6), "1:00");
  EXPECT_EQ(FormatSeconds(187), "3:07");
  EXPECT_EQ(FormatSeconds(3765), "1:02:45");
  EXPECT_EQ(FormatSeconds(-1), "?");
  EXPECT_EQ(FormatSeconds(std::nan("")), "?");
}

TEST(FormatTest, Rates) {
  EXPECT_EQ(FormatRate(0), "0 B/s");
  EXPECT_EQ(FormatRate(999), "999 B/s");
  EXPECT_EQ(FormatRate(1500), "1.5 kB/s");
  EXPECT_EQ(FormatRate(312e6), "312 MB/s");
  EXPECT_EQ(FormatRate(999.6e6), "1.0 GB/s");
  EXPECT_EQ(FormatRate(std::nan("")), "?");
}

TEST(FormatTest, WrapKeepsWordsWhole) {
  EXPECT_EQ(Wrap("one two three", 9, 2), "  one two\n  three\n");
  EXPECT_EQ(Wrap("a-word-longer-than-the-line b", 10, 0), "a-word-longer-than-the-line\nb\n");
  EXPECT_EQ(Wrap("", 10, 2), "\n");
}

TEST(ExitCodeTest, FollowsTheStatus) {
  EXPECT_EQ(ExitCodeOf(absl::OkStatus()), 0);
  EXPECT_EQ(ExitCodeOf(absl::FailedPreconditionError("")), 1);
  EXPECT_EQ(ExitCodeOf(absl::DataLossError("")), 1);
  EXPECT_EQ(ExitCodeOf(absl::AlreadyExistsError("")), 1);
  EXPECT_EQ(ExitCodeOf(absl::InvalidArgumentError("")), 2);
  EXPECT_EQ(ExitCodeOf(absl::NotFoundError("")), 3);
  EXPECT_EQ(ExitCodeOf(absl::PermissionDeniedError("")), 3);
  EXPECT_EQ(ExitCodeOf(absl::CancelledError("")), 130);
}

TEST(OutputTest, TextKeepsTheStreamsApart) {
  Output out({});
  testing::internal::CaptureStdout();
  testing::internal::CaptureStderr();
  out.Text("result\n");
  out.Note("for people");
  out.Warn("careful");
  out.Error(absl::NotFoundError("no model ./a"), 3);
  EXPECT_TRUE(out.Flush());
  EXPECT_EQ(testing::internal::GetCapturedStdout(), "result\n");
  EXPECT_EQ(testing::internal::GetCapturedStderr(),
            "note: for people\nwarning: careful\nerror: no model ./a\n");
}

TEST(OutputTest, JsonErrorsAreOneObject) {
  Output out({.format = "json"});
  testing::internal::CaptureStderr();
  out.Note("not here");
  out.Warn("nor here");
  out.Error(absl::NotFoundError("no model \"\xff\""), 3);
  const Json error = Json::parse(testing::internal::GetCapturedStderr());
  EXPECT_EQ(error["error"]["code"], "NOT_FOUND");
  EXPECT_EQ(error["error"]["message"], "no model \"\xEF\xBF\xBD\"");  // U+FFFD for a bad byte
  EXPECT_EQ(error["error"]["exit_code"], 3);
}

}  // namespace
}  // namespace pewter::client
