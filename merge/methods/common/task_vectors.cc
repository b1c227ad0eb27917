#include "merge/methods/common/task_vectors.h"

#include <algorithm>
#include <cmath>

#include "base/status.h"

namespace pewter::methods {
namespace {

using kernels::Keep;
using kernels::TaskVectorSum;

// Sets what each model keeps of its delta.
absl::Status Sparsify(MethodContext& context, Sparsifier sparsifier, TaskVectorSum& op) {
  if (sparsifier == Sparsifier::kNone) return absl::OkStatus();
  const int64_t elements = context.shape().elements();
  const auto share = [=](double density) {
    return static_cast<int64_t>(density * static_cast<double>(elements));
  };
  // A model's thresholds: that of the elements down to which it keeps, and for a band that of the
  // largest, which it does not.
  std::vector<MethodContext::MagnitudeRank> floors, ceilings;
  const auto largest_deltas = [](int input, int64_t k) {
    return MethodContext::MagnitudeRank{
        kernels::DeltaMagnitude{}, {MethodContext::kBase, input}, k};
  };
  for (int i = 0; i < op.count; ++i) {
    TaskVectorSum::Model& model = op.model[i];
    const double density = context.number(i, "density");
    if (density >= 1) continue;
    if (density <= 0 || elements == 0) {
      model.keep = Keep::kNone;
      continue;
    }
    switch (sparsifier) {
      case Sparsifier::kNone:
        break;
      case Sparsifier::kMagnitude:
        model.keep = Keep::kMagnitude;
        floors.push_back(largest_deltas(i, std::max<int64_t>(1, share(density))));
        break;
      case Sparsifier::kBand: {
        const int64_t kept = share(density);
        if (kept == 0) {
          model.keep = Keep::kNone;
          break;
        }
        const int64_t dropped = std::min(share(context.number(i, "gamma")), elements - kept);
        model.keep = dropped == 0 ? Keep::kMagnitude : Keep::kBand;
        floors.push_back(largest_deltas(i, dropped + kept));
        if (dropped > 0) ceilings.push_back(largest_deltas(i, dropped));
        break;
      }
      case Sparsifier::kRanked: {
        const double epsilon = context.number(i, "epsilon");
        // In a row of one element there are no ranks.
        if (context.row_elements() > 1) {
          model.keep = Keep::kRanked;
          model.ranked = kernels::MakeRankedDraw(context.random_key(i), context.row_elements(),
                                                 density - epsilon, density + epsilon);
          break;
        }
        [[fallthrough]];
      }
      case Sparsifier::kRandom:
        model.keep = Keep::kRandom;
        model.key = context.random_key(i);
        model.draw_below = static_cast<uint64_t>(std::llround(density * 0x1p32));
        break;
    }
  }
  if (floors.empty()) return absl::OkStatus();
  std::vector<MethodContext::MagnitudeRank> ranks = floors;
  ranks.insert(ranks.end(), ceilings.begin(), ceilings.end());
  ASSIGN_OR_RETURN(const std::vector<kernels::Threshold> thresholds, context.SelectLargest(ranks));
  for (size_t r = 0; r < ranks.size(); ++r) {
    TaskVectorSum::Model& model = op.model[ranks[r].operands.back()];
    if (r < floors.size()) {
      model.threshold = thresholds[r].value;
      model.ties_end = thresholds[r].ties_end;
    } else {
      model.ceiling = thresholds[r].value;
      model.ceiling_end = thresholds[r].ties_end;
    }
  }
  return absl::OkStatus();
}

// mergekit's rescale keeps the L1 norm of each delta; sums below 1e-7 leave it alone.
absl::Status Rescale(MethodContext& context, TaskVectorSum& op) {
  constexpr double kTinySum = 1e-7;
  const auto sparse = [](const TaskVectorSum::Model& model) {
    return model.keep != Keep::kAll && model.keep != Keep::kNone;
  };
  if (std::none_of(op.model, op.model + op.count, sparse)) return absl::OkStatus();
  ASSIGN_OR_RETURN(const std::vector<double> sums,
                   context.Reduce(kernels::DeltaAbsSums{op}, context.AllOperands()));
  for (int i = 0; i < op.count; ++i) {
    const double all = sums[2 * i], kept = sums[2 * i + 1];
    if (sparse(op.model[i]) && all >= kTinySum && kept >= kTinySum) op.model[i].scale = all / kept;
  }
  return absl::OkStatus();
}

}  // namespace

std::vector<Param> TaskVectorParams(const TaskVectorOptions& options, bool normalize,
                                    bool rescale) {
  const bool sparse = options.sparsifier != Sparsifier::kNone;
  std::vector<Param> params = {
      {.name = "weight",
       .help = "factor of this model's task vector",
       .scope = ParamScopeKind::kModel},
      {.name = "density",
       .help = options.sparsifier == Sparsifier::kRandom
                   ? "probability that an element of the task vector is kept"
               : options.sparsifier == Sparsifier::kRanked
                   ? "probability that an element of the task vector is kept, on average"
                   : "share of the task vector's elements that is kept, largest first",
       .scope = ParamScopeKind::kModel,
       .fallback = 1.0,
       .no_effect = !sparse},
      {.name = "normalize",
       .help = "divide by the sum of the weights (with sign election: of those that count)",
       .type = ParamType::kBool,
       .fallback = normalize},
      {.name = "rescale",
       .help = "scale what is kept so that the task vector's L1 norm stays",
       .type = ParamType::kBool,
       .fallback = rescale,
       .no_effect = !sparse},
      {.name = "lambda", .help = "factor of the merged task vector", .fallback = 1.0},
      {.name = "int8_mask",
       .help = "mergekit: dtype of a temporary mask",
       .type = ParamType::kBool,
       .fallback = false,
       .no_effect = true},
  };
  if (options.sparsifier == Sparsifier::kBand) {
    params.push_back({.name = "gamma",
                      .help = "share of the task vector's elements that is dropped, largest first",
                      .scope = ParamScopeKind::kModel,
                      .fallback = 0.01,
                      .min = 0});
  }
  if (options.sparsifier == Sparsifier::kRanked) {
    params.push_back({.name = "epsilon",
                      .help =
                          "how far the probability lies below `density` for the smallest element "
                          "of a row, and above it for the largest",
                      .scope = ParamScopeKind::kModel,
                      .fallback = 0.15,
                      .min = 0});
  }
  return params;
}

absl::Status RunTaskVectors(MethodContext& context, const TaskVectorOptions& options) {
  constexpr double kTinyWeight = 1e-8;
  if (context.inputs() == 0) return context.Copy(MethodContext::kBase);
  TaskVectorSum op;
  op.count = context.inputs();
  op.elect_sign = options.elect_sign;
  op.normalize = context.flag("normalize");
  op.lambda = context.number("lambda");
  double weight_sum = 0;
  for (int i = 0; i < op.count; ++i) {
    weight_sum += op.model[i].weight = context.number(i, "weight");
  }
  op.weight_sum = std::abs(weight_sum) < kTinyWeight ? 1 : weight_sum;
  RETURN_IF_ERROR(Sparsify(context, options.sparsifier, op));
  if (options.sparsifier != Sparsifier::kNone && context.flag("rescale")) {
    RETURN_IF_ERROR(Rescale(context, op));
  }
  return context.Map(op, context.AllOperands());
}

}  // namespace pewter::methods
