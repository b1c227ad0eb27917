#include "client/tensor_diff.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <iterator>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>

#include "absl/types/span.h"
#include "base/status.h"
#include "merge/checkpoint/tensor_source.h"

namespace pewter::client {

namespace {

constexpr int64_t kTile = 1 << 18;  // elements

// Compares one pair of tensors after the other; one a thread.
class Comparer {
 public:
  // Fills in what the values tell. `diff` holds both infos, of one shape.
  absl::Status Compare(const Checkpoint& model_a, const Checkpoint& model_b, TensorDiff& diff);

 private:
  // T: the unsigned integer of the elements' width, or the floating type that they were widened to.
  template <class T>
  absl::Status CompareAs(const TensorSource& a, const TensorSource& b, TensorDiff& diff);

  std::unique_ptr<std::byte[]> tile_a_ = std::make_unique<std::byte[]>(kTile * sizeof(double));
  std::unique_ptr<std::byte[]> tile_b_ = std::make_unique<std::byte[]>(kTile * sizeof(double));
};

absl::Status Comparer::Compare(const Checkpoint& model_a, const Checkpoint& model_b,
                               TensorDiff& diff) {
  ASSIGN_OR_RETURN(const std::shared_ptr<const TensorSource> a, model_a.OpenTensor(diff.name, 0));
  ASSIGN_OR_RETURN(const std::shared_ptr<const TensorSource> b, model_b.OpenTensor(diff.name, 0));
  diff.elements = a->shape().elements();
  if (IsFloat(a->dtype()) && IsFloat(b->dtype())) {
    // Widening is exact, so equal bits stay equal and others stay different.
    const bool f64 = a->dtype() == DType::kF64 || b->dtype() == DType::kF64;
    const DType wide = f64 ? DType::kF64 : DType::kF32;
    const auto wide_a = CastSource(a, wide), wide_b = CastSource(b, wide);
    return f64 ? CompareAs<double>(*wide_a, *wide_b, diff)
               : CompareAs<float>(*wide_a, *wide_b, diff);
  }
  // Integers of unequal types are not compared: none of their elements counts as equal.
  if (a->dtype() != b->dtype()) return absl::OkStatus();
  switch (ByteWidth(a->dtype())) {
    case 1:
      return CompareAs<uint8_t>(*a, *b, diff);
    case 2:
      return CompareAs<uint16_t>(*a, *b, diff);
    case 4:
      return CompareAs<uint32_t>(*a, *b, diff);
    default:
      return CompareAs<uint64_t>(*a, *b, diff);
  }
}

template <class T>
absl::Status Comparer::CompareAs(const TensorSource& a, const TensorSource& b, TensorDiff& diff) {
  double max_abs = 0, square_difference = 0, square_a = 0;
  for (int64_t first = 0; first < diff.elements; first += kTile) {
    const int64_t count = std::min(kTile, diff.elements - first);
    const size_t bytes = count * sizeof(T);
    RETURN_IF_ERROR(a.Read(first, count, absl::MakeSpan(tile_a_.get(), bytes), nullptr));
    RETURN_IF_ERROR(b.Read(first, count, absl::MakeSpan(tile_b_.get(), bytes), nullptr));
    const T* x = reinterpret_cast<const T*>(tile_a_.get());
    const T* y = reinterpret_cast<const T*>(tile_b_.get());
    for (int64_t i = 0; i < count; ++i) {
      if constexpr (std::is_floating_point_v<T>) {
        diff.equal_elements += std::memcmp(x + i, y + i, sizeof(T)) == 0;
        if (std::isnan(x[i]) || std::isnan(y[i])) continue;
        const double value = x[i];
        const double difference = x[i] == y[i] ? 0 : std::abs(value - y[i]);  // inf - inf is NaN
        max_abs = std::max(max_abs, difference);
        square_difference += difference * difference;
        square_a += value * value;
      } else {
        diff.equal_elements += x[i] == y[i];
      }
    }
  }
  if constexpr (std::is_floating_point_v<T>) {
    diff.max_abs = max_abs;
    diff.relative_l2 = square_difference == 0 ? 0 : std::sqrt(square_difference / square_a);
  }
  return absl::OkStatus();
}

// Everything but values.
TensorDiff CompareInfo(const std::string& name, const TensorInfo* a, const TensorInfo* b) {
  TensorDiff diff{.name = name};
  if (a != nullptr) diff.a = *a;
  if (b != nullptr) diff.b = *b;
  if (a == nullptr) {
    diff.kind = TensorDiff::Kind::kOnlyInB;
  } else if (b == nullptr) {
    diff.kind = TensorDiff::Kind::kOnlyInA;
  } else if (a->shape != b->shape) {
    diff.kind = TensorDiff::Kind::kShape;
  } else if (a->dtype != b->dtype) {
    diff.kind = TensorDiff::Kind::kDType;
  }
  return diff;
}

}  // namespace

const char* KindName(TensorDiff::Kind kind) {
  switch (kind) {
    case TensorDiff::Kind::kEqual:
      return "equal";
    case TensorDiff::Kind::kValues:
      return "values";
    case TensorDiff::Kind::kDType:
      return "dtype";
    case TensorDiff::Kind::kShape:
      return "shape";
    case TensorDiff::Kind::kOnlyInA:
      return "only in A";
    case TensorDiff::Kind::kOnlyInB:
      return "only in B";
  }
  return "";
}

absl::StatusOr<std::vector<TensorDiff>> DiffModels(const Checkpoint& a, const Checkpoint& b,
                                                   int threads) {
  std::vector<std::string> names;
  std::set_union(a.tensor_names().begin(), a.tensor_names().end(), b.tensor_names().begin(),
                 b.tensor_names().end(), std::back_inserter(names));
  std::vector<TensorDiff> diffs;
  diffs.reserve(names.size());
  for (const std::string& name : names)
    diffs.push_back(CompareInfo(name, a.Find(name), b.Find(name)));

  if (threads <= 0) threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  std::atomic<size_t> next{0};
  std::atomic<bool> failed{false};
  std::mutex mutex;
  absl::Status error;  // the first
  const auto work = [&] {
    Comparer comparer;
    for (size_t at; !failed && (at = next.fetch_add(1)) < diffs.size();) {
      TensorDiff& diff = diffs[at];
      if (diff.kind != TensorDiff::Kind::kEqual && diff.kind != TensorDiff::Kind::kDType) continue;
      const absl::Status status = comparer.Compare(a, b, diff);
      if (!status.ok()) {
        std::lock_guard lock(mutex);
        if (!failed.exchange(true)) error = status;
      } else if (diff.kind == TensorDiff::Kind::kEqual && diff.equal_elements != diff.elements) {
        diff.kind = TensorDiff::Kind::kValues;
      }
    }
  };
  {
    std::vector<std::jthread> workers;
    for (int i = 0; i < threads; ++i) workers.emplace_back(work);
  }
  if (failed) return error;
  return diffs;
}

}  // namespace pewter::client
