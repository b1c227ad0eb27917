#include "tests/server/postgres_server.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <grp.h>
#include <gtest/gtest.h>
#include <libpq-fe.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <mutex>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "tests/support/temp_folder.h"

namespace pewter::server {
namespace {

// PostgreSQL refuses to run as root; then it runs as this user.
constexpr uid_t kNobody = 65534;

std::string FindPrograms() {
  std::vector<std::string> places;
  if (const char* given = std::getenv("PEWTER_POSTGRES"); given != nullptr) places.push_back(given);
  for (int version = 18; version >= 15; --version) {
    places.push_back(absl::StrCat("/usr/lib/postgresql/", version, "/bin"));
  }
  for (const std::string& place : places) {
    if (access(absl::StrCat(place, "/initdb").c_str(), X_OK) == 0) return place;
  }
  return "";
}

int FreePort() {
  const int probe = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  bind(probe, reinterpret_cast<sockaddr*>(&address), size);
  getsockname(probe, reinterpret_cast<sockaddr*>(&address), &size);
  close(probe);
  return ntohs(address.sin_port);
}

pid_t Spawn(std::vector<std::string> arguments, const std::string& log) {
  std::vector<char*> argv;
  for (std::string& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);
  const pid_t parent = getpid();
  const pid_t child = fork();
  if (child != 0) return child;
  const int out = open(log.c_str(), O_WRONLY | O_CREAT | O_APPEND, 0644);
  dup2(out, 1);
  dup2(out, 2);
  if (getuid() == 0 &&
      (setgroups(0, nullptr) != 0 || setgid(kNobody) != 0 || setuid(kNobody) != 0)) {
    _exit(1);
  }
  // An immediate shutdown.
  prctl(PR_SET_PDEATHSIG, SIGQUIT);
  if (getppid() != parent) _exit(1);
  execv(argv[0], argv.data());
  _exit(127);
}

pid_t g_postgres = 0;
testing::TempFolder* g_folder = nullptr;

void StopNow() {
  if (g_postgres > 0) {
    kill(g_postgres, SIGQUIT);
    waitpid(g_postgres, nullptr, 0);
  }
  g_postgres = 0;
}

}  // namespace

PostgresServer* PostgresServer::Get(std::string& why) {
  static PostgresServer* server = nullptr;
  static std::string missing;
  static std::once_flag once;
  std::call_once(once, [] {
    const std::string programs = FindPrograms();
    if (programs.empty()) {
      missing = "there is no PostgreSQL: install Debian's postgresql-15";
      return;
    }
    g_folder = new testing::TempFolder;
    server = new PostgresServer;
    server->programs_ = programs;
    server->data_ = *g_folder / "data";
    server->port_ = FreePort();
    std::filesystem::create_directories(server->data_);
    if (getuid() == 0) {
      for (const std::string& path : {g_folder->path(), server->data_}) {
        ASSERT_EQ(chown(path.c_str(), kNobody, kNobody), 0);
      }
    }
    int status = 0;
    waitpid(Spawn({absl::StrCat(programs, "/initdb"), "-D", server->data_, "-U", "postgres", "-A",
                   "trust", "-E", "UTF8", "--locale=C", "--no-sync", "--no-instructions"},
                  *g_folder / "log"),
            &status, 0);
    if (status != 0) {
      ADD_FAILURE() << "initdb failed:\n" << testing::ReadFile(*g_folder / "log");
      missing = "initdb failed";
      delete std::exchange(server, nullptr);
      return;
    }
    std::atexit([] {
      StopNow();
      delete g_folder;
    });
    server->Start();
  });
  why = missing;
  return server;
}

void PostgresServer::Start() {
  g_postgres =
      Spawn({absl::StrCat(programs_, "/postgres"), "-D", data_, "-p", absl::StrCat(port_), "-c",
             "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", "fsync=off"},
            *g_folder / "log");
  const std::string url = absl::StrCat("postgresql://postgres@127.0.0.1:", port_, "/postgres");
  for (const absl::Time end = absl::Now() + absl::Seconds(60); absl::Now() < end;) {
    if (PQping(url.c_str()) == PQPING_OK) return;
    absl::SleepFor(absl::Milliseconds(20));
  }
  FAIL() << "PostgreSQL did not start:\n" << testing::ReadFile(*g_folder / "log");
}

void PostgresServer::Stop() { StopNow(); }

std::string PostgresServer::MakeDatabase() {
  static std::atomic<int> count = 0;
  const std::string schema = absl::StrCat("test", ++count);
  const std::string url = absl::StrCat("postgresql://postgres@127.0.0.1:", port_, "/postgres");
  Run(url, absl::StrCat("CREATE SCHEMA ", schema));
  return absl::StrCat(url, "?options=-csearch_path%3D", schema);
}

std::string PostgresServer::Run(const std::string& url, const std::string& sql) {
  const std::unique_ptr<PGconn, void (*)(PGconn*)> connection(PQconnectdb(url.c_str()), &PQfinish);
  const std::unique_ptr<PGresult, void (*)(PGresult*)> result(PQexec(connection.get(), sql.c_str()),
                                                              &PQclear);
  const ExecStatusType status = PQresultStatus(result.get());
  EXPECT_TRUE(status == PGRES_COMMAND_OK || status == PGRES_TUPLES_OK)
      << PQerrorMessage(connection.get());
  return PQntuples(result.get()) > 0 ? PQgetvalue(result.get(), 0, 0) : "";
}

}  // namespace pewter::server
