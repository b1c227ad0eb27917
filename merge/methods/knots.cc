// KnOTS (arXiv 2410.19735; github.com/gstoica27/KnOTS): task vectors are aligned by the joint SVD
// of each weight, and merged in that basis by TIES, all weights together:
//
//   [D_1 ... D_T] = U S [V_1 ... V_T]^T, directions with s_j > 1e-5;  X_t = S V_t^T = U^T D_t
//   knots_dare_ties: entries of X_t are dropped with probability `drop`, the others / (1 - drop)
//   of each model, the entries of all its X_t together: the density largest stay (one more, as in
//     the authors' code)
//   signs are elected by sum_t X_t; a sum of 0 takes the sign of the sum of all elected signs
//   M = lambda sum_t X_t / the number of terms that are not 0;  out = base + U M
//
// What is kept is found by their magnitudes as float32 numbers, to within which equal ones stay
// together. Each round of the search decomposes the weights again, so that nothing is held.
//
// KnOTS is about adapters, which change linear weights alone. Other tensors: base + lambda mean of
// the task vectors.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <mutex>
#include <utility>

#include "base/status.h"
#include "kernels/radix_select.h"
#include "merge/methods/common/joint_space.h"
#include "merge/methods/common/linear_weights.h"
#include "merge/methods/method.h"

namespace pewter::methods {
namespace {

using kernels::ElectedMean;

constexpr RankCut kCut = {.absolute = 1e-5};

class KnotsTask : public TensorTask {
 public:
  KnotsTask(MatrixShape shape, std::vector<int64_t> ranks, DType dtype, DType result_dtype,
            double lambda, double drop, bool report)
      : shape_(shape),
        ranks_(std::move(ranks)),
        count_(static_cast<int>(ranks_.size())),
        dtype_(dtype),
        result_dtype_(result_dtype),
        lambda_(lambda),
        drop_(drop),
        report_(report) {}

  const char* name() const override { return drop_ > 0 ? "knots_dare_ties" : "knots_ties"; }
  DType result_dtype() const override { return result_dtype_; }
  int64_t bytes() const override {
    const JointBasisCost cost = CostOfJointBasis(shape_, ranks_, Stack::kHorizontal, kCut);
    const int64_t block = cost.rank * shape_.columns * int64_t{sizeof(double)};
    return TaskVectors::Bytes(shape_, dtype_, ranks_) +
           std::max(cost.peak, cost.kept + (count_ + 1 + (report_ ? 1 : 0)) * block) +
           TaskVectors::EmitBytes(shape_) + shape_.rows * shape_.columns * ByteWidth(result_dtype_);
  }

  absl::Status Run(TaskContext& context, kernels::View result) const override {
    ASSIGN_OR_RETURN(const Aligned aligned, Align(context));
    kernels::Backend& backend = context.backend();
    ASSIGN_OR_RETURN(kernels::LinearAlgebra* const algebra, backend.linear_algebra());
    const JointBlocks& blocks = aligned.blocks;
    if (blocks.rank > 0) {
      const absl::Span<const double> found = context.measured();
      ElectedMean op = Election(context, found);
      op.sign_of_zero = found.back();
      std::fill_n(op.weight, count_, lambda_);
      if (context.reports()) RETURN_IF_ERROR(Tell(context, aligned, op));
      RETURN_IF_ERROR(backend.Map(
          op, blocks.Views(), {blocks.Of(0).data, DType::kF64, blocks.rank * blocks.length}, 0));
    }
    // Small directions count, so the basis is the shared side's own, and the task vectors are gone.
    ASSIGN_OR_RETURN(const Expansion expansion,
                     Expansion::Make(backend, aligned.basis, blocks.Of(0), Stack::kHorizontal, {}));
    const auto rows_of = [&](int64_t first, kernels::Matrix out) {
      return expansion.Rows(*algebra, first, out);
    };
    return aligned.vectors.Emit(backend, 0, shape_.rows, rows_of, result);
  }

