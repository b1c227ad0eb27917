#include "merge/align/weight_matching.h"

#include <algorithm>
#include <cstddef>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <utility>

#include "absl/algorithm/container.h"
#include "absl/strings/str_cat.h"
#include "base/dtype_names.h"
#include "base/status.h"
#include "kernels/assignment.h"
#include "kernels/thread_pool.h"
#include "kernels/linear_algebra.h"
#include "merge/checkpoint/held_source.h"

namespace pewter {
namespace {

using kernels::Assignment;
using kernels::ConstMatrix;
using kernels::LinearAlgebra;
using kernels::Matrix;
using kernels::Transpose;

constexpr double kGain = 1e-12;  // of the objective: less is rounding

// A tensor's elements as they are stored, seen as rows by columns.
struct Values {
  std::vector<std::byte> bytes;
  DType dtype = DType::kF32;
  int64_t rows = 0, columns = 0;

  ConstMatrix Part(int64_t row, int64_t row_count, int64_t column, int64_t column_count) const {
    return {.data = bytes.data() + (row * columns + column) * ByteWidth(dtype),
            .dtype = dtype,
            .rows = row_count,
            .columns = column_count,
            .stride = columns};
  }
};

// For each feature of the reference (rows) and of the model (columns) of one group, what their
// pairing adds to the objective.
struct Gains {
  int64_t width = 0;
  std::vector<double> values;

  explicit Gains(int64_t features) : width(features), values(features * features, 0) {}
  Matrix matrix() { return {values.data(), width, width, width}; }
  double At(int64_t i, int64_t j) const { return values[i * width + j]; }
  double Of(const std::vector<int32_t>& permutation) const {
    double sum = 0;
    for (int64_t i = 0; i < width; ++i) sum += At(i, permutation[i]);
    return sum;
  }
};

// Where a group lies in a tensor.
struct Place {
  int tensor = 0, axis = 0;
  int64_t begin = 0;
};

class Matcher {
 public:
  Matcher(const Symmetry& symmetry, const Checkpoint& reference, const Checkpoint& model,
          const WeightMatchingOptions& options, kernels::Backend& backend)
      : symmetry_(symmetry),
        reference_(reference),
        model_(model),
        options_(options),
        backend_(backend),
        pool_(std::max(options.threads, 1)) {}

  absl::StatusOr<WeightMatch> Match(const Alignment& start) {
    ASSIGN_OR_RETURN(algebra_, backend_.linear_algebra());
    RETURN_IF_ERROR(FindTensors());
    FindSteps(start);
    WeightMatch best;
    for (int attempt = 0; attempt < std::max(options_.restarts, 1); ++attempt) {
      ASSIGN_OR_RETURN(WeightMatch match, Climb(start, attempt));
      if (attempt == 0 || match.objective.back() > best.objective.back()) best = std::move(match);
    }
    return best;
  }

  absl::StatusOr<DenseMatrix> Similarity(int group, const Alignment& alignment) {
    ASSIGN_OR_RETURN(algebra_, backend_.linear_algebra());
    RETURN_IF_ERROR(FindTensors());
    ASSIGN_OR_RETURN(Gains gains, GainsOf(group, alignment));
    return DenseMatrix(gains.width, gains.width, std::move(gains.values));
  }

 private:
  // What moves at once: a group, an attention, or all attentions that share an order of heads.
  struct Step {
    int group = -1;  // free, or of kind kHeads
    std::vector<int> attentions;
    std::vector<int> groups;  // all that it moves
  };

  // --- Tensors --------------------------------------------------------------------------------

