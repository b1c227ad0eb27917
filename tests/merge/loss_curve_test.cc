#include "merge/evaluate/loss_curve.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>

namespace pewter {
namespace {

using json = nlohmann::ordered_json;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

LossCurve Curve(std::vector<double> losses) {
  LossCurve curve{.label = "plain"};
  const std::vector<double> lambdas = EvenLambdas(static_cast<int>(losses.size()));
  for (size_t i = 0; i < losses.size(); ++i) curve.points.push_back({lambdas[i], losses[i], 0.5});
  return curve;
}

TEST(LossCurveTest, EvenLambdas) {
  EXPECT_THAT(EvenLambdas(2), ElementsAre(0, 1));
  EXPECT_THAT(EvenLambdas(5), ElementsAre(0, 0.25, 0.5, 0.75, 1));
}

TEST(LossCurveTest, Barriers) {
  const Barrier barrier = BarrierOf(Curve({3, 5, 6, 9, 4}));
  EXPECT_DOUBLE_EQ(barrier.above_mean, 9 - 3.5);
  EXPECT_DOUBLE_EQ(barrier.at, 0.75);
  EXPECT_DOUBLE_EQ(barrier.above_line, 9 - 3.75);
  EXPECT_DOUBLE_EQ(barrier.middle, 6);
}

// A curve that hangs below its ends has no barrier, and is below the mean of uneven ends nowhere.
TEST(LossCurveTest, NoBarrier) {
  const Barrier sagging = BarrierOf(Curve({3, 1, 3}));
  EXPECT_DOUBLE_EQ(sagging.above_mean, 0);
  EXPECT_DOUBLE_EQ(sagging.above_line, 0);
  const Barrier uneven = BarrierOf(Curve({5, 3}));
  EXPECT_DOUBLE_EQ(uneven.above_mean, 1);
  EXPECT_DOUBLE_EQ(uneven.above_line, 0);
  EXPECT_DOUBLE_EQ(uneven.middle, 4);
}

TEST(LossCurveTest, MiddleBetweenPoints) {
  EXPECT_DOUBLE_EQ(BarrierOf(Curve({1, 2, 4, 1})).middle, 3);
}

TEST(LossCurveTest, Json) {
  const json report = CurveJson({.a = "m/a", .b = "m/b", .curves = {Curve({1, 3, 2})}});
  EXPECT_EQ(report["a"], "m/a");
  EXPECT_EQ(report["curves"][0]["barrier"], 1.5);
  EXPECT_EQ(report["curves"][0]["barrier_at"], 0.5);
  EXPECT_EQ(report["curves"][0]["loss_at_half"], 3);
  EXPECT_EQ(report["curves"][0]["points"][2],
            json({{"lambda", 1.0}, {"loss", 2.0}, {"accuracy", 0.5}}));
}

// Names are a stranger's; what the picture says stays text.
TEST(LossCurveTest, PictureAndPage) {
  CurveReport report = {.a = "<a>", .b = "b&b"};
  report.curves = {Curve({1, 3, 2}), Curve({1, NAN, 2}), Curve({2, 2, 2})};
  report.curves[1].label = "\"><script>";
  const std::string svg = CurveSvg(report), html = CurveHtml("d", {report});
  for (const std::string& text : {svg, html}) {
    EXPECT_THAT(text, HasSubstr("<svg"));
    EXPECT_THAT(text, HasSubstr("&lt;a&gt;"));
    EXPECT_THAT(text, HasSubstr("b&amp;b"));
    EXPECT_THAT(text, HasSubstr("plain: barrier 1.500"));
    EXPECT_THAT(text, Not(HasSubstr("<script")));
    EXPECT_THAT(text, Not(HasSubstr("src=")));
  }
  // A frame of the losses 1 to 3: the highest point is at its top, in the middle.
  EXPECT_THAT(svg, HasSubstr("cx=\"402.0\" cy=\"28.0\""));
}

}  // namespace
}  // namespace pewter
