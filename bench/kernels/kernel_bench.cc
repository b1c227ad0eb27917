// Kernel benchmarks: bytes per second (reads and writes) of each op on tensors of 256 MiB, as a
// fraction of what a plain copy moves on the same device and threads at the same time.
//
//   pewter_kernel_bench [--device=cpu|cuda[:N]] [--threads=N] [Google Benchmark's flags]
//
// Every iteration times a copy and then the kernel, so that a busy machine slows both. With one
// CPU thread the clock is the thread's CPU time, else wall time. Counters: `of_memcpy`, the ratio
// of the medians; `ns_per_draw`, what random masks add, where there are any; `seconds` for
// selection.
#include <benchmark/benchmark.h>
#include <time.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "kernels/backends.h"
#include "tests/kernels/view_scan.h"

namespace pewter::kernels {
namespace {

constexpr int64_t kTensorBytes = int64_t{256} << 20;
constexpr int kMaxBenchInputs = 8;

void Require(const absl::Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "pewter_kernel_bench: %s\n", std::string(status.message()).c_str());
  std::exit(1);
}
template <class T>
T Require(absl::StatusOr<T> value) {
  Require(value.status());
  return *std::move(value);
}

double Median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

// The backend and its tensors: inputs 0 ... 7 and an output, made again for each dtype.
class Bench {
 public:
  Bench(std::unique_ptr<Backend> backend, int threads)
      : backend_(std::move(backend)), threads_(threads) {
    for (int i = 0; i <= kMaxBenchInputs; ++i) {
      buffers_.push_back(Require(backend_->Allocate(kTensorBytes)));
    }
  }

  Backend& backend() { return *backend_; }
  int64_t Elements(DType dtype) const { return kTensorBytes / ByteWidth(dtype); }
  std::vector<ConstView> Inputs(DType dtype, int count) {
    Fill(dtype);
    std::vector<ConstView> views;
    for (int i = 0; i < count; ++i) {
      views.push_back({buffers_[i]->data(), dtype, Elements(dtype)});
    }
    return views;
  }
  View Output(DType dtype) { return {buffers_.back()->data(), dtype, Elements(dtype)}; }
  // Replaces input 0 by float32 values; gives its address.
  const char* SetInput(const std::vector<float>& values) {
    Require(backend_->Upload(values.data(), buffers_[0]->data(),
                             static_cast<int64_t>(values.size() * sizeof(float))));
    Require(backend_->Synchronize());
    filled_ = false;
    return static_cast<const char*>(buffers_[0]->data());
  }

  double Seconds(const std::function<void()>& work) {
    const bool device = !backend_->host_memory();
    const int repeats = device ? 10 : 1;  // launches are much shorter than waiting for one
    const double start = Now();
    for (int i = 0; i < repeats; ++i) work();
    if (device) Require(backend_->Synchronize());
    return (Now() - start) / repeats;
  }
  double CopySeconds() {
    return Seconds([&] {
      Require(backend_->Copy(buffers_[0]->data(), buffers_.back()->data(), kTensorBytes));
    });
  }

  // Times `work`, which moves `bytes`, and a copy in turn.
  void Run(benchmark::State& state, int64_t bytes, const std::function<void()>& work) {
    std::vector<double> kernel, copy;
    work();  // the first touches memory and loads code
    CopySeconds();
    for (auto _ : state) {
      copy.push_back(CopySeconds());
      kernel.push_back(Seconds(work));
      state.SetIterationTime(kernel.back());
    }
    const double rate = static_cast<double>(bytes) / Median(kernel);
    state.counters["bytes_per_second"] = rate;
    state.counters["of_memcpy"] = rate / (2.0 * kTensorBytes / Median(copy));
  }

 private:
  double Now() const {
    timespec now;
    clock_gettime(
        backend_->host_memory() && threads_ == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &now);
    return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
  }