  absl::Status FindTensors() {
    const auto& tensors = symmetry_.tensors();
    places_.resize(symmetry_.groups().size());
    names_.resize(tensors.size());
    for (int t = 0; t < static_cast<int>(tensors.size()); ++t) {
      const SymmetricTensor& tensor = tensors[t];
      if (absl::c_all_of(tensor.axes, [](const auto& axis) { return axis.empty(); })) continue;
      const std::string a = StoredName(reference_, tensor.tensor, /*with_tied=*/true);
      const std::string b = StoredName(model_, tensor.tensor, /*with_tied=*/true);
      if (a.empty() || b.empty()) continue;
      const TensorInfo &of_a = *reference_.Find(a), &of_b = *model_.Find(b);
      if (!(of_a.shape == of_b.shape) || !IsFloat(of_a.dtype) || !IsFloat(of_b.dtype)) {
        skipped_.push_back(tensor.tensor.name);
        continue;
      }
      names_[t] = {a, b};
      for (int axis = 0; axis < static_cast<int>(tensor.axes.size()); ++axis) {
        if (tensor.axes[axis].empty()) continue;
        if (axis != 0 && axis != of_a.shape.rank() - 1) {
          return absl::UnimplementedError(absl::StrCat(
              "weight matching of tensor ", tensor.tensor.name, ": features on a middle axis"));
        }
        int64_t begin = 0;
        for (const AxisSegment& segment : tensor.axes[axis]) {
          if (!segment.redundant) places_[segment.group].push_back({t, axis, begin});
          begin += symmetry_.groups()[segment.group].width;
        }
      }
    }
    return absl::OkStatus();
  }

  bool Counts(int tensor) const { return !names_[tensor].first.empty(); }

  static absl::StatusOr<Values> ReadAll(const TensorSource& source, int axis) {
    const Shape& shape = source.shape();
    Values values = {.dtype = source.dtype()};
    const int64_t count = shape.elements();
    // The axis in question is the rows or the columns.
    values.rows = axis == 0 ? shape[0] : count / std::max<int64_t>(shape[axis], 1);
    values.columns = axis == 0 ? count / std::max<int64_t>(shape[0], 1) : shape[axis];
    values.bytes.resize(count * ByteWidth(source.dtype()));
    RETURN_IF_ERROR(source.Read(0, count, absl::MakeSpan(values.bytes), nullptr));
    return values;
  }

  absl::StatusOr<Values> ReadReference(int tensor, int axis) const {
    ASSIGN_OR_RETURN(const auto source, reference_.OpenTensor(names_[tensor].first, 0));
    return ReadAll(*source, axis);
  }
  // Aligned on all axes but `except` (-1: on all).
  absl::StatusOr<Values> ReadAligned(int tensor, int axis, int except,
                                     const Alignment& alignment) const {
    SymmetricTensor symmetric = symmetry_.tensors()[tensor];
    if (except >= 0) symmetric.axes[except].clear();
    ASSIGN_OR_RETURN(auto source, model_.OpenTensor(names_[tensor].second, 0));
    // In memory, so that the view jumps about there and not in a file.
    ASSIGN_OR_RETURN(source, HeldSource::Hold(*source));
    ASSIGN_OR_RETURN(source, AlignSource(symmetry_, symmetric, alignment, std::move(source)));
    return ReadAll(*source, axis);
  }

  // Adds what one tensor says about a group.
  absl::Status AddTensor(const Place& place, const Alignment& alignment, Gains& gains) const {
    ASSIGN_OR_RETURN(const Values a, ReadReference(place.tensor, place.axis));
    ASSIGN_OR_RETURN(const Values b, ReadAligned(place.tensor, place.axis, place.axis, alignment));
    const auto part = [&](const Values& values) {
      return place.axis == 0 ? values.Part(place.begin, gains.width, 0, values.columns)
                             : values.Part(0, values.rows, place.begin, gains.width);
    };
    const auto transpose = [&](bool yes) { return yes ? Transpose::kYes : Transpose::kNo; };
    return algebra_->Gemm(transpose(place.axis != 0), part(a), transpose(place.axis == 0), part(b),
                          1, 1, gains.matrix());
  }

  // Whether a group lies on another axis of the tensor too.
  bool OnOtherAxis(int group, const Place& place) const {
    return absl::c_any_of(places_[group], [&](const Place& other) {
      return other.tensor == place.tensor && other.axis != place.axis;
    });
  }

  absl::StatusOr<Gains> GainsOf(int group, const Alignment& alignment) const {
    Gains gains(symmetry_.groups()[group].width);
    for (const Place& place : places_[group]) {
      RETURN_IF_ERROR(AddTensor(place, alignment, gains));
    }
    return gains;
  }

