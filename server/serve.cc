#include "server/serve.h"

#include <fcntl.h>
#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>
#include <semaphore.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iostream>
#include <memory>
#include <optional>
#include <thread>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/cleanup/cleanup.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "base/failpoint.h"
#include "base/reason.h"
#include "base/status.h"
#include "base/units.h"
#include "server/artifact_service.h"
#include "server/collector.h"
#include "server/executor/local_executor.h"
#include "server/health.h"
#include "server/job_manager.h"
#include "server/listen_address.h"
#include "server/log.h"
#include "server/merge_service.h"
#include "server/planner.h"
#include "server/random_token.h"
#include "server/stop_signals.h"
#include "server/worker_service.h"
#include "store/artifact_store.h"
#include "store/housekeeping.h"

namespace pewter::server {
namespace {

// Calls besides watches that run at the same time; more are refused with RESOURCE_EXHAUSTED. Each
// has a thread.
constexpr int kMaxCalls = 128;
constexpr int kMaxPlans = 2;
// Workers stop between tiles; this is for one that does not.
constexpr absl::Duration kDrainGrace = absl::Seconds(30);
constexpr std::chrono::seconds kShutdownGrace{2};
constexpr absl::Duration kHealthInterval = absl::Seconds(1);
constexpr int kMinPingIntervalMs = 10'000;

absl::StatusOr<ListenAddress> CheckListen(const ServeOptions& options) {
  ASSIGN_OR_RETURN(ListenAddress address, ParseListenAddress(options.listen));
  if (!address.IsLoopback() && !options.insecure) {
    return absl::InvalidArgumentError(absl::StrCat(
        "--listen ", options.listen,
        " can be reached from other machines, and this server has no TLS and no authentication: "
        "whoever connects reads and writes files as you. Listen on 127.0.0.1, or give --insecure "
        "in a network where everybody may"));
  }
  return address;
}

absl::Status MakeFolder(const std::string& path) {
  std::error_code error;
  std::filesystem::create_directories(path, error);
  if (error) return absl::PermissionDeniedError(absl::StrCat(path, ": ", error.message()));
  return absl::OkStatus();
}

// Held until the process ends, however it ends.
absl::Status LockFolder(const std::string& data) {
  const std::string path = absl::StrCat(data, "/lock");
  const int fd = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (fd < 0) return absl::PermissionDeniedError(absl::StrCat(path, ": ", strerror(errno)));
  if (flock(fd, LOCK_EX | LOCK_NB) == 0) return absl::OkStatus();
  close(fd);
  return absl::FailedPreconditionError(
      absl::StrCat("another pewterd serves from ", data, "; stop it or give another --data"));
}

// Readers find the whole address or no file.
absl::Status WriteAddress(const std::string& data, const std::string& address) {
  const std::string path = absl::StrCat(data, "/address");
  const std::string temporary = absl::StrCat(path, ".new");
  std::ofstream(temporary) << address << "\n";
  if (rename(temporary.c_str(), path.c_str()) != 0) {
    return absl::PermissionDeniedError(absl::StrCat(path, ": ", strerror(errno)));
  }
  return absl::OkStatus();
}

// Tells this server from others that share its database; the same after a restart, so that it knows
// which jobs it held. Whoever holds the folder's lock may read and write it.
absl::StatusOr<std::string> ServerId(const std::string& data) {
  const std::string path = absl::StrCat(data, "/server-id");
  std::string id;
  std::getline(std::ifstream(path) >> std::ws, id);
  if (!id.empty()) return id;
  id = RandomHex(8);
  std::ofstream file(path);
  file << id << "\n";
  if (!file.flush()) return absl::PermissionDeniedError(absl::StrCat("cannot write ", path));
  return id;
}

absl::StatusOr<std::string> ChooseDatabase(const ServeOptions& options) {
  if (HoldsPassword(options.database)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "--database holds a password, which every user of this machine can read in the list of "
        "processes; give the whole URL in ",
        kDatabaseVariable, ", or the password in PGPASSFILE or PGPASSWORD"));
  }
  if (!options.database.empty()) return options.database;
  const char* const variable = getenv(kDatabaseVariable);
  if (variable != nullptr && *variable != '\0') return std::string(variable);
  return absl::StrCat("sqlite:", options.data, "/jobs.db");
}