  // Input 0 is a base; the others are that plus a fine-tuning's delta, about half of which is lost
  // when it is rounded to bfloat16.
  void Fill(DType dtype) {
    if (filled_ && dtype_ == dtype) return;
    constexpr int64_t kPeriod = 1 << 20;
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    std::vector<float> base(kPeriod), values(kPeriod);
    for (float& value : base) value = 0.02f * normal(random);
    std::vector<std::byte> stored(kPeriod * ByteWidth(dtype));
    for (int i = 0; i < kMaxBenchInputs; ++i) {
      for (int64_t j = 0; j < kPeriod; ++j) {
        values[j] = base[j] + (i == 0 || random() % 4 == 0 ? 0 : 5e-5f * normal(random));
      }
      std::vector<std::byte> half(kPeriod * 2);
      Convert({values.data(), DType::kF32, kPeriod}, {half.data(), DType::kBF16, kPeriod});
      Convert({half.data(), DType::kBF16, kPeriod}, {stored.data(), dtype, kPeriod});
      for (int64_t at = 0; at < kTensorBytes; at += static_cast<int64_t>(stored.size())) {
        Require(backend_->Upload(stored.data(), static_cast<char*>(buffers_[i]->data()) + at,
                                 static_cast<int64_t>(stored.size())));
      }
      Require(backend_->Synchronize());
    }
    dtype_ = dtype;
    filled_ = true;
  }

