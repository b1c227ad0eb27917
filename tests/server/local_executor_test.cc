#include "server/executor/local_executor.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/stat.h>

#include <cerrno>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "tests/support/matchers.h"
#include "tests/support/temp_folder.h"

namespace pewter::server {
namespace {

using ::pewter::testing::IsOk;
using ::pewter::testing::ReadFile;
using ::pewter::testing::TempFolder;
using ::testing::HasSubstr;

class LocalExecutorTest : public ::testing::Test {
 protected:
  // An executor whose workers run this shell script.
  std::unique_ptr<Executor> Make(const std::string& script) {
    const std::string path = folder_.Write("worker", absl::StrCat("#!/bin/sh\n", script, "\n"));
    chmod(path.c_str(), 0700);
    auto executor = MakeLocalExecutor({.binary = path, .server_address = "127.0.0.1:1"});
    EXPECT_THAT(executor, IsOk());
    return *std::move(executor);
  }
  static WorkerExit WaitForOne(Executor& executor) {
    const absl::Time deadline = absl::Now() + absl::Seconds(30);
    while (absl::Now() < deadline) {
      const std::vector<WorkerExit> exits = executor.Poll(absl::Seconds(1));
      if (!exits.empty()) {
        EXPECT_EQ(exits.size(), 1u);
        return exits[0];
      }
    }
    ADD_FAILURE() << "no worker ended";
    return {};
  }
  bool WaitForFile(const std::string& path) {
    const absl::Time deadline = absl::Now() + absl::Seconds(30);
    struct stat info;
    while (absl::Now() < deadline) {
      if (stat(path.c_str(), &info) == 0 && info.st_size > 0) return true;
      absl::SleepFor(absl::Milliseconds(5));
    }
    return false;
  }

  TempFolder folder_;
};

TEST_F(LocalExecutorTest, TellsExitCodeAndLastWords) {
  auto executor = Make("echo oops >&2; exit 7");
  ASSERT_THAT(executor->Submit({.job_id = "a", .token = "t"}), IsOk());
  const WorkerExit exit = WaitForOne(*executor);
  EXPECT_EQ(exit.job_id, "a");
  EXPECT_EQ(exit.exit_code, 7);
  EXPECT_EQ(exit.signal, 0);
  EXPECT_EQ(exit.stderr_tail, "oops\n");
}

TEST_F(LocalExecutorTest, TellsTheSignal) {
  auto executor = Make("kill -SEGV $$");
  ASSERT_THAT(executor->Submit({.job_id = "a", .token = "t"}), IsOk());
  EXPECT_EQ(WaitForOne(*executor).signal, SIGSEGV);
}

TEST_F(LocalExecutorTest, KeepsABoundedTail) {
  auto executor = Make("i=0; while [ $i -lt 20000 ]; do echo line $i >&2; i=$((i+1)); done");
  ASSERT_THAT(executor->Submit({.job_id = "a", .token = "t"}), IsOk());
  const WorkerExit exit = WaitForOne(*executor);
  EXPECT_LE(exit.stderr_tail.size(), 4096u);
  EXPECT_THAT(exit.stderr_tail, HasSubstr("line 19999\n"));
}

TEST_F(LocalExecutorTest, TokenIsInTheEnvironmentAndNotInTheArguments) {
  setenv(kTokenVariable, "of-somebody-else", 1);
  auto executor = Make("echo \"$@\" >&2; echo token=$PEWTER_JOB_TOKEN >&2");
  unsetenv(kTokenVariable);
  ASSERT_THAT(executor->Submit({.job_id = "a", .token = "s3cret"}), IsOk());
  const std::string said = WaitForOne(*executor).stderr_tail;
  EXPECT_THAT(said, HasSubstr("work --job a --server 127.0.0.1:1 --parent "));
  EXPECT_THAT(said, HasSubstr("token=s3cret"));
  EXPECT_EQ(said.find("s3cret"), said.rfind("s3cret"));
}

TEST_F(LocalExecutorTest, InheritsNoDescriptorsAndNoBlockedSignals) {
  sigset_t all, old;
  sigfillset(&all);
  pthread_sigmask(SIG_BLOCK, &all, &old);
  // A shell blocks all signals for a moment whenever it starts a process; what it becomes does not.
  auto executor = Make("ls /proc/$$/fd >&2; exec grep -E 'SigBlk|SigIgn' /proc/self/status >&2");
  ASSERT_THAT(executor->Submit({.job_id = "a", .token = "t"}), IsOk());
  pthread_sigmask(SIG_SETMASK, &old, nullptr);
  const std::string said = WaitForOne(*executor).stderr_tail;
  // The shell keeps its script open as 10 or so.
  for (int fd = 3; fd < 10; ++fd) {
    EXPECT_EQ(said.find(absl::StrCat("\n", fd, "\n")), std::string::npos) << said;
  }
  EXPECT_THAT(said, HasSubstr("SigBlk:\t0000000000000000"));
}

TEST_F(LocalExecutorTest, OneWorkerAJob) {
  auto executor = Make("exec sleep 60");
  ASSERT_THAT(executor->Submit({.job_id = "a", .token = "t"}), IsOk());
  EXPECT_EQ(executor->Submit({.job_id = "a", .token = "t"}).code(),
            absl::StatusCode::kAlreadyExists);
  executor->Cancel("a", Executor::CancelMode::kKill);
  EXPECT_EQ(WaitForOne(*executor).signal, SIGKILL);
  EXPECT_THAT(executor->Submit({.job_id = "a", .token = "t"}), IsOk());
}

TEST_F(LocalExecutorTest, StopIsSigterm) {
  auto executor = Make(absl::StrCat("trap 'exit 3' TERM; echo ready > ", folder_ / "ready",
                                    "; while :; do sleep 0.05 2>/dev/null; done"));
  ASSERT_THAT(executor->Submit({.job_id = "a", .token = "t"}), IsOk());
  ASSERT_TRUE(WaitForFile(folder_ / "ready"));
  executor->Cancel("a", Executor::CancelMode::kStop);
  executor->Cancel("unknown", Executor::CancelMode::kStop);
  EXPECT_EQ(WaitForOne(*executor).exit_code, 3);
}

TEST_F(LocalExecutorTest, LeavesNobodyBehind) {
  auto executor = Make(absl::StrCat("echo $$ > ", folder_ / "pid", "; exec sleep 60"));
  ASSERT_THAT(executor->Submit({.job_id = "a", .token = "t"}), IsOk());
  ASSERT_TRUE(WaitForFile(folder_ / "pid"));
  int pid = 0;
  ASSERT_TRUE(absl::SimpleAtoi(ReadFile(folder_ / "pid"), &pid));
  ASSERT_EQ(kill(pid, 0), 0);
  executor.reset();
  EXPECT_EQ(kill(pid, 0), -1);
  EXPECT_EQ(errno, ESRCH);
}

TEST_F(LocalExecutorTest, SaysWhyNoWorkerStarts) {
  auto executor = MakeLocalExecutor({.binary = "/nowhere/pewterd", .server_address = "x"});
  ASSERT_THAT(executor, IsOk());
  const absl::Status status = (*executor)->Submit({.job_id = "a", .token = "t"});
  EXPECT_THAT(std::string(status.message()), HasSubstr("/nowhere/pewterd"));
  EXPECT_TRUE((*executor)->Poll(absl::ZeroDuration()).empty());
}

}  // namespace
}  // namespace pewter::server
