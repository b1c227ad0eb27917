#include "merge/engine/existing_output.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "merge/engine/manifest.h"
#include "merge/pewter.h"
#include "tests/support/matchers.h"
#include "tests/support/tiny_model.h"

namespace pewter {
namespace {

using ::testing::HasSubstr;
using testing::IsOk;
using testing::RandomTensor;
using testing::ReadFile;
using testing::StatusIs;
using testing::TempFolder;
using testing::WriteSafetensors;

class ExistingOutputTest : public ::testing::Test {
 protected:
  void SetUp() override {
    WriteSafetensors(folder_ / "m.safetensors", {RandomTensor("a", DType::kF32, {100}, 1),
                                                 RandomTensor("b", DType::kF32, {100}, 2)});
  }
  absl::StatusOr<PlacedManifest> Run(const ExistingOutput& existing, const std::string& scale = "1",
                                     RunOptions options = {}) {
    const auto recipe =
        ParseRecipe(absl::StrCat("merge_method: passthrough\nmodels:\n  - model: ", folder_.path(),
                                 "/m.safetensors\n    parameters: {scale: ", scale, "}\n"));
    if (!recipe.ok()) return recipe.status();
    const auto plan = MakePlan(*recipe, {.threads = 1, .device = "cpu", .shard_bytes = 400});
    if (!plan.ok()) return plan.status();
    options.output = folder_ / "out";
    return RunPlanInto(*plan, options, existing);
  }
  bool Exists(const std::string& file) { return std::filesystem::exists(folder_ / file); }

  TempFolder folder_;
};

constexpr ExistingOutput kReuse{.on_existing = OnExisting::kReuseIfIdentical};
constexpr ExistingOutput kVersion{.on_existing = OnExisting::kNewVersion};

TEST_F(ExistingOutputTest, FailIsTheDefault) {
  ASSERT_THAT(Run({}), IsOk());
  EXPECT_THAT(Run({}), StatusIs(absl::StatusCode::kAlreadyExists, HasSubstr("finished model")));
}

TEST_F(ExistingOutputTest, AnIdenticalModelIsUsedAgain) {
  const auto first = Run(kReuse);
  ASSERT_THAT(first, IsOk());
  EXPECT_FALSE(first->reused);
  EXPECT_EQ(first->output, folder_ / "out");
  const auto second = Run(kReuse);
  ASSERT_THAT(second, IsOk());
  EXPECT_TRUE(second->reused);
  EXPECT_EQ(second->output, folder_ / "out");
  EXPECT_EQ(second->manifest.json, ReadFile(folder_ / "out/pewter_manifest.json"));
  EXPECT_EQ(second->manifest.fingerprint, first->manifest.fingerprint);
  EXPECT_EQ(second->manifest.bytes_written, 0);
  // Another plan's is not.
  EXPECT_EQ(Run(kReuse, "2").status().code(), absl::StatusCode::kAlreadyExists);
  // Nor is one that has lost a file.
  std::filesystem::remove(folder_ / "out/model-00001-of-00002.safetensors");
  EXPECT_THAT(Run(kReuse), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("model-00001")));
}

TEST_F(ExistingOutputTest, VersionsAreCounted) {
  for (int i = 1; i <= 3; ++i) {
    const auto run = Run(kVersion);
    ASSERT_THAT(run, IsOk());
    EXPECT_EQ(run->output, absl::StrCat(folder_ / "out", "/v", i));
    EXPECT_FALSE(run->reused);
    EXPECT_TRUE(Exists(absl::StrCat("out/v", i, "/pewter_manifest.json")));
  }
  // Whatever is in the way counts, and what has no such name does not.
  folder_.Write("out/v7/mine.txt", "x");
  folder_.Write("out/v99.txt", "x");
  folder_.Write("out/v-8/x", "x");
  folder_.Write("out/version9/x", "x");
  const auto next = Run(kVersion);
  ASSERT_THAT(next, IsOk());
  EXPECT_EQ(next->output, folder_ / "out/v8");
}

TEST_F(ExistingOutputTest, RunsThatBeginTogetherGetVersionsOfTheirOwn) {
  constexpr int kRuns = 6;
  absl::Mutex mutex;
  std::set<std::string> outputs;
  std::vector<std::thread> threads;
  for (int i = 0; i < kRuns; ++i) {
    threads.emplace_back([&] {
      const auto run = Run(kVersion);
      ASSERT_THAT(run, IsOk());
      absl::MutexLock lock(&mutex);
      outputs.insert(run->output);
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(outputs.size(), static_cast<size_t>(kRuns));
  for (const std::string& output : outputs) {
    EXPECT_TRUE(std::filesystem::exists(output + "/pewter_manifest.json")) << output;
  }
}

TEST_F(ExistingOutputTest, AnAttemptGoesOnWithItsVersion) {
  ExistingOutput own = kVersion;
  own.own_unfinished = true;
  // The first attempt ends before its last file.
  int files = 0;
  const RunOptions dies{.may_write = [&files](WriteKind) {
    return ++files > 3 ? absl::AbortedError("killed") : absl::OkStatus();
  }};
  EXPECT_EQ(Run(own, "1", dies).status().code(), absl::StatusCode::kAborted);
  EXPECT_TRUE(Exists("out/v1/.pewter-state.json"));
  const auto resumed = Run(own);
  ASSERT_THAT(resumed, IsOk());
  EXPECT_EQ(resumed->output, folder_ / "out/v1");
  EXPECT_GT(resumed->manifest.shards_reused, 0);
  // One that was lost after it had published has done the job; without that it is a model like any.
  own.own_finished = true;
  const auto found = Run(own);
  ASSERT_THAT(found, IsOk());
  EXPECT_TRUE(found->reused);
  EXPECT_EQ(found->output, folder_ / "out/v1");
  own.own_finished = false;
  const auto next = Run(own);
  ASSERT_THAT(next, IsOk());
  EXPECT_EQ(next->output, folder_ / "out/v2");
  // Of another plan.
  own.own_finished = true;
  const auto other = Run(own, "2");
  ASSERT_THAT(other, IsOk());
  EXPECT_EQ(other->output, folder_ / "out/v3");
}

TEST_F(ExistingOutputTest, AModelIsRemovedWithItsFilesAndNoOthers) {
  const auto run = Run({});
  ASSERT_THAT(run, IsOk());
  folder_.Write("out/mine.txt", "x");
  const auto store = OpenStore(folder_ / "out");
  ASSERT_THAT(store, IsOk());
  ASSERT_THAT(RemoveModel(**store, run->manifest.json), IsOk());
  const auto left = (*store)->List("");
  ASSERT_THAT(left, IsOk());
  ASSERT_EQ(left->size(), 1u);
  EXPECT_EQ((*left)[0].key, "mine.txt");
  EXPECT_THAT(RemoveModel(**store, run->manifest.json), IsOk());
  EXPECT_EQ(RemoveModel(**store, "nonsense").code(), absl::StatusCode::kDataLoss);
}

}  // namespace
}  // namespace pewter