  // An axis of a tensor that has groups.
  int GroupedAxis(int tensor) const {
    const auto& axes = symmetry_.tensors()[tensor].axes;
    int axis = 0;
    while (axes[axis].empty()) ++axis;
    return axis;
  }

  // Sum of products of what is evidence.
  double Evidence(int tensor, const Values& a, const Values& b) const {
    const int axis = GroupedAxis(tensor);
    double sum = 0;
    int64_t begin = 0;
    for (const AxisSegment& segment : symmetry_.tensors()[tensor].axes[axis]) {
      const int64_t width = symmetry_.groups()[segment.group].width;
      const auto part = [&](const Values& values) {
        return axis == 0 ? values.Part(begin, width, 0, values.columns)
                         : values.Part(0, values.rows, begin, width);
      };
      if (!segment.redundant) sum += Dot(part(a), part(b));
      begin += width;
    }
    return sum;
  }

  // <reference, aligned> of one tensor.
  absl::StatusOr<double> Product(int tensor, const Alignment& alignment) const {
    const int axis = GroupedAxis(tensor);
    ASSIGN_OR_RETURN(const Values a, ReadReference(tensor, axis));
    ASSIGN_OR_RETURN(const Values b, ReadAligned(tensor, axis, -1, alignment));
    return Evidence(tensor, a, b);
  }

  absl::Status AddSquares(int tensor, WeightMatch& match) const {
    const int axis = GroupedAxis(tensor);
    ASSIGN_OR_RETURN(const Values a, ReadReference(tensor, axis));
    match.reference_square += Evidence(tensor, a, a);
    ASSIGN_OR_RETURN(const Values b, ReadAligned(tensor, axis, -1, Alignment()));
    match.model_square += Evidence(tensor, b, b);
    return absl::OkStatus();
  }

  static double Dot(const ConstMatrix& a, const ConstMatrix& b) {
    std::vector<double> x(a.columns), y(a.columns);
    const auto widen = [](const ConstMatrix& m, int64_t row, std::vector<double>& values) {
      const auto* data = static_cast<const std::byte*>(m.data);
      kernels::Convert(
          {.data = data + row * m.stride * ByteWidth(m.dtype), .dtype = m.dtype, .size = m.columns},
          {.data = values.data(), .dtype = DType::kF64, .size = m.columns});
    };
    double sum = 0;
    for (int64_t i = 0; i < a.rows; ++i) {
      widen(a, i, x);
      widen(b, i, y);
      double of_row = 0;
      for (int64_t j = 0; j < a.columns; ++j) of_row += x[j] * y[j];
      sum += of_row;
    }
    return sum;
  }

  // --- Steps ----------------------------------------------------------------------------------

  void FindSteps(const Alignment& start) {
    const auto& groups = symmetry_.groups();
    const auto& attentions = symmetry_.attentions();
    const auto wanted = [&](int group) {
      return absl::c_find(options_.kinds, groups[group].kind) != options_.kinds.end();
    };
    const auto mapped = [&](int group) {
      const auto it = start.groups.find(groups[group].name);
      return it != start.groups.end() && it->second.transform.blocks != 0;
    };
    const auto add_attention = [&](int attention, Step& step) {
      const Attention& a = attentions[attention];
      step.attentions.push_back(attention);
      for (const int group : {a.query, a.key, a.value, a.output}) {
        if (absl::c_find(step.groups, group) == step.groups.end()) step.groups.push_back(group);
      }
    };
    std::vector<bool> done(attentions.size(), false);
    for (int g = 0; g < static_cast<int>(groups.size()); ++g) {
      Step step;
      if (groups[g].attention >= 0) {
        const int attention = groups[g].attention;
        if (done[attention] || attentions[attention].head_order >= 0) continue;
        done[attention] = true;
        add_attention(attention, step);
      } else {
        step.group = g;
        step.groups = {g};
        for (int a = 0; a < static_cast<int>(attentions.size()); ++a) {
          if (attentions[a].head_order == g) add_attention(a, step);
        }
      }
      if (absl::c_any_of(step.groups, wanted) && absl::c_none_of(step.groups, mapped)) {
        steps_.push_back(std::move(step));
      }
    }
  }