  // Adds, by model: the entries, and how many of them have each digit of the level.
  struct Counts {
    std::vector<int64_t> entries;
    std::vector<std::vector<uint64_t>> bins;
  };
  absl::Status Count(TaskContext& context, absl::Span<const kernels::RadixLevel> levels,
                     Counts& counts) const {
    ASSIGN_OR_RETURN(const Aligned aligned, Align(context));
    kernels::Backend& backend = context.backend();
    const int64_t size = aligned.blocks.rank * aligned.blocks.length;
    if (size == 0) return absl::OkStatus();
    ASSIGN_OR_RETURN(const auto memory, backend.Allocate(size * int64_t{sizeof(float)}));
    kernels::WeightedSum rounded;
    rounded.count = 1;
    rounded.weight[0] = 1;
    for (int t = 0; t < count_; ++t) {
      const int model = context.model(t);
      RETURN_IF_ERROR(
          backend.Map(rounded, {aligned.blocks.View(t)}, {memory->data(), DType::kF32, size}, 0));
      counts.entries[model] += size;
      RETURN_IF_ERROR(backend.Histogram(kernels::DeltaMagnitude{1},
                                        {{memory->data(), DType::kF32, size}}, 0, levels[model],
                                        absl::MakeSpan(counts.bins[model])));
    }
    return absl::OkStatus();
  }

  // The sum of the elected signs.
  absl::StatusOr<double> Signs(TaskContext& context, absl::Span<const double> thresholds) const {
    ASSIGN_OR_RETURN(const Aligned aligned, Align(context));
    if (aligned.blocks.rank == 0) return 0.0;
    ASSIGN_OR_RETURN(const std::vector<double> signs,
                     context.backend().Reduce(kernels::ElectedSigns{Election(context, thresholds)},
                                              aligned.blocks.Views(), 0));
    double sum = 0;
    for (double of_block : signs) sum += of_block;
    return sum;
  }

 private:
  struct Aligned {
    TaskVectors vectors;
    JointBasis basis;
    JointBlocks blocks;
    std::vector<double> squares;  // of the task vectors, where there is a report
  };

  absl::Status Tell(TaskContext& context, const Aligned& aligned, const ElectedMean& op) const {
    kernels::Backend& backend = context.backend();
    ASSIGN_OR_RETURN(const std::vector<double> norms, RowNorms(backend, aligned.blocks));
    std::vector<double> kept;
    for (int t = 0; t < count_; ++t) {
      ElectedMean one = op;
      one.count = 1;
      one.elect = one.disjoint = false;
      one.weight[0] = 1;
      one.threshold[0] = op.threshold[t];
      ASSIGN_OR_RETURN(const double square, KeptSquare(backend, aligned.blocks, t, one));
      kept.push_back(aligned.squares[t] > 0 ? square / aligned.squares[t] : 0);
    }
    ReportSpectrum(context, "", aligned.basis.spectrum, aligned.basis.rank());
    ReportTasks(context, "", norms, aligned.squares);
    context.Report("kept", std::move(kept));
    return absl::OkStatus();
  }

  absl::StatusOr<Aligned> Align(TaskContext& context) const {
    kernels::Backend& backend = context.backend();
    Aligned aligned;
    ASSIGN_OR_RETURN(aligned.vectors, TaskVectors::Load(context, ranks_));
    const auto deltas = aligned.vectors.Rows(0, shape_.rows);
    for (size_t t = 0; t < deltas.size() && report_; ++t) {
      ASSIGN_OR_RETURN(const double square, SquaredNorm(backend, deltas[t]));
      aligned.squares.push_back(square);
    }
    ASSIGN_OR_RETURN(aligned.basis, FindJointBasis(backend, deltas, Stack::kHorizontal, kCut));
    ASSIGN_OR_RETURN(aligned.blocks, ProjectOnBasis(backend, aligned.basis, deltas,
                                                    Stack::kHorizontal, &aligned.vectors));
    if (drop_ > 0) RETURN_IF_ERROR(Drop(context, aligned.blocks));
    return aligned;
  }

