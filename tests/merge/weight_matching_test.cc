#include "merge/align/weight_matching.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "kernels/backends.h"
#include "alignment_goldens.h"
#include "tests/support/matchers.h"

namespace pewter {
namespace {

using testing::AlignmentGolden;
using testing::AlignmentGoldens;
using ::testing::HasSubstr;
using testing::IsOk;
using testing::StatusIs;

const std::vector<GroupKind> kAll = {
    GroupKind::kResidual, GroupKind::kFfn,    GroupKind::kQueryKey, GroupKind::kValueOutput,
    GroupKind::kQuery,    GroupKind::kKey,    GroupKind::kValue,    GroupKind::kOutput,
    GroupKind::kHeads,    GroupKind::kPooler, GroupKind::kHead};

std::unique_ptr<kernels::Backend> Cpu() { return *kernels::OpenBackend({}, 1); }

absl::StatusOr<WeightMatch> Match(const AlignmentGolden& golden, WeightMatchingOptions options,
                                  const Alignment& start = {}) {
  const auto backend = Cpu();
  return MatchWeights(golden.symmetry, *golden.a, *golden.b, start, options, *backend);
}

TEST(WeightMatchingTest, FindsThePlantedOrders) {
  const std::vector<AlignmentGolden> goldens = AlignmentGoldens();
  if (goldens.empty()) GTEST_SKIP() << "no goldens";
  for (const AlignmentGolden& golden : goldens) {
    SCOPED_TRACE(golden.name);
    for (const int threads : {1, 3}) {
      const auto match = Match(golden, {.kinds = kAll, .threads = threads});
      ASSERT_THAT(match, IsOk());
      EXPECT_EQ(match->alignment.groups.size(), golden.planted.groups.size());
      for (const auto& [name, group] : golden.planted.groups) {
        EXPECT_EQ(match->alignment.groups.at(name).permutation, group.permutation) << name;
      }
      EXPECT_THAT(CheckAlignment(golden.symmetry, match->alignment), IsOk());
      EXPECT_GT(match->objective.back(), match->objective.front());
      // The objective is the distance that is left: noise of 1 % in each tensor.
      const double left =
          match->reference_square + match->model_square - 2 * match->objective.back();
      EXPECT_LT(left, 3e-4 * match->reference_square);
      EXPECT_GT(left, 0);
      EXPECT_THAT(match->skipped, ::testing::IsEmpty());
    }
  }
}

TEST(WeightMatchingTest, OtherWaysThroughTheGroupsFindThemToo) {
  const std::vector<AlignmentGolden> goldens = AlignmentGoldens();
  if (goldens.empty()) GTEST_SKIP() << "no goldens";
  for (const AlignmentGolden& golden : goldens) {
    SCOPED_TRACE(golden.name);
    const auto match = Match(golden, {.kinds = kAll, .restarts = 4, .seed = 7});
    ASSERT_THAT(match, IsOk());
    for (const auto& [name, group] : golden.planted.groups) {
      EXPECT_EQ(match->alignment.groups.at(name).permutation, group.permutation) << name;
    }
  }
}

// The objective as the definition has it, and never less than before.
TEST(WeightMatchingTest, ObjectiveIsTheSumOfProducts) {
  const std::vector<AlignmentGolden> goldens = AlignmentGoldens();
  if (goldens.empty()) GTEST_SKIP() << "no goldens";
  for (const AlignmentGolden& golden : goldens) {
    SCOPED_TRACE(golden.name);
    const auto match = Match(golden, {.kinds = kAll});
    ASSERT_THAT(match, IsOk());
    for (size_t i = 1; i < match->objective.size(); ++i) {
      EXPECT_GE(match->objective[i], match->objective[i - 1]);
    }
    const auto again = Match(golden, {.kinds = kAll}, match->alignment);
    ASSERT_THAT(again, IsOk());
    EXPECT_NEAR(again->objective.front(), match->objective.back(), 1e-9 * match->objective.back());
    EXPECT_NEAR(again->objective.back(), match->objective.back(), 1e-9 * match->objective.back());
    EXPECT_EQ(again->alignment.groups.at("res").permutation,
              match->alignment.groups.at("res").permutation);
  }
}

TEST(WeightMatchingTest, GroupsThatAreNotAskedForStay) {
  const std::vector<AlignmentGolden> goldens = AlignmentGoldens();
  if (goldens.empty()) GTEST_SKIP() << "no goldens";
  for (const AlignmentGolden& golden : goldens) {
    SCOPED_TRACE(golden.name);
    // With the residual stream in its place the rest is found in one sweep.
    Alignment start;
    start.groups["res"] = golden.planted.groups.at("res");
    const auto match = Match(golden, {.kinds = {GroupKind::kFfn}}, start);
    ASSERT_THAT(match, IsOk());
    for (const auto& [name, group] : match->alignment.groups) {
      EXPECT_EQ(group.permutation, golden.planted.groups.at(name).permutation) << name;
      EXPECT_TRUE(name == "res" || name.rfind("ff.", 0) == 0) << name;
    }
    EXPECT_LE(match->objective.size(), 3u);
  }
}

TEST(WeightMatchingTest, StopsWhenAsked) {
  const std::vector<AlignmentGolden> goldens = AlignmentGoldens();
  if (goldens.empty()) GTEST_SKIP() << "no goldens";
  int asked = 0;
  const auto match =
      Match(goldens[0], {.kinds = kAll, .check = [&]() -> absl::Status {
                           return ++asked == 3 ? absl::CancelledError("stop") : absl::OkStatus();
                         }});
  EXPECT_THAT(match, StatusIs(absl::StatusCode::kCancelled, HasSubstr("stop")));
}

}  // namespace
}  // namespace pewter
