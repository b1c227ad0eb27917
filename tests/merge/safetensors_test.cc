#include "merge/checkpoint/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>

#include "absl/strings/str_cat.h"
#include "base/digest.h"
#include "base/dtype_names.h"
#include "store/file_store.h"
#include "tests/support/matchers.h"
#include "tests/support/temp_folder.h"

namespace pewter::testing {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr DType kAllDTypes[] = {
    DType::kF64, DType::kF32, DType::kF16,  DType::kBF16,   DType::kF8E4M3, DType::kF8E5M2,
    DType::kI64, DType::kI32, DType::kI16,  DType::kI8,     DType::kU64,    DType::kU32,
    DType::kU16, DType::kU8,  DType::kBool, DType::kF8E8M0, DType::kC64};

// The file with this JSON and that many bytes of data.
std::string FileOf(absl::string_view json, int64_t data_bytes) {
  const uint64_t length = json.size();
  std::string file(8, '\0');
  std::memcpy(file.data(), &length, 8);
  return absl::StrCat(file, json, std::string(data_bytes, 'd'));
}

absl::StatusOr<SafetensorsHeader> Parse(absl::string_view json, int64_t data_bytes) {
  const int64_t data_begin = 8 + static_cast<int64_t>(json.size());
  return ParseSafetensorsHeader(json, data_begin, data_begin + data_bytes);
}

absl::StatusOr<SafetensorsHeader> ReadHeader(const std::string& file) {
  TempFolder folder;
  folder.Write("x.safetensors", file);
  FileStore store(folder.path());
  return ReadSafetensorsHeader(store, "x.safetensors", static_cast<int64_t>(file.size()));
}

TEST(Safetensors, ParsesTheFormat) {
  const absl::StatusOr<SafetensorsHeader> header = Parse(
      R"({"b":{"dtype":"BF16","shape":[2,3],"data_offsets":[4,16]},"__metadata__":{"format":"pt"},)"
      R"("a":{"shape":[],"data_offsets":[0,4],"dtype":"F32"},)"
      R"("none":{"dtype":"F64","shape":[0,7],"data_offsets":[16,16]}}   )",
      16);
  ASSERT_THAT(header, IsOk());
  ASSERT_EQ(header->tensors.size(), 3u);
  EXPECT_EQ(header->tensors[0].name, "a");
  EXPECT_EQ(header->tensors[0].dtype, DType::kF32);
  EXPECT_EQ(header->tensors[0].shape, Shape());
  EXPECT_EQ(header->tensors[0].offset, header->data_begin);
  EXPECT_EQ(header->tensors[0].bytes, 4);
  EXPECT_EQ(header->tensors[1].name, "b");
  EXPECT_EQ(header->tensors[1].dtype, DType::kBF16);
  EXPECT_EQ(header->tensors[1].shape, (Shape{2, 3}));
  EXPECT_EQ(header->tensors[1].offset, header->data_begin + 4);
  EXPECT_EQ(header->tensors[1].bytes, 12);
  EXPECT_EQ(header->tensors[2].bytes, 0);
  EXPECT_EQ(header->metadata, (std::map<std::string, std::string>{{"format", "pt"}}));
}

TEST(Safetensors, AFileWithoutTensorsIsValid) {
  EXPECT_THAT(Parse("{}", 0), IsOk());
  EXPECT_THAT(Parse(R"({"__metadata__":{}})", 0), IsOk());
}

TEST(Safetensors, LayoutIsReadBackForEveryDType) {
  std::vector<TensorInfo> tensors;
  for (DType dtype : kAllDTypes) {
    tensors.push_back({.name = absl::StrCat("tensor \"", SafetensorsName(dtype), "\"\n\u00e9"),
                       .dtype = dtype,
                       .shape = Shape{3, 5}});
    tensors.push_back({.name = absl::StrCat("empty ", SafetensorsName(dtype)),
                       .dtype = dtype,
                       .shape = Shape{0}});
  }
  const std::map<std::string, std::string> metadata = {{"format", "pt"}, {"k\"", "v\\"}};
  const absl::StatusOr<std::string> layout = LayOutSafetensors(tensors, metadata);
  ASSERT_THAT(layout, IsOk());
  EXPECT_EQ(layout->size() % 8, 0u);
  const int64_t size = tensors.back().offset + tensors.back().bytes;
  const absl::StatusOr<SafetensorsHeader> header = ReadHeader(
      absl::StrCat(*layout, std::string(size - static_cast<int64_t>(layout->size()), 'd')));
  ASSERT_THAT(header, IsOk());
  EXPECT_EQ(header->metadata, metadata);
  EXPECT_EQ(header->data_begin, static_cast<int64_t>(layout->size()));
  EXPECT_EQ(header->crc32c,
            Crc32c({reinterpret_cast<const std::byte*>(layout->data()), layout->size()}));
  ASSERT_EQ(header->tensors.size(), tensors.size());
  std::map<std::string, TensorInfo> by_name;
  for (const TensorInfo& tensor : header->tensors) by_name[tensor.name] = tensor;
  for (const TensorInfo& tensor : tensors) {
    const TensorInfo& read = by_name[tensor.name];
    EXPECT_EQ(read.dtype, tensor.dtype) << tensor.name;
    EXPECT_EQ(read.shape, tensor.shape) << tensor.name;
    EXPECT_EQ(read.offset, tensor.offset) << tensor.name;
    EXPECT_EQ(read.bytes, tensor.bytes) << tensor.name;
    EXPECT_EQ(read.bytes, tensor.shape.elements() * ByteWidth(tensor.dtype)) << tensor.name;
  }
}

TEST(Safetensors, LayoutIsExactlyThis) {
  std::vector<TensorInfo> tensors = {{.name = "b", .dtype = DType::kF16, .shape = Shape{2}},
                                     {.name = "a", .dtype = DType::kU8, .shape = Shape{}}};
  const std::string json =
      R"({"__metadata__":{"format":"pt"},"b":{"dtype":"F16","shape":[2],"data_offsets":[0,4]},)"
      R"("a":{"dtype":"U8","shape":[],"data_offsets":[4,5]}})";
  ASSERT_EQ(json.size() % 8, 0u);
  EXPECT_EQ(*LayOutSafetensors(tensors, {{"format", "pt"}}), FileOf(json, 0));
  EXPECT_EQ(tensors[0].offset, 8 + static_cast<int64_t>(json.size()));
  EXPECT_EQ(tensors[1].offset, 12 + static_cast<int64_t>(json.size()));
}

TEST(Safetensors, LayoutRefusesWhatCannotBeWritten) {
  const auto lay_out = [](std::vector<TensorInfo> tensors) {
    return LayOutSafetensors(tensors, {}).status();
  };
  EXPECT_THAT(lay_out({{.name = "a"}, {.name = "a"}}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("\"a\"")));
  EXPECT_THAT(lay_out({{.name = "__metadata__"}}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("__metadata__")));
  EXPECT_THAT(lay_out({{.name = "\xff"}}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("UTF-8")));
  EXPECT_THAT(lay_out({{.name = "x", .dtype = DType::kF64, .shape = Shape{int64_t{1} << 62}}}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("overflow")));
}

struct BadHeader {
  std::string what;
  std::string json;
  int64_t data_bytes;
  std::vector<std::string> message;  // each is in it
};

class BadHeaderTest : public ::testing::TestWithParam<BadHeader> {};

TEST_P(BadHeaderTest, IsDataLossAndSaysWhy) {
  const absl::StatusOr<SafetensorsHeader> header = Parse(GetParam().json, GetParam().data_bytes);
  for (const std::string& part : GetParam().message) {
    EXPECT_THAT(header, StatusIs(absl::StatusCode::kDataLoss, HasSubstr(part)));
  }
  // The same through a file, which is named.
  EXPECT_THAT(ReadHeader(FileOf(GetParam().json, GetParam().data_bytes)),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("x.safetensors")));
}

