#include "merge/plan/sizing.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "base/units.h"
#include "kernels/backends.h"
#include "kernels/linear_algebra.h"
#include "kernels/threshold_select.h"

namespace pewter {
namespace {

// On the CPU a tile of every input stays in the core's cache from the read to the last use; a GPU
// wants enough for its launch and transfer costs to vanish.
constexpr int64_t kCpuTileElements = 2 * kernels::kReduceBlock;
constexpr int64_t kCudaTileElements = 64 * kernels::kReduceBlock;
// Lanes of a GPU: reading, uploading, computing and downloading overlap between them.
constexpr int kCudaLanes = 4;
constexpr int kLanesPerOpenShard = 4;
constexpr int64_t kLargestWindow = int64_t{64} << 20;
constexpr int64_t kLeastWindowTiles = 4;
// Of what is read from distant stores: enough for links of some gigabits.
constexpr int64_t kMostReadAhead = int64_t{256} << 20;
// Of the largest tensors there are seldom more at a time.
constexpr int64_t kLargestInFlight = 2;

}  // namespace

absl::StatusOr<Sizing> SizeRun(const Plan& plan) {
  const PlanOptions& options = plan.options;
  ASSIGN_OR_RETURN(const kernels::Device device, kernels::ResolveDevice(options.device));
  Sizing sizing{.tile_elements = device.cuda ? kCudaTileElements : kCpuTileElements};

  int64_t most_operands = 1, widest = 1, resident = 0, candidates = 0, longest_row = 0;
  int64_t largest_task = 0;
  for (const PlanTensor& tensor : plan.tensors) {
    const auto see = [&](const PlanInput& input) {
      widest = std::max(widest, ByteWidth(input.source->dtype()));
      resident += input.source->resident_bytes();
    };
    std::for_each(tensor.inputs.begin(), tensor.inputs.end(), see);
    std::for_each(tensor.statistics.begin(), tensor.statistics.end(), see);
    if (tensor.base) see(*tensor.base);
    if (tensor.method != nullptr && tensor.shape.rank() > 0) {
      const int64_t row = tensor.shape[tensor.shape.rank() - 1];
      if (tensor.method->by_rows) longest_row = std::max(longest_row, row);
      if (tensor.method->by_columns && tensor.shape[0] > 0) {
        longest_row = std::max(longest_row, tensor.shape.elements() / tensor.shape[0]);
      }
    }
    widest = std::max({widest, ByteWidth(tensor.dtype), ByteWidth(tensor.result_dtype)});
    // Copied inputs are read into the result.
    if (tensor.method != nullptr || tensor.task != nullptr) {
      most_operands = std::max<int64_t>(
          most_operands, static_cast<int64_t>(tensor.inputs.size() + tensor.statistics.size()) +
                             (tensor.base ? 1 : 0));
    }
    if (tensor.method != nullptr && tensor.method->selects) {
      candidates = std::max(candidates, static_cast<int64_t>(tensor.inputs.size()) *
                                            kernels::MostCandidates(tensor.shape.elements()) *
                                            static_cast<int64_t>(sizeof(kernels::SiftCandidate)));
    }
    if (tensor.task != nullptr) {
      largest_task = std::max(largest_task, tensor.task->bytes());
      if (tensor.task->bytes() > options.memory_bytes) {
        return absl::ResourceExhaustedError(
            absl::StrCat("tensor ", tensor.name, " needs ", FormatBytes(tensor.task->bytes()),
                         " with ", tensor.task->name(), " and the memory budget is ",
                         FormatBytes(options.memory_bytes), "; raise --memory"));
      }
    }
    if (tensor.method == nullptr || tensor.method->whole_tensor_bytes_per_element == 0) continue;
    ASSIGN_OR_RETURN(
        const int64_t whole,
        CheckedMul(tensor.shape.elements(), tensor.method->whole_tensor_bytes_per_element));
    if (whole > options.memory_bytes) {
      return absl::ResourceExhaustedError(absl::StrCat(
          "tensor ", tensor.name, " ", tensor.shape.ToString(), " needs ", FormatBytes(whole),
          " with ", tensor.method->name, " and the memory budget is ",
          FormatBytes(options.memory_bytes), "; raise --memory"));
    }
  }

  // Tiles of rows hold whole ones.
  const int64_t tile_bytes = std::max(sizing.tile_elements, longest_row) * widest;
  // A tile of each operand and of the result, and to select: a tile's candidates, and a histogram
  // of each operand.
  int64_t lane_bytes = (most_operands + 1) * tile_bytes;
  const int64_t histograms = most_operands * kernels::kRadixBins * 8;
  if (candidates > 0) {
    lane_bytes +=
        sizing.tile_elements * static_cast<int64_t>(sizeof(kernels::SiftCandidate)) + histograms;
  }
  // Of a lane, of the tensor that it sees, and the sums.
  if (plan.measure != nullptr) lane_bytes += 3 * histograms;
  if (largest_task > 0) lane_bytes += kernels::LinearAlgebra::kThreadBytes;
  const int64_t least = resident + lane_bytes + kLeastWindowTiles * tile_bytes + largest_task;
  if (least > options.memory_bytes) {
    return absl::ResourceExhaustedError(
        absl::StrCat("the merge needs at least ", FormatBytes(least), " (", FormatBytes(resident),
                     " of it for adapters, token maps and new rows, ", FormatBytes(largest_task),
                     " for the largest matrix) and the memory budget is ",
                     FormatBytes(options.memory_bytes), "; raise --memory"));
  }
  // Half of what is left for lanes, a quarter for windows, an eighth for candidates (without them
  // thresholds take more passes), the rest for what the process needs besides.
  int64_t free = options.memory_bytes - resident - largest_task;
  if (std::any_of(plan.files.begin(), plan.files.end(),
                  [](const InputFile& file) { return file.store->distant(); })) {
    sizing.read_ahead_bytes = std::min(free / 4, kMostReadAhead);
    free -= sizing.read_ahead_bytes;
  }
  const int64_t wanted = device.cuda ? std::max(kCudaLanes, options.threads) : options.threads;
  sizing.lanes = static_cast<int>(std::clamp<int64_t>(free / 2 / lane_bytes, 1, wanted));
  sizing.open_shards = std::clamp(sizing.lanes / kLanesPerOpenShard, 1,
                                  std::max(1, static_cast<int>(plan.shards.size())));
  const int64_t least_window = kLeastWindowTiles * tile_bytes;
  sizing.window_bytes = std::clamp(free / 4 / sizing.open_shards, least_window,
                                   std::max(kLargestWindow, least_window));
  sizing.candidate_bytes = std::min(free / 8, kLargestInFlight * candidates);
  sizing.peak_bytes = resident + sizing.lanes * lane_bytes +
                      sizing.open_shards * sizing.window_bytes + sizing.candidate_bytes +
                      sizing.read_ahead_bytes;
  // As many of the largest task as lanes can run, if what is left is enough.
  sizing.task_bytes = std::min(
      sizing.lanes * largest_task,
      largest_task +
          std::max<int64_t>(0, free + sizing.read_ahead_bytes - (sizing.peak_bytes - resident)));
  sizing.peak_bytes += sizing.task_bytes;
  return sizing;
}

}  // namespace pewter
