#include "client/progress.h"

#include <cstdio>
#include <memory>
#include <string>
#include <thread>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace pewter::client {
namespace {

using testing::EndsWith;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::Not;
using testing::StartsWith;

Progress HalfWay() {
  return {.phase = Phase::kMerging,
          .tensors_done = 120,
          .tensors_total = 290,
          .bytes_written = 512 << 20,
          .bytes_total = int64_t{1} << 30,
          .bytes_per_second = 310e6,
          .seconds_left = 72,
          .current = "model.layers.3.mlp.up_proj.weight"};
}

TEST(RenderBarTest, ShowsWhatFits) {
  const std::string bar = RenderBar(HalfWay(), 120);
  EXPECT_THAT(bar, StartsWith("merging [============>           ]"));
  EXPECT_THAT(bar, HasSubstr(" 50%"));
  EXPECT_THAT(bar, HasSubstr("310 MB/s"));
  EXPECT_THAT(bar, HasSubstr("1:12 left"));
  EXPECT_THAT(bar, HasSubstr("120/290 tensors"));
  EXPECT_THAT(bar, EndsWith("512 MiB of 1.0 GiB"));
}

TEST(RenderBarTest, NeverFillsTheTerminal) {
  for (int columns = 1; columns < 130; ++columns) {
    EXPECT_LT(DisplayWidth(RenderBar(HalfWay(), columns)), columns) << columns;
  }
}

TEST(RenderBarTest, EndsFull) {
  Progress progress = HalfWay();
  progress.phase = Phase::kDone;
  EXPECT_THAT(RenderBar(progress, 120), HasSubstr("[========================]  100%"));
}

TEST(RenderBarTest, KnowsNothingBeforeThePlan) {
  EXPECT_EQ(RenderBar({}, 80), "planning [>                       ]");
}

TEST(RenderLineTest, IsReadableInALog) {
  EXPECT_EQ(RenderLine(HalfWay()),
            "merging: 50%, 310 MB/s, 1:12 left, 120/290 tensors, 512 MiB of 1.0 GiB");
}

// What a display writes to a file.
class DisplayTest : public testing::Test {
 protected:
  std::string Written() {
    std::fflush(file_.get());
    std::rewind(file_.get());
    std::string text(1 << 16, '\0');
    text.resize(std::fread(text.data(), 1, text.size(), file_.get()));
    return text;
  }
  std::unique_ptr<FILE, int (*)(FILE*)> file_{std::tmpfile(), &std::fclose};
};

TEST_F(DisplayTest, BarIsRedrawnAndTakenAway) {
  ProgressDisplay display(ProgressStyle::kBar, /*print_warnings=*/true, file_.get());
  display.OnProgress(HalfWay());
  std::this_thread::sleep_for(std::chrono::milliseconds(350));
  display.OnWarning("tensor x is not read");
  display.Finish();
  const std::string text = Written();
  EXPECT_THAT(text, StartsWith("\rmerging ["));
  // The warning stands on a line of its own.
  EXPECT_THAT(text, HasSubstr("\r\x1b[Kwarning: tensor x is not read\n"));
  // No bar is left.
  EXPECT_THAT(text.substr(text.rfind("merging")), HasSubstr("\x1b[K\r\x1b[K"));
  display.OnProgress(HalfWay());
  std::this_thread::sleep_for(std::chrono::milliseconds(150));
  EXPECT_EQ(Written(), text);
}

TEST_F(DisplayTest, QuickMergesLeaveNoLines) {
  ProgressDisplay display(ProgressStyle::kLines, /*print_warnings=*/true, file_.get());
  display.OnProgress(HalfWay());
  display.Finish();
  EXPECT_THAT(Written(), IsEmpty());
}

TEST_F(DisplayTest, NoneStillWarns) {
  ProgressDisplay display(ProgressStyle::kNone, /*print_warnings=*/true, file_.get());
  display.OnProgress(HalfWay());
  display.OnWarning("careful");
  display.Finish();
  EXPECT_EQ(Written(), "warning: careful\n");
}

TEST(ProgressStyleTest, IsForTerminals) {
  FILE* file = std::tmpfile();
  EXPECT_EQ(ChooseProgressStyle(Output({}), file), ProgressStyle::kLines);
  EXPECT_EQ(ChooseProgressStyle(Output({.format = "json"}), file), ProgressStyle::kNone);
  EXPECT_EQ(ChooseProgressStyle(Output({.quiet = true}), file), ProgressStyle::kNone);
  std::fclose(file);
}

}  // namespace
}  // namespace pewter::client
