#include "client/transfer.h"

#include <filesystem>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/matchers.h"
#include "tests/support/temp_folder.h"

namespace pewter::client {
namespace {

using pewter::testing::IsOk;
using pewter::testing::TempFolder;
using ::testing::ElementsAre;

// A safetensors file of one byte.
std::string Weights(const std::string& tensor) {
  std::string header =
      absl::StrCat(R"({")", tensor, R"(":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})");
  header.resize((header.size() + 7) / 8 * 8, ' ');
  std::string file(8, '\0');
  file[0] = static_cast<char>(header.size());
  return absl::StrCat(file, header, "x");
}

std::vector<std::string> Names(const std::string& path) {
  const auto files = FilesOfModel(path);
  EXPECT_THAT(files, IsOk());
  std::vector<std::string> names;
  if (!files.ok()) return names;
  for (const ModelFile& file : *files) {
    EXPECT_EQ(static_cast<int64_t>(std::filesystem::file_size(file.file)), file.size);
    names.push_back(file.path);
  }
  return names;
}

TEST(FilesOfModelTest, WhatAMergeReadsOfAFolder) {
  const TempFolder folder;
  folder.Write("a.safetensors", Weights("a"));
  folder.Write("b.safetensors", Weights("b"));
  folder.Write("tokenizer.json", "{}");
  folder.Write("tokenizer.model", "");
  folder.Write(".hidden.json", "{}");
  folder.Write("optimizer.ckpt", "x");
  folder.Write("model.gguf", "x");
  folder.Write("checkpoint-500/c.safetensors", Weights("c"));
  folder.Write("1_Pooling/config.json", "{}");
  EXPECT_THAT(Names(folder.path()),
              ElementsAre("a.safetensors", "b.safetensors", "tokenizer.json", "tokenizer.model"));
  folder.Write("modules.json",
               R"([{"path": ""}, {"path": "1_Pooling"}, {"path": "../x"}, {"path": "absent"}, 7])");
  EXPECT_THAT(Names(absl::StrCat("file://", folder.path())),
              ElementsAre("1_Pooling/config.json", "a.safetensors", "b.safetensors", "modules.json",
                          "tokenizer.json", "tokenizer.model"));
}

TEST(FilesOfModelTest, OfTwoFormatsTheOneThatIsRead) {
  const TempFolder folder;
  folder.Write("config.json", R"({"architectures": ["LlamaForCausalLM"]})");
  folder.Write("model.safetensors", Weights("a"));
  folder.Write("pytorch_model.bin", "not even a zip");
  EXPECT_THAT(Names(folder.path()), ElementsAre("config.json", "model.safetensors"));
}

TEST(FilesOfModelTest, FilesTokenizersAndWhatIsNone) {
  const TempFolder folder;
  const std::string file = folder.Write("data/calibration.safetensors", "anything");
  EXPECT_THAT(Names(file), ElementsAre("calibration.safetensors"));
  folder.Write("tokenizer/tokenizer.json", "{}");
  EXPECT_THAT(Names(folder / "tokenizer"), ElementsAre("tokenizer.json"));
  folder.Write("broken/model.safetensors", "x");
  EXPECT_FALSE(FilesOfModel(folder / "broken").ok());
  EXPECT_TRUE(absl::IsNotFound(FilesOfModel(folder / "absent").status()));
  std::filesystem::create_directory(folder / "empty");
  EXPECT_TRUE(absl::IsNotFound(FilesOfModel(folder / "empty").status()));
}

}  // namespace
}  // namespace pewter::client