  // DARE: task vectors of a base of zeros.
  absl::Status Drop(TaskContext& context, const JointBlocks& blocks) const {
    kernels::Backend& backend = context.backend();
    const int64_t size = blocks.rank * blocks.length;
    if (size == 0) return absl::OkStatus();
    ASSIGN_OR_RETURN(const auto memory, backend.Allocate(size * int64_t{sizeof(double)}));
    const kernels::View zeros = {memory->data(), DType::kF64, size};
    kernels::WeightedSum nothing;
    nothing.count = 1;
    RETURN_IF_ERROR(backend.Map(nothing, {blocks.View(0)}, zeros, 0));
    for (int t = 0; t < count_; ++t) {
      kernels::TaskVectorSum op;
      op.count = 1;
      op.model[0].keep = kernels::Keep::kRandom;
      op.model[0].key = context.random_key(t);
      op.model[0].draw_below = static_cast<uint64_t>(std::llround((1 - drop_) * 0x1p32));
      op.model[0].scale = 1 / (1 - drop_);
      RETURN_IF_ERROR(backend.Map(op, {{zeros.data, DType::kF64, size}, blocks.View(t)},
                                  {blocks.Of(t).data, DType::kF64, size}, 0));
    }
    return backend.Synchronize();  // before the zeros go
  }

  ElectedMean Election(const TaskContext& context, absl::Span<const double> thresholds) const {
    ElectedMean op;
    op.count = count_;
    for (int t = 0; t < count_; ++t) op.threshold[t] = thresholds[context.model(t)];
    return op;
  }

  const MatrixShape shape_;
  const std::vector<int64_t> ranks_;
  const int count_;
  const DType dtype_, result_dtype_;
  const double lambda_, drop_;
  const bool report_;
};

// The thresholds, by model, then the sign of sums of zero. Two rounds find the thresholds, one the
// sign. Ranks decide how many entries there are, so that the first round counts these as well.
class KnotsMeasure : public Measure {
 public:
  explicit KnotsMeasure(const MeasureFacts& facts)
      : density_(std::get<double>(facts.params.at("density"))), models_(facts.elements.size()) {
    counts_.entries.assign(models_, 0);
    Clear();
  }

  bool done() const override { return round_ == 3; }

  absl::Status See(MethodContext&) override {
    return absl::InternalError("a tensor that is not a linear weight is not measured");
  }
  absl::Status See(const TensorTask& task, TaskContext& tensor) override {
    const auto& knots = static_cast<const KnotsTask&>(task);
    if (round_ == 2) {
      ASSIGN_OR_RETURN(const double signs, knots.Signs(tensor, found_));
      std::lock_guard lock(mutex_);
      signs_ += signs;
      return absl::OkStatus();
    }
    std::vector<kernels::RadixLevel> levels(models_);
    if (round_ == 1) {
      for (size_t m = 0; m < models_; ++m) {
        if (selects_[m].remaining > 0) levels[m] = selects_[m].select.level();
      }
    }
    KnotsTask::Counts counts = {
        std::vector<int64_t>(models_),
        std::vector<std::vector<uint64_t>>(models_, std::vector<uint64_t>(kernels::kRadixBins))};
    RETURN_IF_ERROR(knots.Count(tensor, levels, counts));
    std::lock_guard lock(mutex_);
    for (size_t m = 0; m < models_; ++m) {
      counts_.entries[m] += counts.entries[m];
      for (int64_t bin = 0; bin < kernels::kRadixBins; ++bin) {
        counts_.bins[m][bin] += counts.bins[m][bin];
      }
    }
    return absl::OkStatus();
  }

  absl::Status EndRound() override {
    if (round_ == 0) {
      for (int64_t entries : counts_.entries) {
        const auto nominal = static_cast<int64_t>(static_cast<double>(entries) * density_);
        const int64_t kept = std::min(entries, nominal + 1);
        selects_.push_back({kept, kernels::RadixSelect(kept, /*f64=*/false)});
      }
    }
    if (round_ < 2) {
      for (size_t m = 0; m < models_; ++m) {
        if (selects_[m].remaining > 0) {
          RETURN_IF_ERROR(selects_[m].select.Descend(counts_.bins[m]));
        }
      }
      Clear();
    }
    if (round_ == 1) {
      for (const Selection& selection : selects_) {
        found_.push_back(selection.remaining > 0 ? LeastThatRoundsTo(selection.select.value()) : 0);
      }
    }
    ++round_;
    return absl::OkStatus();
  }

