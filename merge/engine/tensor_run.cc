#include "merge/engine/tensor_run.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/failpoint.h"
#include "base/status.h"
#include "kernels/linear_algebra.h"
#include "merge/engine/tensor_scan.h"

namespace pewter {
namespace {

using kernels::ConstView;
using kernels::View;

DType WorkDType(const PlanTensor& tensor) {
  const PlanInput& any = tensor.inputs.empty() ? *tensor.base : tensor.inputs.front();
  return any.source->dtype();
}

}  // namespace

TensorRun::TensorRun(const PlanTensor& tensor, int64_t order, Environment& environment)
    : tensor_(tensor),
      order_(order),
      environment_(environment),
      work_dtype_(WorkDType(tensor)),
      audited_(tensor.inputs.size() + tensor.statistics.size() + 1, false),
      reported_(audited_.size(), false) {}

class TensorRun::Task : public TaskContext {
 public:
  Task(TensorRun& run, Lane& lane) : run_(run), lane_(lane) {}

  kernels::Backend& backend() override {
    used_backend_ = true;
    return lane_.backend();
  }
  DType dtype(int operand) const override { return run_.source(operand).dtype(); }
  const Shape& shape(int operand) const override { return run_.source(operand).shape(); }
  absl::Span<const double> measured() const override { return run_.measured(); }
  int model(int input) const override { return run_.model(input); }
  PhiloxKey random_key(int input) const override { return run_.random_key(input); }
  bool reports() const override { return run_.environment_.report; }
  void Report(const std::string& name, std::vector<double> values) override {
    run_.report_[name] = std::move(values);
  }

  // Makes warnings of what the backend's libraries did otherwise than usual.
  void TakeNotes() {
    if (!used_backend_) return;
    const auto algebra = lane_.backend().linear_algebra();
    if (!algebra.ok()) return;  // so nothing was done with it
    for (const std::string& note : (*algebra)->TakeNotes()) {
      run_.warnings_.push_back(absl::StrCat("tensor ", run_.tensor_.name, ": ", note));
    }
  }

  absl::StatusOr<std::unique_ptr<kernels::Buffer>> Load(int operand, Where where) override {
    const int64_t elements = shape(operand).elements(), width = ByteWidth(dtype(operand));
    kernels::Backend& backend = lane_.backend();
    const bool direct = where == Where::kHost || backend.host_memory();
    ASSIGN_OR_RETURN(
        std::unique_ptr<kernels::Buffer> buffer,
        direct ? backend.AllocateHost(elements * width) : backend.Allocate(elements * width));
    auto* const to = static_cast<char*>(buffer->data());
    const int64_t step = run_.environment_.tile_elements;
    for (int64_t first = 0; first < elements; first += step) {
      const int64_t count = std::min(step, elements - first);
      if (direct) {
        RETURN_IF_ERROR(
            run_.ReadAudited(run_.source(operand), operand, first, count, to + first * width));
        continue;
      }
      ASSIGN_OR_RETURN(void* const staged, lane_.Host(0, step * width));
      RETURN_IF_ERROR(run_.ReadAudited(run_.source(operand), operand, first, count, staged));
      RETURN_IF_ERROR(backend.Upload(staged, to + first * width, count * width));
      RETURN_IF_ERROR(backend.Synchronize());  // before the staging memory is used again
    }
    run_.audited_[operand + 1] = true;
    return buffer;
  }

  absl::StatusOr<Factors> LoadFactors(int input) override {
    const LowRankUpdate* const update = run_.source(input).update();
    if (update == nullptr) {
      return absl::InternalError(absl::StrCat("input ", input, " is no product"));
    }
    Factors factors{.rank = update->rank};
    ASSIGN_OR_RETURN(factors.left, LoadFactor(input, *update->left, update->transposed));
    ASSIGN_OR_RETURN(factors.right, LoadFactor(input, *update->right, update->transposed));
    for (double& value : factors.left) value *= update->scale;
    run_.audited_[input + 1] = true;
    return factors;
  }

