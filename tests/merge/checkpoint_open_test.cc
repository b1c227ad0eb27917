// What Checkpoint::Open accepts, refuses and says.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>

#include "absl/strings/str_cat.h"
#include "merge/checkpoint/checkpoint.h"
#include "tests/support/hub_cache.h"
#include "tests/support/matchers.h"
#include "tests/support/temp_folder.h"
#include "tests/support/tiny_model.h"

namespace pewter::testing {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

absl::StatusOr<std::shared_ptr<const Checkpoint>> Open(const std::string& path,
                                                       const std::string& revision = "") {
  return Checkpoint::Open(ModelRef{.path = path, .revision = revision});
}

template <typename T>
absl::Span<std::byte> Writable(absl::Span<T> values) {
  return {reinterpret_cast<std::byte*>(values.data()), values.size() * sizeof(T)};
}

TinyTensor Numbers(const std::string& name, DType dtype, int count, double first) {
  TinyTensor tensor{name, dtype, Shape{count}, {}};
  for (int i = 0; i < count; ++i) tensor.values.push_back(first + i);
  return tensor;
}

std::string Index(const std::vector<std::pair<std::string, std::string>>& entries) {
  std::string map;
  for (const auto& [tensor, file] : entries) {
    absl::StrAppend(&map, map.empty() ? "" : ",", "\"", tensor, "\":\"", file, "\"");
  }
  return absl::StrCat(R"({"metadata":{"total_size":1,"x":[[{}]]},"weight_map":{)", map, "}}");
}

// A folder with two shards: a and b in the first, c in the second.
class Sharded : public ::testing::Test {
 protected:
  Sharded() {
    folder_.Write("config.json", R"({"model_type":"x"})");
    WriteSafetensors(folder_ / kFirst,
                     {Numbers("a", DType::kF32, 4, 0), Numbers("b", DType::kBF16, 3, 10)});
    WriteSafetensors(folder_ / kSecond, {Numbers("c", DType::kI64, 2, 20)});
    WriteIndex({{"a", kFirst}, {"b", kFirst}, {"c", kSecond}});
  }
  void WriteIndex(const std::vector<std::pair<std::string, std::string>>& entries) {
    folder_.Write("model.safetensors.index.json", Index(entries));
  }
  static constexpr char kFirst[] = "model-00001-of-00002.safetensors";
  static constexpr char kSecond[] = "model-00002-of-00002.safetensors";
  TempFolder folder_;
};

template <typename T>
std::vector<T> ReadAll(const Checkpoint& checkpoint, const std::string& tensor) {
  const auto source = checkpoint.OpenTensor(tensor, 0);
  EXPECT_THAT(source, IsOk());
  std::vector<T> values((*source)->shape().elements());
  EXPECT_EQ(sizeof(T), static_cast<size_t>(ByteWidth((*source)->dtype())));
  EXPECT_THAT((*source)->Read(0, values.size(), Writable(absl::MakeSpan(values)), nullptr), IsOk());
  return values;
}

TEST_F(Sharded, OpensAndReads) {
  const auto opened = Open(folder_.path());
  ASSERT_THAT(opened, IsOk());
  const Checkpoint& checkpoint = **opened;
  EXPECT_FALSE(checkpoint.raw());
  EXPECT_EQ(checkpoint.config_json(), R"({"model_type":"x"})");
  EXPECT_THAT(checkpoint.tensor_names(), ElementsAre("a", "b", "c"));
  ASSERT_EQ(checkpoint.files().size(), 2u);
  EXPECT_EQ(checkpoint.files()[1].Describe(), folder_ / kSecond);
  EXPECT_NE(checkpoint.files()[0].header[0].crc32c, checkpoint.files()[1].header[0].crc32c);
  EXPECT_EQ(checkpoint.Find("b")->dtype, DType::kBF16);
  EXPECT_EQ(checkpoint.Find("b")->shape, Shape{3});
  EXPECT_EQ(checkpoint.Find("nothing"), nullptr);
  EXPECT_EQ(checkpoint.FileOf("c"), 1);
  EXPECT_EQ(checkpoint.FileOf("nothing"), -1);
  EXPECT_FALSE(checkpoint.Adapted("a"));
  EXPECT_THAT(ReadAll<float>(checkpoint, "a"), ElementsAre(0, 1, 2, 3));
  EXPECT_THAT(ReadAll<int64_t>(checkpoint, "c"), ElementsAre(20, 21));
  EXPECT_THAT(checkpoint.OpenTensor("nothing", 0),
              StatusIs(absl::StatusCode::kNotFound,
                       AllOf(HasSubstr(folder_.path()), HasSubstr("\"nothing\""))));
}

TEST_F(Sharded, IndexWinsOverASingleFile) {
  WriteSafetensors(folder_ / "model.safetensors", {Numbers("other", DType::kF32, 1, 0)});
  EXPECT_THAT((*Open(folder_.path()))->tensor_names(), ElementsAre("a", "b", "c"));
}

TEST_F(Sharded, MissingShard) {
  std::filesystem::remove(folder_ / kSecond);
  EXPECT_THAT(Open(folder_.path()),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       AllOf(HasSubstr("index.json"), HasSubstr(kSecond), HasSubstr("missing"))));
}

