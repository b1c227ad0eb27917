// Decom-Renorm-Merge (arXiv 2505.23117; the authors' code, github.com/yophis/decom-renorm-merge,
// decides where the paper is silent): task vectors are aligned in a joint basis, the rows of their
// singular matrices are normalised before they are trimmed, and what is left is merged by elected
// signs.
//
// For one weight with task vectors D_t and their horizontal stack [D_1 ... D_T] = U S V^T:
//   1. directions with s_j > rank_cut s_1 stay; P_t = U^T D_t are the rows s_j v_jt (joint_space.h)
//   2. of all rows of all P_t, normalised, the entries below one threshold become 0: the k-th
//      smallest magnitude of the N, k = N - round(density N), stays itself
//   3. at each place the sign of the sum over the models is elected, and entries of the other sign
//      become 0; a sum of 0 takes the sign of the sum of all elected signs
//   4. M = sum_t weight_t P_t / the number of terms that are not 0 (disjoint_mean), or / T
//   5. out = base + U M
// Vertically [D_1; ...; D_T] shares V, which is the same of the transposed matrices.
//
// A row of a normalised matrix whose norm before was at most 1e-10 s_1 is rounding noise: the
// authors' code divides by it, here the row is absent (its entries are zeros that count in N).
// A density of 1 leaves the decomposition out, as the authors' code does, and with it the signs and
// the weights: the mean of the task vectors. Other tensors are merged element by element, by signs
// and weights; with other_density, what is trimmed is decided over all of them (Measure).
#include <algorithm>
#include <cmath>
#include <memory>
#include <mutex>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "kernels/radix_select.h"
#include "merge/methods/common/joint_space.h"
#include "merge/methods/common/linear_weights.h"
#include "merge/methods/common/trimmed_merge.h"
#include "merge/methods/method.h"

namespace pewter::methods {
namespace {

using kernels::ElectedMean;

// The numerical rank by which auto_rank decides.
constexpr double kAutoRankCut = 0.1;

// Kinds of tensors that are merged element by element.
constexpr char kMean[] = "mean";
constexpr char kElementwise[] = "elementwise";

enum class Direction { kHorizontal, kVertical, kAutoRank, kAutoOrthogonality };

struct DrmOptions {
  Direction direction = Direction::kHorizontal;
  TrimmedMerge merge;
  double rank_cut = 0.01;
  int parts = 1;               // blocks of rows that are merged independently
  std::vector<int64_t> ranks;  // TensorFacts::ranks
  bool report = false;
};

int64_t RankAbove(const JointBasis& basis, double share) {
  return std::count_if(basis.spectrum.begin(), basis.spectrum.end(),
                       [&](double value) { return value > share * basis.spectrum[0]; });
}

// How nearly orthogonal the models' singular matrices are, as the authors' code measures it: the
// sum over all pairs of models, a model with itself included, of 1 - |<V_s, V_t> - [s = t]|.
absl::StatusOr<double> Orthogonality(kernels::Backend& backend, const JointBasis& basis,
                                     Deltas deltas, Stack stack) {
  ASSIGN_OR_RETURN(const JointBlocks blocks,
                   ProjectOnBasis(backend, basis, deltas, stack, nullptr));
  const kernels::Gram gram = {.count = blocks.count};
  ASSIGN_OR_RETURN(const std::vector<double> products,
                   backend.ReduceBlocks(gram, blocks.Views(), 0, blocks.length));
  double sum = 0;
  for (int g = 0; g < gram.groups(); ++g) {
    double product = 0;
    for (int64_t j = 0; j < blocks.rank; ++j) {
      const double value = basis.spectrum[j];
      product += products[j * gram.groups() + g] / (value * value);
    }
    const kernels::Gram::Pair pair = gram.PairOf(g);
    sum += pair.i == pair.j ? 1 - std::abs(product - 1) : 2 * (1 - std::abs(product));
  }
  return sum;
}

class DrmTask : public TensorTask {
 public:
  DrmTask(MatrixShape shape, DType dtype, DType result_dtype, DrmOptions options)
      : shape_(shape), dtype_(dtype), result_dtype_(result_dtype), options_(std::move(options)) {}

  const char* name() const override { return "drm"; }
  DType result_dtype() const override { return result_dtype_; }

  int64_t bytes() const override {
    const MatrixShape part = Part(0).shape;
    int64_t most = 0, kept = 0;
    for (Stack stack : Stacks()) {
      const JointBasisCost cost = CostOfJointBasis(part, options_.ranks, stack, Cut());
      const int64_t blocks = (count() * cost.rank * (BlockLength(stack, part) + 2) +
                              (options_.report ? cost.rank * BlockLength(stack, part) : 0)) *
                             int64_t{sizeof(double)};
      most = std::max({most, cost.peak, cost.kept + blocks});
      kept += cost.kept;
    }
    const int64_t basis = Stacks().size() > 1 ? kept + most : most;
    return TaskVectors::Bytes(shape_, dtype_, options_.ranks) + basis +
           TaskVectors::EmitBytes(part) + shape_.rows * shape_.columns * ByteWidth(result_dtype_);
  }