 private:
  absl::StatusOr<std::vector<double>> LoadFactor(int input, const TensorSource& source,
                                                 bool transposed) {
    std::vector<float> stored(source.shape().elements());
    RETURN_IF_ERROR(run_.ReadAudited(source, input, 0, source.shape().elements(), stored.data()));
    if (!transposed) return std::vector<double>(stored.begin(), stored.end());
    const int64_t rows = source.shape()[0];
    const int64_t columns = rows == 0 ? 0 : source.shape().elements() / rows;
    std::vector<double> values(stored.size());
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) values[j * rows + i] = stored[i * columns + j];
    }
    return values;
  }

  TensorRun& run_;
  Lane& lane_;
  bool used_backend_ = false;
};

absl::Status TensorRun::Run() {
  const auto run = [&] {
    if (tensor_.task != nullptr) return RunTask();
    return tensor_.method == nullptr ? CopyInputs() : tensor_.method->run(*this);
  };
  return Annotate(run(), absl::StrCat("output tensor ", tensor_.name));
}

absl::Status TensorRun::Measure(pewter::Measure& measure) {
  const auto see = [&]() -> absl::Status {
    if (tensor_.task == nullptr) return measure.See(*this);
    const auto see_task = [&](Lane& lane, int64_t) {
      Task task(*this, lane);
      return measure.See(*tensor_.task, task);
    };
    return environment_.scheduler.Run(order_, 1, see_task, [](int64_t) { return true; });
  };
  return Annotate(see(), absl::StrCat("output tensor ", tensor_.name));
}

const ParamValue* TensorRun::shared(absl::string_view param) const {
  const auto found = tensor_.params.find(std::string(param));
  return found == tensor_.params.end() ? nullptr : &found->second;
}

const ParamValue* TensorRun::of_input(int input, absl::string_view param) const {
  const ParamValues& params = tensor_.inputs[input].params;
  const auto found = params.find(std::string(param));
  return found == params.end() ? nullptr : &found->second;
}

PhiloxKey TensorRun::random_key(int input) const {
  return MakePhiloxKey(environment_.seed, absl::StrCat(tensor_.name, "#", input));
}

const TensorSource& TensorRun::source(int operand) const {
  if (operand == kBase) return *tensor_.base->source;
  return operand < inputs() ? *tensor_.inputs[operand].source
                            : *tensor_.statistics[operand - inputs()].source;
}

int64_t TensorRun::StepOf(Cut cut) const {
  if (cut == Cut::kTiles) return environment_.tile_elements;
  // Whole rows, or elements of whole columns' rows.
  const int64_t unit = cut == Cut::kRows ? row_elements() : columns();
  return std::max<int64_t>(1, environment_.tile_elements / unit) * unit;
}

absl::Status TensorRun::ForEachTile(Operands operands, bool writes_output, Cut cut,
                                    absl::FunctionRef<absl::Status(const Tile& tile)> fn) {
  const int64_t elements = tensor_.shape.elements();
  const int64_t step = StepOf(cut);
  const int64_t width = ByteWidth(tensor_.dtype);
  const auto run_tile = [&](Lane& lane, int64_t index) {
    return fn({lane, index * step, std::min(step, elements - index * step)});
  };
  const auto admit = [&](int64_t index) {
    return !writes_output || environment_.writer->Admits(
                                 tensor_.offset + std::min((index + 1) * step, elements) * width);
  };
  RETURN_IF_ERROR(
      environment_.scheduler.Run(order_, (elements + step - 1) / step, run_tile, admit));
  for (int operand : operands) audited_[operand + 1] = true;
  return absl::OkStatus();
}

absl::Status TensorRun::Pass(Operands operands, bool writes_output, PassFn fn, Cut cut) {
  return ForEachTile(operands, writes_output, cut, [&](const Tile& tile) -> absl::Status {
    std::vector<ConstView> views(operands.size());
    for (size_t slot = 0; slot < operands.size(); ++slot) {
      ASSIGN_OR_RETURN(views[slot], Load(tile, operands[slot], static_cast<int>(slot)));
    }
    return fn(tile, views);
  });
}