std::string ArtifactRoot(const ServeOptions& options) {
  std::string root = options.artifacts;
  if (const char* inherited = getenv(kArtifactRootVariable); root.empty() && inherited != nullptr) {
    root = inherited;
  }
  if (root.empty()) root = absl::StrCat(options.data, "/artifacts");
  return absl::StrContains(root, "://") ? root : std::filesystem::absolute(root).string();
}

absl::Status CheckFree(const std::string& place, int64_t wanted) {
  ASSIGN_OR_RETURN(const std::shared_ptr<ObjectStore> store, OpenStore(place));
  const std::optional<int64_t> free = FreeBytes(*store);
  if (!free || *free >= wanted) return absl::OkStatus();
  return WithReason(absl::ResourceExhaustedError(
                        absl::StrCat(place, ": ", FormatBytes(*free), " are free, less than the ",
                                     FormatBytes(wanted), " of --min-free-disk")),
                    kDiskFull);
}

// Tells what the health service answers, once a second: for the server as a whole whether the job
// database takes changes, for kHealthOfJobs also whether there is room for jobs.
class HealthMonitor {
 public:
  HealthMonitor(grpc::HealthCheckServiceInterface* service, JobManager* jobs,
                std::function<absl::Status()> may_claim)
      : thread_([=, this] {
          absl::MutexLock lock(&mutex_);
          while (!stopping_) {
            mutex_.Unlock();
            const absl::Status database = jobs->Check();
            const bool takes_jobs = database.ok() && may_claim().ok();
            mutex_.Lock();
            if (stopping_) return;
            if (database.ok() != serving_) {
              serving_ = database.ok();
              Log(serving_ ? LogLevel::kInfo : LogLevel::kError,
                  serving_ ? "serving" : "not serving: the job database takes no changes",
                  {{"error", std::string(database.message())}});
            }
            service->SetServingStatus("", serving_);
            service->SetServingStatus(kHealthOfJobs, takes_jobs);
            stop_.WaitWithTimeout(&mutex_, kHealthInterval);
          }
        }) {}
  ~HealthMonitor() {
    {
      absl::MutexLock lock(&mutex_);
      stopping_ = true;
      stop_.SignalAll();
    }
    thread_.join();
  }

 private:
  absl::Mutex mutex_;
  absl::CondVar stop_;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  bool serving_ ABSL_GUARDED_BY(mutex_) = true;
  std::thread thread_;
};

// The signal that ends the server. It is handled rather than blocked and waited for: a thread that
// blocks none would take it and die.
std::atomic<int> g_stop_signal{0};
sem_t g_stop;

void OnStopSignal(int signal) {
  const int saved = errno;
  g_stop_signal = signal;
  sem_post(&g_stop);
  errno = saved;
}

}  // namespace

