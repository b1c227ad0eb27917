// MergeMethod: a value that maps input tensors to one output tensor. It sees no file, no proto, no
// thread.
//
// To add a method, add one file here that defines `const MergeMethod k...` (see linear.cc) and a
// golden; when its formula is new, add an op in kernels/ops/ too. The table of methods is generated
// from the files of this folder.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "base/random.h"
#include "base/shape.h"
#include "kernels/backend.h"
#include "kernels/threshold_select.h"

namespace pewter {

// A kPatterns is a regular expression, or a list of them of which one must match: one expression in
// the end.
enum class ParamType { kBool, kInt, kFloat, kString, kPatterns };

// Where a parameter may be set. kModel: per input, then slice, module, global. kTensor: slice,
// module, global; its value may differ from tensor to tensor. kJob: global only.
enum class ParamScopeKind { kJob, kModel, kTensor };

struct NoDefault {};  // required
struct Unset {};      // optional, absent unless given
using ParamDefault = std::variant<NoDefault, Unset, bool, int64_t, double, const char*>;

struct Param {
  const char* name;
  const char* help;
  ParamType type = ParamType::kFloat;
  ParamScopeKind scope = ParamScopeKind::kTensor;
  ParamDefault fallback = NoDefault{};
  double min = -std::numeric_limits<double>::infinity();
  double max = std::numeric_limits<double>::infinity();
  std::vector<const char*> choices = {};
  // mergekit accepts it for this method and it changes nothing: accepted with a warning.
  bool no_effect = false;
};

// How a method treats base_model.
enum class BaseUse {
  kInput,     // an input like the others (appended when it is not listed)
  kOptional,  // taken out of the inputs when given
  kRequired,
};

// What a method reads of the statistics files of its models (`statistics` of the recipe).
enum class StatisticsUse {
  kNone,
  kLayerInputs,  // of weights of linear layers: X^T X, where the rows of X are the layer's inputs
  kLikeTensors,  // of every tensor: one of the same name and shape (a diagonal Fisher matrix)
};

// Resolved values of one tensor. Absent: the parameter is Unset.
using ParamValue = std::variant<bool, int64_t, double, std::string>;
using ParamValues = std::map<std::string, ParamValue>;

class MethodContext;
class TaskContext;
class TensorTask;

// What statistics files have of the layer whose weight a tensor is.
struct LayerInputs {
  int64_t width = 0;         // inputs of the layer
  int axis = 1;              // of the weight, that runs over them
  std::vector<double> rows;  // of X, by model
};

// What a method is told of an output tensor while it is planned. Inputs have one dtype and shape.
struct TensorFacts {
  absl::string_view name;
  const Shape& shape;
  DType dtype;         // of the inputs
  DType result_dtype;  // that the result is rounded to
  int inputs;          // without the base
  bool vocabulary;     // its rows are tokens
  const ParamValues& params;
  std::vector<const ParamValues*> input_params;
  // By input: the rank of the product by which it differs from the base, where its task may load
  // factors instead (TaskContext::LoadFactors); 0: it is a tensor like others.
  std::vector<int64_t> ranks;
  const LayerInputs* layer_inputs = nullptr;  // null: the statistics have none
  bool has_statistics = false;                // operands StatisticsOf(input) are there
  bool report = false;                        // TaskContext::reports will be true
};
// How a method treats a tensor, where not all alike.
struct Treatment {
  std::shared_ptr<const TensorTask> task;  // instead of `run`
  bool keep_base = false;                  // the base's tensor is the output's
  bool measured = false;                   // takes part in MergeMethod::measure
  std::string kind;                        // what `run` is told (MethodContext::kind)
  std::vector<std::string> notes;          // for the plan
};

// Of the tensors that take part in a measure.
struct MeasureFacts {
  const ParamValues& params;      // of scope kJob
  std::vector<int64_t> elements;  // by model
  bool f64;                       // they are merged in double, else in float
};

// What a method finds out of many tensors together before the first is merged. Made for one run.
class Measure {
 public:
  virtual ~Measure() = default;
  // In every round each of the tensors is seen once, several at a time and in any order.
  virtual bool done() const = 0;
  virtual absl::Status See(MethodContext& tensor) = 0;
  virtual absl::Status See(const TensorTask& task, TaskContext& tensor) = 0;
  virtual absl::Status EndRound() = 0;
  // Once done: what `measured` of every context gives.
  virtual std::vector<double> Found() const = 0;
};

struct MergeMethod {
  const char* name;
  const char* title;      // "TIES"
  const char* summary;    // one line
  const char* formula;    // plain text
  const char* reference;  // address of the paper or project
  std::vector<Param> params;
  BaseUse base = BaseUse::kInput;
  int min_inputs = 1;  // without the base when the method takes it out
  int max_inputs = kernels::kMaxInputs - 1;
  // What to do with an optional tensor that only one input has: pass it through (true) or run on
  // what is there.
  bool single_input_passes = false;
  // Extra device bytes for each element, beyond tiles (0: works tile by tile, memory independent of
  // the tensor's size).
  int64_t whole_tensor_bytes_per_element = 0;
  bool selects = false;     // calls SelectLargest
  bool by_rows = false;     // calls ReduceRows, or has ops that need whole rows
  bool by_columns = false;  // calls ReduceColumns
  bool in_double = false;   // inputs are widened to F64
  StatisticsUse statistics = StatisticsUse::kNone;
  // Linear layers of two models that are aligned by data are fitted to both by the plan
  // (merge/plan/fitted_layers.h), with the parameters `budget` and `ridge`; other tensors are for
  // `run`.
  bool fits_layers = false;
  // What the values of one input must fulfil together; null: nothing. Called while planning.
  absl::Status (*check_input)(const ParamValues& params) = nullptr;
  // Null: all tensors are for `run`. Called while planning.
  absl::StatusOr<Treatment> (*treat)(const TensorFacts& tensor) = nullptr;
  // Set where treatments ask for it.
  std::unique_ptr<Measure> (*measure)(const MeasureFacts& facts) = nullptr;
  absl::Status (*run)(MethodContext&) = nullptr;
};

// All methods, sorted by name.
absl::Span<const MergeMethod* const> Methods();
// InvalidArgument with the nearest names when there is none.
absl::StatusOr<const MergeMethod*> FindMethod(absl::string_view name);

// What a method sees of one output tensor. Implemented by the engine; all passes stream over tiles.
class MethodContext {
 public:
  virtual ~MethodContext() = default;