  // One way through the groups, until nothing is gained.
  absl::StatusOr<WeightMatch> Climb(const Alignment& start, int attempt) {
    WeightMatch match = {.alignment = start, .skipped = skipped_};
    for (const Step& step : steps_) {
      for (const int group : step.groups) {
        std::vector<int32_t>& order = Order(group, match.alignment);
        if (!order.empty()) continue;
        order.resize(symmetry_.groups()[group].width);
        absl::c_iota(order, 0);
      }
    }
    double objective = 0;
    for (int t = 0; t < static_cast<int>(names_.size()); ++t) {
      if (!Counts(t)) continue;
      ASSIGN_OR_RETURN(const double product, Product(t, match.alignment));
      objective += product;
      RETURN_IF_ERROR(AddSquares(t, match));
    }
    match.objective.push_back(objective);
    std::mt19937_64 engine(options_.seed + 0x9E3779B97F4A7C15ull * attempt);
    std::vector<int> order(steps_.size());
    absl::c_iota(order, 0);
    prices_.assign(symmetry_.groups().size(), {});
    // A step whose evidence is what it was when it was taken last would be taken the same way.
    std::vector<int64_t> changed(symmetry_.groups().size(), 0), taken(steps_.size(), -1);
    int64_t now = 0;
    for (int sweep = 0; sweep < options_.max_sweeps; ++sweep) {
      for (size_t i = order.size(); (attempt > 0 || options_.shuffle_all) && i > 1; --i) {
        std::swap(order[i - 1], order[engine() % i]);
      }
      double gained = 0;
      for (const int s : order) {
        if (options_.check) RETURN_IF_ERROR(options_.check());
        if (!EvidenceChanged(steps_[s], changed, taken[s])) continue;
        taken[s] = now++;
        auto gain = Take(steps_[s], match.alignment);
        if (!gain.ok()) {
          return Annotate(
              gain.status(),
              absl::StrCat("weight matching of ", symmetry_.groups()[steps_[s].groups[0]].name));
        }
        if (*gain <= 0) continue;
        gained += *gain;
        for (const int group : steps_[s].groups) changed[group] = now;
      }
      objective += gained;
      match.objective.push_back(objective);
      if (gained <= kGain * std::abs(objective)) break;
    }
    return match;
  }

  bool EvidenceChanged(const Step& step, const std::vector<int64_t>& changed, int64_t taken) const {
    if (taken < 0) return true;
    for (const int group : step.groups) {
      for (const Place& place : places_[group]) {
        for (const auto& axis : symmetry_.tensors()[place.tensor].axes) {
          for (const AxisSegment& segment : axis) {
            if (changed[segment.group] > taken) {
              // A step's own change is news to it only where it was an approximation.
              if (absl::c_find(step.groups, segment.group) == step.groups.end()) return true;
              if (OnOtherAxis(segment.group, place)) return true;
            }
          }
        }
      }
    }
    return false;
  }

  std::vector<int32_t>& Order(int group, Alignment& alignment) const {
    return alignment.groups[symmetry_.groups()[group].name].permutation;
  }

  // Takes a step where it gains, and returns what it gained.
  absl::StatusOr<double> Take(const Step& step, Alignment& alignment) {
    return step.attentions.empty() ? TakeFree(step.group, alignment)
                                   : TakeAttentions(step, alignment);
  }

