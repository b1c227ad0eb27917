#include "merge/methods/adapters/common/tasks.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "kernels/linear_algebra.h"
#include "kernels/low_rank_product.h"
#include "merge/methods/adapters/common/elementwise.h"

namespace pewter::adapters {
namespace {

using kernels::Buffer;
using kernels::LowRankProduct;
using kernels::Matrix;
using kernels::Transpose;

constexpr int64_t kFloat = sizeof(float);
constexpr int64_t kDouble = sizeof(double);
// Elements of a dense product that are in work at a time.
constexpr int64_t kTile = int64_t{1} << 18;

int OperandA(size_t input) { return static_cast<int>(2 * input); }
int OperandB(size_t input) { return static_cast<int>(2 * input) + 1; }

int64_t SumOfRanks(const AdapterModule& module) {
  int64_t sum = 0;
  for (const AdapterInput& input : module.inputs) sum += input.rank;
  return sum;
}

// weight * scale: what the product of an input's factors counts.
double Coefficient(const AdapterInput& input) { return input.number("weight") * input.scale; }

// An operand in host memory.
class Values {
 public:
  static absl::StatusOr<Values> Load(TaskContext& context, int operand) {
    Values values;
    ASSIGN_OR_RETURN(values.buffer_, context.Load(operand, TaskContext::Where::kHost));
    values.size_ = context.shape(operand).elements();
    return values;
  }
  absl::Span<float> span() const {
    return {static_cast<float*>(buffer_->data()), static_cast<size_t>(size_)};
  }

 private:
  std::unique_ptr<Buffer> buffer_;
  int64_t size_ = 0;
};

// A task of a module by a method.
class AdapterTask : public TensorTask {
 public:
  AdapterTask(const AdapterMethod& method, AdapterModule module)
      : method_(method), module_(std::move(module)) {}
  const char* name() const override { return method_.method.name; }
  absl::Status Run(TaskContext& context, kernels::View result) const final {
    return Make(context, {static_cast<float*>(result.data), static_cast<size_t>(result.size)});
  }

 protected:
  virtual absl::Status Make(TaskContext& context, absl::Span<float> result) const = 0;

  int64_t factor_elements() const { return module_.rank * (module_.in + module_.out); }
  // A, then B.
  absl::Span<float> ResultA(absl::Span<float> result) const {
    return result.first(module_.rank * module_.in);
  }
  absl::Span<float> ResultB(absl::Span<float> result) const {
    return result.subspan(module_.rank * module_.in, module_.rank * module_.out);
  }

  const AdapterMethod& method_;
  const AdapterModule module_;
};

class StackTask final : public AdapterTask {
 public:
  using AdapterTask::AdapterTask;

  int64_t bytes() const override {
    int64_t largest = 0;
    for (const AdapterInput& input : module_.inputs) largest = std::max(largest, input.rank);
    return (factor_elements() + largest * std::max(module_.in, module_.out)) * kFloat;
  }

  absl::Status Make(TaskContext& context, absl::Span<float> result) const override {
    const absl::Span<float> to_a = ResultA(result), to_b = ResultB(result);
    int64_t row = 0;
    for (size_t i = 0; i < module_.inputs.size(); ++i) {
      const int64_t rank = module_.inputs[i].rank;
      const double coefficient = Coefficient(module_.inputs[i]);
      {
        ASSIGN_OR_RETURN(const Values a, Values::Load(context, OperandA(i)));
        std::transform(a.span().begin(), a.span().end(), to_a.begin() + row * module_.in,
                       [&](float x) { return static_cast<float>(coefficient * x); });
      }
      ASSIGN_OR_RETURN(const Values b, Values::Load(context, OperandB(i)));
      for (int64_t o = 0; o < module_.out; ++o) {
        std::copy_n(b.span().begin() + o * rank, rank, to_b.begin() + o * module_.rank + row);
      }
      row += rank;
    }
    return absl::OkStatus();
  }
};

// The operands, which are loaded here, as the combination says. `scale`: of each operand.
absl::Status CombineOperands(TaskContext& context, Combination combination,
                             absl::Span<const int> operands, absl::Span<const double> scales,
                             absl::Span<float> result) {
  std::vector<Values> loaded;
  std::vector<float*> values;
  for (size_t i = 0; i < operands.size(); ++i) {
    ASSIGN_OR_RETURN(Values one, Values::Load(context, operands[i]));
    if (scales[i] != 1) {
      for (float& value : one.span()) value = static_cast<float>(scales[i] * value);
    }
    if (combination.ranks()) {
      combination.Rank(i, result, [&](int64_t first, int64_t count, float* out) {
        std::copy_n(one.span().begin() + first, count, out);
      });
    }
    values.push_back(one.span().data());
    loaded.push_back(std::move(one));
  }
  combination.Combine(0, static_cast<int64_t>(result.size()), values, result.data());
  return absl::OkStatus();
}

class FactorwiseTask final : public AdapterTask {
 public:
  using AdapterTask::AdapterTask;

