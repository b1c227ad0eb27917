// The clients and workers of bench/service.py, each a thread that makes the RPCs of a real one.
//
//   pewter_service_load ADDRESS SOCKET JOBS WATCHERS WORKERS JOB_SECONDS SECONDS
//
// First JOBS jobs are queued, while the workers hold the first of them. Then, for SECONDS, all that
// is printed as JSON is measured:
//   workers   run one job after the other as `pewterd work` does (a connection of its own, claim,
//             heartbeats every 250 ms with progress, a confirmed lease, the result), but sleep
//             JOB_SECONDS, half of it more or less, where that merges. For each job done a client
//             queues another, so that the queue stays as long as it was.
//   watchers  each watches a job until it is done, and then another; the jobs that come next in the
//             order of their creation. Lag is from an event's time, or for progress from the
//             worker's call, to its receipt. Events of a job must be numbered without gaps.
// Server and clients share the machine and its clock.
#include <grpcpp/grpcpp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "pewter/v1/merge_service.grpc.pb.h"
#include "pewter/v1/worker_service.grpc.pb.h"

namespace {

namespace v1 = pewter::v1;

constexpr int kCreators = 16;
constexpr int kWatchersPerConnection = 10;
constexpr absl::Duration kHeartbeatInterval = absl::Milliseconds(250);
constexpr char kRecipe[] =
    "merge_method: linear\nmodels:\n  - {model: /models/a, parameters: {weight: 1}}\n"
    "  - {model: /models/b, parameters: {weight: 1}}\n";

// Durations, of which quantiles are wanted. Thread-safe.
class Samples {
 public:
  void Add(absl::Duration duration) {
    const std::lock_guard lock(mutex_);
    seconds_.push_back(absl::ToDoubleSeconds(duration));
  }
  // {"count": N, "p50_s": S, "p99_s": S, "max_s": S}
  std::string ToJson() {
    const std::lock_guard lock(mutex_);
    std::sort(seconds_.begin(), seconds_.end());
    const auto quantile = [&](double q) {
      return seconds_.empty() ? 0 : seconds_[static_cast<size_t>(q * (seconds_.size() - 1))];
    };
    return absl::StrCat("{\"count\": ", seconds_.size(), ", \"p50_s\": ", quantile(0.5),
                        ", \"p99_s\": ", quantile(0.99), ", \"max_s\": ", quantile(1), "}");
  }

 private:
  std::mutex mutex_;
  std::vector<double> seconds_;
};

struct Options {
  std::string address, socket;
  int jobs = 0, watchers = 0, workers = 0;
  absl::Duration job_time, time;
};

class Load {
 public:
  explicit Load(Options options) : options_(std::move(options)) {}

  void Run() {
    Listen();
    for (int i = 0; i < options_.workers; ++i) std::thread([this, i] { Work(i); }).detach();
    const absl::Duration fill = Fill();
    for (int i = 0; i < options_.watchers; ++i) {
      if (i % kWatchersPerConnection == 0) watch_channels_.push_back(Connect());
      std::thread([this, channel = watch_channels_.back()] { Watch(channel); }).detach();
    }
    absl::SleepFor(absl::Seconds(2));  // until all watch
    measuring_ = true;
    const absl::Time start = absl::Now();
    const absl::Duration cpu = Cpu();
    absl::SleepFor(options_.time);
    measuring_ = false;
    const double seconds = absl::ToDoubleSeconds(absl::Now() - start);
    printf(
        "{\"fill_s\": %.3f, \"creates_per_second\": %.1f, \"fill_create\": %s, \"create\": %s,\n"
        "\"claim\": %s, \"heartbeat\": %s, \"finish\": %s,\n\"event_lag\": %s, "
        "\"progress_lag\": %s,\n\"jobs_per_second\": %.1f, \"watches_ended\": %d, \"gaps\": %d, "
        "\"errors\": %d, \"client_cpu_s\": %.2f}\n",
        absl::ToDoubleSeconds(fill), options_.jobs / absl::ToDoubleSeconds(fill),
        fill_create_.ToJson().c_str(), create_.ToJson().c_str(), claim_.ToJson().c_str(),
        heartbeat_.ToJson().c_str(), finish_.ToJson().c_str(), event_lag_.ToJson().c_str(),
        progress_lag_.ToJson().c_str(), done_ / seconds, watches_.load(), gaps_.load(),
        errors_.load(), absl::ToDoubleSeconds(Cpu() - cpu));
    fflush(stdout);
    _exit(errors_ == 0 && gaps_ == 0 ? 0 : 1);  // what still runs ends with the process
  }

