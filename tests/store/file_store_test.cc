#include "store/file_store.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>
#include <fstream>
#include <optional>

#include "absl/strings/match.h"
#include "absl/time/clock.h"
#include "base/reason.h"
#include "store/housekeeping.h"
#include "tests/support/matchers.h"
#include "tests/support/temp_folder.h"

namespace pewter::testing {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
namespace fs = std::filesystem;

absl::Span<const std::byte> AsBytes(const std::string& text) {
  return {reinterpret_cast<const std::byte*>(text.data()), text.size()};
}

int OpenDescriptors() {
  return static_cast<int>(std::distance(fs::directory_iterator("/proc/self/fd"), {}));
}

std::vector<std::string> FilesIn(const std::string& folder) {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(folder)) {
    names.push_back(entry.path().filename().string());
  }
  return names;
}

TEST(FileStore, OpensPathsAndFileUris) {
  TempFolder folder;
  folder.Write("a.txt", "hello");
  EXPECT_EQ(*ReadText(**OpenStore(folder.path()), "a.txt", 10), "hello");
  EXPECT_EQ(*ReadText(**OpenStore(absl::StrCat("file://", folder.path())), "a.txt", 10), "hello");
  EXPECT_EQ((*OpenStore(folder.path()))->Describe("a.txt"), folder / "a.txt");
  EXPECT_EQ((*OpenStore("/models/"))->Describe("a.txt"), "/models/a.txt");
  EXPECT_THAT(OpenStore("file://relative"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("absolute")));
  EXPECT_THAT(OpenStore("ftp://host/x"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("ftp://host/x")));
  EXPECT_THAT(OpenStore(""), StatusIs(absl::StatusCode::kInvalidArgument, ::testing::_));
}

TEST(FileStore, DescriptorsAreBounded) {
  TempFolder folder;
  FileStore store(folder.path());
  const int before = OpenDescriptors();
  for (int i = 0; i < 200; ++i) {
    const std::string name = absl::StrCat("f", i);
    folder.Write(name, name);
    EXPECT_EQ(*ReadText(store, name, 10), name);
  }
  EXPECT_LE(OpenDescriptors(), before + 32);
}

TEST(FileStore, ModificationTimeIsInNanoseconds) {
  TempFolder folder;
  const std::string path = folder.Write("a", "x");
  const timespec times[2] = {{.tv_sec = 1, .tv_nsec = 0},
                             {.tv_sec = 1700000000, .tv_nsec = 123456789}};
  ASSERT_EQ(utimensat(AT_FDCWD, path.c_str(), times, 0), 0);
  EXPECT_EQ(FileStore(folder.path()).Stat("a")->mtime_ns, 1700000000123456789);
}

TEST(FileStore, SpecialFilesAreRefusedAndDoNotHang) {
  TempFolder folder;
  ASSERT_EQ(mkfifo((folder / "pipe").c_str(), 0600), 0);
  FileStore store(folder.path());
  std::byte byte;
  EXPECT_THAT(store.ReadInto("pipe", 0, absl::MakeSpan(&byte, 1)),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("pipe")));
  EXPECT_THAT(store.Stat("pipe"),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("pipe")));
  EXPECT_TRUE(store.List("")->empty());
}

TEST(FileStore, LinkLoopsEnd) {
  TempFolder folder;
  fs::create_symlink("loop", folder / "loop");
  fs::create_directory_symlink(folder.path(), folder / "self");
  folder.Write("a", "x");
  FileStore store(folder.path());
  EXPECT_FALSE(store.Stat("loop").ok());
  ASSERT_EQ(store.List("")->size(), 1u);
  EXPECT_EQ(store.List("")->front().key, "a");
}

TEST(FileStore, LeftoversOfAKilledWriterAreRemovedThoseOfALivingOneAreNot) {
  TempFolder folder;
  FileStore store(folder.path());
  // A process that dies in the middle of writing.
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    auto writer = store.Create("a");
    if (writer.ok()) (void)(*writer)->Append(AsBytes("half"));
    kill(getpid(), SIGKILL);
  }
  int status;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  ASSERT_EQ(FilesIn(folder.path()).size(), 1u);
  EXPECT_TRUE(store.List("")->empty());

  absl::StatusOr<std::unique_ptr<ObjectWriter>> living = store.Create("a");
  ASSERT_THAT(living, IsOk());
  ASSERT_EQ(FilesIn(folder.path()).size(), 1u) << "the leftover is gone, the living one is there";
  ASSERT_THAT(WriteText(store, "a", "second"), IsOk());
  ASSERT_THAT((*living)->Append(AsBytes("first")), IsOk());
  ASSERT_THAT((*living)->Commit(), IsOk());
  EXPECT_EQ(*ReadText(store, "a", 10), "first");
  EXPECT_EQ(FilesIn(folder.path()), std::vector<std::string>{"a"});
}

TEST(FileStore, TemporariesAreRemovedByAgeAndNeverThoseOfALivingWriter) {
  TempFolder folder;
  FileStore store(folder.path());
  ASSERT_THAT(WriteText(store, "deep/kept", "x"), IsOk());
  const std::string stale = folder / "deep/.a.123-4.pewter-tmp";
  std::ofstream(stale) << "half";
  std::ofstream(folder / "deep/.hidden") << "of the user";
  auto living = store.Create("deep/b");
  ASSERT_THAT(living, IsOk());
  EXPECT_EQ(*RemoveUnfinished(store, absl::Now() - absl::Hours(1)), 0);
  EXPECT_TRUE(fs::exists(stale));
  EXPECT_EQ(*RemoveUnfinished(store, absl::Now() + absl::Hours(1)), 1);
  EXPECT_FALSE(fs::exists(stale));
  ASSERT_THAT((*living)->Commit(), IsOk());
  EXPECT_THAT(FilesIn(folder / "deep"), ::testing::UnorderedElementsAre("kept", ".hidden", "b"));
  FileStore nowhere(folder / "none/at/all");
  EXPECT_EQ(*RemoveUnfinished(nowhere, absl::Now()), 0);
}

