// Opens every hostile checkpoint of this folder and holds it to its verdict in README.md.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <string>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "merge/checkpoint/checkpoint.h"
#include "tests/support/temp_folder.h"

namespace pewter::testing {
namespace {

namespace fs = std::filesystem;

const fs::path& Root() {
  static const fs::path root = fs::path(PEWTER_SOURCE_DIR) / "tests/attacks";
  return root;
}

struct Verdict {
  std::string file;
  std::string code;
  std::string message;
};

// The rows of the table: | `file` | CODE | message | what |
std::vector<Verdict> Verdicts() {
  std::vector<Verdict> verdicts;
  for (absl::string_view line : absl::StrSplit(ReadFile((Root() / "README.md").string()), '\n')) {
    if (!absl::StartsWith(line, "| `")) continue;
    std::vector<std::string> cells = absl::StrSplit(line, '|');
    for (std::string& cell : cells) absl::StripAsciiWhitespace(&cell);
    verdicts.push_back({cells[1].substr(1, cells[1].size() - 2), cells[2], cells[3]});
  }
  return verdicts;
}

class Attack : public ::testing::TestWithParam<Verdict> {};

// What the attacks that run something would create (make_attacks.py).
constexpr char kCanary[] = "/tmp/pewter_attack_canary";

TEST_P(Attack, MeetsItsVerdict) {
  fs::remove(kCanary);
  const fs::path path = Root() / GetParam().file;
  ASSERT_TRUE(fs::exists(path)) << path;
  ModelRef ref{.path = path.string()};
  if (absl::StartsWith(GetParam().file, "adapters/")) {
    ref = ModelRef{.path = (Root() / "base").string(), .adapter = path.string()};
  }
  const auto checkpoint = Checkpoint::Open(ref);
  const std::string message(checkpoint.status().message());
  EXPECT_EQ(absl::StatusCodeToString(checkpoint.status().code()), GetParam().code) << message;
  EXPECT_THAT(message, ::testing::HasSubstr(GetParam().message));
  EXPECT_TRUE(std::none_of(message.begin(), message.end(), absl::ascii_iscntrl)) << message;
  EXPECT_LT(message.size(), 1000u);
  EXPECT_FALSE(fs::exists(kCanary)) << "it ran a command";
  if (!checkpoint.ok()) return;
  // What is accepted can be read.
  for (const std::string& name : (*checkpoint)->tensor_names()) {
    const auto source = (*checkpoint)->OpenTensor(name, 0).value();
    const int64_t elements = source->shape().elements();
    std::vector<std::byte> bytes(elements * ByteWidth(source->dtype()));
    EXPECT_TRUE(source->Read(0, elements, absl::MakeSpan(bytes), nullptr).ok());
  }
}

INSTANTIATE_TEST_SUITE_P(Attacks, Attack, ::testing::ValuesIn(Verdicts()), [](const auto& info) {
  std::string name = info.param.file;
  std::replace_if(
      name.begin(), name.end(), [](char c) { return !absl::ascii_isalnum(c); }, '_');
  return name;
});

TEST(Attacks, EveryFileHasOneVerdict) {
  std::vector<std::string> files, rows;
  for (const char* folder : {"files", "folders", "adapters", "torch"}) {
    for (const auto& entry : fs::directory_iterator(Root() / folder)) {
      files.push_back(absl::StrCat(folder, "/", entry.path().filename().string()));
    }
  }
  for (const Verdict& verdict : Verdicts()) rows.push_back(verdict.file);
  EXPECT_THAT(rows, ::testing::UnorderedElementsAreArray(files));
}

}  // namespace
}  // namespace pewter::testing