TEST_F(Sharded, TruncatedShard) {
  std::filesystem::resize_file(folder_ / kSecond,
                               std::filesystem::file_size(folder_ / kSecond) - 1);
  EXPECT_THAT(Open(folder_.path()),
              StatusIs(absl::StatusCode::kDataLoss,
                       AllOf(HasSubstr(kSecond), HasSubstr("\"c\""), HasSubstr("truncated"))));
}

TEST_F(Sharded, TensorOfTheIndexThatNoShardHas) {
  WriteIndex({{"a", kFirst}, {"b", kFirst}, {"c", kSecond}, {"d", kSecond}});
  EXPECT_THAT(Open(folder_.path()), StatusIs(absl::StatusCode::kFailedPrecondition,
                                             AllOf(HasSubstr("\"d\""), HasSubstr(kSecond))));
}

TEST_F(Sharded, TensorInAnotherShardThanTheIndexSays) {
  WriteIndex({{"a", kFirst}, {"b", kSecond}, {"c", kSecond}});
  EXPECT_THAT(Open(folder_.path()),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       AllOf(HasSubstr("\"b\""), HasSubstr(kSecond), HasSubstr(kFirst))));
}

TEST_F(Sharded, TensorOfAShardThatTheIndexLacks) {
  WriteIndex({{"a", kFirst}, {"c", kSecond}});
  EXPECT_THAT(Open(folder_.path()),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       AllOf(HasSubstr("\"b\""), HasSubstr(kFirst), HasSubstr("index"))));
}

TEST_F(Sharded, TensorInTwoShards) {
  WriteSafetensors(folder_ / kSecond,
                   {Numbers("c", DType::kI64, 2, 20), Numbers("a", DType::kF32, 4, 0)});
  EXPECT_THAT(Open(folder_.path()),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       AllOf(HasSubstr("\"a\""), HasSubstr(kFirst), HasSubstr(kSecond))));
}

TEST_F(Sharded, IndexThatLeadsOutOfTheFolder) {
  for (const char* file :
       {"../x.safetensors", "/etc/passwd", "..", "sub/x.safetensors", "a\\\\b", "", "x\\u0000y"}) {
    WriteIndex({{"a", file}});
    EXPECT_THAT(Open(folder_.path()), StatusIs(absl::StatusCode::kDataLoss,
                                               AllOf(HasSubstr("\"a\""), HasSubstr("index.json"),
                                                     HasSubstr("not a file of this folder"))))
        << file;
  }
}

TEST_F(Sharded, MalformedIndex) {
  const std::pair<std::string, std::string> cases[] = {
      {"", "JSON"},
      {"[]", "not a JSON object"},
      {"{}", "no weight_map"},
      {R"({"weight_map":[]})", "weight_map must map"},
      {R"({"weight_map":"x"})", "weight_map must map"},
      {R"({"weight_map":{"a":1}})", "weight_map must map"},
      {R"({"weight_map":{"a":{"b":"c"}}})", "weight_map must map"},
      {R"({"weight_map":{"a":"x","a":"x"}})", "duplicate key \"a\""},
      {R"({"weight_map":{},"weight_map":{}})", "duplicate key \"weight_map\""},
      {R"({"weight_map":{"a":)", "JSON"},
      {std::string("{\"weight_map\":{}}\0{", 19), "NUL"},
  };
  for (const auto& [text, message] : cases) {
    folder_.Write("model.safetensors.index.json", text);
    EXPECT_THAT(Open(folder_.path()), StatusIs(absl::StatusCode::kDataLoss,
                                               AllOf(HasSubstr("index.json"), HasSubstr(message))))
        << text;
  }
}