std::string OneTensor(absl::string_view dtype, absl::string_view shape, absl::string_view offsets) {
  return absl::StrCat(R"({"w":{"dtype":)", dtype, R"(,"shape":)", shape, R"(,"data_offsets":)",
                      offsets, "}}");
}

std::vector<BadHeader> BadHeaders() {
  const std::string u8 = R"("U8")";
  return {
      {"empty", "", 0, {"'{'"}},
      {"not_an_object", "[]", 0, {"'{'"}},
      {"leading_space", " {}", 0, {"'{'"}},
      {"byte_order_mark", "\xef\xbb\xbf{}", 0, {"'{'"}},
      {"unfinished", R"({"w":{"dtype":"U8")", 0, {"JSON", "byte 19"}},
      {"trailing_text", "{}{}", 0, {"JSON"}},
      {"nul_after_the_end", std::string("{}\0x", 4), 0, {"NUL"}},
      {"not_utf8", "{\"\xff\xfe\":1}", 0, {"JSON", "UTF-8"}},
      {"control_character", "{\"a\x1b[31m\":1}", 0, {"JSON"}},
      {"deep_arrays", R"({"w":)" + std::string(1'000'000, '['), 0, {"\"w\"", "array"}},
      {"deep_objects",
       [] {
         std::string json;
         for (int i = 0; i < 100'000; ++i) json += R"({"a":)";
         return json;
       }(),
       0,
       {"\"a\"", "unknown key"}},
      {"duplicate_tensor",
       R"({"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
       R"("w":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})",
       2,
       {"\"w\"", "twice"}},
      {"duplicate_field",
       R"({"w":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}})",
       1,
       {"\"w\"", "duplicate key \"dtype\""}},
      {"duplicate_metadata", R"({"__metadata__":{},"__metadata__":{}})", 0, {"__metadata__"}},
      {"duplicate_metadata_key", R"({"__metadata__":{"a":"1","a":"2"}})", 0, {"\"a\""}},
      {"metadata_number", R"({"__metadata__":{"a":1}})", 0, {"__metadata__", "a number"}},
      {"metadata_nested", R"({"__metadata__":{"a":{}}})", 0, {"__metadata__", "an object"}},
      {"metadata_text", R"({"__metadata__":"x"})", 0, {"__metadata__"}},
      {"tensor_is_text", R"({"w":"x"})", 0, {"\"w\""}},
      {"tensor_is_null", R"({"w":null})", 0, {"\"w\"", "null"}},
      {"unknown_field", R"({"w":{"stride":[1]}})", 0, {"\"w\"", "\"stride\""}},
      {"no_dtype", R"({"w":{"shape":[1],"data_offsets":[0,1]}})", 1, {"\"w\"", "needed"}},
      {"unknown_dtype", OneTensor(R"("F4")", "[2]", "[0,1]"), 1, {"\"w\"", "\"F4\""}},
      {"dtype_number", OneTensor("1", "[1]", "[0,1]"), 1, {"\"w\"", "a number"}},
      {"negative_dimension", OneTensor(u8, "[-1]", "[0,1]"), 1, {"\"w\"", "negative dimension"}},
      {"fractional_dimension", OneTensor(u8, "[1.5]", "[0,1]"), 1, {"\"w\"", "1.5"}},
      {"exponent_dimension", OneTensor(u8, "[1e0]", "[0,1]"), 1, {"\"w\"", "1e0"}},
      {"huge_dimension", OneTensor(u8, "[18446744073709551616]", "[0,1]"), 1, {"\"w\""}},
      {"dimension_over_int64", OneTensor(u8, "[9223372036854775808]", "[0,1]"), 1, {"\"w\"", "64"}},
      {"element_count_overflows",
       OneTensor(u8, "[4294967296,4294967296]", "[0,1]"),
       1,
       {"\"w\"", "overflows"}},
      {"byte_count_overflows",
       OneTensor(R"("F64")", "[4611686018427387904]", "[0,1]"),
       1,
       {"\"w\"", "overflows"}},
      {"too_many_dimensions", OneTensor(u8, "[1,1,1,1,1,1,1,1,1]", "[0,1]"), 1, {"\"w\"", "8"}},
      {"nested_shape", OneTensor(u8, "[[1]]", "[0,1]"), 1, {"\"w\"", "an array"}},
      {"shape_is_a_number", OneTensor(u8, "1", "[0,1]"), 1, {"\"w\"", "a number"}},
      {"one_offset", OneTensor(u8, "[1]", "[0]"), 1, {"\"w\"", "[begin, end]"}},
      {"three_offsets", OneTensor(u8, "[1]", "[0,1,2]"), 1, {"\"w\"", "[begin, end]"}},
      {"negative_offset", OneTensor(u8, "[1]", "[-1,0]"), 1, {"\"w\"", "negative data offset"}},
      {"offsets_backwards", OneTensor(u8, "[1]", "[1,0]"), 1, {"\"w\"", "end before they begin"}},
      {"offset_over_int64", OneTensor(u8, "[1]", "[0,9223372036854775808]"), 1, {"\"w\"", "64"}},
      {"size_is_not_shape", OneTensor(R"("F32")", "[2]", "[0,4]"), 4, {"\"w\"", "8", "4"}},
      {"past_the_end", OneTensor(u8, "[8]", "[0,8]"), 7, {"\"w\"", "truncated"}},
      {"far_past_the_end",
       OneTensor(u8, "[9223372036854775807]", "[0,9223372036854775807]"),
       7,
       {"\"w\"", "truncated"}},
      {"bytes_left_over", OneTensor(u8, "[8]", "[0,8]"), 9, {"1 bytes after the last tensor"}},
      {"data_without_tensors", "{}", 4, {"4 bytes"}},
      {"overlap",
       R"({"v":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},)"
       R"("w":{"dtype":"U8","shape":[4],"data_offsets":[3,7]}})",
       7,
       {"\"v\"", "\"w\"", "overlap"}},
      {"same_bytes_twice",
       R"({"v":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},)"
       R"("w":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}})",
       4,
       {"\"v\"", "\"w\"", "overlap"}},
      {"hole",
       R"({"v":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},)"
       R"("w":{"dtype":"U8","shape":[4],"data_offsets":[6,10]}})",
       10,
       {"\"w\"", "hole of 2 bytes"}},
      {"hole_at_the_start", OneTensor(u8, "[4]", "[2,6]"), 6, {"\"w\"", "hole of 2 bytes"}},
  };
}

INSTANTIATE_TEST_SUITE_P(Safetensors, BadHeaderTest, ::testing::ValuesIn(BadHeaders()),
                         [](const auto& info) { return info.param.what; });

TEST(Safetensors, BadFilesAreNamedAndSayWhy) {
  EXPECT_THAT(ReadHeader(""), StatusIs(absl::StatusCode::kDataLoss,
                                       AllOf(HasSubstr("x.safetensors"), HasSubstr("0 bytes"))));
  EXPECT_THAT(ReadHeader("1234567"), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("7 bytes")));
  const std::string good = FileOf(OneTensor(R"("U8")", "[8]", "[0,8]"), 8);
  EXPECT_THAT(ReadHeader(good), IsOk());
  EXPECT_THAT(
      ReadHeader(good.substr(0, 20)),
      StatusIs(absl::StatusCode::kDataLoss, HasSubstr("the file has only 12 more: truncated")));
  EXPECT_THAT(
      ReadHeader(good.substr(0, good.size() - 1)),
      StatusIs(absl::StatusCode::kDataLoss, AllOf(HasSubstr("\"w\""), HasSubstr("truncated"))));
  EXPECT_THAT(ReadHeader(std::string(8, '\xff') + "{}"),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("18446744073709551615")));
}

// A sparse file whose header claims more than the format allows: refused before it is read.
TEST(Safetensors, AHugeHeaderIsRefusedUnread) {
  TempFolder folder;
  const std::string path = folder.Write("x.safetensors", FileOf("{}", 0));
  const uint64_t length = 100'000'001;
  std::string file = ReadFile(path);
  std::memcpy(file.data(), &length, 8);
  WriteFile(path, file);
  FileStore store(folder.path());
  EXPECT_THAT(ReadSafetensorsHeader(store, "x.safetensors", 200'000'000),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("at most 100000000")));
}

TEST(Safetensors, HostileNamesAreEscapedAndCutInMessages) {
  const absl::StatusOr<SafetensorsHeader> header =
      Parse(absl::StrCat(R"({"\u001b[31m)", std::string(10'000, 'x'), R"(":1})"), 0);
  EXPECT_EQ(header.status().message().find('\x1b'), absl::string_view::npos);
  EXPECT_THAT(std::string(header.status().message()), HasSubstr(R"(\x1b[31mxxx)"));
  EXPECT_LT(header.status().message().size(), 400u);
}

}  // namespace
}  // namespace pewter::testing
