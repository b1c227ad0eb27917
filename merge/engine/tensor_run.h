// TensorRun: merges one output tensor. It is the MethodContext that a method's Run sees; each call
// of the method is one pass over the tensor's tiles on the scheduler's lanes.
//
// Tiles have a fixed size and reductions are summed by block in order, so the bytes do not depend
// on the number of lanes, on --memory or on what else is in flight.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "merge/engine/buffer_pool.h"
#include "merge/engine/input_audit.h"
#include "merge/engine/shard_writer.h"
#include "merge/engine/tile_scheduler.h"
#include "merge/methods/method.h"
#include "merge/plan/plan.h"

namespace pewter {

class TensorRun : public MethodContext {
 public:
  struct Environment {
    TileScheduler& scheduler;
    BufferPool& buffers;
    ShardWriter* writer;                    // null while the run measures
    std::atomic<int64_t>& candidate_bytes;  // that may still be used to find thresholds
    int64_t tile_elements;                  // a multiple of kernels::kReduceBlock
    uint64_t seed;
    bool allow_nonfinite;
    bool report;
    absl::Span<const double> measured;
    std::function<void(int64_t bytes)> on_read;
  };
  // `order`: place among all tensors of the plan. Plan and environment must outlive the run.
  TensorRun(const PlanTensor& tensor, int64_t order, Environment& environment);

  // Merges the tensor and submits all of its bytes.
  absl::Status Run();
  // One round's look at the tensor.
  absl::Status Measure(pewter::Measure& measure);

  // After Run: what was read, and a warning for each input with values that are not finite.
  std::vector<ReadRange> TakeRanges() { return JoinRanges(std::move(ranges_)); }
  const std::vector<std::string>& warnings() const { return warnings_; }
  const TensorReport& report() const { return report_; }

  // MethodContext
  int inputs() const override { return static_cast<int>(tensor_.inputs.size()); }
  bool has_base() const override { return tensor_.base.has_value(); }
  bool has_statistics() const override { return !tensor_.statistics.empty(); }
  const Shape& shape() const override { return tensor_.shape; }
  const ParamValue* shared(absl::string_view param) const override;
  const ParamValue* of_input(int input, absl::string_view param) const override;
  PhiloxKey random_key(int input) const override;
  bool f64() const override { return work_dtype_ == DType::kF64; }
  absl::string_view kind() const override { return tensor_.kind; }
  absl::Span<const double> measured() const override { return environment_.measured; }
  int model(int input) const override { return tensor_.inputs[input].model; }
  absl::StatusOr<std::vector<double>> Reduce(const kernels::ReduceOp& op,
                                             Operands operands) override;
  absl::StatusOr<std::vector<kernels::Threshold>> SelectLargest(
      absl::Span<const MagnitudeRank> ranks) override;
  absl::Status CountMagnitudes(absl::Span<const MagnitudeRank> magnitudes,
                               absl::Span<const kernels::RadixLevel> levels,
                               absl::Span<std::vector<uint64_t>> bins) override;
  absl::Status Map(const kernels::MapOp& op, Operands operands) override;
  absl::StatusOr<std::vector<double>> ReduceRows(const kernels::ReduceOp& op,
                                                 Operands operands) override;
  absl::StatusOr<std::vector<double>> ReduceColumns(const kernels::ReduceOp& op,
                                                    Operands operands) override;
  absl::Status Copy(int input) override;

 private:
  friend class TensorScan;
  class Task;  // the TaskContext of one run

  // One tile of a pass: elements [first, first + count).
  struct Tile {
    Lane& lane;
    int64_t first;
    int64_t count;
  };
  using PassFn =
      absl::FunctionRef<absl::Status(const Tile& tile, absl::Span<const kernels::ConstView> views)>;

  const TensorSource& source(int operand) const;
  bool audited(int operand) const { return audited_[operand + 1]; }
  // How a pass cuts the tensor.
  enum class Cut { kTiles, kRows, kColumns };
  int64_t StepOf(Cut cut) const;  // elements of a tile
  absl::Status ForEachTile(Operands operands, bool writes_output, Cut cut,
                           absl::FunctionRef<absl::Status(const Tile& tile)> fn);
  // Runs `fn` on every tile with the operands' elements in the backend's memory.
  absl::Status Pass(Operands operands, bool writes_output, PassFn fn, Cut cut = Cut::kTiles);
  // How ops like `op` want the tensor cut.
  template <class Op>
  static Cut CutFor(const Op& op);
  // The op with its values of rows or columns in the memory of the tile's backend. `operands`: how
  // many views the tile has.
  template <class Op>
  absl::StatusOr<Op> Placed(const Tile& tile, const Op& op, size_t operands);
  // Terms for each run of `block` elements.
  absl::StatusOr<std::vector<double>> ReduceBlocks(const kernels::ReduceOp& op, Operands operands,
                                                   int64_t block, Cut cut);
  // Reads elements of an operand, or of a factor that it is made with, to `host`; the first time,
  // records what was read and checks that it is finite.
  absl::Status ReadAudited(const TensorSource& from, int operand, int64_t first, int64_t count,
                           void* host);
  absl::StatusOr<kernels::ConstView> Load(const Tile& tile, int operand, int slot);
  absl::Status CheckFinite(kernels::ConstView host, const TensorSource& from, int64_t first,
                           int operand);
  absl::Status RunTask();
  absl::Status CopyInputs();
  // The operands' elements, one operand after the other.
  absl::Status CopyAll(Operands operands);
  // A tile of the result in host memory, in `from`, goes to the output in the output's dtype.
  absl::Status Emit(const Tile& tile, PooledBuffer result, DType from);

  static constexpr size_t kMostRanges = 4096;  // that are not joined yet

  const PlanTensor& tensor_;
  const int64_t order_;
  Environment& environment_;
  const DType work_dtype_;
  std::vector<char> audited_;  // by operand + 1
  std::mutex mutex_;
  std::vector<ReadRange> ranges_;      // guarded by mutex_
  size_t join_at_ = kMostRanges;       // size of `ranges_`; guarded by mutex_
  std::vector<std::string> warnings_;  // guarded by mutex_
  std::vector<char> reported_;         // by operand + 1; guarded by mutex_
  TensorReport report_;                // of a task, which runs on one thread
};

}  // namespace pewter