  absl::Status Run(TaskContext& context, kernels::View result) const override {
    ASSIGN_OR_RETURN(TaskVectors vectors, TaskVectors::Load(context, options_.ranks));
    for (int part = 0; part < options_.parts; ++part) {
      RETURN_IF_ERROR(MergePart(context, vectors, part, result));
    }
    return absl::OkStatus();
  }

  // The largest eigenvalue problem.
  int64_t order() const {
    int64_t order = 0;
    for (Stack stack : Stacks()) {
      order = std::max(order, CostOfJointBasis(Part(0).shape, options_.ranks, stack, Cut()).order);
    }
    return order;
  }

 private:
  struct RowRange {
    int64_t first;
    MatrixShape shape;
  };

  int count() const { return static_cast<int>(options_.ranks.size()); }
  RankCut Cut() const { return {.relative = options_.rank_cut}; }

  std::vector<Stack> Stacks() const {
    switch (options_.direction) {
      case Direction::kHorizontal:
        return {Stack::kHorizontal};
      case Direction::kVertical:
        return {Stack::kVertical};
      case Direction::kAutoRank:
      case Direction::kAutoOrthogonality:
        break;
    }
    return {Stack::kHorizontal, Stack::kVertical};
  }

  // The first parts have a row more where they are not equal.
  RowRange Part(int part) const {
    const int64_t rows = shape_.rows / options_.parts, more = shape_.rows % options_.parts;
    return {part * rows + std::min<int64_t>(part, more),
            {rows + (part < more ? 1 : 0), shape_.columns}};
  }

  absl::Status MergePart(TaskContext& context, TaskVectors& vectors, int index,
                         kernels::View result) const {
    kernels::Backend& backend = context.backend();
    const RowRange part = Part(index);
    const std::vector<TaskVector> deltas = vectors.Rows(part.first, part.shape.rows);
    ASSIGN_OR_RETURN(kernels::LinearAlgebra* const algebra, backend.linear_algebra());
    std::vector<Stack> stacks = Stacks();
    std::vector<JointBasis> bases;
    for (Stack stack : stacks) {
      ASSIGN_OR_RETURN(JointBasis basis, FindJointBasis(backend, deltas, stack, Cut()));
      bases.push_back(std::move(basis));
    }
    size_t chosen = 0;
    if (bases.size() > 1 && bases[0].rank() > 0) {
      ASSIGN_OR_RETURN(chosen, Choose(backend, bases, deltas, stacks));
    }
    const Stack stack = stacks[chosen];
    const JointBasis basis = std::move(bases[chosen]);
    bases.clear();
    TrimmedMergeReport report;
    if (context.reports()) {
      report.context = &context;
      if (options_.parts > 1) report.part = absl::StrCat("part ", index, ": ");
      for (const TaskVector& delta : deltas) {
        ASSIGN_OR_RETURN(const double square, SquaredNorm(backend, delta));
        report.squares.push_back(square);
      }
      ReportSpectrum(context, report.part, basis.spectrum, basis.rank());
    }
    ASSIGN_OR_RETURN(
        const JointBlocks blocks,
        ProjectOnBasis(backend, basis, deltas, stack,
                       part.first + part.shape.rows == shape_.rows ? &vectors : nullptr));
    // Without a direction the models do not differ from the base here.
    if (blocks.rank > 0) {
      RETURN_IF_ERROR(MergeTrimmed(backend, blocks, basis.spectrum[0], options_.merge, report));
    }
    ASSIGN_OR_RETURN(const Expansion expansion,
                     Expansion::Make(backend, basis, blocks.Of(0), stack, deltas));
    const auto rows_of = [&](int64_t first, kernels::Matrix out) {
      return expansion.Rows(*algebra, first - part.first, out);
    };
    return vectors.Emit(backend, part.first, part.first + part.shape.rows, rows_of, result);
  }

  absl::StatusOr<size_t> Choose(kernels::Backend& backend, absl::Span<const JointBasis> bases,
                                Deltas deltas, absl::Span<const Stack> stacks) const {
    if (options_.direction == Direction::kAutoRank) {
      return RankAbove(bases[0], kAutoRankCut) < RankAbove(bases[1], kAutoRankCut) ? 0 : 1;
    }
    double orthogonality[2] = {};
    for (int i : {0, 1}) {
      ASSIGN_OR_RETURN(orthogonality[i], Orthogonality(backend, bases[i], deltas, stacks[i]));
    }
    return orthogonality[0] > orthogonality[1] ? 0 : 1;
  }