  int64_t bytes() const override {
    const int64_t longer = module_.rank * std::max(module_.in, module_.out);
    return (factor_elements() + static_cast<int64_t>(module_.inputs.size()) * longer) * kFloat;
  }

  absl::Status Make(TaskContext& context, absl::Span<float> result) const override {
    for (const bool of_a : {true, false}) {
      std::vector<Combination::Term> terms = TermsOf(module_, of_a ? "lora_A" : "lora_B");
      std::vector<int> operands;
      for (size_t i = 0; i < terms.size(); ++i) {
        // Of a negative coefficient one factor is negative.
        const double coefficient = Coefficient(module_.inputs[i]);
        terms[i].weight = std::sqrt(std::abs(coefficient)) * (of_a && coefficient < 0 ? -1 : 1);
        operands.push_back(of_a ? OperandA(i) : OperandB(i));
      }
      RETURN_IF_ERROR(CombineOperands(
          context, Combination(method_.elementwise, ByFrequency(module_), std::move(terms)),
          operands, std::vector<double>(operands.size(), 1),
          of_a ? ResultA(result) : ResultB(result)));
    }
    return absl::OkStatus();
  }
};

class BiasTask final : public AdapterTask {
 public:
  BiasTask(const AdapterMethod& method, AdapterModule module, int64_t elements)
      : AdapterTask(method, std::move(module)), elements_(elements) {}

  int64_t bytes() const override {
    return (static_cast<int64_t>(module_.inputs.size()) + 1) * elements_ * kFloat;
  }

  absl::Status Make(TaskContext& context, absl::Span<float> result) const override {
    std::vector<int> operands;
    std::vector<double> scales;
    for (const AdapterInput& input : module_.inputs) {
      operands.push_back(static_cast<int>(operands.size()));
      scales.push_back(input.scale);
    }
    return CombineOperands(
        context,
        Combination(method_.elementwise, ByFrequency(module_), TermsOf(module_, "lora_B.bias")),
        operands, scales, result);
  }

 private:
  const int64_t elements_;
};

// --- decompositions
// -------------------------------------------------------------------------------

// q-quantile as numpy and torch have it: linear between the two nearest. Reorders `values`.
double Quantile(std::vector<float>& values, double q) {
  const double place = q * static_cast<double>(values.size() - 1);
  const auto below = static_cast<int64_t>(std::floor(place));
  const auto order = [](float a, float b) { return a < b; };
  std::nth_element(values.begin(), values.begin() + below, values.end(), order);
  const double low = values[below];
  if (below + 1 == static_cast<int64_t>(values.size())) return low;
  const double high = *std::min_element(values.begin() + below + 1, values.end(), order);
  return low + (high - low) * (place - static_cast<double>(below));
}

// A matrix in the memory of a backend.
struct Placed {
  std::unique_ptr<Buffer> memory;
  Matrix matrix;
};

absl::StatusOr<Placed> Allocate(kernels::Backend& backend, int64_t rows, int64_t columns) {
  Placed placed;
  ASSIGN_OR_RETURN(placed.memory, backend.Allocate(rows * columns * kDouble));
  placed.matrix = {static_cast<double*>(placed.memory->data()), rows, columns, columns};
  return placed;
}

absl::StatusOr<std::vector<double>> Fetch(kernels::Backend& backend, const Matrix& matrix) {
  std::vector<double> values(matrix.rows * matrix.columns);
  RETURN_IF_ERROR(
      backend.Download(matrix.data, values.data(), static_cast<int64_t>(values.size()) * kDouble));
  RETURN_IF_ERROR(backend.Synchronize());
  return values;
}

class SvdTask : public AdapterTask {
 public:
  using AdapterTask::AdapterTask;

 protected:
  // Host memory of SetFactors, the result included.
  int64_t factor_bytes() const { return factor_elements() * (kDouble + 2 * kFloat); }

