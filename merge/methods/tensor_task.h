// TensorTask: computes an output tensor, or several that belong together, from whole inputs.
//
// What a MergeMethod is for work that streams over tiles, a task is for work that must see all of
// its inputs at once: decompositions. The plan holds its tasks, made with resolved parameters; the
// engine runs one on one lane, within the memory that it states. Tasks are immutable.
//
// An input that is a model with an adapter on the very base of the merge differs from it by a
// product of small factors. A task that is about such differences loads the factors instead.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "base/random.h"
#include "base/shape.h"
#include "kernels/backend.h"

namespace pewter {

// What a task tells the user of its tensor, where the recipe asks for it: by name.
using TensorReport = std::map<std::string, std::vector<double>>;

// What a task sees. Implemented by the engine.
class TaskContext {
 public:
  virtual ~TaskContext() = default;

  // The base's index, where the plan's tensor has one; inputs count from 0, and after them come
  // their statistics, where the method uses such: X^T X as a matrix of any floating dtype.
  static constexpr int kBase = -1;

  virtual kernels::Backend& backend() = 0;
  virtual DType dtype(int operand) const = 0;
  virtual const Shape& shape(int operand) const = 0;
  // All elements of an operand, row-major, in its dtype, in the backend's memory (kHost: in the
  // host's).
  enum class Where { kBackend, kHost };
  virtual absl::StatusOr<std::unique_ptr<kernels::Buffer>> Load(int operand, Where where) = 0;
  // Of an input that is the base plus a product (TensorFacts::ranks): the factors, whose product it
  // is, as doubles in host memory: left [rows, rank], right [rank, columns].
  struct Factors {
    int64_t rank = 0;
    std::vector<double> left, right;
  };
  virtual absl::StatusOr<Factors> LoadFactors(int input) = 0;
  // As a MethodContext's.
  virtual absl::Span<const double> measured() const = 0;
  virtual int model(int input) const = 0;
  virtual PhiloxKey random_key(int input) const = 0;
  // Whether the recipe asks for a report (`output: {report: true}`), and where it goes.
  virtual bool reports() const = 0;
  virtual void Report(const std::string& name, std::vector<double> values) = 0;
};

class TensorTask {
 public:
  virtual ~TensorTask() = default;
  virtual const char* name() const = 0;  // in plans
  // The most memory that Run holds at a time, the loaded operands and `result` included; what the
  // backend's threads keep is not.
  virtual int64_t bytes() const = 0;
  virtual DType result_dtype() const { return DType::kF32; }
  // Sets `result`, of that type and in host memory: the elements of the plan's tensor, those of its
  // parts one after the other.
  virtual absl::Status Run(TaskContext& context, kernels::View result) const = 0;
};

}  // namespace pewter
