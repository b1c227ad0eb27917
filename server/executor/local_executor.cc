#include "server/executor/local_executor.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/eventfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "base/status.h"

extern char** environ;

namespace pewter::server {
namespace {

constexpr size_t kStderrTailBytes = 4096;

absl::Status ErrnoStatus(absl::string_view what, int error) {
  return absl::UnavailableError(absl::StrCat(what, ": ", strerror(error)));
}

// Whether a worker must not inherit the variable: only the server touches the job database.
bool IsSecret(absl::string_view entry) {
  const absl::string_view name = entry.substr(0, entry.find('='));
  return name == kTokenVariable || name == kDatabaseVariable || name == "PGPASSWORD" ||
         name == "PGPASSFILE";
}

class Fd {
 public:
  explicit Fd(int fd = -1) : fd_(fd) {}
  Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Fd& operator=(Fd&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Fd() {
    if (fd_ >= 0) close(fd_);
  }
  int get() const { return fd_; }

 private:
  int fd_;
};

struct SpawnActions {
  SpawnActions() { posix_spawn_file_actions_init(&actions); }
  ~SpawnActions() { posix_spawn_file_actions_destroy(&actions); }
  posix_spawn_file_actions_t actions;
};

struct SpawnAttributes {
  SpawnAttributes() { posix_spawnattr_init(&attributes); }
  ~SpawnAttributes() { posix_spawnattr_destroy(&attributes); }
  posix_spawnattr_t attributes;
};

// A child. Its stderr is a pipe whose end of file says that it is gone: workers start no processes
// and do not close it.
struct Child {
  pid_t pid = 0;
  Fd stderr_pipe;
  std::string tail;
};

class LocalExecutor final : public Executor {
 public:
  LocalExecutor(LocalExecutorOptions options, Fd wake)
      : options_(std::move(options)), wake_(std::move(wake)) {}

  ~LocalExecutor() override {
    absl::MutexLock lock(&mutex_);
    for (auto& [id, child] : children_) kill(child.pid, SIGKILL);
    for (auto& [id, child] : children_) waitpid(child.pid, nullptr, 0);
  }

  absl::Status Submit(const WorkerLaunch& launch) override {
    absl::MutexLock lock(&mutex_);
    if (children_.contains(launch.job_id)) {
      return absl::AlreadyExistsError(absl::StrCat("job ", launch.job_id, " has a worker"));
    }
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) != 0) return ErrnoStatus("cannot make a pipe", errno);
    Fd read_end(ends[0]);
    const Fd write_end(ends[1]);
    fcntl(read_end.get(), F_SETFL, O_NONBLOCK);

    SpawnActions spawn;
    posix_spawn_file_actions_addopen(&spawn.actions, 0, "/dev/null", O_RDONLY, 0);
    posix_spawn_file_actions_addopen(&spawn.actions, 1, "/dev/null", O_WRONLY, 0);
    posix_spawn_file_actions_adddup2(&spawn.actions, write_end.get(), 2);
    posix_spawn_file_actions_addclosefrom_np(&spawn.actions, 3);
    // A worker handles signals its own way, whatever this process does with them. Its own
    // process group keeps a terminal's ^C away from it: the server decides when workers stop.
    SpawnAttributes attributes;
    sigset_t none, all;
    sigemptyset(&none);
    sigfillset(&all);
    posix_spawnattr_setsigmask(&attributes.attributes, &none);
    posix_spawnattr_setsigdefault(&attributes.attributes, &all);
    posix_spawnattr_setpgroup(&attributes.attributes, 0);
    posix_spawnattr_setflags(&attributes.attributes, POSIX_SPAWN_SETSIGMASK |
                                                         POSIX_SPAWN_SETSIGDEF |
                                                         POSIX_SPAWN_SETPGROUP);