TEST(FileStore, TheRoomOfAFolderThatIsNotThereYetIsThatOfItsDisk) {
  TempFolder folder;
  const std::optional<int64_t> free = FreeBytes(FileStore(folder / "none/at/all"));
  ASSERT_TRUE(free.has_value());
  EXPECT_GT(*free, 0);
}

TEST(FileStore, WritingOverAFolderIsRefused) {
  TempFolder folder;
  folder.Write("x/a", "1");
  FileStore store(folder.path());
  EXPECT_THAT(store.Create("x"),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("folder")));
  EXPECT_THAT(store.Create("x/a/b"),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("not a folder")));
}

TEST(FileStore, NoPermissionIsPermissionDenied) {
  TempFolder folder;
  folder.Write("secret", "x");
  chmod((folder / "secret").c_str(), 0000);
  chmod(folder.path().c_str(), 0555);
  FileStore store(folder.path());
  // root may do everything, so it steps down for the calls.
  const bool root = geteuid() == 0;
  ASSERT_EQ(root ? seteuid(65534) : 0, 0);
  const absl::Status read = ReadText(store, "secret", 10).status();
  const absl::Status write = store.Create("new").status();
  ASSERT_EQ(root ? seteuid(0) : 0, 0);
  chmod(folder.path().c_str(), 0755);
  EXPECT_THAT(read, StatusIs(absl::StatusCode::kPermissionDenied, HasSubstr("secret")));
  EXPECT_THAT(write, StatusIs(absl::StatusCode::kPermissionDenied, HasSubstr("new")));
}

// Blocks, whole and partial, from pieces of any size; on a disk and on a file system without
// O_DIRECT.
TEST(FileStore, WritesEveryByteInOrder) {
  constexpr int64_t kBlock = 4 << 20;
  TempFolder disk;
  TempFolder memory("/dev/shm");
  for (const TempFolder* folder : {&disk, &memory}) {
    FileStore store(folder->path());
    for (const int64_t size : {int64_t{0}, int64_t{1}, kBlock - 1, kBlock, kBlock + 1, 3 * kBlock,
                               3 * kBlock + 4095, 5 * kBlock + 4097}) {
      std::string text(size, '\0');
      for (int64_t i = 0; i < size; ++i) text[i] = static_cast<char>((i * 2654435761u) >> 13);
      auto writer = store.Create("out");
      ASSERT_THAT(writer, IsOk());
      int64_t piece = 1;
      for (int64_t at = 0; at < size; at += piece, piece = piece * 3 % 1'000'003) {
        ASSERT_THAT((*writer)->Append(AsBytes(text.substr(at, piece))), IsOk());
      }
      ASSERT_THAT((*writer)->Commit(), IsOk());
      EXPECT_TRUE(*ReadText(store, "out", size) == text) << size << " bytes in " << folder->path();
    }
  }
}

TEST(FileStore, FileSizeLimitIsResourceExhausted) {
  TempFolder folder;
  FileStore store(folder.path());
  auto writer = store.Create("large");
  ASSERT_THAT(writer, IsOk());
  struct rlimit old;
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &old), 0);
  const auto old_handler = std::signal(SIGXFSZ, SIG_IGN);
  const struct rlimit small = {.rlim_cur = 100'000, .rlim_max = old.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  const absl::Status append = (*writer)->Append(AsBytes(std::string(150'000, 'x')));
  const absl::Status commit = (*writer)->Commit();
  const absl::Status again = (*writer)->Commit();
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &old), 0);
  std::signal(SIGXFSZ, old_handler);
  EXPECT_THAT(append, IsOk()) << "too little for a write of its own";
  EXPECT_THAT(commit,
              StatusIs(absl::StatusCode::kResourceExhausted,
                       AllOf(HasSubstr(folder / "large"), HasSubstr("limit"),
                             HasSubstr("100000 bytes are written"), HasSubstr("50000 more"))));
  EXPECT_EQ(AttachedReason(commit), "");
  EXPECT_EQ(again, commit) << "a damaged object is not committed";
  writer->reset();
  EXPECT_TRUE(FilesIn(folder.path()).empty());
}

TEST(FileStore, FullDiskIsResourceExhausted) {
  TempFolder folder;
  const std::string mount_point = folder / "disk";
  fs::create_directory(mount_point);
  if (mount("tmpfs", mount_point.c_str(), "tmpfs", 0, "size=1m") != 0) {
    GTEST_SKIP() << "mounting a small disk needs privileges: " << strerror(errno);
  }
  {
    FileStore store(mount_point);
    auto writer = store.Create("large");
    EXPECT_THAT(writer, IsOk());
    const absl::Status append = (*writer)->Append(AsBytes(std::string(20 << 20, 'x')));
    EXPECT_THAT(append, StatusIs(absl::StatusCode::kResourceExhausted,
                                 AllOf(HasSubstr(store.Describe("large")),
                                       HasSubstr("disk is full"), HasSubstr("more are needed"))));
    EXPECT_EQ(AttachedReason(append), kDiskFull);
    writer->reset();
    EXPECT_TRUE(FilesIn(mount_point).empty()) << "the space is free again";
  }
  EXPECT_EQ(umount(mount_point.c_str()), 0);
}

}  // namespace
}  // namespace pewter::testing