  absl::StatusOr<double> TakeFree(int group, Alignment& alignment) {
    const std::vector<int32_t> before = Order(group, alignment);
    // Tensors that have the group on two axes last, so that what the others gain can be told.
    Gains gains(symmetry_.groups()[group].width);
    std::vector<Place> both;
    for (const Place& place : places_[group]) {
      if (OnOtherAxis(group, place)) {
        both.push_back(place);
      } else {
        RETURN_IF_ERROR(AddTensor(place, alignment, gains));
      }
    }
    const Gains exact = both.empty() ? Gains(0) : gains;
    for (const Place& place : both) RETURN_IF_ERROR(AddTensor(place, alignment, gains));
    ASSIGN_OR_RETURN(Assignment assignment,
                     kernels::SolveAssignment(
                         {.costs = gains.matrix(), .maximize = true, .prices = prices_[group]}));
    prices_[group] = std::move(assignment.prices);
    if (both.empty()) {
      const double gain = gains.Of(assignment.columns) - gains.Of(before);
      if (gain > 0) Order(group, alignment) = std::move(assignment.columns);
      return std::max(gain, 0.0);
    }
    double gain = exact.Of(assignment.columns) - exact.Of(before);
    std::vector<int> tensors;
    for (const Place& place : both) {
      if (absl::c_find(tensors, place.tensor) == tensors.end()) tensors.push_back(place.tensor);
    }
    for (const int tensor : tensors) {
      ASSIGN_OR_RETURN(const double old, Product(tensor, alignment));
      gain -= old;
    }
    Order(group, alignment) = std::move(assignment.columns);
    for (const int tensor : tensors) {
      ASSIGN_OR_RETURN(const double product, Product(tensor, alignment));
      gain += product;
    }
    if (gain > 0) return gain;
    Order(group, alignment) = before;
    return 0.0;
  }

  // --- Attentions -------------------------------------------------------------------------------

  // What the groups of one attention say. One matrix for groups that are one.
  struct AttentionGains {
    const Attention* attention;
    std::vector<Gains> gains;
    int query = 0, key = 0, value = 0, output = 0;  // into `gains`
  };

  // The best way to put one kv head of the model, with its query heads, into a slot of the
  // reference.
  struct HeadMatch {
    double score = 0;
    std::vector<int32_t> queries;  // [shared]: which query head of the model's group
    std::vector<int32_t> query_key, value_output;  // [head_dim]
  };

  absl::StatusOr<AttentionGains> GainsOf(const Attention& attention,
                                         const Alignment& alignment) const {
    AttentionGains all = {.attention = &attention};
    std::vector<int> groups;
    const auto add = [&](int group, int& index) -> absl::Status {
      const auto it = absl::c_find(groups, group);
      index = static_cast<int>(it - groups.begin());
      if (it != groups.end()) return absl::OkStatus();
      ASSIGN_OR_RETURN(Gains gains, GainsOf(group, alignment));
      groups.push_back(group);
      all.gains.push_back(std::move(gains));
      return absl::OkStatus();
    };
    RETURN_IF_ERROR(add(attention.query, all.query));
    RETURN_IF_ERROR(add(attention.key, all.key));
    RETURN_IF_ERROR(add(attention.value, all.value));
    RETURN_IF_ERROR(add(attention.output, all.output));
    return all;
  }