  const MatrixShape shape_;
  const DType dtype_, result_dtype_;
  const DrmOptions options_;
};

// --- Planning -----------------------------------------------------------------------------------

double Number(const ParamValues& params, const char* name) {
  return std::get<double>(params.at(name));
}
bool Flag(const ParamValues& params, const char* name) { return std::get<bool>(params.at(name)); }

Direction DirectionOf(const ParamValues& params) {
  const auto& name = std::get<std::string>(params.at("direction"));
  if (name == "horizontal") return Direction::kHorizontal;
  if (name == "vertical") return Direction::kVertical;
  return name == "auto_rank" ? Direction::kAutoRank : Direction::kAutoOrthogonality;
}

absl::StatusOr<Treatment> Treat(const TensorFacts& tensor) {
  if (PatternMatches(tensor, "ignore", false)) {
    return Treatment{.keep_base = true, .notes = {"left as in the base model: `ignore`"}};
  }
  if (!IsLinearWeight(tensor)) {
    const bool trimmed = Number(tensor.params, "other_density") < 1 && tensor.shape.elements() > 0;
    return Treatment{.measured = trimmed, .kind = kElementwise};
  }
  DrmOptions options{.direction = DirectionOf(tensor.params),
                     .merge = {.density = Number(tensor.params, "density"),
                               .disjoint = Flag(tensor.params, "disjoint_mean")},
                     .rank_cut = Number(tensor.params, "rank_cut"),
                     .ranks = tensor.ranks,
                     .report = tensor.report};
  if (options.merge.density >= 1) {
    return Treatment{.kind = kMean, .notes = {"density 1: the mean of the task vectors"}};
  }
  for (const ParamValues* params : tensor.input_params) {
    options.merge.weights.push_back(Number(*params, "weight"));
  }
  Treatment treatment;
  const MatrixShape shape = AsMatrix(tensor.shape);
  const bool fused =
      absl::StrContains(tensor.name, "in_proj") || absl::StrContains(tensor.name, "qkv");
  if (fused && Flag(tensor.params, "split_qkv")) {
    if (shape.rows == 3 * shape.columns) {
      options.parts = 3;
      treatment.notes.push_back("query, key and value are merged independently");
    } else {
      treatment.notes.push_back("not split: the rows are not three times the columns");
    }
  }
  const auto task =
      std::make_shared<const DrmTask>(shape, tensor.dtype, tensor.result_dtype, std::move(options));
  RETURN_IF_ERROR(CheckOrder(task->order(),
                             "take the other `direction`, or leave it out with `linear_exclude`"));
  treatment.task = task;
  return treatment;
}

// The thresholds to which the tensors that are merged element by element are trimmed, all of a
// model together.
class OtherThresholds : public Measure {
 public:
  explicit OtherThresholds(const MeasureFacts& facts) {
    const double density = Number(facts.params, "other_density");
    for (int64_t elements : facts.elements) {
      selects_.emplace_back(Survivors(elements, density), facts.f64);
      takes_part_.push_back(elements > 0);
    }
    Clear();
  }

  bool done() const override { return Round().done(); }

  absl::Status See(MethodContext& tensor) override {
    std::vector<MethodContext::MagnitudeRank> magnitudes;
    std::vector<kernels::RadixLevel> levels;
    for (int i = 0; i < tensor.inputs(); ++i) {
      magnitudes.push_back({kernels::DeltaMagnitude{}, {MethodContext::kBase, i}, 0});
      levels.push_back(selects_[tensor.model(i)].level());
    }
    std::vector<std::vector<uint64_t>> counted(magnitudes.size(),
                                               std::vector<uint64_t>(kernels::kRadixBins));
    RETURN_IF_ERROR(tensor.CountMagnitudes(magnitudes, levels, absl::MakeSpan(counted)));
    std::lock_guard lock(mutex_);
    for (int i = 0; i < tensor.inputs(); ++i) {
      std::vector<uint64_t>& bins = bins_[tensor.model(i)];
      for (size_t bin = 0; bin < bins.size(); ++bin) bins[bin] += counted[i][bin];
    }
    return absl::OkStatus();
  }
  absl::Status See(const TensorTask&, TaskContext&) override {
    return absl::InternalError("a linear weight is not measured");
  }

  absl::Status EndRound() override {
    for (size_t m = 0; m < selects_.size(); ++m) {
      if (takes_part_[m]) RETURN_IF_ERROR(selects_[m].Descend(bins_[m]));
    }
    Clear();
    return absl::OkStatus();
  }

  std::vector<double> Found() const override {
    std::vector<double> thresholds;
    for (size_t m = 0; m < selects_.size(); ++m) {
      thresholds.push_back(takes_part_[m] ? selects_[m].value() : 0);
    }
    return thresholds;
  }