TEST(CheckpointOpen, SingleFile) {
  TempFolder folder;
  folder.Write("config.json", "{}");
  WriteSafetensors(folder / "model.safetensors", {Numbers("a", DType::kF32, 2, 5)});
  const auto opened = Open(absl::StrCat("file://", folder.path()));
  ASSERT_THAT(opened, IsOk());
  EXPECT_FALSE((*opened)->raw());
  EXPECT_THAT(ReadAll<float>(**opened, "a"), ElementsAre(5, 6));
}

TEST(CheckpointOpen, RawFile) {
  TempFolder folder;
  folder.Write("config.json", "{}");
  WriteSafetensors(folder / "weights.safetensors", {Numbers("a", DType::kF16, 2, 5)});
  const auto opened = Open(folder / "weights.safetensors");
  ASSERT_THAT(opened, IsOk());
  EXPECT_TRUE((*opened)->raw());
  EXPECT_EQ((*opened)->config_json(), "");
  EXPECT_THAT((*opened)->tensor_names(), ElementsAre("a"));
}

TEST(CheckpointOpen, RawFolder) {
  TempFolder folder;
  WriteSafetensors(folder / "y.safetensors", {Numbers("a", DType::kF32, 2, 5)});
  WriteSafetensors(folder / "x.safetensors", {Numbers("b", DType::kF32, 2, 6)});
  folder.Write("notes.txt", "");
  const auto opened = Open(folder.path());
  ASSERT_THAT(opened, IsOk());
  EXPECT_TRUE((*opened)->raw());
  EXPECT_THAT((*opened)->tensor_names(), ElementsAre("a", "b"));
  EXPECT_EQ((*opened)->FileOf("b"), 0) << "files in order of their names";
}

TEST(CheckpointOpen, FoldersWithoutReadableWeights) {
  TempFolder folder;
  EXPECT_THAT(Open(folder.path()), StatusIs(absl::StatusCode::kNotFound, HasSubstr(folder.path())));
  folder.Write("config.json", "{}");
  EXPECT_THAT(Open(folder.path()),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("model.safetensors")));
  folder.Write("model-00001-of-00002.safetensors", "");
  EXPECT_THAT(Open(folder.path()),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("index")));
  folder.Write("adapter_config.json", "{}");
  EXPECT_THAT(Open(folder.path()),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("BASE+ADAPTER")));
}

std::string TorchFileText() {
  return ReadFile(absl::StrCat(PEWTER_SOURCE_DIR, "/tests/attacks/torch/good.bin"));
}

TEST(CheckpointOpen, TorchFilesComeAfterSafetensors) {
  TempFolder folder;
  folder.Write("config.json", "{}");
  folder.Write("pytorch_model.bin", TorchFileText());
  EXPECT_THAT(ReadAll<float>(**Open(folder.path()), "w"), ElementsAre(1, 2, 3, 4));
  folder.Write("pytorch_model.bin", "");
  EXPECT_THAT(Open(folder.path()),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("pytorch_model.bin")));
  folder.Write("part.bin", TorchFileText());
  folder.Write("pytorch_model.bin.index.json", Index({{"w", "part.bin"}}));
  EXPECT_THAT(ReadAll<float>(**Open(folder.path()), "w"), ElementsAre(1, 2, 3, 4));
  WriteSafetensors(folder / "model.safetensors", {Numbers("s", DType::kF32, 1, 0)});
  EXPECT_THAT((*Open(folder.path()))->tensor_names(), ElementsAre("s"));
}

