#include "merge/forward/interpolation.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <vector>

#include "tests/support/matchers.h"
#include "tests/support/temp_folder.h"
#include "tests/support/tiny_model.h"

namespace pewter {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::IsOk;
using testing::StatusIs;

class InterpolationTest : public ::testing::Test {
 protected:
  ForwardModel Model(const std::string& name, const std::vector<testing::TinyTensor>& tensors) {
    folder_.Write(name + "/config.json", R"({"architectures": ["X"], "model_type": "x"})");
    testing::WriteSafetensors(folder_ / (name + "/model.safetensors"), tensors);
    auto checkpoint = Checkpoint::Open({.path = folder_ / name});
    return *MakeForwardModel(*std::move(checkpoint));
  }

  static std::vector<float> Read(const ForwardModel& model, const char* tensor) {
    const auto source = model.tensors(tensor);
    EXPECT_THAT(source, IsOk());
    std::vector<float> values((*source)->shape().elements());
    EXPECT_THAT(CastSource(*source, DType::kF32)
                    ->Read(0, values.size(),
                           absl::MakeSpan(reinterpret_cast<std::byte*>(values.data()),
                                          values.size() * sizeof(float)),
                           nullptr),
                IsOk());
    return values;
  }

  testing::TempFolder folder_;
};

TEST_F(InterpolationTest, IsTheLineBetween) {
  const ForwardModel a = Model("a", {{"x", DType::kF32, {2, 2}, {1, 2, 3, 4}}});
  const ForwardModel b = Model("b", {{"x", DType::kBF16, {2, 2}, {5, 2, -1, 0}}});
  EXPECT_THAT(Read(Interpolate(a, b, 0.25), "x"), ElementsAre(4, 2, 0, 1));
  EXPECT_THAT(Read(Interpolate(a, b, 1), "x"), ElementsAre(1, 2, 3, 4));
  EXPECT_THAT(Read(Interpolate(a, b, 0), "x"), ElementsAre(5, 2, -1, 0));
}

// Longer than the runs in which B is read, and read in pieces.
TEST_F(InterpolationTest, OfLongTensors) {
  constexpr int64_t kSize = 200'000;
  const auto x = testing::RandomTensor("x", DType::kF32, {kSize}, 1);
  const auto y = testing::RandomTensor("x", DType::kF32, {kSize}, 2);
  const ForwardModel middle = Interpolate(Model("a", {x}), Model("b", {y}), 0.5);
  const std::vector<float> whole = Read(middle, "x");
  for (const int64_t i : {int64_t{0}, int64_t{65'535}, int64_t{65'536}, kSize - 1}) {
    EXPECT_FLOAT_EQ(whole[i],
                    (static_cast<float>(x.values[i]) + static_cast<float>(y.values[i])) / 2);
    float one = 0;
    const auto source = middle.tensors("x");
    ASSERT_THAT(source, IsOk());
    EXPECT_THAT((*source)->Read(i, 1, {reinterpret_cast<std::byte*>(&one), sizeof(one)}, nullptr),
                IsOk());
    EXPECT_EQ(one, whole[i]);
  }
}

TEST_F(InterpolationTest, NeedsTheSameTensors) {
  const ForwardModel a =
      Model("a", {{"x", DType::kF32, {2}, {1, 2}}, {"y", DType::kF32, {1}, {1}}});
  const ForwardModel b = Model("b", {{"x", DType::kF32, {1, 2}, {1, 2}}});
  const ForwardModel middle = Interpolate(a, b, 0.5);
  for (const char* tensor : {"x", "y"}) {
    EXPECT_THAT(middle.tensors(tensor).status(),
                StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr(tensor)));
  }
  const auto none = middle.tensors("z");
  ASSERT_THAT(none, IsOk());
  EXPECT_EQ(*none, nullptr);
}

}  // namespace
}  // namespace pewter
