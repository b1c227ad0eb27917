#include "merge/engine/tensor_run.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "kernels/radix_select.h"

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
      audited_(tensor.inputs.size() + 1, false),
      reported_(tensor.inputs.size() + 1, false) {}

absl::Status TensorRun::Run() {
  return Annotate(tensor_.method == nullptr ? Copy(0) : tensor_.method->run(*this),
                  absl::StrCat("output tensor ", tensor_.name));
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
  return operand == kBase ? *tensor_.base->source : *tensor_.inputs[operand].source;
}

absl::Status TensorRun::ForEachTile(Operands operands, bool writes_output,
                                    absl::FunctionRef<absl::Status(const Tile& tile)> fn) {
  const int64_t elements = tensor_.shape.elements();
  const int64_t step = environment_.tile_elements;
  const int64_t width = ByteWidth(tensor_.dtype);
  const auto run_tile = [&](Lane& lane, int64_t index) {
    return fn({lane, index * step, std::min(step, elements - index * step)});
  };
  const auto admit = [&](int64_t index) {
    return !writes_output || environment_.writer.Admits(
                                 tensor_.offset + std::min((index + 1) * step, elements) * width);
  };
  RETURN_IF_ERROR(
      environment_.scheduler.Run(order_, (elements + step - 1) / step, run_tile, admit));
  for (int operand : operands) audited_[operand + 1] = true;
  return absl::OkStatus();
}

absl::Status TensorRun::Pass(Operands operands, bool writes_output, PassFn fn) {
  return ForEachTile(operands, writes_output, [&](const Tile& tile) -> absl::Status {
    std::vector<ConstView> views(operands.size());
    for (size_t slot = 0; slot < operands.size(); ++slot) {
      ASSIGN_OR_RETURN(views[slot], Load(tile, operands[slot], static_cast<int>(slot)));
    }
    return fn(tile, views);
  });
}

absl::Status TensorRun::ReadAudited(int operand, int64_t first, int64_t count, void* host) {
  const TensorSource& from = source(operand);
  const int64_t bytes = count * ByteWidth(from.dtype());
  TileAudit audit;
  RETURN_IF_ERROR(from.Read(first, count,
                            {static_cast<std::byte*>(host), static_cast<size_t>(bytes)},
                            audited(operand) ? nullptr : &audit));
  environment_.on_read(bytes);
  if (audited(operand)) return absl::OkStatus();
  RETURN_IF_ERROR(CheckFinite({host, from.dtype(), count}, first, operand));
  std::vector<ReadRange> ranges = audit.Take();
  std::lock_guard lock(mutex_);
  ranges_.insert(ranges_.end(), ranges.begin(), ranges.end());
  return absl::OkStatus();
}

absl::StatusOr<ConstView> TensorRun::Load(const Tile& tile, int operand, int slot) {
  const DType dtype = source(operand).dtype();
  const int64_t bytes = tile.count * ByteWidth(dtype);
  ASSIGN_OR_RETURN(void* host, tile.lane.Host(slot, bytes));
  RETURN_IF_ERROR(ReadAudited(operand, tile.first, tile.count, host));
  kernels::Backend& backend = tile.lane.backend();
  if (backend.host_memory()) return ConstView{host, dtype, tile.count};
  ASSIGN_OR_RETURN(void* device, tile.lane.Device(slot, bytes));
  RETURN_IF_ERROR(backend.Upload(host, device, bytes));
  return ConstView{device, dtype, tile.count};
}

absl::Status TensorRun::CheckFinite(ConstView host, int64_t first, int operand) {
  int64_t at;
  if (!IsFloat(host.dtype) || !kernels::FindNonFinite(host, &at)) return absl::OkStatus();
  const std::string message =
      absl::StrCat(source(operand).name(), ": element ", first + at, " is NaN or infinite");
  if (!environment_.allow_nonfinite) {
    return absl::FailedPreconditionError(
        absl::StrCat(message, "; mend the checkpoint, or pass --allow-nonfinite to go on"));
  }
  std::lock_guard lock(mutex_);
  if (!std::exchange(reported_[operand + 1], true)) warnings_.push_back(message);
  return absl::OkStatus();
}

