#include "merge/align/aligner.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <utility>
#include <vector>

#include "absl/algorithm/container.h"
#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "merge/align/data_aligner.h"
#include "merge/align/weight_matching.h"

namespace pewter {
namespace {

using nlohmann::json;

// --- By weights -------------------------------------------------------------------------------

class WeightAligner final : public Aligner {
 public:
  WeightAligner(std::vector<GroupKind> kinds, int restarts, int64_t bytes)
      : kinds_(std::move(kinds)), restarts_(restarts), bytes_(bytes) {}

  std::string name() const override { return "permutation by weights"; }
  int64_t bytes() const override { return bytes_; }

  absl::StatusOr<Alignment> Align(const AlignerRun& run) const override {
    ASSIGN_OR_RETURN(WeightMatch match, MatchWeights(run.symmetry, run.reference, run.model, {},
                                                     {.kinds = kinds_,
                                                      .restarts = restarts_,
                                                      .seed = run.seed,
                                                      .threads = run.threads,
                                                      .check = run.check},
                                                     run.host));
    Alignment alignment = std::move(match.alignment);
    alignment.method = name();
    json report = {{"objective", match.objective},
                   {"squared_distance_before", Distance(match, match.objective.front())},
                   {"squared_distance_after", Distance(match, match.objective.back())}};
    json moved = json::object();
    for (const auto& [group, of] : alignment.groups) {
      int64_t features = 0;
      for (size_t i = 0; i < of.permutation.size(); ++i) {
        features += of.permutation[i] != static_cast<int32_t>(i);
      }
      moved[group] = features;
    }
    report["features_moved"] = std::move(moved);
    if (!match.skipped.empty()) report["tensors_not_compared"] = match.skipped;
    alignment.report = report.dump();
    return alignment;
  }

 private:
  static double Distance(const WeightMatch& match, double objective) {
    return match.reference_square + match.model_square - 2 * objective;
  }

  const std::vector<GroupKind> kinds_;
  const int restarts_;
  const int64_t bytes_;
};

// --- What a recipe says -----------------------------------------------------------------------

absl::Status At(TextPosition at, absl::string_view message) {
  return absl::InvalidArgumentError(absl::StrCat(at.ToString(), ": ", message));
}

// The kinds that a recipe's word stands for.
std::vector<GroupKind> KindsOf(RecipeAlign::Group group) {
  switch (group) {
    case RecipeAlign::Group::kFfn:
      return {GroupKind::kFfn};
    case RecipeAlign::Group::kHeads:
      return {GroupKind::kQueryKey, GroupKind::kValueOutput, GroupKind::kQuery, GroupKind::kKey,
              GroupKind::kValue,    GroupKind::kOutput,      GroupKind::kHeads};
    case RecipeAlign::Group::kResidual:
      return {GroupKind::kResidual};
    case RecipeAlign::Group::kPooler:
      return {GroupKind::kPooler};
    case RecipeAlign::Group::kOutputHead:
      return {GroupKind::kHead};
  }
  return {};
}

absl::string_view WordOf(RecipeAlign::Group group) {
  switch (group) {
    case RecipeAlign::Group::kFfn:
      return "ffn";
    case RecipeAlign::Group::kHeads:
      return "heads";
    case RecipeAlign::Group::kResidual:
      return "residual";
    case RecipeAlign::Group::kPooler:
      return "pooler";
    case RecipeAlign::Group::kOutputHead:
      return "output_head";
  }
  return "";
}

absl::StatusOr<std::vector<GroupKind>> KindsOf(const RecipeAlign& recipe,
                                               const Symmetry& symmetry) {
  std::vector<GroupKind> kinds;
  for (const RecipeAlign::Group group : recipe.groups) {
    const std::vector<GroupKind> of_group = KindsOf(group);
    const bool any = absl::c_any_of(symmetry.groups(), [&](const SymmetryGroup& one) {
      return absl::c_find(of_group, one.kind) != of_group.end();
    });
    if (!any) {
      const bool tied = group == RecipeAlign::Group::kOutputHead && !symmetry.tied().empty();
      return At(recipe.groups_at,
                absl::StrCat("the models have no group `", WordOf(group), "` to align",
                             tied ? ": their output head is tied to the embeddings and so in the "
                                    "order of the residual stream"
                                  : ""));
    }
    kinds.insert(kinds.end(), of_group.begin(), of_group.end());
  }
  return kinds;
}

// That keys which mean something for some methods alone are with those.
absl::Status CheckKeys(const RecipeAlign& recipe, const Symmetry& symmetry) {
  using Group = RecipeAlign::Group;
  const bool permutation = recipe.method == RecipeAlign::Method::kPermutation;
  const bool staged = recipe.method == RecipeAlign::Method::kStaged;
  const bool cca = recipe.method == RecipeAlign::Method::kCca;
  const bool weights = recipe.evidence == RecipeAlign::Evidence::kWeights;
  const bool orthogonal = recipe.heads == RecipeAlign::Heads::kOrthogonal;
  if (recipe.query_key_at) {
    if (!permutation || (weights && recipe.calibration)) {
      return At(*recipe.query_key_at,
                "`query_key` is for `method: permutation` by activations alone; `method: staged` "
                "tries both orders, `method: cca` maps queries and keys by themselves");
    }
    if (absl::c_all_of(symmetry.attentions(),
                       [](const Attention& attention) { return attention.rotary; })) {
      return At(*recipe.query_key_at,
                "`query_key` has no meaning for these models: rotary positions fix the order of "
                "queries and keys inside heads");
    }
    if (weights) return At(*recipe.query_key_at, "`query_key` needs data: `calibration: FILE`");
  }
  if (recipe.last_stage_at &&
      (!staged || (orthogonal && recipe.last_stage == RecipeAlign::Stage::kWeights))) {
    return At(*recipe.last_stage_at,
              staged ? "`heads: orthogonal` comes after `last_stage: weights`; leave one out"
                     : "`last_stage` is for `method: staged` alone");
  }
  if (recipe.objective && !staged) {
    return At(recipe.objective->at, "`objective` is for `method: staged` alone");
  }
  if (!cca) {
    for (const auto& [at, key] :
         {std::pair{recipe.mapped_at, "mapped"}, std::pair{recipe.gamma_at, "gamma"}}) {
      if (at) return At(*at, absl::StrCat("`", key, "` is for `method: cca` alone"));
    }
    return absl::OkStatus();
  }
  if (orthogonal) {
    return At(recipe.heads_at,
              "`heads: orthogonal` and `method: cca` are two maps of the same "
              "features; leave one out");
  }
  const TextPosition mapped_at = recipe.mapped_at.value_or(recipe.groups_at);
  if (recipe.mapped.empty()) {
    return At(mapped_at, "`method: cca` without a group that is mapped is `method: permutation`");
  }
  for (const Group group : recipe.mapped) {
    if (group == Group::kPooler || group == Group::kOutputHead) {
      return At(mapped_at, absl::StrCat("group `", WordOf(group),
                                        "` is reordered, not mapped; `mapped` takes heads, ffn and "
                                        "residual"));
    }
    if (absl::c_linear_search(recipe.groups, group)) continue;
    return At(mapped_at, absl::StrCat("group `", WordOf(group),
                                      "` is mapped (`mapped`, which is "
                                      "[heads] unless given) and not among `groups`"));
  }
  if (weights) {
    return At(recipe.calibration ? recipe.evidence_at : recipe.method_at,
              recipe.calibration ? "`method: cca` knows features by their activations alone"
                                 : "`method: cca` needs data: `calibration: FILE`");
  }
  return absl::OkStatus();
}

// --- Views ------------------------------------------------------------------------------------

class LaterSource final : public TensorSource {
 public:
  LaterSource(std::shared_ptr<const Symmetry> symmetry, SymmetricTensor tensor,
              std::shared_ptr<const AlignmentSlot> slot, std::shared_ptr<const TensorSource> source)
      : symmetry_(std::move(symmetry)),
        tensor_(std::move(tensor)),
        slot_(std::move(slot)),
        source_(std::move(source)) {}

