#include "merge/plan/planning_work.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <thread>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "base/units.h"
#include "kernels/backends.h"

namespace pewter {
namespace {

// A task's operands, straight from their sources. Tasks of adapters use nothing else.
class PlanningContext final : public TaskContext {
 public:
  PlanningContext(kernels::Backend& backend, const std::vector<PlanInput>& inputs)
      : backend_(backend), inputs_(inputs) {}

  kernels::Backend& backend() override { return backend_; }
  DType dtype(int operand) const override { return inputs_[operand].source->dtype(); }
  const Shape& shape(int operand) const override { return inputs_[operand].source->shape(); }
  absl::StatusOr<std::unique_ptr<kernels::Buffer>> Load(int operand, Where where) override {
    const TensorSource& source = *inputs_[operand].source;
    if (where == Where::kBackend) return LoadWhole(backend_, source);
    const int64_t elements = source.shape().elements(),
                  bytes = elements * ByteWidth(source.dtype());
    ASSIGN_OR_RETURN(auto buffer, backend_.AllocateHost(bytes));
    RETURN_IF_ERROR(source.Read(
        0, elements, {static_cast<std::byte*>(buffer->data()), static_cast<size_t>(bytes)},
        nullptr));
    return buffer;
  }
  absl::StatusOr<Factors> LoadFactors(int) override {
    return absl::InternalError("no factors are known while planning");
  }
  absl::Span<const double> measured() const override { return {}; }
  int model(int input) const override { return inputs_[input].model; }
  PhiloxKey random_key(int) const override { return {}; }
  bool reports() const override { return false; }
  void Report(const std::string&, std::vector<double>) override {}

 private:
  kernels::Backend& backend_;
  const std::vector<PlanInput>& inputs_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<kernels::Buffer>> LoadWhole(kernels::Backend& backend,
                                                           const TensorSource& source) {
  constexpr int64_t kStep = int64_t{1} << 20;
  const int64_t elements = source.shape().elements(), width = ByteWidth(source.dtype());
  ASSIGN_OR_RETURN(std::unique_ptr<kernels::Buffer> buffer, backend.Allocate(elements * width));
  std::unique_ptr<kernels::Buffer> staging;
  if (!backend.host_memory()) {
    ASSIGN_OR_RETURN(staging, backend.AllocateHost(kStep * width));
  }
  auto* const to = static_cast<std::byte*>(buffer->data());
  for (int64_t first = 0; first < elements; first += kStep) {
    const int64_t count = std::min(kStep, elements - first);
    std::byte* const place = to + first * width;
    std::byte* const host = staging == nullptr ? place : static_cast<std::byte*>(staging->data());
    RETURN_IF_ERROR(source.Read(first, count, {host, size_t(count * width)}, nullptr));
    if (staging == nullptr) continue;
    RETURN_IF_ERROR(backend.Upload(host, place, count * width));
    RETURN_IF_ERROR(backend.Synchronize());
  }
  return buffer;
}

absl::StatusOr<std::vector<float>> RunWhilePlanning(kernels::Backend& backend,
                                                    const TensorTask& task, int64_t elements,
                                                    const std::vector<PlanInput>& inputs) {
  std::vector<float> result(elements);
  PlanningContext context(backend, inputs);
  RETURN_IF_ERROR(task.Run(context, {result.data(), DType::kF32, elements}));
  return result;
}

absl::Status ForEachWhilePlanning(
    const PlanOptions& options, int64_t count, int64_t bytes, absl::string_view what,
    absl::FunctionRef<absl::Status(kernels::Backend& backend, int64_t i)> fn) {
  if (count == 0) return absl::OkStatus();  // and no device is opened
  if (bytes > options.memory_bytes) {
    return absl::ResourceExhaustedError(
        absl::StrCat(what, " need ", FormatBytes(bytes), " and the memory budget is ",
                     FormatBytes(options.memory_bytes), "; raise --memory"));
  }
  ASSIGN_OR_RETURN(const kernels::Device device, kernels::ResolveDevice(options.device));
  const int64_t workers = std::clamp<int64_t>(bytes == 0 ? 1 : options.memory_bytes / bytes, 1,
                                              std::clamp<int64_t>(options.threads, 1, count));
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  absl::Status status;
  const auto work = [&] {
    const auto run = [&]() -> absl::Status {
      ASSIGN_OR_RETURN(const auto backend, kernels::OpenBackend(device, /*threads=*/1));
      for (int64_t i = next++; i < count; i = next++) RETURN_IF_ERROR(fn(*backend, i));
      return absl::OkStatus();
    };
    const absl::Status done = run();
    std::lock_guard lock(mutex);
    if (status.ok()) status = done;
    if (!done.ok()) next = count;
  };
  {
    std::vector<std::jthread> threads;
    for (int64_t i = 0; i < workers; ++i) threads.emplace_back(work);
  }
  return status;
}

int64_t RankOfEnergy(const std::vector<double>& values, int64_t most, double epsilon,
                     double energy) {
  double total = 0;
  for (double value : values) total += value * value;
  int64_t rank = 0;
  double kept = 0;
  while (rank < most && values[rank] > epsilon) {
    if (energy > 0 && kept >= energy * total) break;
    kept += values[rank] * values[rank];
    ++rank;
  }
  return rank;
}

}  // namespace pewter
