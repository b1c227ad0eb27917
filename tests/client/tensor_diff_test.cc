#include "client/tensor_diff.h"

#include <unistd.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "merge/checkpoint/safetensors.h"

namespace pewter::client {
namespace {

namespace fs = std::filesystem;

struct Tensor {
  std::string name;
  DType dtype = DType::kF32;
  Shape shape;
  std::string data;
};

template <class T>
Tensor Make(const std::string& name, DType dtype, std::initializer_list<int64_t> shape,
            const std::vector<T>& values) {
  return {name, dtype, Shape(shape),
          std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T))};
}

class TensorDiffTest : public testing::Test {
 protected:
  TensorDiffTest() {
    folder_ = fs::temp_directory_path() / ("pewter_tensor_diff_" + std::to_string(getpid()));
    fs::create_directories(folder_);
  }
  ~TensorDiffTest() override { fs::remove_all(folder_); }

  std::shared_ptr<const Checkpoint> Write(const std::string& name,
                                          const std::vector<Tensor>& tensors) {
    std::vector<TensorInfo> infos;
    for (const Tensor& tensor : tensors) {
      infos.push_back({.name = tensor.name, .dtype = tensor.dtype, .shape = tensor.shape});
    }
    const auto header = LayOutSafetensors(infos, {});
    EXPECT_TRUE(header.ok());
    const std::string path = (folder_ / (name + ".safetensors")).string();
    std::ofstream file(path, std::ios::binary);
    file << *header;
    for (const Tensor& tensor : tensors) file << tensor.data;
    file.close();
    ModelRef ref;
    ref.path = path;
    const auto model = Checkpoint::Open(ref);
    EXPECT_TRUE(model.ok()) << model.status();
    return *model;
  }

  static TensorDiff One(const std::vector<TensorDiff>& diffs, const std::string& name) {
    for (const TensorDiff& diff : diffs) {
      if (diff.name == name) return diff;
    }
    ADD_FAILURE() << name;
    return {};
  }

  fs::path folder_;
};

TEST_F(TensorDiffTest, SaysWhatDiffers) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const auto a = Write("a", {
                                Make<float>("same", DType::kF32, {4}, {1, nan, 3, -0.0f}),
                                Make<float>("values", DType::kF32, {2, 2}, {3, 4, 0, 0}),
                                Make<float>("dtype", DType::kF32, {2}, {1.5f, 1.001f}),
                                Make<float>("shape", DType::kF32, {2}, {1, 2}),
                                Make<float>("gone", DType::kF32, {1}, {1}),
                                Make<int64_t>("ids", DType::kI64, {3}, {1, 2, 3}),
                            });
  const auto b = Write("b", {
                                Make<float>("same", DType::kF32, {4}, {1, nan, 3, -0.0f}),
                                Make<float>("values", DType::kF32, {2, 2}, {3, 4, 0.5f, 0}),
                                Make<uint16_t>("dtype", DType::kBF16, {2}, {0x3FC0, 0x3F80}),
                                Make<float>("shape", DType::kF32, {1, 2}, {1, 2}),
                                Make<float>("new", DType::kF32, {1}, {1}),
                                Make<int64_t>("ids", DType::kI64, {3}, {1, 2, 4}),
                            });
  const auto diffs = DiffModels(*a, *b, /*threads=*/2);
  ASSERT_TRUE(diffs.ok()) << diffs.status();
  ASSERT_EQ(diffs->size(), 7u);

  EXPECT_EQ(One(*diffs, "same").kind, TensorDiff::Kind::kEqual);  // NaN and -0 included
  const TensorDiff values = One(*diffs, "values");
  EXPECT_EQ(values.kind, TensorDiff::Kind::kValues);
  EXPECT_EQ(values.equal_elements, 3);
  EXPECT_DOUBLE_EQ(*values.max_abs, 0.5);
  EXPECT_DOUBLE_EQ(*values.relative_l2, 0.1);
  const TensorDiff dtype = One(*diffs, "dtype");
  EXPECT_EQ(dtype.kind, TensorDiff::Kind::kDType);
  EXPECT_EQ(dtype.equal_elements, 1);
  EXPECT_NEAR(*dtype.max_abs, 0.001, 1e-6);
  EXPECT_EQ(One(*diffs, "shape").kind, TensorDiff::Kind::kShape);
  EXPECT_EQ(One(*diffs, "gone").kind, TensorDiff::Kind::kOnlyInA);
  EXPECT_EQ(One(*diffs, "new").kind, TensorDiff::Kind::kOnlyInB);
  const TensorDiff ids = One(*diffs, "ids");
  EXPECT_EQ(ids.kind, TensorDiff::Kind::kValues);
  EXPECT_EQ(ids.equal_elements, 2);
  EXPECT_FALSE(ids.max_abs.has_value());
}

TEST_F(TensorDiffTest, NegativeZeroIsADifference) {
  const auto a = Write("a", {Make<float>("x", DType::kF32, {1}, {0.0f})});
  const auto b = Write("b", {Make<float>("x", DType::kF32, {1}, {-0.0f})});
  const auto diffs = DiffModels(*a, *b, 1);
  ASSERT_TRUE(diffs.ok());
  EXPECT_EQ(diffs->front().kind, TensorDiff::Kind::kValues);
  EXPECT_EQ(*diffs->front().max_abs, 0);
}

TEST_F(TensorDiffTest, SeesTheLastElementOfManyTiles) {
  std::vector<float> values(600'001, 1.0f);
  const auto a = Write("a", {Make<float>("x", DType::kF32, {600'001}, values)});
  values.back() = 3.0f;
  const auto b = Write("b", {Make<float>("x", DType::kF32, {600'001}, values)});
  const auto diffs = DiffModels(*a, *b, 1);
  ASSERT_TRUE(diffs.ok());
  EXPECT_EQ(diffs->front().equal_elements, 600'000);
  EXPECT_EQ(*diffs->front().max_abs, 2);
  EXPECT_DOUBLE_EQ(*diffs->front().relative_l2, 2 / std::sqrt(600'001.0));
}

}  // namespace
}  // namespace pewter::client