  virtual int inputs() const = 0;  // without the base where has_base()
  virtual bool has_base() const = 0;
  virtual const Shape& shape() const = 0;
  virtual const ParamValue* shared(absl::string_view param) const = 0;  // null: unset
  virtual const ParamValue* of_input(int input, absl::string_view param) const = 0;
  // Key of the random draws of one input: from the job's seed, the output tensor's name and the
  // input's place.
  virtual PhiloxKey random_key(int input) const = 0;
  // True when arithmetic is in double (an input or the output is F64).
  virtual bool f64() const = 0;
  // Treatment::kind.
  virtual absl::string_view kind() const = 0;
  // Measure::Found, in a merge that has a measure; else empty.
  virtual absl::Span<const double> measured() const = 0;
  // The number of an input's model, which MeasureFacts::elements counts by.
  virtual int model(int input) const = 0;

  // Operands of a pass: indices of inputs; kBase is the base.
  static constexpr int kBase = -1;
  using Operands = absl::Span<const int>;
  // The operand that is the statistics of an input (StatisticsUse::kLikeTensors), in its dtype.
  int StatisticsOf(int input) const { return inputs() + input; }
  virtual bool has_statistics() const = 0;

  // One pass: sums of the op's terms over the whole tensor, in a fixed order.
  virtual absl::StatusOr<std::vector<double>> Reduce(const kernels::ReduceOp& op,
                                                     Operands operands) = 0;
  // For each: the threshold of the k largest magnitudes, 1 <= k <= elements, found with shared
  // passes. Methods that call it say `selects`.
  struct MagnitudeRank {
    kernels::MagnitudeOp op;
    std::vector<int> operands;
    int64_t k;
  };
  virtual absl::StatusOr<std::vector<kernels::Threshold>> SelectLargest(
      absl::Span<const MagnitudeRank> ranks) = 0;
  // One pass: adds the counts of each op's digit (Backend::Histogram) to its bins.
  virtual absl::Status CountMagnitudes(absl::Span<const MagnitudeRank> magnitudes,
                                       absl::Span<const kernels::RadixLevel> levels,
                                       absl::Span<std::vector<uint64_t>> bins) = 0;
  // The last pass: writes the output.
  virtual absl::Status Map(const kernels::MapOp& op, Operands operands) = 0;

  // Rows are runs along the last axis; a vector is one row. What an op knows of rows or columns
  // (kernels::AxisValues) is in host memory and stays there while the call lasts.
  int64_t row_elements() const;
  // One pass: terms for each row, those of a row together. Methods that call this or use ops that
  // need whole rows say `by_rows`.
  virtual absl::StatusOr<std::vector<double>> ReduceRows(const kernels::ReduceOp& op,
                                                         Operands operands) = 0;
  // Columns are the vectors along the first axis. Term t of column c is value t * columns() + c.
  // Methods that call this say `by_columns`.
  int64_t columns() const;
  virtual absl::StatusOr<std::vector<double>> ReduceColumns(const kernels::ReduceOp& op,
                                                            Operands operands) = 0;

  // The output is an input, converted to the output's dtype; bytes are copied when dtypes agree.
  virtual absl::Status Copy(int input) = 0;

  // Shorthands; the parameter exists by the method's table.
  double number(absl::string_view param) const;
  bool flag(absl::string_view param) const;
  double number(int input, absl::string_view param) const;
  // base, input 0, input 1, ... or the inputs alone.
  std::vector<int> AllOperands() const;
};

}  // namespace pewter
