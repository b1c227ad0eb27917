// Times of linear assignments whose costs are in files, for bench/assignment.py:
//
//   pewter_assignment_bench RUNS COSTS SIZE [MOVED]
//
// COSTS and MOVED hold SIZE x SIZE float32 values, row-major; the sum is made as great as it can
// be. Prints a line of JSON: seconds of CPU time (best of RUNS) and the optimum, for COSTS, and for
// MOVED from nothing (`cold`) and from the prices that COSTS left (`warm`).
#include <time.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <string>
#include <vector>

#include "kernels/assignment.h"

namespace pewter::kernels {
namespace {

[[noreturn]] void Fail(const std::string& what) {
  std::fprintf(stderr, "pewter_assignment_bench: %s\n", what.c_str());
  std::exit(1);
}

std::vector<float> ReadCosts(const char* path, int64_t size) {
  std::vector<float> costs(size * size);
  std::ifstream file(path, std::ios::binary);
  file.read(reinterpret_cast<char*>(costs.data()),
            static_cast<std::streamsize>(costs.size() * sizeof(float)));
  if (!file) Fail(std::string("cannot read ") + path);
  return costs;
}

double CpuSeconds() {
  timespec now{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

struct Timed {
  double seconds = std::numeric_limits<double>::infinity();
  Assignment assignment;
};

Timed Solve(const std::vector<float>& costs, int64_t size, const std::vector<double>& prices,
            int runs) {
  Timed best;
  for (int run = 0; run < runs; ++run) {
    const double begin = CpuSeconds();
    auto assignment = SolveAssignment({.costs = {.data = costs.data(),
                                                 .dtype = DType::kF32,
                                                 .rows = size,
                                                 .columns = size,
                                                 .stride = size},
                                       .maximize = true,
                                       .prices = prices});
    best.seconds = std::min(best.seconds, CpuSeconds() - begin);
    if (!assignment.ok()) Fail(std::string(assignment.status().message()));
    best.assignment = *std::move(assignment);
  }
  return best;
}

int Main(int argc, char** argv) {
  if (argc != 4 && argc != 5) Fail("want RUNS COSTS SIZE [MOVED]");
  const int runs = std::atoi(argv[1]);
  const int64_t size = std::atoll(argv[3]);
  if (runs < 1 || size < 1) Fail("RUNS and SIZE are at least 1");
  const Timed first = Solve(ReadCosts(argv[2], size), size, {}, runs);
  std::printf("{\"seconds\": %.9f, \"total\": %.17g", first.seconds, first.assignment.total);
  if (argc == 5) {
    const std::vector<float> moved = ReadCosts(argv[4], size);
    const Timed cold = Solve(moved, size, {}, runs);
    const Timed warm = Solve(moved, size, first.assignment.prices, runs);
    std::printf(", \"cold\": %.9f, \"warm\": %.9f, \"moved_total\": %.17g, \"warm_total\": %.17g",
                cold.seconds, warm.seconds, cold.assignment.total, warm.assignment.total);
  }
  std::printf("}\n");
  return 0;
}

}  // namespace
}  // namespace pewter::kernels

int main(int argc, char** argv) { return pewter::kernels::Main(argc, argv); }