absl::StatusOr<std::vector<double>> TensorRun::ReduceBlocks(const kernels::ReduceOp& op,
                                                            Operands operands) {
  const int64_t blocks =
      (tensor_.shape.elements() + kernels::kReduceBlock - 1) / kernels::kReduceBlock;
  const int64_t terms = kernels::Terms(op);
  std::vector<double> sums(blocks * terms);
  RETURN_IF_ERROR(Pass(operands, /*writes_output=*/false,
                       [&](const Tile& tile, absl::Span<const ConstView> views) -> absl::Status {
                         ASSIGN_OR_RETURN(const std::vector<double> rows,
                                          tile.lane.backend().Reduce(op, views, tile.first));
                         std::copy(rows.begin(), rows.end(),
                                   sums.begin() + tile.first / kernels::kReduceBlock * terms);
                         return absl::OkStatus();
                       }));
  return sums;
}

absl::StatusOr<std::vector<double>> TensorRun::Reduce(const kernels::ReduceOp& op,
                                                      Operands operands) {
  ASSIGN_OR_RETURN(const std::vector<double> rows, ReduceBlocks(op, operands));
  std::vector<double> sums(kernels::Terms(op));
  for (size_t i = 0; i < rows.size(); ++i) sums[i % sums.size()] += rows[i];
  return sums;
}

absl::StatusOr<std::vector<MethodContext::Trim>> TensorRun::SelectLargestDeltas(
    absl::Span<const int64_t> ks) {
  std::vector<Trim> trims(ks.size());
  std::vector<int> operands = {kBase};
  std::vector<kernels::RadixSelect> selects;
  for (size_t i = 0; i < ks.size(); ++i) {
    if (ks[i] == 0) continue;
    operands.push_back(static_cast<int>(i));
    selects.emplace_back(ks[i], f64());
  }
  if (selects.empty() || tensor_.shape.elements() == 0) return trims;

  // One pass a level for all inputs together. Each lane counts for itself; the sums do not depend
  // on who counted.
  while (!selects.front().done()) {
    std::vector<std::vector<uint64_t>> bins(environment_.scheduler.lanes() * selects.size());
    RETURN_IF_ERROR(
        Pass(operands, /*writes_output=*/false,
             [&](const Tile& tile, absl::Span<const ConstView> views) -> absl::Status {
               for (size_t s = 0; s < selects.size(); ++s) {
                 std::vector<uint64_t>& mine = bins[tile.lane.index() * selects.size() + s];
                 mine.resize(kernels::kRadixBins);
                 const std::array<ConstView, 2> pair = {views[0], views[s + 1]};
                 RETURN_IF_ERROR(tile.lane.backend().Histogram(
                     kernels::DeltaMagnitude{}, pair, selects[s].level(), absl::MakeSpan(mine)));
               }
               return absl::OkStatus();
             }));
    for (size_t s = 0; s < selects.size(); ++s) {
      std::vector<uint64_t> total(kernels::kRadixBins);
      for (size_t lane = 0; lane < bins.size(); lane += selects.size()) {
        const std::vector<uint64_t>& part = bins[lane + s];
        for (size_t bin = 0; bin < part.size(); ++bin) total[bin] += part[bin];
      }
      RETURN_IF_ERROR(selects[s].Descend(total));
    }
  }

  // Where only some of the elements equal to a threshold belong, find the index at which they end.
  // Zeros may all stay: a zero delta adds nothing.
  kernels::CountEqualMagnitude count;
  count.task.count = static_cast<int>(selects.size());
  bool split = false;
  for (size_t s = 0; s < selects.size(); ++s) {
    Trim& trim = trims[operands[s + 1]];
    trim.threshold = selects[s].value();
    trim.ties_end = tensor_.shape.elements();
    count.task.model[s].threshold = trim.threshold;
    split |= trim.threshold != 0 && selects[s].ties() < selects[s].equal();
  }
  if (!split) return trims;
  ASSIGN_OR_RETURN(const std::vector<double> equal, ReduceBlocks(count, operands));
  for (size_t s = 0; s < selects.size(); ++s) {
    Trim& trim = trims[operands[s + 1]];
    if (trim.threshold == 0 || selects[s].ties() == selects[s].equal()) continue;
    ASSIGN_OR_RETURN(trim.ties_end, FindTiesEnd(operands[s + 1], trim.threshold, selects[s].ties(),
                                                absl::MakeConstSpan(equal).subspan(s),
                                                static_cast<int>(selects.size())));
  }
  return trims;
}