  // Solves, for a pair of kv heads, the orders inside heads and of the query heads, one after the
  // other until neither gains.
  static absl::StatusOr<HeadMatch> MatchHeads(const AttentionGains& all, int64_t slot,
                                              int64_t head) {
    const Attention& attention = *all.attention;
    const int64_t dim = attention.head_dim, shared = attention.heads / attention.kv_heads;
    HeadMatch match;
    match.queries.resize(shared);
    absl::c_iota(match.queries, 0);
    match.query_key.resize(dim);
    absl::c_iota(match.query_key, 0);
    match.value_output = match.query_key;

    // [dim, dim] at a pair of heads, added to `sum`.
    const auto add = [dim](const Gains& gains, int64_t row, int64_t column,
                           std::vector<double>& sum) {
      for (int64_t i = 0; i < dim; ++i) {
        for (int64_t j = 0; j < dim; ++j) {
          sum[i * dim + j] += gains.At(row * dim + i, column * dim + j);
        }
      }
    };
    const auto along = [dim](const Gains& gains, int64_t row, int64_t column,
                             const std::vector<int32_t>& order) {
      double sum = 0;
      for (int64_t i = 0; i < dim; ++i) sum += gains.At(row * dim + i, column * dim + order[i]);
      return sum;
    };
    const auto solve = [](const std::vector<double>& gains, int64_t size,
                          std::vector<int32_t>& order) -> absl::Status {
      ASSIGN_OR_RETURN(Assignment assignment,
                       kernels::SolveAssignment({.costs = {.data = gains.data(),
                                                           .dtype = DType::kF64,
                                                           .rows = size,
                                                           .columns = size,
                                                           .stride = size},
                                                 .maximize = true}));
      order = std::move(assignment.columns);
      return absl::OkStatus();
    };
    // The order inside heads from what the kv head says and, `with_queries`, what the query heads
    // say when they are paired as they are now.
    const auto order_inside = [&](int of_kv, int of_queries, bool with_queries,
                                  std::vector<int32_t>& order) -> absl::Status {
      std::vector<double> sum(dim * dim, 0);
      add(all.gains[of_kv], slot, head, sum);
      for (int64_t h = 0; with_queries && of_queries != of_kv && h < shared; ++h) {
        add(all.gains[of_queries], slot * shared + h, head * shared + match.queries[h], sum);
      }
      return solve(sum, dim, order);
    };
    const auto score = [&] {
      double sum = along(all.gains[all.value], slot, head, match.value_output) +
                   along(all.gains[all.key], slot, head, match.query_key);
      for (int64_t h = 0; h < shared; ++h) {
        const int64_t row = slot * shared + h, column = head * shared + match.queries[h];
        if (all.output != all.value) {
          sum += along(all.gains[all.output], row, column, match.value_output);
        }
        if (all.query != all.key) sum += along(all.gains[all.query], row, column, match.query_key);
      }
      return sum;
    };
    const auto match_queries = [&]() -> absl::Status {
      std::vector<double> sum(shared * shared);
      for (int64_t h = 0; h < shared; ++h) {
        for (int64_t k = 0; k < shared; ++k) {
          sum[h * shared + k] =
              along(all.gains[all.output], slot * shared + h, head * shared + k,
                    match.value_output) +
              along(all.gains[all.query], slot * shared + h, head * shared + k, match.query_key);
        }
      }
      return solve(sum, shared, match.queries);
    };

    bool with_queries = shared == 1;  // there is one way to pair them
    for (int round = 0; round < kRounds; ++round) {
      const HeadMatch before = match;
      RETURN_IF_ERROR(order_inside(all.value, all.output, with_queries, match.value_output));
      if (!attention.rotary) {
        RETURN_IF_ERROR(order_inside(all.key, all.query, with_queries, match.query_key));
      }
      if (shared > 1) RETURN_IF_ERROR(match_queries());
      with_queries = true;
      match.score = score();
      if (round > 0 && match.score <= before.score) {
        match = before;
        break;
      }
      if (shared == 1) break;
    }
    return match;
  }

  absl::StatusOr<double> TakeAttentions(const Step& step, Alignment& alignment) {
    std::vector<AttentionGains> all;
    for (const int attention : step.attentions) {
      ASSIGN_OR_RETURN(AttentionGains gains, GainsOf(symmetry_.attentions()[attention], alignment));
      all.push_back(std::move(gains));
    }
    const int64_t heads = all[0].attention->kv_heads;
    // All pairs of all attentions at once.
    std::vector<absl::StatusOr<HeadMatch>> matches(all.size() * heads * heads);
    pool_.ForEach(static_cast<int64_t>(matches.size()), [&](int64_t item, int /*thread*/) {
      const int64_t pair = item % (heads * heads);
      matches[item] = MatchHeads(all[item / (heads * heads)], pair / heads, pair % heads);
    });
    std::vector<double> scores(heads * heads, 0);
    for (size_t item = 0; item < matches.size(); ++item) {
      RETURN_IF_ERROR(matches[item].status());
      scores[item % (heads * heads)] += matches[item]->score;
    }
    Gains of_heads(0);
    if (step.group >= 0) {
      ASSIGN_OR_RETURN(of_heads, GainsOf(step.group, alignment));
      for (size_t i = 0; i < scores.size(); ++i) scores[i] += of_heads.values[i];
    }
    ASSIGN_OR_RETURN(const Assignment assignment,
                     kernels::SolveAssignment({.costs = {.data = scores.data(),
                                                         .dtype = DType::kF64,
                                                         .rows = heads,
                                                         .columns = heads,
                                                         .stride = heads},
                                               .maximize = true}));
    // Taken as a whole: what all groups of the step gain.
    Alignment next = alignment;
    double gain = 0;
    if (step.group >= 0) {
      gain -= of_heads.Of(Order(step.group, next));
      Order(step.group, next) = assignment.columns;
      gain += of_heads.Of(assignment.columns);
    }
    for (size_t a = 0; a < all.size(); ++a) {
      const Attention& attention = *all[a].attention;
      const int64_t shared = attention.heads / attention.kv_heads;
      AttentionOrder order = {.kv_heads = assignment.columns};
      for (int64_t slot = 0; slot < heads; ++slot) {
        const int32_t head = assignment.columns[slot];
        const HeadMatch& match = *matches[(a * heads + slot) * heads + head];
        for (const int32_t query : match.queries) {
          order.heads.push_back(static_cast<int32_t>(head * shared + query));
        }
        absl::c_copy(match.query_key, std::back_inserter(order.query_key));
        absl::c_copy(match.value_output, std::back_inserter(order.value_output));
      }
      AttentionPermutations expanded = Expand(attention, order);
      const auto set = [&](int group, int gains, std::vector<int32_t>& permutation) {
        std::vector<int32_t>& target = Order(group, next);
        gain += all[a].gains[gains].Of(permutation) - all[a].gains[gains].Of(target);
        target = std::move(permutation);
      };
      set(attention.query, all[a].query, expanded.query);
      if (attention.key != attention.query) set(attention.key, all[a].key, expanded.key);
      set(attention.value, all[a].value, expanded.value);
      if (attention.output != attention.value)
        set(attention.output, all[a].output, expanded.output);
    }
    if (gain <= 0) return 0.0;
    alignment = std::move(next);
    return gain;
  }