  std::vector<double> Found() const override {
    std::vector<double> found = found_;
    found.push_back(signs_ > 0 ? 1 : signs_ < 0 ? -1 : 0);
    return found;
  }

 private:
  struct Selection {
    int64_t remaining;  // entries that stay; 0: there are none
    kernels::RadixSelect select;
  };

  // Of the doubles.
  static double LeastThatRoundsTo(double value) {
    const auto single = static_cast<float>(value);
    if (single == 0) return 0;
    return (static_cast<double>(std::nextafterf(single, 0)) + value) / 2;
  }
  void Clear() { counts_.bins.assign(models_, std::vector<uint64_t>(kernels::kRadixBins)); }

  const double density_;
  const size_t models_;
  int round_ = 0;
  std::vector<Selection> selects_;  // by model
  std::vector<double> found_;
  std::mutex mutex_;
  KnotsTask::Counts counts_;  // guarded by mutex_ within a round
  double signs_ = 0;          // likewise
};

absl::StatusOr<Treatment> Treat(const TensorFacts& tensor) {
  if (!IsLinearWeight(tensor)) return Treatment{};
  const MatrixShape shape = AsMatrix(tensor.shape);
  RETURN_IF_ERROR(CheckOrder(shape.rows, "leave it out with `linear_exclude`"));
  const auto drop = tensor.params.find("drop");
  Treatment treatment{.measured = true};
  treatment.task = std::make_shared<const KnotsTask>(
      shape, tensor.ranks, tensor.dtype, tensor.result_dtype,
      std::get<double>(tensor.params.at("lambda")),
      drop == tensor.params.end() ? 0 : std::get<double>(drop->second), tensor.report);
  return treatment;
}

std::vector<Param> Params(bool with_drop) {
  std::vector<Param> params = {
      {.name = "density",
       .help = "share of the entries of a model's aligned task vectors that is kept, largest "
               "first, all weights together",
       .scope = ParamScopeKind::kJob,
       .fallback = 0.2,
       .min = 0,
       .max = 1},
      {.name = "lambda", .help = "factor of the merged task vector", .fallback = 1.0}};
  if (with_drop) {
    params.push_back({.name = "drop",
                      .help = "probability that an entry of an aligned task vector is dropped",
                      .fallback = 0.1,
                      .min = 0,
                      .max = 0.999});
  }
  const std::vector<Param> linear = LinearWeightParams();
  params.insert(params.end(), linear.begin(), linear.end());
  return params;
}

absl::Status Run(MethodContext& context) {
  return RunMeanOfTaskVectors(context, context.number("lambda"));
}

std::unique_ptr<Measure> MakeMeasure(const MeasureFacts& facts) {
  return std::make_unique<KnotsMeasure>(facts);
}

}  // namespace

absl::Span<const MergeMethod> knots() {
  static const MergeMethod methods[] = {
      {
          .name = "knots_ties",
          .title = "KnOTS-TIES",
          .summary = "aligns task vectors by a joint SVD of each weight and merges them in that "
                     "basis by TIES",
          .formula = "[D_1 ... D_T] = U S [V_1 ... V_T]^T; X_t = top_density(S V_t^T), of all "
                     "weights together; m = sign(sum_t X_t); out = base + lambda U mean_{X_t != 0, "
                     "sign X_t = m} X_t; other tensors: base + lambda mean_t D_t",
          .reference = "https://arxiv.org/abs/2410.19735",
          .params = Params(false),
          .base = BaseUse::kRequired,
          .min_inputs = 1,
          .treat = &Treat,
          .measure = &MakeMeasure,
          .run = &Run,
      },
      {
          .name = "knots_dare_ties",
          .title = "KnOTS-DARE-TIES",
          .summary = "aligns task vectors by a joint SVD of each weight, drops entries at random "
                     "and merges the rest in that basis by TIES",
          .formula =
              "as knots_ties, with the entries of S V_t^T kept with probability 1 - drop and "
              "divided by it first",
          .reference = "https://arxiv.org/abs/2410.19735",
          .params = Params(true),
          .base = BaseUse::kRequired,
          .min_inputs = 1,
          .treat = &Treat,
          .measure = &MakeMeasure,
          .run = &Run,
      }};
  return methods;
}

}  // namespace pewter::methods