absl::StatusOr<int64_t> TensorRun::FindTiesEnd(int input, double threshold, int64_t ties,
                                               absl::Span<const double> equal_by_block,
                                               int stride) {
  int64_t block = 0;
  for (; ties > static_cast<int64_t>(equal_by_block[block * stride]); ++block) {
    ties -= static_cast<int64_t>(equal_by_block[block * stride]);
  }
  const int64_t first = block * kernels::kReduceBlock;
  const int64_t count = std::min(kernels::kReduceBlock, tensor_.shape.elements() - first);
  // The deltas in the compute type, as the kernels form them.
  const auto scan = [&]<class T>(T) -> absl::StatusOr<int64_t> {
    const auto read = [&](int operand, std::vector<T>& out) -> absl::Status {
      const TensorSource& from = source(operand);
      std::vector<std::byte> stored(count * ByteWidth(from.dtype()));
      RETURN_IF_ERROR(from.Read(first, count, absl::MakeSpan(stored), nullptr));
      out.resize(count);
      kernels::Convert({stored.data(), from.dtype(), count},
                       {out.data(), sizeof(T) == 8 ? DType::kF64 : DType::kF32, count});
      return absl::OkStatus();
    };
    std::vector<T> base, model;
    RETURN_IF_ERROR(read(kBase, base));
    RETURN_IF_ERROR(read(input, model));
    for (int64_t i = 0; i < count; ++i) {
      if (std::abs(model[i] - base[i]) == static_cast<T>(threshold) && --ties == 0)
        return first + i + 1;
    }
    return absl::DataLossError(
        absl::StrCat(source(input).name(), " changed while it was being merged"));
  };
  return f64() ? scan(double{}) : scan(float{});
}

absl::Status TensorRun::Emit(const Tile& tile, PooledBuffer result, DType from) {
  const int64_t bytes = tile.count * ByteWidth(tensor_.dtype);
  if (from != tensor_.dtype) {
    ASSIGN_OR_RETURN(PooledBuffer converted, environment_.buffers.Acquire(bytes));
    kernels::Convert({result.data(), from, tile.count},
                     {converted.data(), tensor_.dtype, tile.count});
    result = std::move(converted);
  }
  environment_.writer.Submit(tensor_.offset + tile.first * ByteWidth(tensor_.dtype),
                             std::move(result), bytes);
  return absl::OkStatus();
}

absl::Status TensorRun::Map(const kernels::MapOp& op, Operands operands) {
  // The op computes in F32 (F64); rounding to result_dtype first is only needed when that is
  // narrower.
  const DType compute = f64() ? DType::kF64 : DType::kF32;
  const bool direct =
      tensor_.result_dtype == tensor_.dtype ||
      (tensor_.result_dtype == compute && ByteWidth(tensor_.dtype) <= ByteWidth(compute));
  const DType stored = direct ? tensor_.dtype : tensor_.result_dtype;
  const int64_t width = ByteWidth(stored);
  return Pass(operands, /*writes_output=*/true,
              [&](const Tile& tile, absl::Span<const ConstView> views) -> absl::Status {
                kernels::Backend& backend = tile.lane.backend();
                const int64_t bytes = tile.count * width;
                ASSIGN_OR_RETURN(PooledBuffer result, environment_.buffers.Acquire(bytes));
                View out{result.data(), stored, tile.count};
                if (!backend.host_memory()) {
                  ASSIGN_OR_RETURN(out.data,
                                   tile.lane.Device(static_cast<int>(views.size()), bytes));
                }
                RETURN_IF_ERROR(backend.Map(op, views, out, tile.first));
                if (!backend.host_memory()) {
                  RETURN_IF_ERROR(backend.Download(out.data, result.data(), bytes));
                  RETURN_IF_ERROR(backend.Synchronize());
                }
                return Emit(tile, std::move(result), stored);
              });
}

absl::Status TensorRun::Copy(int input) {
  // Straight from the source into the output's buffer: no kernel, no device.
  const DType dtype = source(input).dtype();
  return ForEachTile({&input, 1}, /*writes_output=*/true, [&](const Tile& tile) -> absl::Status {
    ASSIGN_OR_RETURN(PooledBuffer result,
                     environment_.buffers.Acquire(tile.count * ByteWidth(dtype)));
    RETURN_IF_ERROR(ReadAudited(input, tile.first, tile.count, result.data()));
    return Emit(tile, std::move(result), dtype);
  });
}

}  // namespace pewter