  static constexpr int kRounds = 8;

  const Symmetry& symmetry_;
  const Checkpoint &reference_, &model_;
  const WeightMatchingOptions& options_;
  kernels::Backend& backend_;
  kernels::ThreadPool pool_;
  LinearAlgebra* algebra_ = nullptr;
  std::vector<std::vector<Place>> places_;                  // by group
  std::vector<std::pair<std::string, std::string>> names_;  // by tensor; empty: no evidence
  std::vector<std::string> skipped_;
  std::vector<Step> steps_;
  std::vector<std::vector<double>> prices_;  // by group, of its last assignment
};

}  // namespace

bool IsAttentionKind(GroupKind kind) {
  switch (kind) {
    case GroupKind::kQueryKey:
    case GroupKind::kValueOutput:
    case GroupKind::kQuery:
    case GroupKind::kKey:
    case GroupKind::kValue:
    case GroupKind::kOutput:
    case GroupKind::kHeads:
      return true;
    default:
      return false;
  }
}

int64_t WeightMatchingBytes(const Symmetry& symmetry) {
  int64_t largest = 0, widest = 0;
  for (const SymmetricTensor& tensor : symmetry.tensors()) {
    largest = std::max(largest, tensor.shape.elements() * ByteWidth(tensor.dtype));
  }
  const auto square = [&](int group) {
    const int64_t width = symmetry.groups()[group].width;
    return width * width;
  };
  std::map<int, int64_t> together;  // by what orders the heads of several attentions
  for (int g = 0; g < static_cast<int>(symmetry.groups().size()); ++g) {
    const SymmetryGroup& group = symmetry.groups()[g];
    if (group.attention < 0) {
      widest = std::max(widest, 2 * square(g));
      continue;
    }
    const int order = symmetry.attentions()[group.attention].head_order;
    widest = std::max(widest, together[order >= 0 ? order : -1 - group.attention] += square(g));
  }
  return 3 * largest + widest * static_cast<int64_t>(sizeof(double));
}

absl::StatusOr<WeightMatch> MatchWeights(const Symmetry& symmetry, const Checkpoint& reference,
                                         const Checkpoint& model, const Alignment& start,
                                         const WeightMatchingOptions& options,
                                         kernels::Backend& backend) {
  return Matcher(symmetry, reference, model, options, backend).Match(start);
}

absl::StatusOr<DenseMatrix> WeightSimilarity(const Symmetry& symmetry, const Checkpoint& reference,
                                             const Checkpoint& model, const Alignment& alignment,
                                             int group, kernels::Backend& backend) {
  return Matcher(symmetry, reference, model, {}, backend).Similarity(group, alignment);
}

}  // namespace pewter