absl::Status Serve(const ServeOptions& options) {
  sem_init(&g_stop, 0, 0);
  HandleStopSignals(&OnStopSignal);
  if (FailpointsArmed()) {
    Log(LogLevel::kWarning,
        "failpoints are armed: processes may be killed, stopped or made to fail");
  }

  ASSIGN_OR_RETURN(ListenAddress address, CheckListen(options));
  ASSIGN_OR_RETURN(const AccessPolicy access,
                   AccessPolicy::Make(options.allow_read, options.allow_write));
  ASSIGN_OR_RETURN(const ProjectPolicy projects, ProjectPolicy::Make(options.projects));
  RETURN_IF_ERROR(MakeFolder(options.data));
  RETURN_IF_ERROR(LockFolder(options.data));
  ASSIGN_OR_RETURN(const std::string server_id, ServerId(options.data));
  ASSIGN_OR_RETURN(const std::string database, ChooseDatabase(options));
  ASSIGN_OR_RETURN(std::unique_ptr<JobStore> store, OpenJobStore(database, projects));
  // Workers find it in their environment, and have no working directory of ours.
  const std::string artifact_root = ArtifactRoot(options);
  setenv(kArtifactRootVariable, artifact_root.c_str(), /*overwrite=*/1);
  ASSIGN_OR_RETURN(const std::unique_ptr<ArtifactManager> artifacts,
                   ArtifactManager::Open({.root = artifact_root,
                                          .partial = absl::StrCat(options.data, "/partial"),
                                          .quota_bytes = options.artifact_quota,
                                          .min_free_bytes = options.min_free_disk,
                                          .retention = options.retention}));
  const auto may_claim = [&] {
    absl::Status roomy = CheckFree(options.data, options.min_free_disk);
    return roomy.ok() ? CheckFree(artifact_root, options.min_free_disk) : roomy;
  };
  const absl::Duration lease = absl::Seconds(options.lease_seconds);
  JobManager jobs(std::move(store), {.server = server_id,
                                     .workers = options.workers,
                                     .lease = lease,
                                     .look = std::min(absl::Seconds(5), lease / 3),
                                     .start_limit = 4 * lease,
                                     .max_watches = options.max_watches,
                                     .access = access,
                                     .may_claim = may_claim});
  Planner planner(kMaxPlans, access);
  MergeServiceImpl merge_service(&jobs, &planner);
  WorkerServiceImpl worker_service(&jobs);
  ArtifactServiceImpl artifact_service(artifacts.get(), &jobs);
  ByteStreamImpl byte_stream(artifacts.get(), &jobs, {});

  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  grpc::ServerBuilder builder;
  builder.AddListeningPort(address.ToString(), grpc::InsecureServerCredentials(), &address.port);
  // Or a second server on the same port would get a part of the calls.
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS,
                             kMinPingIntervalMs);
  builder.SetResourceQuota(
      grpc::ResourceQuota("pewterd").SetMaxThreads(kMaxCalls + options.max_watches));
  builder.RegisterService(&merge_service);
  builder.RegisterService(&worker_service);
  builder.RegisterService(&artifact_service);
  builder.RegisterService(&byte_stream);
  const std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  if (server == nullptr) {
    return absl::UnavailableError(absl::StrCat("cannot listen on ", options.listen));
  }

  LocalExecutorOptions executor_options{.server_address = address.LocalTarget()};
  if (!options.worker_program.empty()) executor_options.binary = options.worker_program;
  ASSIGN_OR_RETURN(std::unique_ptr<Executor> executor, MakeLocalExecutor(executor_options));
  RETURN_IF_ERROR(jobs.Start(std::move(executor)));
  auto health = std::make_unique<HealthMonitor>(server->GetHealthCheckService(), &jobs, may_claim);
  auto collector = std::make_unique<Collector>(&jobs, options.retention);
  RETURN_IF_ERROR(WriteAddress(options.data, address.ToString()));
  const absl::Cleanup remove_address = [&] {
    unlink(absl::StrCat(options.data, "/address").c_str());
  };
  std::cout << "listening on " << address.ToString() << std::endl;
  Log(LogLevel::kInfo, "server started",
      {{"address", address.ToString()}, {"data", options.data}, {"server", server_id}});

  while (sem_wait(&g_stop) != 0) {
  }
  HandleStopSignals(SIG_DFL);  // a second one ends it at once
  Log(LogLevel::kInfo, "server stops", {{"signal", strsignal(g_stop_signal)}});
  health.reset();
  collector.reset();
  server->GetHealthCheckService()->SetServingStatus(false);
  jobs.Drain(kDrainGrace);
  server->Shutdown(std::chrono::system_clock::now() + kShutdownGrace);
  Log(LogLevel::kInfo, "server stopped");
  return absl::OkStatus();
}

std::string DefaultDataFolder() {
  if (const char* state = getenv("XDG_STATE_HOME"); state != nullptr && *state != '\0') {
    return absl::StrCat(state, "/pewter");
  }
  const char* home = getenv("HOME");
  return absl::StrCat(home != nullptr ? home : "", "/.local/state/pewter");
}

}  // namespace pewter::server