  // Row k of left [rank, out] and of right [rank, in] are a singular pair but for their lengths,
  // whose product is the singular value.
  void SetFactors(std::vector<double> left, std::vector<double> right,
                  absl::Span<float> result) const {
    const int64_t in = module_.in, out = module_.out, rank = module_.rank;
    const absl::Span<float> to_a = ResultA(result), to_b = ResultB(result);
    for (int64_t k = 0; k < rank; ++k) {
      double* const u = left.data() + k * out;
      double* const v = right.data() + k * in;
      double length = 0;
      for (int64_t j = 0; j < in; ++j) length += v[j] * v[j];
      length = std::sqrt(length);
      const double largest = *std::max_element(
          u, u + out, [](double a, double b) { return std::abs(a) < std::abs(b); });
      const double sign = largest < 0 ? -1 : 1;
      for (int64_t j = 0; j < in; ++j) {
        to_a[k * in + j] = length == 0 ? 0 : static_cast<float>(sign * v[j] / length);
      }
      for (int64_t i = 0; i < out; ++i) {
        to_b[i * rank + k] = static_cast<float>(sign * u[i] * length);
      }
    }
    const ParamValue* const clamp = module_.Find("svd_clamp");
    if (clamp == nullptr || result.empty()) return;
    std::vector<float> entries(result.begin(), result.end());
    const auto high = static_cast<float>(Quantile(entries, std::get<double>(*clamp)));
    // Not std::clamp: below the median the bounds may be the wrong way round.
    for (float& value : result) value = std::min(std::max(value, -high), high);
  }
};

class SumSvdTask final : public SvdTask {
 public:
  using SvdTask::SvdTask;

  int64_t bytes() const override {
    const int64_t ranks = SumOfRanks(module_), sides = module_.in + module_.out;
    // The stacked factors, the squares of the core with what its decomposition takes, the products
    // of the results; besides these the workspace of a QR, blocks that are being multiplied, and an
    // operand.
    constexpr int64_t kBlocks = int64_t{8} << 20;
    const int64_t longer = std::max(module_.in, module_.out);
    return kDouble * (ranks * sides + 12 * ranks * ranks + 64 * ranks + factor_elements()) +
           kFloat * ranks * longer + factor_bytes() + kBlocks;
  }

  absl::Status Make(TaskContext& context, absl::Span<float> result) const override {
    kernels::Backend& backend = context.backend();
    ASSIGN_OR_RETURN(kernels::LinearAlgebra* const algebra, backend.linear_algebra());
    ASSIGN_OR_RETURN(Triangle b, Factor(context, *algebra, /*of_a=*/false));
    ASSIGN_OR_RETURN(Triangle a, Factor(context, *algebra, /*of_a=*/true));
    const int64_t rows = b.r.matrix.rows, columns = a.r.matrix.rows, k = std::min(rows, columns);
    ASSIGN_OR_RETURN(const Placed core, Allocate(backend, rows, columns));
    ASSIGN_OR_RETURN(const Placed u, Allocate(backend, rows, k));
    ASSIGN_OR_RETURN(const Placed vt, Allocate(backend, k, columns));
    RETURN_IF_ERROR(
        algebra->Gemm(Transpose::kNo, b.r.matrix, Transpose::kYes, a.r.matrix, 1, 0, core.matrix));
    std::vector<double> values;
    RETURN_IF_ERROR(algebra->Svd({{core.matrix, u.matrix, vt.matrix, &values}}));

    const int64_t rank = module_.rank;
    ASSIGN_OR_RETURN(const Placed left, Allocate(backend, rank, module_.out));
    ASSIGN_OR_RETURN(const Placed right, Allocate(backend, rank, module_.in));
    const Matrix first_u = {u.matrix.data, rows, rank, u.matrix.stride};
    const Matrix first_vt = {vt.matrix.data, rank, columns, vt.matrix.stride};
    RETURN_IF_ERROR(
        algebra->Gemm(Transpose::kYes, first_u, Transpose::kYes, b.q(), 1, 0, left.matrix));
    RETURN_IF_ERROR(
        algebra->Gemm(Transpose::kNo, first_vt, Transpose::kYes, a.q(), 1, 0, right.matrix));
    ASSIGN_OR_RETURN(std::vector<double> of_b, Fetch(backend, left.matrix));
    ASSIGN_OR_RETURN(std::vector<double> of_a, Fetch(backend, right.matrix));
    for (int64_t row = 0; row < rank; ++row) {
      for (int64_t i = 0; i < module_.out; ++i) of_b[row * module_.out + i] *= values[row];
    }
    SetFactors(std::move(of_b), std::move(of_a), result);
    return absl::OkStatus();
  }

 private:
  // Of a stack of factors [out or in, sum of ranks].
  struct Triangle {
    Placed stack;  // its first columns hold Q
    Placed r;
    Matrix q() const {
      return {stack.matrix.data, stack.matrix.rows, r.matrix.rows, stack.matrix.stride};
    }
  };