 private:
  static absl::Duration Cpu() {
    rusage usage{};
    getrusage(RUSAGE_SELF, &usage);
    return absl::DurationFromTimeval(usage.ru_utime) + absl::DurationFromTimeval(usage.ru_stime);
  }

  std::shared_ptr<grpc::Channel> Connect(const std::string& address) {
    grpc::ChannelArguments arguments;
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);  // a connection of its own
    return grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), arguments);
  }
  std::shared_ptr<grpc::Channel> Connect() { return Connect(options_.address); }

  void Failed(const char* what, const grpc::Status& status) {
    if (++errors_ <= 10) {
      fprintf(stderr, "%s: %d %s\n", what, status.error_code(), status.error_message().c_str());
    }
  }

  void Listen() {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    if (options_.socket.size() >= sizeof address.sun_path) exit(2);
    strcpy(address.sun_path, options_.socket.c_str());
    listener_ = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (bind(listener_, reinterpret_cast<sockaddr*>(&address), sizeof address) != 0 ||
        listen(listener_, SOMAXCONN) != 0) {
      perror(options_.socket.c_str());
      exit(1);
    }
  }

  void Create(v1::MergeService::Stub& stub, Samples* samples) {
    v1::CreateJobRequest request;
    request.set_recipe(kRecipe);
    request.set_destination_uri(absl::StrCat("/merged/", ++destinations_));
    v1::CreateJobResponse response;
    grpc::ClientContext context;
    const absl::Time start = absl::Now();
    const grpc::Status status = stub.CreateJob(&context, request, &response);
    if (!status.ok()) return Failed("CreateJob", status);
    if (samples != nullptr) samples->Add(absl::Now() - start);
    const std::lock_guard lock(mutex_);
    created_.push_back(response.job().id());
    more_created_.notify_one();
  }

  // Returns how long it took.
  absl::Duration Fill() {
    const absl::Time start = absl::Now();
    std::atomic<int> left = options_.jobs;
    std::vector<std::thread> creators;
    for (int i = 0; i < kCreators; ++i) {
      creators.emplace_back([&] {
        const auto stub = v1::MergeService::NewStub(Connect());
        while (--left >= 0) Create(*stub, &fill_create_);
      });
    }
    for (std::thread& creator : creators) creator.join();
    filled_ = true;
    return absl::Now() - start;
  }

  void Work(int seed) {
    std::minstd_rand random(seed + 1);
    const auto client = v1::MergeService::NewStub(Connect());
    while (true) {
      const int connection = accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC);
      std::string line;
      for (char c; read(connection, &c, 1) == 1 && c != '\n';) line += c;
      const std::vector<std::string> words = absl::StrSplit(line, ' ');
      if (words.size() == 3) {
        const absl::Duration time =
            options_.job_time * std::uniform_real_distribution<double>(0.5, 1.5)(random);
        if (RunJob(words[0], words[1], words[2], time))
          Create(*client, measuring_ ? &create_ : nullptr);
      }
      close(connection);
    }
  }

  // As server/work.cc.
  bool RunJob(const std::string& id, const std::string& token, const std::string& address,
              absl::Duration time) {
    const auto stub = v1::WorkerService::NewStub(Connect(address));
    // Calls, and keeps how long it took.
    const auto call = [&](const char* what, Samples& samples, const auto& invoke) {
      grpc::ClientContext context;
      context.AddMetadata("pewter-job-token", token);
      const absl::Time start = absl::Now();
      const grpc::Status status = invoke(&context);
      if (!status.ok()) Failed(what, status);
      if (measuring_) samples.Add(absl::Now() - start);
      return status.ok();
    };
    v1::ClaimJobRequest claim;
    claim.set_job_id(id);
    v1::ClaimJobResponse claimed;
    if (!call("ClaimJob", claim_, [&](grpc::ClientContext* context) {
          return stub->ClaimJob(context, claim, &claimed);
        })) {
      return false;
    }
    v1::HeartbeatRequest heartbeat;
    heartbeat.set_job_id(id);
    heartbeat.set_lease_generation(claimed.job().lease_generation());
    const auto beat = [&](v1::JobState state, bool confirm) {
      heartbeat.set_state(state);
      heartbeat.set_confirm_lease(confirm);
      heartbeat.mutable_progress()->set_tensors_total(1000);
      heartbeat.mutable_progress()->set_current_tensor("model.layers.17.mlp.down_proj.weight");
      heartbeat.mutable_progress()->set_read_bytes(absl::ToUnixMicros(absl::Now()));
      v1::HeartbeatResponse response;
      return call("Heartbeat", heartbeat_, [&](grpc::ClientContext* context) {
        return stub->Heartbeat(context, heartbeat, &response);
      });
    };
    const absl::Time start = absl::Now();
    do {
      if (!beat(v1::JOB_STATE_RUNNING, false)) return false;
      absl::SleepFor(kHeartbeatInterval);
    } while (!filled_ || absl::Now() < start + time);
    if (!beat(v1::JOB_STATE_PUBLISHING, true)) return false;
    v1::FinishJobRequest finish;
    finish.set_job_id(id);
    finish.set_lease_generation(claimed.job().lease_generation());
    finish.mutable_output()->set_uri(claimed.job().destination_uri());
    v1::FinishJobResponse finished;
    if (!call("FinishJob", finish_, [&](grpc::ClientContext* context) {
          return stub->FinishJob(context, finish, &finished);
        })) {
      return false;
    }
    if (measuring_) ++done_;
    return true;
  }

  std::string NextCreated() {
    std::unique_lock lock(mutex_);
    more_created_.wait(lock, [&] { return next_watched_ < created_.size(); });
    return created_[next_watched_++];
  }

  void Watch(const std::shared_ptr<grpc::Channel>& channel) {
    const auto stub = v1::MergeService::NewStub(channel);
    while (true) {
      v1::WatchJobRequest request;
      request.set_job_id(NextCreated());
      grpc::ClientContext context;
      const int64_t opened = absl::ToUnixMicros(absl::Now());
      const auto stream = stub->WatchJob(&context, request);
      int64_t sequence = 0;
      for (v1::WatchJobResponse response; stream->Read(&response);) {
        const int64_t now = absl::ToUnixMicros(absl::Now());
        const v1::JobEvent& event = response.event();
        int64_t time = event.time().seconds() * 1'000'000 + event.time().nanos() / 1000;
        if (event.has_progress()) {
          time = event.progress().read_bytes();
        } else if (event.sequence() != ++sequence) {
          ++gaps_;
          sequence = event.sequence();
        }
        // What was before the watch is not late.
        if (!measuring_ || time < opened) continue;
        (event.has_progress() ? progress_lag_ : event_lag_).Add(absl::Microseconds(now - time));
      }
      const grpc::Status status = stream->Finish();
      if (!status.ok()) {
        Failed("WatchJob", status);
        absl::SleepFor(absl::Seconds(1));
      } else if (measuring_) {
        ++watches_;
      }
    }
  }

  const Options options_;
  int listener_ = -1;
  std::vector<std::shared_ptr<grpc::Channel>> watch_channels_;
  std::atomic<int64_t> destinations_ = 0;
  std::atomic<bool> filled_ = false, measuring_ = false;
  std::atomic<int> errors_ = 0, gaps_ = 0, done_ = 0, watches_ = 0;
  Samples fill_create_, create_, claim_, heartbeat_, finish_, event_lag_, progress_lag_;
  std::mutex mutex_;
  std::condition_variable more_created_;
  std::vector<std::string> created_;
  size_t next_watched_ = 0;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 8) {
    fprintf(stderr, "usage: %s ADDRESS SOCKET JOBS WATCHERS WORKERS JOB_SECONDS SECONDS\n",
            argv[0]);
    return 2;
  }
  Load load({.address = argv[1],
             .socket = argv[2],
             .jobs = atoi(argv[3]),
             .watchers = atoi(argv[4]),
             .workers = atoi(argv[5]),
             .job_time = absl::Seconds(atof(argv[6])),
             .time = absl::Seconds(atof(argv[7]))});
  load.Run();
}