 private:
  // All are at the same level.
  const kernels::RadixSelect& Round() const {
    return selects_[std::find(takes_part_.begin(), takes_part_.end(), true) - takes_part_.begin()];
  }
  void Clear() { bins_.assign(selects_.size(), std::vector<uint64_t>(kernels::kRadixBins)); }

  std::vector<kernels::RadixSelect> selects_;  // by model
  std::vector<bool> takes_part_;
  std::mutex mutex_;
  std::vector<std::vector<uint64_t>> bins_;  // by model; guarded by mutex_ within a round
};

// Tensors that are merged element by element.
absl::Status Run(MethodContext& context) {
  const bool mean = context.kind() == kMean;
  ElectedMean op;
  op.count = context.inputs();
  op.from_base = true;
  op.elect = !mean && context.flag("sign_resolution");
  op.disjoint = context.flag("disjoint_mean");
  for (int t = 0; t < op.count; ++t) {
    op.weight[t] = mean ? 1 : context.number(t, "weight");
    if (!mean && !context.measured().empty()) {
      op.threshold[t] = context.measured()[context.model(t)];
    }
  }
  const std::vector<int> operands = context.AllOperands();
  // The sum of a single model is 0 only where nothing has a sign.
  if (op.elect && op.count > 1) {
    ASSIGN_OR_RETURN(const std::vector<double> signs,
                     context.Reduce(kernels::ElectedSigns{op}, operands));
    op.sign_of_zero = Sign(signs[0]);
  }
  return context.Map(op, operands);
}

std::vector<Param> Params() {
  std::vector<Param> params = {
      {.name = "weight",
       .help = "factor of this model's entries in the mean, after the signs are elected",
       .scope = ParamScopeKind::kModel,
       .fallback = 1.0},
      {.name = "density",
       .help = "share of the entries of the normalised singular matrices that is kept, of "
               "all models together; 1: the mean of the task vectors, without a decomposition",
       .fallback = 0.2,
       .min = 0,
       .max = 1},
      {.name = "direction",
       .help = "which way the task vectors are stacked; auto_rank: the one of smaller rank, "
               "counting singular values above a tenth of the largest; auto_orthogonality: "
               "the one whose singular matrices are nearer to orthogonal",
       .type = ParamType::kString,
       .fallback = "horizontal",
       .choices = {"horizontal", "vertical", "auto_rank", "auto_orthogonality"}},
      {.name = "disjoint_mean",
       .help = "divide by the number of models that count at a place; false: by all",
       .type = ParamType::kBool,
       .fallback = true},
      {.name = "sign_resolution",
       .help = "elect signs in tensors that are not linear weights (linear weights: always)",
       .type = ParamType::kBool,
       .fallback = true},
      {.name = "other_density",
       .help = "share of the elements of tensors that are not linear weights which is kept of "
               "each task vector, largest first, all such tensors together",
       .scope = ParamScopeKind::kJob,
       .fallback = 1.0,
       .min = 0,
       .max = 1},
      {.name = "ignore",
       .help = "which tensors stay as in the base model",
       .type = ParamType::kPatterns,
       .fallback = Unset{}},
      {.name = "split_qkv",
       .help = "merge query, key and value of weights called in_proj or qkv independently, "
               "where they have three times as many rows as columns",
       .type = ParamType::kBool,
       .fallback = false},
      {.name = "rank_cut",
       .help = "directions whose singular value is not above this share of the largest are "
               "dropped",
       .fallback = 0.01,
       .min = 1e-6,
       .max = 1}};
  const std::vector<Param> linear = LinearWeightParams();
  params.insert(params.end(), linear.begin(), linear.end());
  return params;
}

}  // namespace

absl::Span<const MergeMethod> drm() {
  static const MergeMethod methods[] = {{
      .name = "drm",
      .title = "Decom-Renorm-Merge",
      .summary = "aligns task vectors in a joint singular basis, normalises and trims their "
                 "singular matrices, and merges them by elected signs",
      .formula =
          "[D_1 ... D_T] = U S [V_1 ... V_T]^T (vertical: of D_t^T); A_t = rows of S V_t^T whose "
          "entries, with the rows scaled to norm 1, are among the density largest of all; m = "
          "sign(sum_t A_t); out = base + U mean_{A_t != 0, sign A_t = m} weight_t A_t",
      .reference = "https://arxiv.org/abs/2505.23117",
      .params = Params(),
      .base = BaseUse::kRequired,
      .min_inputs = 1,
      .treat = &Treat,
      .measure = [](const MeasureFacts& facts) -> std::unique_ptr<Measure> {
        return std::make_unique<OtherThresholds>(facts);
      },
      .run = &Run,
  }};
  return methods;
}

}  // namespace pewter::methods