TEST(CheckpointOpen, RawTorchFiles) {
  TempFolder folder;
  folder.Write("optimizer.pt", TorchFileText());
  EXPECT_TRUE((*Open(folder / "optimizer.pt"))->raw());
  EXPECT_THAT(Open(folder.path()),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("name the file itself")));
  folder.Write("pytorch_model.bin", TorchFileText());
  const auto opened = Open(folder.path());
  ASSERT_THAT(opened, IsOk());
  EXPECT_TRUE((*opened)->raw());
  EXPECT_THAT((*opened)->files(), ::testing::SizeIs(1));
  folder.Write("pytorch_model.bin",
               ReadFile(absl::StrCat(PEWTER_SOURCE_DIR, "/tests/attacks/torch/nested.bin")));
  EXPECT_THAT((*Open(folder.path()))->warnings(),
              ElementsAre(HasSubstr("pytorch_model.bin: its tensors"), HasSubstr("epoch")));
}

TEST(CheckpointOpen, NotACheckpoint) {
  TempFolder folder;
  HubCache cache;
  EXPECT_THAT(Open(""), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("empty")));
  EXPECT_THAT(Open(folder / "nothing"),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr(folder / "nothing")));
  EXPECT_THAT(Open(absl::StrCat("file://", folder / "nothing")),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr(folder / "nothing")));
  EXPECT_THAT(Open(folder.Write("model.gguf", "")),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("model.gguf")));
  EXPECT_THAT(Open("s4://bucket/x"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("s4://bucket/x")));
  EXPECT_THAT(Open(folder.path(), "main"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("no revision")));
}

TEST(CheckpointOpen, HubModels) {
  TempFolder folder;
  WriteSafetensors(folder / "m.safetensors", {Numbers("a", DType::kF32, 2, 5)});
  HubCache cache;
  const std::string commit = "0123456789abcdef0123456789abcdef01234567";
  cache.AddRef("org/tiny-model", "main", commit);
  cache.AddRef("org/tiny-model", "v1", commit);
  cache.AddFile("org/tiny-model", commit, "config.json", "{}");
  cache.AddFile("org/tiny-model", commit, "model.safetensors", ReadFile(folder / "m.safetensors"));
  for (const auto& [path, revision] :
       std::vector<std::pair<std::string, std::string>>{{"org/tiny-model", ""},
                                                        {"org/tiny-model", "v1"},
                                                        {"hf://org/tiny-model", ""},
                                                        {"hf://org/tiny-model@v1", ""},
                                                        {"hf://org/tiny-model", "v1"}}) {
    const auto opened = Open(path, revision);
    ASSERT_THAT(opened, IsOk()) << path;
    EXPECT_THAT(ReadAll<float>(**opened, "a"), ElementsAre(5, 6));
    EXPECT_EQ((*opened)->files()[0].stat.etag.size(), 64u);
  }
  EXPECT_THAT(Open("hf://org/tiny-model@v1", "main"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("revision")));
  // Says both places where it looked.
  EXPECT_THAT(Open("org/other"),
              StatusIs(absl::StatusCode::kNotFound,
                       AllOf(HasSubstr("no local path org/other"), HasSubstr(cache.path()),
                             HasSubstr("hf download"))));
  EXPECT_THAT(Open("hf://org/other"),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr(cache.path())));
}

class Recorder final : public ReadObserver {
 public:
  void OnRead(int file, int64_t offset, absl::Span<const std::byte> bytes) override {
    reads.push_back({file, offset, static_cast<int64_t>(bytes.size())});
  }
  struct Read {
    int file;
    int64_t offset, bytes;
    bool operator==(const Read&) const = default;
  };
  std::vector<Read> reads;
};