absl::Status TensorRun::ReadAudited(const TensorSource& from, int operand, int64_t first,
                                    int64_t count, void* host) {
  const int64_t bytes = count * ByteWidth(from.dtype());
  TileAudit audit;
  RETURN_IF_ERROR(from.Read(first, count,
                            {static_cast<std::byte*>(host), static_cast<size_t>(bytes)},
                            audited(operand) ? nullptr : &audit));
  environment_.on_read(bytes);
  RETURN_IF_ERROR(Reach(Failpoint::kShardRead));
  if (audited(operand)) return absl::OkStatus();
  RETURN_IF_ERROR(CheckFinite({host, from.dtype(), count}, from, first, operand));
  std::vector<ReadRange> ranges = audit.Take();
  std::lock_guard lock(mutex_);
  ranges_.insert(ranges_.end(), ranges.begin(), ranges.end());
  // Tensors that do not lie in row-major order are read in many small pieces.
  if (ranges_.size() >= join_at_) {
    ranges_ = JoinRanges(std::move(ranges_));
    join_at_ = std::max(kMostRanges, 2 * ranges_.size());
  }
  return absl::OkStatus();
}

absl::StatusOr<ConstView> TensorRun::Load(const Tile& tile, int operand, int slot) {
  const DType dtype = source(operand).dtype();
  const int64_t bytes = tile.count * ByteWidth(dtype);
  ASSIGN_OR_RETURN(void* host, tile.lane.Host(slot, bytes));
  RETURN_IF_ERROR(ReadAudited(source(operand), operand, tile.first, tile.count, host));
  kernels::Backend& backend = tile.lane.backend();
  if (backend.host_memory()) return ConstView{host, dtype, tile.count};
  ASSIGN_OR_RETURN(void* device, tile.lane.Device(slot, bytes));
  RETURN_IF_ERROR(backend.Upload(host, device, bytes));
  return ConstView{device, dtype, tile.count};
}

absl::Status TensorRun::CheckFinite(ConstView host, const TensorSource& from, int64_t first,
                                    int operand) {
  int64_t at;
  if (!IsFloat(host.dtype) || !kernels::FindNonFinite(host, &at)) return absl::OkStatus();
  const std::string message =
      absl::StrCat(from.name(), ": element ", first + at, " is NaN or infinite");
  if (!environment_.allow_nonfinite) {
    return absl::FailedPreconditionError(
        absl::StrCat(message, "; mend the checkpoint, or pass --allow-nonfinite to go on"));
  }
  std::lock_guard lock(mutex_);
  if (!std::exchange(reported_[operand + 1], true)) warnings_.push_back(message);
  return absl::OkStatus();
}

template <class Op>
TensorRun::Cut TensorRun::CutFor(const Op& op) {
  const bool rows = std::visit([](const auto& held) { return kernels::WholeRows(held) > 0; }, op);
  return rows ? Cut::kRows : Cut::kTiles;
}

template <class Op>
absl::StatusOr<Op> TensorRun::Placed(const Tile& tile, const Op& op, size_t operands) {
  Op placed = op;
  kernels::Backend& backend = tile.lane.backend();
  kernels::AxisValues* const axis =
      std::visit([](auto& held) { return kernels::AxisOf(held); }, placed);
  if (axis == nullptr || backend.host_memory()) return placed;
  const int64_t first = axis->columns ? 0 : tile.first / axis->row;
  const int64_t lines =
      axis->columns ? axis->row : (tile.first + tile.count - 1) / axis->row - first + 1;
  const int64_t bytes = lines * axis->count * static_cast<int64_t>(sizeof(double));
  const int slot = static_cast<int>(operands) + 1;  // after the result's
  ASSIGN_OR_RETURN(void* const values, tile.lane.Device(slot, bytes));
  RETURN_IF_ERROR(
      backend.Upload(axis->values + (first - axis->first) * axis->count, values, bytes));
  axis->values = static_cast<const double*>(values);
  axis->first = first;
  return placed;
}

// TensorScan's.
template absl::StatusOr<kernels::MagnitudeOp> TensorRun::Placed(const Tile& tile,
                                                                const kernels::MagnitudeOp& op,
                                                                size_t operands);