  absl::StatusOr<Triangle> Factor(TaskContext& context, kernels::LinearAlgebra& algebra,
                                  bool of_a) const {
    kernels::Backend& backend = context.backend();
    const int64_t rows = of_a ? module_.in : module_.out, ranks = SumOfRanks(module_);
    Triangle triangle;
    ASSIGN_OR_RETURN(triangle.stack, Allocate(backend, rows, ranks));
    ASSIGN_OR_RETURN(triangle.r, Allocate(backend, std::min(rows, ranks), ranks));
    std::vector<double> host(backend.host_memory() ? 0 : rows * ranks);
    double* const to = backend.host_memory() ? triangle.stack.matrix.data : host.data();
    int64_t column = 0;
    for (size_t i = 0; i < module_.inputs.size(); ++i) {
      const int64_t rank = module_.inputs[i].rank;
      const double coefficient = Coefficient(module_.inputs[i]);
      ASSIGN_OR_RETURN(const Values values,
                       Values::Load(context, of_a ? OperandA(i) : OperandB(i)));
      const float* const from = values.span().data();
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t k = 0; k < rank; ++k) {
          to[row * ranks + column + k] =
              of_a ? double{from[k * rows + row]} : coefficient * from[row * rank + k];
        }
      }
      column += rank;
    }
    if (!backend.host_memory()) {
      RETURN_IF_ERROR(backend.Upload(host.data(), triangle.stack.matrix.data,
                                     static_cast<int64_t>(host.size()) * kDouble));
      RETURN_IF_ERROR(backend.Synchronize());
    }
    RETURN_IF_ERROR(algebra.QrFactor(triangle.stack.matrix, triangle.r.matrix));
    return triangle;
  }
};

class DenseSvdTask final : public SvdTask {
 public:
  using SvdTask::SvdTask;

  int64_t bytes() const override {
    int64_t products = 0, largest = 0;
    for (const AdapterInput& input : module_.inputs) {
      const int64_t one = LowRankProduct::Bytes(module_.out, input.rank, module_.in);
      products += one;
      largest = std::max(largest, one);
    }
    const int64_t tiles = (static_cast<int64_t>(module_.inputs.size()) + 1) * kTile * kFloat;
    return products + 2 * largest + tiles + module_.out * module_.in * kFloat +
           kernels::FactorLowRankBytes(module_.out, module_.in, module_.rank) + factor_bytes();
  }

  absl::Status Make(TaskContext& context, absl::Span<float> result) const override {
    kernels::Backend& backend = context.backend();
    ASSIGN_OR_RETURN(const std::unique_ptr<Buffer> merged, Merge(context));
    ASSIGN_OR_RETURN(
        const kernels::LowRankFactors factors,
        kernels::FactorLeading(backend,
                               {merged->data(), DType::kF32, module_.out, module_.in, module_.in},
                               module_.rank));
    ASSIGN_OR_RETURN(std::vector<double> left, Fetch(backend, factors.left));
    ASSIGN_OR_RETURN(std::vector<double> right, Fetch(backend, factors.right));
    SetFactors(std::move(left), std::move(right), result);
    return absl::OkStatus();
  }

 private:
  // The operation on all products, [out, in] of F32 in the backend's memory. The products are
  // computed a tile at a time, and again for every pass over them.
  absl::StatusOr<std::unique_ptr<Buffer>> Merge(TaskContext& context) const {
    std::vector<LowRankProduct> products;
    for (size_t i = 0; i < module_.inputs.size(); ++i) {
      const AdapterInput& input = module_.inputs[i];
      ASSIGN_OR_RETURN(const Values a, Values::Load(context, OperandA(i)));
      ASSIGN_OR_RETURN(const Values b, Values::Load(context, OperandB(i)));
      products.emplace_back(std::vector<float>(b.span().begin(), b.span().end()),
                            std::vector<float>(a.span().begin(), a.span().end()), input.rank,
                            static_cast<float>(input.scale));
    }
    Combination combination(method_.elementwise, ByFrequency(module_), TermsOf(module_, "delta"));
    const int64_t elements = module_.out * module_.in;
    if (combination.ranks()) {
      std::vector<float> scratch(elements);
      for (size_t i = 0; i < products.size(); ++i) {
        combination.Rank(i, absl::MakeSpan(scratch), [&](int64_t first, int64_t count, float* out) {
          products[i].Compute(first, count, out);
        });
      }
    }
    kernels::Backend& backend = context.backend();
    ASSIGN_OR_RETURN(std::unique_ptr<Buffer> merged, backend.Allocate(elements * kFloat));
    auto* const to = static_cast<float*>(merged->data());
    const int64_t step = std::min(kTile, elements);
    std::vector<std::vector<float>> tiles(products.size(), std::vector<float>(step));
    std::vector<float*> values;
    for (std::vector<float>& tile : tiles) values.push_back(tile.data());
    std::vector<float> staging(backend.host_memory() ? 0 : step);
    for (int64_t first = 0; first < elements; first += step) {
      const int64_t count = std::min(step, elements - first);
      for (size_t i = 0; i < products.size(); ++i) {
        products[i].Compute(first, count, values[i]);
      }
      if (backend.host_memory()) {
        combination.Combine(first, count, values, to + first);
        continue;
      }
      combination.Combine(first, count, values, staging.data());
      RETURN_IF_ERROR(backend.Upload(staging.data(), to + first, count * kFloat));
      RETURN_IF_ERROR(backend.Synchronize());  // before the staging memory is used again
    }
    return merged;
  }
};

