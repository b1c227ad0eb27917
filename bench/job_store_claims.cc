// How long JobStore::Claim takes when many claim at the same time, for bench/service.py.
//
//   pewter_job_store_claims DATABASE JOBS THREADS CLAIMS
//
// Queues JOBS jobs; then each of THREADS servers claims CLAIMS of them, one after the other, as
// fast as it can. Prints JSON.
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "server/jobs/job_store.h"

namespace {

constexpr int kCreators = 8;

void Check(const absl::Status& status) {
  if (status.ok()) return;
  fprintf(stderr, "%s\n", status.ToString().c_str());
  exit(1);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) {
    fprintf(stderr, "usage: %s DATABASE JOBS THREADS CLAIMS\n", argv[0]);
    return 2;
  }
  const auto store = pewter::server::OpenJobStore(argv[1]);
  Check(store.status());
  const int jobs = atoi(argv[2]), threads = atoi(argv[3]), claims = atoi(argv[4]);
  std::vector<std::thread> servers;
  std::atomic<int> next = 0;
  for (int i = 0; i < kCreators; ++i) {
    servers.emplace_back([&] {
      for (int number = next++; number < jobs; number = next++) {
        pewter::server::NewJob job;
        job.job.set_id(absl::StrCat("j", number));
        job.job.set_recipe("merge_method: linear");
        job.job.set_destination_uri(absl::StrCat("/merged/", number));
        job.destination_key = job.job.destination_uri();
        Check((*store)->Create(job, jobs + 1).status());
      }
    });
  }
  for (std::thread& server : servers) server.join();
  servers.clear();
  std::mutex mutex;
  std::vector<double> milliseconds;
  std::set<std::string> claimed;
  const absl::Time start = absl::Now();
  for (int i = 0; i < threads; ++i) {
    servers.emplace_back([&, i] {
      for (int j = 0; j < claims; ++j) {
        const absl::Time begin = absl::Now();
        const auto claim = (*store)->Claim(absl::StrCat("server", i), absl::Seconds(60));
        const absl::Duration took = absl::Now() - begin;
        Check(claim.status());
        const std::lock_guard lock(mutex);
        milliseconds.push_back(absl::ToDoubleMilliseconds(took));
        if (!claim->job || !claimed.insert(claim->job->id()).second) {
          Check(absl::InternalError("no job, or one that was given out twice"));
        }
      }
    });
  }
  for (std::thread& server : servers) server.join();
  const double seconds = absl::ToDoubleSeconds(absl::Now() - start);
  std::sort(milliseconds.begin(), milliseconds.end());
  const auto quantile = [&](double q) {
    return milliseconds[static_cast<size_t>(q * (milliseconds.size() - 1))] / 1000;
  };
  printf(
      "{\"count\": %zu, \"p50_s\": %.6f, \"p99_s\": %.6f, \"max_s\": %.6f, "
      "\"claims_per_second\": %.1f}\n",
      milliseconds.size(), quantile(0.5), quantile(0.99), quantile(1),
      static_cast<double>(milliseconds.size()) / seconds);
}
