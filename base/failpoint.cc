#include "base/failpoint.h"

#include <cstdlib>

#ifdef PEWTER_FAILPOINTS

#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <fstream>
#include <iterator>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "base/status.h"

#endif

namespace pewter {

#ifdef PEWTER_FAILPOINTS

namespace {

constexpr FailpointInfo kFailpoints[] = {
    {"after_claim", "worker: it has the job, and has done nothing"},
    {"unpublished", "run: a file of the model that is overwritten is gone"},
    {"after_begin", "run: the output's state file is written"},
    {"shard_read", "run: some bytes of an input are read"},
    {"tensor_done", "run: a tensor is merged"},
    {"part_sent", "store: a part of an object has gone out"},
    {"before_shard", "run: a shard is merged and not visible"},
    {"object_synced", "file store: an object is durable and not visible"},
    {"shard_done", "run: a shard is visible, the state file does not know it"},
    {"shard_recorded", "run: the state file knows it"},
    {"before_publish", "run: all shards are there"},
    {"aux_written", "run: one of the other files is there"},
    {"before_commit", "run: the lease is confirmed, the manifest not written"},
    {"after_commit", "run: the manifest is written, the state file still there"},
    {"before_finish", "worker: the output is there, the server does not know"},
    {"after_finish", "worker: the server has answered"},
    {"worker_launched", "server: the process of a worker is started"},
    {"before_database_commit", "server: a transaction is to be committed"},
    {"after_database_commit", "server: it is committed, nobody has been told"},
    {"blob_synced", "server: an upload is durable and no blob yet"},
    {"blob_published", "server: the blob is there, the client does not know"},
    {"set_written", "server: a set is written, its blobs are not looked for"},
};
static_assert(std::size(kFailpoints) == static_cast<size_t>(Failpoint::kSetWritten) + 1);

struct Action {
  enum class Kind { kKill, kPause, kSleep, kError } kind = Kind::kKill;
  absl::Status error;
  int milliseconds = 0;
  int64_t at = 0;  // 0: each hit
};

struct Armed {
  std::string name;
  Action action;
};

absl::Status BadList(absl::string_view entry) {
  return absl::InvalidArgumentError(
      absl::StrCat("PEWTER_FAILPOINTS: cannot read \"", entry,
                   "\"; it is NAME=kill|pause|sleep(MS)|error(CODE)[@N], with a name that `pewterd "
                   "failpoints` lists"));
}

absl::StatusOr<Action> ParseAction(absl::string_view text) {
  Action action;
  if (const size_t at = text.rfind('@'); at != absl::string_view::npos) {
    if (!absl::SimpleAtoi(text.substr(at + 1), &action.at) || action.at < 1) return BadList(text);
    text = text.substr(0, at);
  }
  if (text == "kill") return action;
  if (text == "pause") {
    action.kind = Action::Kind::kPause;
    return action;
  }
  if (!absl::ConsumeSuffix(&text, ")")) return BadList(text);
  if (absl::ConsumePrefix(&text, "sleep(")) {
    action.kind = Action::Kind::kSleep;
    if (!absl::SimpleAtoi(text, &action.milliseconds)) return BadList(text);
    return action;
  }
  if (!absl::ConsumePrefix(&text, "error(")) return BadList(text);
  action.kind = Action::Kind::kError;
  for (int code = 1; code <= static_cast<int>(absl::StatusCode::kUnauthenticated); ++code) {
    if (absl::StatusCodeToString(static_cast<absl::StatusCode>(code)) != text) continue;
    action.error = absl::Status(static_cast<absl::StatusCode>(code), "");
    return action;
  }
  return BadList(text);
}

absl::StatusOr<std::vector<Armed>> ParseList(absl::string_view list) {
  std::vector<Armed> armed;
  for (const absl::string_view entry :
       absl::StrSplit(absl::StripAsciiWhitespace(list), ',', absl::SkipEmpty())) {
    const size_t equals = entry.find('=');
    if (equals == absl::string_view::npos) return BadList(entry);
    const absl::string_view name = entry.substr(0, equals);
    bool known = false;
    for (const FailpointInfo& point : kFailpoints) known = known || name == point.name;
    auto action = ParseAction(entry.substr(equals + 1));
    if (!known || !action.ok()) return BadList(entry);
    armed.push_back({std::string(name), *std::move(action)});
  }
  return armed;
}

struct Setting {
  std::string list;
  std::string folder;
  bool off() const { return list.empty() && folder.empty(); }
};

const Setting& TheSetting() {
  static const auto& setting = *[] {
    const char* const list = getenv("PEWTER_FAILPOINTS");
    const char* const folder = getenv("PEWTER_FAILPOINTS_DIR");
    return new Setting{list == nullptr ? "" : list, folder == nullptr ? "" : folder};
  }();
  return setting;
}

absl::StatusOr<std::vector<Armed>> ArmedNow() {
  const Setting& setting = TheSetting();
  if (!setting.folder.empty()) {
    if (std::ifstream file(absl::StrCat(setting.folder, "/armed")); file) {
      return ParseList(std::string(std::istreambuf_iterator<char>(file), {}));
    }
  }
  return ParseList(setting.list);
}

// The number of this hit, over all processes when they share a folder.
int64_t CountHit(Failpoint point) {
  const Setting& setting = TheSetting();
  static std::atomic<int64_t> hits[std::size(kFailpoints)];
  const int index = static_cast<int>(point);
  if (setting.folder.empty()) return ++hits[index];
  const std::string path = absl::StrCat(setting.folder, "/hits.", kFailpoints[index].name);
  const int fd = open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
  if (fd < 0) return 0;
  struct stat file = {};
  if (flock(fd, LOCK_EX) != 0 || write(fd, "+", 1) != 1 || fstat(fd, &file) != 0) file.st_size = 0;
  close(fd);
  return file.st_size;
}

}  // namespace

absl::Span<const FailpointInfo> Failpoints() { return kFailpoints; }

absl::Status CheckFailpoints() { return ArmedNow().status(); }

absl::Status Reach(Failpoint point) {
  const Setting& setting = TheSetting();
  if (setting.off()) return absl::OkStatus();
  const std::string name = kFailpoints[static_cast<int>(point)].name;
  const int64_t hit = CountHit(point);
  ASSIGN_OR_RETURN(const std::vector<Armed> all, ArmedNow());
  for (const auto& [armed, action] : all) {
    if (armed != name || (action.at != 0 && action.at != hit)) continue;
    switch (action.kind) {
      case Action::Kind::kKill:
        raise(SIGKILL);
        break;
      case Action::Kind::kPause: {
        const std::string go = absl::StrCat(setting.folder, "/go.", name);
        while (access(go.c_str(), F_OK) != 0) {
          std::this_thread::sleep_for(std::chrono::milliseconds(2));
        }
        break;
      }
      case Action::Kind::kSleep:
        std::this_thread::sleep_for(std::chrono::milliseconds(action.milliseconds));
        break;
      case Action::Kind::kError:
        return absl::Status(action.error.code(), absl::StrCat("failpoint ", name));
    }
  }
  return absl::OkStatus();
}

#else

absl::Span<const FailpointInfo> Failpoints() { return {}; }

absl::Status CheckFailpoints() {
  if (!FailpointsArmed()) return absl::OkStatus();
  return absl::FailedPreconditionError(
      "PEWTER_FAILPOINTS is set, and this build has no failpoints: configure one with "
      "-DPEWTER_FAILPOINTS=ON");
}

absl::Status Reach(Failpoint) { return absl::OkStatus(); }

#endif

bool FailpointsArmed() {
  return getenv("PEWTER_FAILPOINTS") != nullptr || getenv("PEWTER_FAILPOINTS_DIR") != nullptr;
}

}  // namespace pewter