absl::Status TensorRun::RunTask() {
  const DType dtype = tensor_.task->result_dtype();
  const int64_t elements = tensor_.shape.elements(), width = ByteWidth(dtype);
  std::vector<std::byte> result(elements * width);
  const auto run = [&](Lane& lane, int64_t) -> absl::Status {
    Task task(*this, lane);
    RETURN_IF_ERROR(tensor_.task->Run(task, {result.data(), dtype, elements}));
    task.TakeNotes();
    return absl::OkStatus();
  };
  RETURN_IF_ERROR(environment_.scheduler.Run(order_, 1, run, [](int64_t) { return true; }));
  const auto emit = [&](const Tile& tile) -> absl::Status {
    const int64_t bytes = tile.count * width;
    ASSIGN_OR_RETURN(PooledBuffer part, environment_.buffers.Acquire(bytes));
    std::memcpy(part.data(), result.data() + tile.first * width, bytes);
    return Emit(tile, std::move(part), dtype);
  };
  return ForEachTile({}, /*writes_output=*/true, Cut::kTiles, emit);
}

absl::StatusOr<std::vector<double>> TensorRun::ReduceBlocks(const kernels::ReduceOp& op,
                                                            Operands operands, int64_t block,
                                                            Cut cut) {
  const int64_t terms = kernels::Terms(op);
  std::vector<double> sums((tensor_.shape.elements() + block - 1) / block * terms);
  const auto reduce = [&](const Tile& tile, absl::Span<const ConstView> views) -> absl::Status {
    ASSIGN_OR_RETURN(const kernels::ReduceOp placed, Placed(tile, op, views.size()));
    ASSIGN_OR_RETURN(const std::vector<double> blocks,
                     tile.lane.backend().ReduceBlocks(placed, views, tile.first, block));
    std::copy(blocks.begin(), blocks.end(), sums.begin() + tile.first / block * terms);
    return absl::OkStatus();
  };
  RETURN_IF_ERROR(Pass(operands, /*writes_output=*/false, reduce, cut));
  return sums;
}

absl::StatusOr<std::vector<double>> TensorRun::Reduce(const kernels::ReduceOp& op,
                                                      Operands operands) {
  const Cut cut = CutFor(op);
  const int64_t block = cut == Cut::kRows ? row_elements() : kernels::kReduceBlock;
  ASSIGN_OR_RETURN(const std::vector<double> blocks, ReduceBlocks(op, operands, block, cut));
  std::vector<double> sums(kernels::Terms(op));
  for (size_t i = 0; i < blocks.size(); ++i) sums[i % sums.size()] += blocks[i];
  return sums;
}

absl::StatusOr<std::vector<double>> TensorRun::ReduceRows(const kernels::ReduceOp& op,
                                                          Operands operands) {
  return ReduceBlocks(op, operands, row_elements(), Cut::kRows);
}

absl::StatusOr<std::vector<double>> TensorRun::ReduceColumns(const kernels::ReduceOp& op,
                                                             Operands operands) {
  std::vector<double> sums(columns() * kernels::Terms(op));
  // Tiles are added in their order, whichever is done first.
  std::map<int64_t, std::vector<double>> waiting;
  int64_t next = 0;
  const auto reduce = [&](const Tile& tile, absl::Span<const ConstView> views) -> absl::Status {
    ASSIGN_OR_RETURN(const kernels::ReduceOp placed, Placed(tile, op, views.size()));
    ASSIGN_OR_RETURN(std::vector<double> of_tile,
                     tile.lane.backend().ReduceColumns(placed, views, tile.first, columns()));
    std::lock_guard lock(mutex_);
    waiting.emplace(tile.first, std::move(of_tile));
    if (tile.first != next) return absl::OkStatus();
    while (!waiting.empty() && waiting.begin()->first == next) {
      const std::vector<double>& part = waiting.begin()->second;
      for (size_t i = 0; i < sums.size(); ++i) sums[i] += part[i];
      next += StepOf(Cut::kColumns);
      waiting.erase(waiting.begin());
    }
    return absl::OkStatus();
  };
  RETURN_IF_ERROR(Pass(operands, /*writes_output=*/false, reduce, Cut::kColumns));
  return sums;
}

absl::StatusOr<std::vector<kernels::Threshold>> TensorRun::SelectLargest(
    absl::Span<const MagnitudeRank> ranks) {
  std::vector<int64_t> ks;
  for (const MagnitudeRank& rank : ranks) ks.push_back(rank.k);
  TensorScan scan(*this, ranks);
  return kernels::SelectThresholds(scan, ks);
}

