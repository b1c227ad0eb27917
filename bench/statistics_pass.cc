// The statistics pass of one or more models over token ids, as a program of its own for
// bench/forward.py.
//
//   pewter_statistics_pass DATA THREADS GRAMS OUT MODEL...
//
// GRAMS is none (the forward pass alone: one site's sums), cross or all. Prints seconds.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "kernels/backends.h"
#include "merge/checkpoint/checkpoint.h"
#include "merge/forward/collect.h"
#include "merge/forward/data.h"
#include "merge/forward/object_path.h"
#include "merge/recipe/recipe.h"

namespace {

void Check(const absl::Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s\n", status.ToString().c_str());
  std::exit(1);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 6) {
    std::fprintf(stderr, "usage: %s DATA THREADS none|cross|all OUT MODEL...\n", argv[0]);
    return 2;
  }
  const auto data = pewter::ForwardData::Open(argv[1]);
  Check(data.status());
  const auto backend = pewter::kernels::OpenBackend({}, std::atoi(argv[2]));
  Check(backend.status());
  const std::string grams = argv[3];
  const auto out = pewter::LocateObject(argv[4]);
  Check(out.status());
  std::vector<pewter::ForwardModel> models;
  for (int i = 5; i < argc; ++i) {
    const auto ref = pewter::ParseModelRef(argv[i]);
    Check(ref.status());
    const auto checkpoint = pewter::Checkpoint::Open(*ref);
    Check(checkpoint.status());
    auto model = pewter::MakeForwardModel(*checkpoint);
    Check(model.status());
    models.push_back(*std::move(model));
  }
  pewter::StatisticsOptions options = {
      .forward = {.backend = backend->get()},
      .choose =
          [&](absl::string_view site) {
            if (grams == "none") {
              // The head's site, so that every layer is gone through.
              return site == "head_input" ? pewter::Grams::kDiagonals : pewter::Grams::kNone;
            }
            if (grams == "all") return pewter::Grams::kAll;
            // Those that alignment reads.
            return absl::StrContains(site, "_input") ? pewter::Grams::kNone : pewter::Grams::kCross;
          },
      .overwrite = true};
  for (pewter::ForwardModel& model : models) model.identity.clear();  // nothing is taken over
  const auto start = std::chrono::steady_clock::now();
  Check(pewter::CollectStatistics(models, *data, options, out->store, out->key).status());
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  std::printf("%.3f\n", seconds.count());
  return 0;
}