  DType dtype() const override { return source_->dtype(); }
  const Shape& shape() const override { return source_->shape(); }
  const std::string& name() const override { return source_->name(); }
  int64_t resident_bytes() const override {
    // Orders of the axes that move, one for the rows of all leading ones together, and a row; the
    // matrices of linear maps, and the rows that they mix.
    int64_t bytes = source_->resident_bytes();
    const int rank = shape().rank();
    int64_t rows = 1;
    for (int axis = 0; axis < rank && axis < static_cast<int>(tensor_.axes.size()); ++axis) {
      if (!tensor_.axes[axis].empty()) bytes += (axis == rank - 1 ? shape()[axis] : 0) * kIndex;
      if (axis < rank - 1) rows *= shape()[axis];
      int64_t mixed = 0;
      for (const AxisSegment& segment : tensor_.axes[axis]) {
        mixed = std::max(mixed, slot_->MapWidth(segment.group));
      }
      if (mixed == 0) continue;
      const int64_t row = axis < rank - 1 ? mixed * shape()[rank - 1] : 0;
      bytes += (shape()[axis] * mixed + row + 2 * shape()[rank - 1]) * kDouble;
    }
    const bool rows_move =
        absl::c_any_of(absl::MakeConstSpan(tensor_.axes).subspan(0, std::max(rank - 1, 0)),
                       [](const auto& axis) { return !axis.empty(); });
    return bytes + (rows_move ? rows * kIndex : 0) +
           (rank == 0 ? 0 : shape()[rank - 1] * ByteWidth(dtype()));
  }

  absl::Status Read(int64_t first, int64_t count, absl::Span<std::byte> out,
                    ReadObserver* observer) const override {
    ASSIGN_OR_RETURN(const auto view, View());
    return view->Read(first, count, out, observer);
  }

 private:
  static constexpr int64_t kIndex = sizeof(int32_t), kDouble = sizeof(double);