absl::Status TensorRun::CountMagnitudes(absl::Span<const MagnitudeRank> magnitudes,
                                        absl::Span<const kernels::RadixLevel> levels,
                                        absl::Span<std::vector<uint64_t>> bins) {
  std::vector<int> all(magnitudes.size());
  std::iota(all.begin(), all.end(), 0);
  return TensorScan(*this, magnitudes).Histogram(all, levels, bins);
}

absl::Status TensorRun::Emit(const Tile& tile, PooledBuffer result, DType from) {
  const int64_t bytes = tile.count * ByteWidth(tensor_.dtype);
  if (from != tensor_.dtype) {
    ASSIGN_OR_RETURN(PooledBuffer converted, environment_.buffers.Acquire(bytes));
    kernels::Convert({result.data(), from, tile.count},
                     {converted.data(), tensor_.dtype, tile.count});
    result = std::move(converted);
  }
  environment_.writer->Submit(tensor_.offset + tile.first * ByteWidth(tensor_.dtype),
                              std::move(result), bytes);
  return absl::OkStatus();
}

absl::Status TensorRun::Map(const kernels::MapOp& op, Operands operands) {
  // Ops compute in F32 (F64); rounding to result_dtype first is only needed when that is narrower.
  const DType compute = f64() ? DType::kF64 : DType::kF32;
  const bool direct =
      tensor_.result_dtype == tensor_.dtype ||
      (tensor_.result_dtype == compute && ByteWidth(tensor_.dtype) <= ByteWidth(compute));
  const DType stored = direct ? tensor_.dtype : tensor_.result_dtype;
  const int64_t width = ByteWidth(stored);
  const auto map = [&](const Tile& tile, absl::Span<const ConstView> views) -> absl::Status {
    kernels::Backend& backend = tile.lane.backend();
    const int64_t bytes = tile.count * width;
    ASSIGN_OR_RETURN(PooledBuffer result, environment_.buffers.Acquire(bytes));
    View out{result.data(), stored, tile.count};
    if (!backend.host_memory()) {
      ASSIGN_OR_RETURN(out.data, tile.lane.Device(static_cast<int>(views.size()), bytes));
    }
    ASSIGN_OR_RETURN(const kernels::MapOp placed, Placed(tile, op, views.size()));
    RETURN_IF_ERROR(backend.Map(placed, views, out, tile.first));
    if (!backend.host_memory()) {
      RETURN_IF_ERROR(backend.Download(out.data, result.data(), bytes));
      RETURN_IF_ERROR(backend.Synchronize());
    }
    return Emit(tile, std::move(result), stored);
  };
  return Pass(operands, /*writes_output=*/true, map, CutFor(op));
}

absl::Status TensorRun::Copy(int input) { return CopyAll({&input, 1}); }

absl::Status TensorRun::CopyInputs() {
  std::vector<int> all(tensor_.inputs.size());
  std::iota(all.begin(), all.end(), 0);
  return CopyAll(all);
}

absl::Status TensorRun::CopyAll(Operands operands) {
  // Straight from the sources into the output's buffer: no kernel, no device.
  const DType dtype = source(operands[0]).dtype();
  const int64_t width = ByteWidth(dtype);
  return ForEachTile(
      operands, /*writes_output=*/true, Cut::kTiles, [&](const Tile& tile) -> absl::Status {
        ASSIGN_OR_RETURN(PooledBuffer result, environment_.buffers.Acquire(tile.count * width));
        auto* const out = static_cast<std::byte*>(result.data());
        int64_t begin = 0;  // of the operand, in the output
        for (int operand : operands) {
          const int64_t end = begin + source(operand).shape().elements();
          const int64_t first = std::max(tile.first, begin);
          const int64_t count = std::min(tile.first + tile.count, end) - first;
          if (count > 0) {
            RETURN_IF_ERROR(ReadAudited(source(operand), operand, first - begin, count,
                                        out + (first - tile.first) * width));
          }
          begin = end;
        }
        return Emit(tile, std::move(result), dtype);
      });
}

}  // namespace pewter
