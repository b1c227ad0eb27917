// Files of torch.save: what is read, byte for byte. What is refused is in tests/attacks.
#include "merge/checkpoint/torch_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/digest.h"
#include "merge/checkpoint/pickle.h"
#include "merge/checkpoint/stored_source.h"
#include "merge/checkpoint/strided.h"
#include "store/object_store.h"
#include "tests/support/matchers.h"
#include "tests/support/temp_folder.h"

namespace pewter::testing {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::SizeIs;

std::string Attack(const std::string& name) {
  return absl::StrCat(PEWTER_SOURCE_DIR, "/tests/attacks/torch/", name);
}

absl::StatusOr<TorchFile> Read(const std::string& name) {
  const auto store = OpenStore(absl::StrCat(PEWTER_SOURCE_DIR, "/tests/attacks/torch"));
  return ReadTorchFile(**store, name, (*store)->Stat(name)->size);
}

std::vector<float> Values(const std::string& name) {
  const auto store = OpenStore(absl::StrCat(PEWTER_SOURCE_DIR, "/tests/attacks/torch"));
  const TensorInfo info = Read(name)->tensors.at(0);
  std::vector<float> values(info.shape.elements());
  EXPECT_THAT(StoredSource(*store, name, info, "w", 0)
                  .Read(0, info.shape.elements(),
                        {reinterpret_cast<std::byte*>(values.data()), values.size() * 4}, nullptr),
              IsOk());
  return values;
}

TEST(TorchFile, BothFormatsHoldTheSame) {
  for (const char* name : {"good.bin", "legacy_good.bin", "nested.bin", "zip64.bin"}) {
    const absl::StatusOr<TorchFile> file = Read(name);
    ASSERT_THAT(file, IsOk()) << name;
    ASSERT_THAT(file->tensors, SizeIs(1)) << name;
    EXPECT_EQ(file->tensors[0].name, "w");
    EXPECT_EQ(file->tensors[0].dtype, DType::kF32);
    EXPECT_EQ(file->tensors[0].shape, Shape{4});
    EXPECT_THAT(file->tensors[0].strides, SizeIs(0));
    EXPECT_THAT(Values(name), ElementsAre(1, 2, 3, 4)) << name;
  }
}

TEST(TorchFile, TransposedIsReadInRowMajorOrder) {
  EXPECT_THAT(Values("transposed.bin"), ElementsAre(1, 3, 2, 4));
}

TEST(TorchFile, WarnsOfWhatItLeavesOut) {
  EXPECT_THAT(Read("nested.bin")->warnings,
              ElementsAre(HasSubstr("\"state_dict\""), HasSubstr("\"epoch\"")));
  EXPECT_THAT(Read("memo_bomb.bin")->warnings, ElementsAre(HasSubstr("\"x\"")));
  EXPECT_THAT(Read("good.bin")->warnings, SizeIs(0));
}

// Header and tensors are the whole file, so that the manifest can give one digest of it.
TEST(TorchFile, HeaderIsAllButTheStorages) {
  for (const std::string name : {"good.bin", "legacy_good.bin"}) {
    const std::string bytes = ReadFile(Attack(name));
    const absl::StatusOr<TorchFile> file = Read(name);
    ASSERT_THAT(file, IsOk());
    int64_t covered = file->tensors[0].bytes;
    for (const HeaderRange& range : file->header) {
      covered += range.bytes;
      EXPECT_TRUE(range.offset + range.bytes <= file->tensors[0].offset ||
                  range.offset >= file->tensors[0].offset + file->tensors[0].bytes);
      EXPECT_EQ(range.crc32c,
                Crc32c(absl::MakeConstSpan(
                    reinterpret_cast<const std::byte*>(bytes.data()) + range.offset, range.bytes)));
    }
    EXPECT_EQ(covered, static_cast<int64_t>(bytes.size())) << name;
  }
}

TEST(Pickle, EndsWhereItSays) {
  const std::string text("\x80\x02K\x07.more", 9);
  const absl::StatusOr<Pickle> pickle = Pickle::Parse(text);
  ASSERT_THAT(pickle, IsOk());
  EXPECT_EQ(pickle->size(), 5u);
  EXPECT_EQ(pickle->root().number, 7);
  EXPECT_THAT(Pickle::Parse(text.substr(0, 4)),
              StatusIs(absl::StatusCode::kOutOfRange, HasSubstr("at byte 4")));
}

TEST(Pickle, Numbers) {
  const std::vector<std::pair<std::string, int64_t>> cases = {
      {std::string("J\xff\xff\xff\xff", 5), -1},
      {std::string("M\x01\x80", 3), 0x8001},
      {std::string("\x8a\x00", 2), 0},
      {std::string("\x8a\x01\xff", 3), -1},
      {std::string("\x8a\x02\xff\x00", 4), 255},
      {std::string("\x8a\x08\x00\x00\x00\x00\x00\x00\x00\x80", 10),
       std::numeric_limits<int64_t>::min()},
  };
  for (const auto& [opcode, want] : cases) {
    const std::string text = absl::StrCat("\x80\x02", opcode, ".");
    const absl::StatusOr<Pickle> pickle = Pickle::Parse(text);
    ASSERT_THAT(pickle, IsOk());
    EXPECT_EQ(pickle->root().number, want);
  }
}

// Against element by element, for views of every kind: axes in any order, rows and columns left
// out, ranges that begin and end anywhere.
TEST(Strided, ReadsWhatElementByElementReadingReads) {
  std::mt19937 random(1);
  const auto draw = [&](int64_t least, int64_t most) {
    return std::uniform_int_distribution<int64_t>(least, most)(random);
  };
  int64_t most_read = 0;
  for (int round = 0; round < 400; ++round) {
    const DType dtype =
        std::vector<DType>{DType::kU8, DType::kF16, DType::kF32, DType::kI64}[draw(0, 3)];
    const int64_t width = ByteWidth(dtype);
    const int rank = static_cast<int>(draw(1, 4));
    const bool large = round % 10 == 0;
    std::vector<int64_t> shape(rank), strides(rank), order(rank);
    for (int64_t& extent : shape) extent = draw(1, large ? 90 : 9);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random);
    int64_t span = 1;
    for (int64_t axis : order) {  // from the innermost of the file
      strides[axis] = span * draw(1, 2) + draw(0, 3);
      span += strides[axis] * (shape[axis] - 1);
    }
    TensorInfo info{.name = "w", .dtype = dtype, .shape = *Shape::Make(shape), .strides = strides};
    info.offset = draw(0, 9000);
    if (span > 4'000'000) continue;
    std::string file(info.offset + span * width, '\0');
    for (char& byte : file) byte = static_cast<char>(random());

    const int64_t elements = info.shape.elements();
    std::string want(elements * width, '\0');
    for (int64_t i = 0; i < elements; ++i) {
      int64_t at = 0, rest = i;
      for (int axis = rank - 1; axis >= 0; --axis) {
        at += rest % shape[axis] * strides[axis];
        rest /= shape[axis];
      }
      std::memcpy(want.data() + i * width, file.data() + info.offset + at * width, width);
    }
    const int64_t first = draw(0, elements - 1);
    const int64_t count = draw(1, elements - first);
    for (const auto& [from, size] : {std::pair{int64_t{0}, elements}, std::pair{first, count}}) {
      std::string got(size * width, '\0');
      const absl::Status status =
          ReadStrided(info, from, size, {reinterpret_cast<std::byte*>(got.data()), got.size()},
                      [&](int64_t offset, absl::Span<std::byte> out) {
                        most_read = std::max(most_read, static_cast<int64_t>(out.size()));
                        EXPECT_GE(offset, info.offset);
                        EXPECT_LE(offset + out.size(), file.size());
                        std::memcpy(out.data(), file.data() + offset, out.size());
                        return absl::OkStatus();
                      });
      ASSERT_THAT(status, IsOk());
      ASSERT_EQ(got, want.substr(from * width, size * width)) << "round " << round;
    }
  }
  EXPECT_LE(most_read, kStridedWindow + 2 * kStridedBlock);
  EXPECT_GT(most_read, kStridedWindow / 4);
}

TEST(Strided, EstimatesReads) {
  const auto reads = [](Shape shape, std::vector<int64_t> strides) {
    return StridedReads({.dtype = DType::kF16, .shape = shape, .strides = std::move(strides)});
  };
  EXPECT_EQ(reads({100, 100}, {1, 100}), 1);               // all at once
  EXPECT_EQ(reads({32000, 4096}, {1, 32000}), 4'096'000);  // 32 rows in 4096 pieces, 1000 times
  EXPECT_EQ(reads({4096, 32000}, {1, 4096}), 1024 * 32000);
  EXPECT_LT(reads({4096, 4000}, {4096, 1}), 200);  // the last columns left out
}

}  // namespace
}  // namespace pewter::testing