    std::vector<std::string> arguments = {"pewterd",  "work",
                                          "--job",    launch.job_id,
                                          "--server", options_.server_address,
                                          "--parent", absl::StrCat(getpid())};
    std::vector<std::string> environment;
    for (char** entry = environ; *entry != nullptr; ++entry) {
      if (!IsSecret(*entry)) environment.emplace_back(*entry);
    }
    environment.push_back(absl::StrCat(kTokenVariable, "=", launch.token));

    pid_t pid = 0;
    const int error =
        posix_spawn(&pid, options_.binary.c_str(), &spawn.actions, &attributes.attributes,
                    Pointers(arguments).data(), Pointers(environment).data());
    if (error != 0) return ErrnoStatus(absl::StrCat("cannot start ", options_.binary), error);
    children_.emplace(launch.job_id, Child{.pid = pid, .stderr_pipe = std::move(read_end)});
    Wake();
    return absl::OkStatus();
  }

  std::vector<WorkerExit> Poll(absl::Duration timeout) override {
    std::vector<pollfd> fds = {{.fd = wake_.get(), .events = POLLIN, .revents = 0}};
    {
      absl::MutexLock lock(&mutex_);
      for (const auto& [id, child] : children_) {
        fds.push_back({.fd = child.stderr_pipe.get(), .events = POLLIN, .revents = 0});
      }
    }
    // Pipes are closed by this thread alone, so the descriptors stay good without the lock.
    poll(fds.data(), fds.size(), static_cast<int>(absl::ToInt64Milliseconds(timeout)));
    uint64_t ignored;
    while (read(wake_.get(), &ignored, sizeof ignored) > 0) {
    }

    std::vector<WorkerExit> exits;
    absl::MutexLock lock(&mutex_);
    for (auto it = children_.begin(); it != children_.end();) {
      if (ReadTail(it->second)) {
        ++it;
        continue;
      }
      int status = 0;
      while (waitpid(it->second.pid, &status, 0) < 0 && errno == EINTR) {
      }
      exits.push_back({.job_id = it->first,
                       .exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : 0,
                       .signal = WIFSIGNALED(status) ? WTERMSIG(status) : 0,
                       .stderr_tail = std::move(it->second.tail)});
      children_.erase(it++);
    }
    return exits;
  }

  void Cancel(absl::string_view job_id, CancelMode mode) override {
    absl::MutexLock lock(&mutex_);
    const auto it = children_.find(job_id);
    // Not yet waited for, so the id is still that process's.
    if (it != children_.end()) kill(it->second.pid, mode == CancelMode::kKill ? SIGKILL : SIGTERM);
  }

 private:
  static std::vector<char*> Pointers(std::vector<std::string>& strings) {
    std::vector<char*> pointers;
    for (std::string& string : strings) pointers.push_back(string.data());
    pointers.push_back(nullptr);
    return pointers;
  }

  // False at the end of the file.
  static bool ReadTail(Child& child) {
    char buffer[4096];
    while (true) {
      const ssize_t size = read(child.stderr_pipe.get(), buffer, sizeof buffer);
      if (size == 0) return false;
      if (size < 0) return errno == EAGAIN || errno == EINTR;
      child.tail.append(buffer, size);
      if (child.tail.size() > kStderrTailBytes) {
        child.tail.erase(0, child.tail.size() - kStderrTailBytes);
      }
    }
  }

  void Wake() {
    const uint64_t one = 1;
    [[maybe_unused]] const ssize_t written = write(wake_.get(), &one, sizeof one);
  }

  const LocalExecutorOptions options_;
  const Fd wake_;  // Submit has added a pipe to wait for
  absl::Mutex mutex_;
  absl::flat_hash_map<std::string, Child> children_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace

absl::StatusOr<std::unique_ptr<Executor>> MakeLocalExecutor(const LocalExecutorOptions& options) {
  Fd wake(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (wake.get() < 0) return ErrnoStatus("cannot make an eventfd", errno);
  return std::make_unique<LocalExecutor>(options, std::move(wake));
}

}  // namespace pewter::server