TEST_F(Sharded, RangesAreReadAndToldToTheObserver) {
  const auto checkpoint = Open(folder_.path()).value();
  const auto source = checkpoint->OpenTensor("c", 7).value();
  EXPECT_EQ(source->name(), absl::StrCat("model ", folder_.path(), ", tensor c"));
  Recorder recorder;
  int64_t value = 0;
  const auto out = Writable(absl::MakeSpan(&value, 1));
  ASSERT_THAT(source->Read(1, 1, out, &recorder), IsOk());
  EXPECT_EQ(value, 21);
  EXPECT_EQ(recorder.reads,
            (std::vector<Recorder::Read>{{8, checkpoint->Find("c")->offset + 8, 8}}));
  EXPECT_THAT(source->Read(2, 0, {}, &recorder), IsOk());
  for (const auto& [first, count] : std::vector<std::pair<int64_t, int64_t>>{
           {-1, 1}, {2, 1}, {0, -1}, {0, 2}, {INT64_MAX, 1}, {1, INT64_MAX}}) {
    EXPECT_THAT(source->Read(first, count, out, nullptr),
                StatusIs(absl::StatusCode::kInternal, HasSubstr("tensor c")));
  }
}

TEST_F(Sharded, AShardThatShrinksAfterOpeningIsDataLossAndNamed) {
  const auto checkpoint = Open(folder_.path()).value();
  const auto source = checkpoint->OpenTensor("c", 0).value();
  std::filesystem::resize_file(folder_ / kSecond, 20);
  int64_t values[2];
  EXPECT_THAT(
      source->Read(0, 2, Writable(absl::MakeSpan(values)), nullptr),
      StatusIs(absl::StatusCode::kDataLoss, AllOf(HasSubstr("tensor c"), HasSubstr(kSecond))));
}

TEST_F(Sharded, CastRoundsToNearestEvenWhateverTheRange) {
  TempFolder folder;
  WriteSafetensors(folder / "m.safetensors", {RandomTensor("w", DType::kF32, Shape{300, 1000}, 1),
                                              Numbers("i", DType::kI32, 2, 0)});
  const auto checkpoint = Open(folder / "m.safetensors").value();
  const auto stored = checkpoint->OpenTensor("w", 0).value();
  EXPECT_EQ(CastSource(stored, DType::kF32), stored) << "nothing to do";
  const auto half = CastSource(stored, DType::kBF16);
  EXPECT_EQ(half->dtype(), DType::kBF16);
  EXPECT_EQ(half->shape(), (Shape{300, 1000}));
  std::vector<uint16_t> whole(300'000), parts(300'000);
  Recorder recorder;
  ASSERT_THAT(half->Read(0, 300'000, Writable(absl::MakeSpan(whole)), &recorder), IsOk());
  int64_t bytes = 0;
  for (const Recorder::Read& read : recorder.reads) bytes += read.bytes;
  EXPECT_EQ(bytes, 300'000 * 4) << "stored bytes, each once";
  for (int64_t first = 0, step = 1; first < 300'000; first += step, step = step * 3 + 7) {
    const int64_t count = std::min(step, 300'000 - first);
    ASSERT_THAT(
        half->Read(first, count, Writable(absl::MakeSpan(parts).subspan(first, count)), nullptr),
        IsOk());
  }
  EXPECT_EQ(whole, parts);
  const std::vector<float> values = ReadAll<float>(*checkpoint, "w");
  for (size_t i = 0; i < values.size(); ++i) {
    uint32_t bits;
    std::memcpy(&bits, &values[i], 4);
    ASSERT_EQ(whole[i], static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)) << i;
  }
  const auto integers = CastSource(checkpoint->OpenTensor("i", 0).value(), DType::kF32);
  float out[2];
  EXPECT_THAT(integers->Read(0, 2, Writable(absl::MakeSpan(out)), nullptr),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       AllOf(HasSubstr("tensor i"), HasSubstr("I32"))));
}

// Every stored model of the golden set opens.
TEST(CheckpointOpen, GoldenModels) {
  const std::filesystem::path models =
      std::filesystem::path(PEWTER_SOURCE_DIR) / "../shared/goldens/mergekit/models";
  if (!std::filesystem::is_directory(models)) GTEST_SKIP() << models << " is not there";
  int opened = 0;
  for (const auto& entry : std::filesystem::directory_iterator(models)) {
    const auto checkpoint = Open(entry.path().string());
    EXPECT_THAT(checkpoint, IsOk()) << entry.path();
    EXPECT_TRUE(checkpoint.ok() && !(*checkpoint)->raw());
    ++opened;
  }
  EXPECT_GT(opened, 20);
}

}  // namespace
}  // namespace pewter::testing