  absl::StatusOr<std::shared_ptr<const TensorSource>> View() const {
    const std::shared_ptr<const Alignment> alignment = slot_->Get();
    if (alignment == nullptr) {
      return absl::InternalError(
          absl::StrCat(name(), ": read before the model's alignment has been found"));
    }
    std::lock_guard lock(mutex_);
    if (alignment != alignment_) {
      ASSIGN_OR_RETURN(view_, AlignSource(*symmetry_, tensor_, *alignment, source_));
      alignment_ = alignment;
    }
    return view_;
  }

  const std::shared_ptr<const Symmetry> symmetry_;
  const SymmetricTensor tensor_;
  const std::shared_ptr<const AlignmentSlot> slot_;
  const std::shared_ptr<const TensorSource> source_;
  mutable std::mutex mutex_;
  mutable std::shared_ptr<const Alignment> alignment_;  // guarded by mutex_; that view_ has
  mutable std::shared_ptr<const TensorSource> view_;    // guarded by mutex_
};

}  // namespace

absl::StatusOr<std::shared_ptr<const Aligner>> MakeAligner(const RecipeAlign& recipe,
                                                           const Symmetry& symmetry,
                                                           AlignerInputs inputs) {
  using Method = RecipeAlign::Method;
  const bool orthogonal = recipe.heads == RecipeAlign::Heads::kOrthogonal;
  RETURN_IF_ERROR(CheckKeys(recipe, symmetry));
  const bool activations = recipe.evidence == RecipeAlign::Evidence::kActivations;
  if (recipe.method != Method::kPermutation && inputs.calibration == nullptr) {
    return At(recipe.method_at,
              absl::StrCat("`method: ", recipe.method == Method::kCca ? "cca" : "staged",
                           "` needs data: `calibration: FILE`"));
  }
  if (activations && inputs.calibration == nullptr) {
    return At(recipe.evidence_at,
              "`evidence: activations` needs data: `calibration: FILE`; `evidence: weights` needs "
              "none");
  }
  ASSIGN_OR_RETURN(std::vector<GroupKind> kinds, KindsOf(recipe, symmetry));
  if (orthogonal) {
    if (recipe.method == Method::kPermutation && !activations) {
      return At(recipe.heads_at,
                "`heads: orthogonal` needs data: `calibration: FILE`, and activations as evidence");
    }
    const bool any = absl::c_any_of(symmetry.attentions(), [](const Attention& attention) {
      return !attention.rotary && !attention.normed && attention.heads == attention.kv_heads;
    });
    if (!any) {
      return At(recipe.heads_at,
                "`heads: orthogonal` is no symmetry of these models: it needs attention without "
                "rotary positions, with keys and values of each head's own");
    }
  }
  if (recipe.method == Method::kPermutation && !activations) {
    return std::make_shared<WeightAligner>(std::move(kinds), recipe.restarts,
                                           WeightMatchingBytes(symmetry));
  }
  DataAlignerOptions options{.data = std::move(inputs.calibration),
                             .objective = std::move(inputs.objective),
                             .staged = recipe.method == Method::kStaged,
                             .orthogonal = orthogonal,
                             .own_query_key = recipe.query_key == RecipeAlign::QueryKey::kOwn,
                             .weights_last = recipe.last_stage == RecipeAlign::Stage::kWeights,
                             .kinds = std::move(kinds),
                             .ways = recipe.restarts,
                             .fit = inputs.fit,
                             .memory_bytes = inputs.memory_bytes};
  if (recipe.method == Method::kCca) {
    const auto maps = [&](RecipeAlign::Group group) {
      return absl::c_linear_search(recipe.mapped, group);
    };
    options.canonical = CanonicalOptions{.heads = maps(RecipeAlign::Group::kHeads),
                                         .feed_forward = maps(RecipeAlign::Group::kFfn),
                                         .residual = maps(RecipeAlign::Group::kResidual),
                                         .gamma = recipe.gamma};
  }
  return MakeDataAligner(std::move(options));
}

void AlignmentSlot::Set(std::shared_ptr<const Alignment> alignment) {
  std::lock_guard lock(mutex_);
  alignment_ = std::move(alignment);
}

std::shared_ptr<const Alignment> AlignmentSlot::Get() const {
  std::lock_guard lock(mutex_);
  return alignment_;
}

void AlignmentSlot::SetStatistics(std::shared_ptr<const StatisticsReader> statistics) {
  std::lock_guard lock(mutex_);
  statistics_ = std::move(statistics);
}

std::shared_ptr<const StatisticsReader> AlignmentSlot::statistics() const {
  std::lock_guard lock(mutex_);
  return statistics_;
}

std::shared_ptr<const TensorSource> AlignLater(std::shared_ptr<const Symmetry> symmetry,
                                               const SymmetricTensor& tensor,
                                               std::shared_ptr<const AlignmentSlot> slot,
                                               std::shared_ptr<const TensorSource> source) {
  if (absl::c_all_of(tensor.axes, [](const auto& axis) { return axis.empty(); })) return source;
  return std::make_shared<LaterSource>(std::move(symmetry), tensor, std::move(slot),
                                       std::move(source));
}

}  // namespace pewter