// What is neither pruned nor elected is a sum of products.
bool IsSum(const AdapterMethod& method, const AdapterModule& module) {
  return !method.elementwise.elect_sign &&
         std::all_of(module.inputs.begin(), module.inputs.end(), [](const AdapterInput& input) {
           return !input.params.contains("density") || input.number("density") >= 1;
         });
}

}  // namespace

std::shared_ptr<const TensorTask> MakeStackTask(const AdapterMethod& method,
                                                const AdapterModule& module) {
  return std::make_shared<const StackTask>(method, module);
}

std::shared_ptr<const TensorTask> MakeFactorwiseTask(const AdapterMethod& method,
                                                     const AdapterModule& module) {
  return std::make_shared<const FactorwiseTask>(method, module);
}

std::shared_ptr<const TensorTask> MakeSvdTask(const AdapterMethod& method,
                                              const AdapterModule& module) {
  if (IsSum(method, module)) {
    return std::make_shared<const SumSvdTask>(method, module);
  }
  return std::make_shared<const DenseSvdTask>(method, module);
}

std::vector<Param> WithRankParams(std::vector<Param> params) {
  params.push_back({.name = "svd_rank",
                    .help = "rank of every module, at most what the merge can have; unset: the "
                            "largest rank that any of the adapters has",
                    .type = ParamType::kInt,
                    .fallback = Unset{},
                    .min = 1});
  params.push_back({.name = "svd_energy",
                    .help = "the least rank that keeps this share of a module's squared singular "
                            "values, at most svd_rank where that is set; found while planning",
                    .fallback = Unset{},
                    .min = 1e-6,
                    .max = 1});
  return params;
}

std::vector<Param> WithSvdParams(std::vector<Param> params) {
  params = WithRankParams(std::move(params));
  params.push_back({.name = "svd_clamp",
                    .help = "clamps the entries of both factors to this quantile of them",
                    .fallback = Unset{},
                    .min = 0,
                    .max = 1});
  params.push_back({.name = "svd_full_matrices",
                    .help = "PEFT: how the decomposition is computed",
                    .type = ParamType::kBool,
                    .fallback = true,
                    .no_effect = true});
  params.push_back({.name = "svd_driver",
                    .help = "PEFT: how the decomposition is computed",
                    .type = ParamType::kString,
                    .fallback = Unset{},
                    .no_effect = true});
  return params;
}

}  // namespace pewter::adapters

namespace pewter {

absl::StatusOr<int64_t> LargestRank(const AdapterMethod& method, const AdapterModule& module) {
  using kernels::kMaxExtent;
  const int64_t shorter = std::min(module.out, module.in);
  if (!adapters::IsSum(method, module)) {
    if (shorter <= kMaxExtent) return shorter;
    return absl::FailedPreconditionError(absl::StrCat(
        "a product of ", module.out, " x ", module.in, " is too large to be decomposed (",
        kMaxExtent, " by the shorter side); svd and cat merge it by its factors"));
  }
  const int64_t ranks = adapters::SumOfRanks(module);
  if (ranks > kMaxExtent || std::max(module.out, module.in) > kMaxExtent * kMaxExtent / ranks) {
    return absl::FailedPreconditionError(
        absl::StrCat("factors of ", module.out, " x ", module.in, " whose ranks sum to ", ranks,
                     " are too large to be decomposed (", kMaxExtent,
                     " by the sum of the ranks); cat merges them"));
  }
  return std::min(shorter, ranks);
}

std::shared_ptr<const TensorTask> MakeBiasTask(const AdapterMethod& method,
                                               const AdapterModule& module, int64_t elements) {
  return std::make_shared<const adapters::BiasTask>(method, module, elements);
}

}  // namespace pewter