  std::unique_ptr<Backend> backend_;
  const int threads_;
  std::vector<std::unique_ptr<Buffer>> buffers_;
  bool filled_ = false;
  DType dtype_ = DType::kF32;
};

const struct {
  DType dtype;
  const char* name;
} kDTypes[] = {{DType::kBF16, "bf16"}, {DType::kF16, "f16"}, {DType::kF32, "f32"}};

TaskVectorSum ThreeModels(Keep keep, bool elect_sign) {
  TaskVectorSum op;
  op.count = 3;
  op.elect_sign = elect_sign;
  op.normalize = keep == Keep::kMagnitude;
  for (int i = 0; i < op.count; ++i) {
    op.model[i].weight = 0.3 + 0.1 * i;
    op.model[i].keep = keep;
    op.model[i].threshold = 5e-5;
    op.model[i].ties_end = int64_t{1} << 20;
    op.model[i].key = MakePhiloxKey(1, absl::StrCat("w#", i));
    op.model[i].draw_below = uint64_t{1} << 31;
  }
  return op;
}

void RegisterMaps(Bench& bench) {
  const auto add = [&](const std::string& name, DType dtype, const MapOp& op) {
    benchmark::RegisterBenchmark(name.c_str(), [&bench, dtype, op](benchmark::State& state) {
      const int inputs = std::visit([](const auto& held) { return held.inputs(); }, op);
      const std::vector<ConstView> in = bench.Inputs(dtype, inputs);
      bench.Run(state, (inputs + 1) * kTensorBytes,
                [&] { Require(bench.backend().Map(op, in, bench.Output(dtype), 0)); });
    })->UseManualTime();
  };
  // Inputs and output of different types.
  benchmark::RegisterBenchmark("weighted_sum/f32_to_bf16/inputs:4", [&bench](
                                                                        benchmark::State& state) {
    const WeightedSum op = {.count = 4, .weight = {1, 2, 3, 4}};
    const std::vector<ConstView> in = bench.Inputs(DType::kF32, 4);
    const View out{bench.Output(DType::kBF16).data, DType::kBF16, in[0].size};
    bench.Run(state, kTensorBytes * 9 / 2, [&] { Require(bench.backend().Map(op, in, out, 0)); });
  })->UseManualTime();
  for (const auto& [dtype, name] : kDTypes) {
    for (int count = 2; count <= kMaxBenchInputs; ++count) {
      WeightedSum op;
      op.count = count;
      for (int i = 0; i < count; ++i) op.weight[i] = 1.0 / count;
      add(absl::StrCat("weighted_sum/", name, "/inputs:", count), dtype, op);
    }
    add(absl::StrCat("task_arithmetic/", name, "/models:3"), dtype, ThreeModels(Keep::kAll, false));
    add(absl::StrCat("ties/", name, "/models:3"), dtype, ThreeModels(Keep::kMagnitude, true));
  }
}

void RegisterDraws(Bench& bench) {
  for (const auto& [dtype, name] : kDTypes) {
    benchmark::RegisterBenchmark(
        absl::StrCat("dare_ties/", name, "/models:3").c_str(),
        [&bench, dtype = dtype](benchmark::State& state) {
          const std::vector<ConstView> in = bench.Inputs(dtype, 4);
          const auto map = [&](Keep keep) {
            Require(bench.backend().Map(ThreeModels(keep, true), in, bench.Output(dtype), 0));
          };
          std::vector<double> added;
          bench.Run(state, 5 * kTensorBytes, [&] { map(Keep::kRandom); });
          for (int i = 0; i < 7; ++i) {
            added.push_back(bench.Seconds([&] { map(Keep::kRandom); }) -
                            bench.Seconds([&] { map(Keep::kAll); }));
          }
          state.counters["ns_per_draw"] =
              1e9 * Median(added) / (3.0 * static_cast<double>(bench.Elements(dtype)));
        })
        ->UseManualTime();
  }
}

void RegisterReductions(Bench& bench) {
  const auto add = [&](const std::string& name, DType dtype, int inputs, const ReduceOp& op) {
    benchmark::RegisterBenchmark(name.c_str(), [&bench, dtype, inputs,
                                                op](benchmark::State& state) {
      const std::vector<ConstView> in = bench.Inputs(dtype, inputs);
      bench.Run(state, inputs * kTensorBytes,
                [&] { Require(bench.backend().Reduce(op, in, 0).status()); });
    })->UseManualTime();
  };
  for (const auto& [dtype, name] : kDTypes) {
    add(absl::StrCat("dot_norms/", name), dtype, 2, DotNorms{});
    add(absl::StrCat("delta_abs_sums/dare/", name, "/models:3"), dtype, 4,
        DeltaAbsSums{ThreeModels(Keep::kRandom, false)});
    // Rows of 2048 elements, half of them zero in the deltas.
    TaskVectorSum della = ThreeModels(Keep::kRanked, false);
    for (int i = 0; i < della.count; ++i) {
      della.model[i].ranked =
          MakeRankedDraw(MakePhiloxKey(1, absl::StrCat("w#", i)), 2048, 0.4, 0.6);
    }
    add(absl::StrCat("delta_abs_sums/della/", name, "/models:3"), dtype, 4, DeltaAbsSums{della});
    add(absl::StrCat("gram/", name, "/models:3"), dtype, 4, Gram{.count = 3, .from_base = true});
    SelectedSquares squares;
    squares.task.count = 3;
    squares.task.select_all = false;
    add(absl::StrCat("selected_squares/", name, "/models:3"), dtype, 4, squares);
    if (bench.backend().host_memory()) {
      static const std::vector<double> row_values(1 << 20, 0.5);
      add(absl::StrCat("softmax_divergence/", name), dtype, 2,
          SoftmaxDivergence{{.row = 2048, .count = 2, .values = row_values.data()}});
    }
    benchmark::RegisterBenchmark(
        absl::StrCat("delta_histogram/", name).c_str(),
        [&bench, dtype = dtype](benchmark::State& state) {
          const std::vector<ConstView> in = bench.Inputs(dtype, 2);
          std::vector<uint64_t> bins(kRadixBins);
          bench.Run(state, 2 * kTensorBytes, [&] {
            Require(bench.backend().Histogram(DeltaMagnitude{}, in, 0, RadixLevel{},
                                              absl::MakeSpan(bins)));
          });
        })
        ->UseManualTime();
  }
}

// Host only: on the calling thread whatever the device.
void RegisterHostLoops(Bench& bench) {
  for (const auto& [dtype, name] : kDTypes) {
    benchmark::RegisterBenchmark(
        absl::StrCat("find_non_finite/", name).c_str(),
        [&bench, dtype = dtype](benchmark::State& state) {
          const ConstView in = bench.Inputs(dtype, 1)[0];
          int64_t at;
          bench.Run(state, kTensorBytes, [&] { benchmark::DoNotOptimize(FindNonFinite(in, &at)); });
        })
        ->UseManualTime();
  }
  for (const auto& [from, from_name] : kDTypes) {
    for (const auto& [to, to_name] : kDTypes) {
      if (from == to) continue;
      benchmark::RegisterBenchmark(absl::StrCat("convert/", from_name, "/", to_name).c_str(),
                                   [&bench, from = from, to = to](benchmark::State& state) {
                                     ConstView in = bench.Inputs(from, 1)[0];
                                     in.size = std::min(in.size, bench.Elements(to));
                                     bench.Run(
                                         state, in.size * (ByteWidth(from) + ByteWidth(to)), [&] {
                                           Convert(in, View{bench.Output(to).data, to, in.size});
                                         });
                                   })
          ->UseManualTime();
    }
  }
}

// The 20 % largest of 4096 x 14336 magnitudes, tile by tile as a merge does it. `seconds` is for
// both levels.
void RegisterSelections(Bench& bench) {
  constexpr int64_t kElements = int64_t{4096} * 14336;
  constexpr int64_t kTile = 1 << 18;
  const auto bf16 = [](float value) {
    return std::bit_cast<float>(std::bit_cast<uint32_t>(value) & 0xffff0000u);
  };
  using Draw = std::function<float(std::mt19937&, std::normal_distribution<float>&)>;
  const std::pair<const char*, Draw> distributions[] = {
      {"normal", [](auto& random, auto& normal) { return normal(random); }},
      {"zeros_60_percent",
       [](auto& random, auto& normal) { return random() % 10 < 6 ? 0.0f : normal(random); }},
      {"all_equal", [](auto&, auto&) { return 0.75f; }},
      {"bf16_quantised", [=](auto& random, auto& normal) { return bf16(normal(random)); }},
      {"two_values", [](auto& random, auto&) { return random() % 2 == 0 ? 0.5f : 0.25f; }},
      {"one_bin",
       [](auto& random, auto&) { return 1.0f + static_cast<float>(random() % 60000) * 0x1p-23f; }},
      {"exponents",
       [](auto& random, auto&) {
         return std::bit_cast<float>(static_cast<uint32_t>(random()) % 0x7f800000u);
       }},
  };
  for (const auto& [name, draw] : distributions) {
    benchmark::RegisterBenchmark(
        absl::StrCat("select/", name).c_str(),
        [&bench, draw = draw](benchmark::State& state) {
          std::mt19937 random(3);
          std::normal_distribution<float> normal;
          std::vector<float> values(kElements);
          for (float& value : values) value = draw(random, normal);
          const char* data = bench.SetInput(values);
          std::vector<double> seconds;
          const int64_t tile = bench.backend().host_memory() ? kTile : kElements;
          ViewScan scan(bench.backend(), {{{data, DType::kF32, kElements}}}, tile);
          const auto select = [&] { Require(SelectThresholds(scan, {kElements / 5}).status()); };
          bench.Run(state, kElements * 4, select);
          for (int i = 0; i < 5; ++i) seconds.push_back(bench.Seconds(select));
          state.counters["seconds"] = Median(seconds);
        })
        ->UseManualTime();
  }
}

int Main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  std::string device_name = "cpu";
  int threads = 1;
  for (int i = 1; i < argc; ++i) {
    absl::string_view flag = argv[i];
    if (absl::ConsumePrefix(&flag, "--device=")) {
      device_name = std::string(flag);
    } else if (!absl::ConsumePrefix(&flag, "--threads=") || !absl::SimpleAtoi(flag, &threads) ||
               threads < 1) {
      std::fprintf(stderr, "pewter_kernel_bench: unknown flag %s\n", argv[i]);
      return 2;
    }
  }
  const Device device = Require(ResolveDevice(device_name));
  Bench bench(Require(OpenBackend(device, threads)), threads);
  benchmark::AddCustomContext("device", bench.backend().description());
  RegisterMaps(bench);
  RegisterDraws(bench);
  RegisterReductions(bench);
  RegisterSelections(bench);
  if (bench.backend().host_memory()) RegisterHostLoops(bench);
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}

}  // namespace
}  // namespace pewter::kernels

int main(int argc, char** argv) { return pewter::kernels::Main(argc, argv); }
