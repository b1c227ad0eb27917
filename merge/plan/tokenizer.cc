#include "merge/plan/tokenizer.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <mutex>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/status.h"
#include "kernels/backend.h"
#include "merge/checkpoint/dotted_key.h"
#include "merge/checkpoint/printable.h"
#include "merge/checkpoint/stored_source.h"

namespace pewter {
namespace {

constexpr size_t kTokensShown = 5;

// Tokens for a message, the first few of them.
std::string Shown(std::vector<std::string> tokens) {
  const size_t count = tokens.size();
  if (count > kTokensShown) tokens.resize(kTokensShown);
  for (std::string& token : tokens) token = Printable(token);
  return absl::StrCat(
      absl::StrJoin(tokens, ", "),
      count > kTokensShown ? absl::StrCat(" and ", count - kTokensShown, " more") : std::string());
}

// Where a row of a view comes from.
struct RowOrigin {
  static constexpr int32_t kZeros = -1;
  static constexpr int32_t kMean = -2;     // `row` is an index into RowTable::means
  static constexpr int32_t kPadding = -3;  // the mean of the rows that are no padding
  static constexpr int32_t kMade = -4;     // `row` is an index of the approximator
  int32_t source = kZeros;                 // index of the source
  int32_t row = 0;
};

struct RowTable {
  std::vector<RowOrigin> rows;  // further rows are padding
  std::vector<std::vector<RowOrigin>> means;
};

class AlignedSource final : public TensorSource {
 public:
  AlignedSource(int self, std::vector<std::shared_ptr<const TensorSource>> sources, RowTable table,
                Shape shape, std::shared_ptr<const RowApproximator> approximator)
      : self_(self),
        sources_(std::move(sources)),
        table_(std::move(table)),
        shape_(shape),
        approximator_(std::move(approximator)) {
    width_ = shape_.elements() / std::max<int64_t>(1, shape_[0]);
  }

  DType dtype() const override { return sources_[self_]->dtype(); }
  const Shape& shape() const override { return shape_; }
  const std::string& name() const override { return sources_[self_]->name(); }
  int64_t resident_bytes() const override {
    int64_t bytes = static_cast<int64_t>(table_.rows.size() * sizeof(RowOrigin));
    for (const auto& mean : table_.means) {
      bytes += static_cast<int64_t>(mean.size() * sizeof(RowOrigin) + sizeof(mean));
    }
    // The padding row, and its sum while it is computed.
    bytes += width_ * (ByteWidth(dtype()) + static_cast<int64_t>(sizeof(double)));
    if (approximator_ != nullptr) bytes += approximator_->resident_bytes();
    return bytes + sources_[self_]->resident_bytes();
  }
  void WillRead(ReadIntents& intents) const override { sources_[self_]->WillRead(intents); }

  absl::Status Read(int64_t first, int64_t count, absl::Span<std::byte> out,
                    ReadObserver* observer) const override {
    const int64_t element = ByteWidth(dtype());
    while (count > 0) {
      const int64_t row = first / width_;
      const int64_t within = first % width_;
      int64_t run = 1;  // rows that follow one another in their source too
      const RowOrigin origin = Origin(row);
      while (origin.source >= 0 && run * width_ < within + count &&
             Origin(row + run).source == origin.source &&
             Origin(row + run).row == origin.row + run) {
        ++run;
      }
      const int64_t part = std::min(count, run * width_ - within);
      const absl::Span<std::byte> to = out.subspan(0, part * element);
      if (origin.source >= 0) {
        RETURN_IF_ERROR(
            sources_[origin.source]->Read(origin.row * width_ + within, part, to, observer));
      } else if (origin.source == RowOrigin::kMean) {
        RETURN_IF_ERROR(ReadMean(table_.means[origin.row], within, part, to, observer));
      } else if (origin.source == RowOrigin::kPadding) {
        RETURN_IF_ERROR(ReadPadding(within, to));
      } else if (origin.source == RowOrigin::kMade) {
        std::vector<std::byte> made(width_ * element);
        RETURN_IF_ERROR(approximator_->Row(origin.row, absl::MakeSpan(made), observer));
        std::memcpy(to.data(), made.data() + within * element, to.size());
      } else {
        std::memset(to.data(), 0, to.size());
      }
      out.remove_prefix(to.size());
      first += part;
      count -= part;
    }
    return absl::OkStatus();
  }

 private:
  absl::Status ReadMean(const std::vector<RowOrigin>& origins, int64_t within, int64_t count,
                        absl::Span<std::byte> out, ReadObserver* observer) const {
    std::vector<double> sum(count, 0.0);
    std::vector<double> row(count);
    for (const RowOrigin& origin : origins) {
      RETURN_IF_ERROR(
          sources_[origin.source]->Read(origin.row * width_ + within, count, out, observer));
      kernels::Convert({.data = out.data(), .dtype = dtype(), .size = count},
                       {.data = row.data(), .dtype = DType::kF64, .size = count});
      for (int64_t i = 0; i < count; ++i) sum[i] += row[i];
    }
    for (double& value : sum) value /= static_cast<double>(origins.size());
    kernels::Convert({.data = sum.data(), .dtype = DType::kF64, .size = count},
                     {.data = out.data(), .dtype = dtype(), .size = count});
    return absl::OkStatus();
  }

  RowOrigin Origin(int64_t row) const {
    return row < static_cast<int64_t>(table_.rows.size())
               ? table_.rows[row]
               : RowOrigin{.source = RowOrigin::kPadding};
  }

  // Elements of the padding row from `within` on.
  absl::Status ReadPadding(int64_t within, absl::Span<std::byte> out) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (padding_.empty()) RETURN_IF_ERROR(ComputePadding());
    std::memcpy(out.data(), padding_.data() + within * ByteWidth(dtype()), out.size());
    return absl::OkStatus();
  }

  // One pass over the other rows, always in the same order. It is not audited: whoever reads the
  // whole view reads them again.
  absl::Status ComputePadding() const {
    constexpr int64_t kBlockElements = int64_t{1} << 16;
    const int64_t block = std::max<int64_t>(1, kBlockElements / std::max<int64_t>(1, width_));
    std::vector<std::byte> bytes(block * width_ * ByteWidth(dtype()));
    std::vector<double> values(block * width_);
    std::vector<double> sum(width_, 0.0);
    int64_t count = 0;
    const int64_t end = static_cast<int64_t>(table_.rows.size());
    for (int64_t row = 0; row < end;) {
      int64_t run = 0;
      while (run < block && row + run < end &&
             table_.rows[row + run].source != RowOrigin::kPadding) {
        ++run;
      }
      const int64_t elements = run * width_;
      RETURN_IF_ERROR(Read(row * width_, elements,
                           {bytes.data(), size_t(elements * ByteWidth(dtype()))}, nullptr));
      kernels::Convert({.data = bytes.data(), .dtype = dtype(), .size = elements},
                       {.data = values.data(), .dtype = DType::kF64, .size = elements});
      for (int64_t i = 0; i < elements; ++i) sum[i % width_] += values[i];
      count += run;
      row += std::max<int64_t>(run, 1);
    }
    for (double& value : sum) value /= static_cast<double>(std::max<int64_t>(1, count));
    padding_.resize(width_ * ByteWidth(dtype()));
    kernels::Convert({.data = sum.data(), .dtype = DType::kF64, .size = width_},
                     {.data = padding_.data(), .dtype = dtype(), .size = width_});
    return absl::OkStatus();
  }

  const int self_;
  const std::vector<std::shared_ptr<const TensorSource>> sources_;
  const RowTable table_;
  const Shape shape_;
  const std::shared_ptr<const RowApproximator> approximator_;  // null: no row is the donor's
  int64_t width_ = 1;
  mutable std::mutex mutex_;                // guards padding_
  mutable std::vector<std::byte> padding_;  // empty until the first read of it
};

class FirstRowsSource final : public TensorSource {
 public:
  FirstRowsSource(std::shared_ptr<const TensorSource> source, Shape shape)
      : source_(std::move(source)), shape_(shape) {}

  DType dtype() const override { return source_->dtype(); }
  const Shape& shape() const override { return shape_; }
  const std::string& name() const override { return source_->name(); }
  int64_t resident_bytes() const override { return source_->resident_bytes(); }
  void WillRead(ReadIntents& intents) const override { source_->WillRead(intents); }
  absl::Status Read(int64_t first, int64_t count, absl::Span<std::byte> out,
                    ReadObserver* observer) const override {
    RETURN_IF_ERROR(CheckReadRange(*this, first, count, out.size()));
    return source_->Read(first, count, out, observer);
  }

 private:
  const std::shared_ptr<const TensorSource> source_;
  const Shape shape_;
};

absl::StatusOr<Shape> WithRows(const Shape& shape, int64_t rows) {
  std::vector<int64_t> extents(shape.extents().begin(), shape.extents().end());
  extents[0] = rows;
  return Shape::Make(extents);
}

}  // namespace

// Makes a TokenAlignment in the order in which ids are given out.
class TokenAlignment::Builder {
 public:
  Builder(const RecipeTokenizer& recipe, absl::Span<const std::shared_ptr<const Checkpoint>> models,
          int base, std::vector<std::string>& warnings)
      : recipe_(recipe), models_(models), warnings_(warnings) {
    result_.base_ = base;
    result_.approximate_ = recipe.approximate;
    for (const auto& model : models) result_.models_.push_back(model->ref().ToString());
  }

  absl::StatusOr<TokenAlignment> Make(const Checkpoint& source, const Checkpoint& donor,
                                      absl::Span<const VocabularyMatrices> matrices) {
    RETURN_IF_ERROR(Annotate(ReadAll(source, donor), recipe_.at.ToString()));
    result_.edit_.listed = source_.added;
    result_.edit_.surplus = source_.surplus;
    vocabulary_ = source_.vocabulary;
    for (const auto& [token, id] : vocabulary_) next_ = std::max(next_, id + 1);
    if (!source_.surplus.empty()) {
      warnings_.push_back(absl::StrCat(
          "model ", source.ref().ToString(), ": ", source_.surplus.size(),
          " tokens have ids beyond config.json's vocab_size and are left out of the tokenizer: ",
          Shown(Contents(source_.surplus))));
    }
    if (recipe_.source == RecipeTokenizer::Source::kUnion) Unite();
    for (const RecipeToken& token : recipe_.tokens) RETURN_IF_ERROR(AddRecipeToken(token));
    RETURN_IF_ERROR(Annotate(CheckGaps(source), recipe_.at.ToString()));
    if (recipe_.approximate) {
      RETURN_IF_ERROR(
          Annotate(PrepareApproximation(source, matrices), recipe_.approximate->at.ToString()));
    }
    SetRows();
    for (const RecipeToken& token : recipe_.tokens) RETURN_IF_ERROR(AddRule(token));
    result_.ids_.output = std::move(vocabulary_);
    result_.ids_.roles = source_.roles;
    return std::move(result_);
  }

 private:
  static absl::StatusOr<Tokenizer> Require(const Checkpoint& model) {
    ASSIGN_OR_RETURN(std::optional<Tokenizer> tokenizer, ReadTokenizer(model));
    if (!tokenizer) {
      return absl::FailedPreconditionError(
          absl::StrCat("model ", model.ref().ToString(),
                       ": its tokenizer is needed and it has none of tokenizer.json, vocab.json "
                       "and vocab.txt"));
    }
    return *std::move(tokenizer);
  }

  static std::vector<std::string> Contents(const std::map<int64_t, std::string>& tokens) {
    std::vector<std::string> contents;
    for (const auto& [id, token] : tokens) contents.push_back(token);
    return contents;
  }

  absl::Status ReadAll(const Checkpoint& source, const Checkpoint& donor) {
    ASSIGN_OR_RETURN(source_, Require(source));
    Tokenizer of_donor;
    if (&donor == &source) {
      of_donor = source_;
    } else {
      ASSIGN_OR_RETURN(of_donor, Require(donor));
    }
    for (const auto& [token, id] : of_donor.vocabulary) result_.ids_.tokens[id] = token;
    for (const auto& model : models_) {
      if (model.get() == &source || model.get() == &donor) {
        tokenizers_.push_back(model.get() == &source ? source_ : of_donor);
        continue;
      }
      ASSIGN_OR_RETURN(std::optional<Tokenizer> own, ReadTokenizer(*model));
      if (!own) {
        warnings_.push_back(absl::StrCat("model ", model->ref().ToString(),
                                         " has no tokenizer; it is taken to have that of ",
                                         donor.ref().ToString()));
        own = of_donor;
      }
      tokenizers_.push_back(*std::move(own));
    }
    return absl::OkStatus();
  }

  // Gives a token that the output does not have the next id.
  void Append(AddedToken token) {
    vocabulary_[token.content] = next_;
    result_.edit_.added[next_++] = std::move(token);
  }

  // The definition of an added token, of the first model that has one; `first` is asked before.
  const AddedToken* Definition(const std::string& token, int first) const {
    const auto find = [&](const Tokenizer& tokenizer) -> const AddedToken* {
      const auto id = tokenizer.vocabulary.find(token);
      if (id == tokenizer.vocabulary.end()) return nullptr;
      const auto added = tokenizer.added.find(id->second);
      return added == tokenizer.added.end() ? nullptr : &added->second;
    };
    if (first >= 0) {
      if (const AddedToken* added = find(tokenizers_[first])) return added;
    }
    for (const Tokenizer& tokenizer : tokenizers_) {
      if (const AddedToken* added = find(tokenizer)) return added;
    }
    return nullptr;
  }

  // Tokens of the other models in the order of models and ids.
  void Unite() {
    std::set<std::string> conflicting;
    for (const Tokenizer& tokenizer : tokenizers_) {
      std::map<int64_t, std::string> by_id;
      for (const auto& [token, id] : tokenizer.vocabulary) by_id[id] = token;
      for (const auto& [id, token] : by_id) {
        const auto own = tokenizer.added.find(id);
        const AddedToken* definition = own == tokenizer.added.end() ? nullptr : &own->second;
        const auto known = vocabulary_.find(token);
        if (known == vocabulary_.end()) {
          // An added token somewhere is one here.
          const AddedToken* any = definition != nullptr ? definition : Definition(token, -1);
          Append(any != nullptr ? *any : AddedToken{.content = token});
        } else if (definition != nullptr) {
          const AddedToken* first = FindAdded(known->second);
          if (first == nullptr) {
            result_.edit_.added[known->second] = *definition;
          } else if (!(*first == *definition)) {
            conflicting.insert(token);
          }
        }
      }
    }
    if (!conflicting.empty()) {
      warnings_.push_back(
          absl::StrCat("models define added tokens differently (the first definition is taken): ",
                       Shown({conflicting.begin(), conflicting.end()})));
    }
  }

  const AddedToken* FindAdded(int64_t id) const {
    for (const auto* tokens : {&result_.edit_.listed, &result_.edit_.added}) {
      const auto it = tokens->find(id);
      if (it != tokens->end()) return &it->second;
    }
    return nullptr;
  }

  absl::Status AddRecipeToken(const RecipeToken& token) {
    if (vocabulary_.contains(token.token)) return absl::OkStatus();
    int model = -1;
    if (token.rows == RecipeToken::Rows::kModel) {
      ASSIGN_OR_RETURN(model, Index(*token.model));
    }
    const AddedToken* definition = Definition(token.token, model);
    Append(definition != nullptr ? *definition : AddedToken{.content = token.token});
    return absl::OkStatus();
  }

  // Loaders count ids of added tokens on from the number of tokens.
  absl::Status CheckGaps(const Checkpoint& source) {
    TokenizerEdit& edit = result_.edit_;
    const bool longer = !edit.added.empty() && edit.added.rbegin()->first >=
                                                   static_cast<int64_t>(source_.vocabulary.size());
    if (!longer) return absl::OkStatus();
    if (next_ != static_cast<int64_t>(vocabulary_.size())) {
      return absl::FailedPreconditionError(absl::StrCat(
          "model ", source.ref().ToString(), ": its tokenizer has ", source_.vocabulary.size(),
          " tokens with gaps between their ids; tokens "
          "cannot be added to it"));
    }
    // Those that files only imply would come after the new ones.
    for (const auto& [id, token] : source_.implied) edit.added.try_emplace(id, token);
    return absl::OkStatus();
  }

  void SetRows() {
    const int64_t multiple = recipe_.pad_to_multiple_of;
    result_.rows_ = (next_ + multiple - 1) / multiple * multiple;
    result_.tokens_.resize(next_);
    result_.is_token_.assign(next_, false);
    for (const auto& [token, id] : vocabulary_) {
      result_.tokens_[id] = token;
      result_.is_token_[id] = true;
    }
    if (recipe_.approximate) return Match();
    for (const Tokenizer& tokenizer : tokenizers_) {
      std::vector<int64_t>& rows = result_.own_.emplace_back(next_, -1);
      for (const auto& [token, id] : vocabulary_) {
        const auto own = tokenizer.vocabulary.find(token);
        if (own != tokenizer.vocabulary.end()) rows[id] = own->second;
      }
    }
  }

  // Own rows of tokens that stand for the same.
  void Match() {
    const auto trained = [&](size_t model) {
      return trained_.empty() ? nullptr : &trained_[model];
    };
    for (size_t i = 0; i < tokenizers_.size(); ++i) {
      TokenMatches matches = MatchTokens(*recipe_.approximate, tokenizers_[i], source_, trained(i),
                                         trained(tokenizers_.size()));
      result_.donor_tokens_ = static_cast<int64_t>(matches.same.size());
      matches.same.resize(next_, -1);  // tokens that the recipe adds are nobody's
      result_.own_.push_back(std::move(matches.same));
      result_.matches_.push_back(std::move(matches));
    }
  }

  // What is asked for besides the rows of tokens that a model has.
  absl::Status PrepareApproximation(const Checkpoint& source,
                                    absl::Span<const VocabularyMatrices> matrices) {
    const TokenApproximation& how = *recipe_.approximate;
    if (how.magikarp) {
      for (size_t i = 0; i < matrices.size(); ++i) {
        const Vocabulary& vocabulary =
            i < tokenizers_.size() ? tokenizers_[i].vocabulary : source_.vocabulary;
        ASSIGN_OR_RETURN(trained_.emplace_back(),
                         TrainedRows(vocabulary, *matrices[i].embedding, matrices[i].head.get()));
      }
    }
    for (size_t i = 0; i <= models_.size(); ++i) {
      const Checkpoint& model = i < models_.size() ? *models_[i] : source;
      result_.heads_.emplace_back();
      if (how.method == TokenApproximation::Method::kMatchingPursuitRope) {
        result_.heads_.back() = RotaryHeadsOf(model);
      }
      if (how.method == TokenApproximation::Method::kSubword && i < models_.size()) {
        ASSIGN_OR_RETURN(result_.texts_.emplace_back(), TextTokenizer::Read(model));
      }
    }
    if (how.method == TokenApproximation::Method::kSubword) {
      const TokenMeanings meanings(source_);
      result_.written_.resize(next_);
      for (const auto& [token, id] : vocabulary_) result_.written_[id] = meanings.Text(token);
    }
    return absl::OkStatus();
  }

  RotaryHeads RotaryHeadsOf(const Checkpoint& model) {
    using nlohmann::json;
    const json config = json::parse(model.config_json(), nullptr, /*allow_exceptions=*/false);
    RotaryHeads heads;
    const json* count = FindInLanguageModel(config, "num_attention_heads");
    if (count == nullptr) count = FindInLanguageModel(config, "n_head");
    if (count != nullptr && count->is_number_integer()) heads.heads = count->get<int64_t>();
    const json* base = FindInLanguageModel(config, "rope_theta");
    if (base == nullptr) base = FindInLanguageModel(config, "rope_parameters.rope_theta");
    if (base != nullptr && base->is_number()) {
      heads.base = base->get<double>();
    } else {
      warnings_.push_back(absl::StrCat("config.json of model ", model.ref().ToString(),
                                       " has no rope_theta; it is taken to be ", heads.base));
    }
    return heads;
  }

  absl::StatusOr<int> Index(const ModelRef& ref) const {
    const std::string name = ref.ToString();
    const auto it = std::find(result_.models_.begin(), result_.models_.end(), name);
    if (it == result_.models_.end()) {
      return absl::InvalidArgumentError(
          absl::StrCat(ref.at.ToString(), ": model ", name,
                       " is not one of the models that are merged, so it has no row to give"));
    }
    return static_cast<int>(it - result_.models_.begin());
  }

  absl::Status AddRule(const RecipeToken& token) {
    if (token.rows == RecipeToken::Rows::kUsual) return absl::OkStatus();
    Rule rule{.token = token.token, .force = token.force, .at = token.at};
    if (token.rows != RecipeToken::Rows::kZero) {
      ASSIGN_OR_RETURN(rule.model, Index(*token.model));
      const std::string& wanted =
          token.rows == RecipeToken::Rows::kModel ? token.token : token.other;
      const Vocabulary& vocabulary = tokenizers_[rule.model].vocabulary;
      if (token.other_id) {
        rule.row = *token.other_id;
      } else if (const auto id = vocabulary.find(wanted); id != vocabulary.end()) {
        rule.row = id->second;
      } else {
        return absl::InvalidArgumentError(absl::StrCat(token.model->at.ToString(), ": model ",
                                                       token.model->ToString(), " has no token ",
                                                       Printable(wanted)));
      }
    }
    result_.rules_.insert_or_assign(vocabulary_.at(token.token), std::move(rule));
    return absl::OkStatus();
  }

  const RecipeTokenizer& recipe_;
  absl::Span<const std::shared_ptr<const Checkpoint>> models_;
  std::vector<std::string>& warnings_;
  Tokenizer source_;
  std::vector<Tokenizer> tokenizers_;       // of models_
  std::vector<std::vector<bool>> trained_;  // by id: of models_, then of source_
  Vocabulary vocabulary_;                   // of the output
  int64_t next_ = 0;                        // id of the next new token
  TokenAlignment result_;
};

absl::StatusOr<TokenAlignment> TokenAlignment::Make(
    const RecipeTokenizer& recipe, absl::Span<const std::shared_ptr<const Checkpoint>> models,
    int base, const Checkpoint& source, const Checkpoint& donor, std::vector<std::string>& warnings,
    absl::Span<const VocabularyMatrices> matrices) {
  return Builder(recipe, models, base, warnings).Make(source, donor, matrices);
}

absl::StatusOr<std::vector<std::shared_ptr<const TensorSource>>> TokenAlignment::Align(
    absl::Span<const int> models, absl::Span<const std::shared_ptr<const TensorSource>> sources,
    const Donor& donor, std::vector<std::string>& warnings) const {
  const int count = static_cast<int>(sources.size());
  const auto row_extents = [](const TensorSource& source) {
    return source.shape().rank() == 0 ? absl::Span<const int64_t>()
                                      : source.shape().extents().subspan(1);
  };
  for (const auto& source : sources) {
    if (source->shape().rank() == 0 || source->shape()[0] > std::numeric_limits<int32_t>::max() ||
        row_extents(*source) != row_extents(*sources[0])) {
      return absl::FailedPreconditionError(
          absl::StrCat(sources[0]->name(), " has shape ", sources[0]->shape().ToString(), " and ",
                       source->name(), " has shape ", source->shape().ToString(),
                       "; only the number of rows may differ"));
    }
  }
  const auto row_of = [&](int source, int64_t row) -> int64_t {
    const int64_t own = own_[models[source]][row];
    return own < sources[source]->shape()[0] ? own : -1;
  };
  const int64_t tokens = static_cast<int64_t>(is_token_.size());
  // Rows before it can be made from the donor's.
  const int64_t made =
      approximate_ && donor.rows != nullptr ? std::min(donor_tokens_, donor.rows->shape()[0]) : 0;

  // What a row is for a model that has none of its own, or is not to take it.
  RowTable shared;
  shared.rows.resize(tokens);
  std::vector<std::string> zeros;
  absl::flat_hash_map<int64_t, bool> forced;
  for (int64_t row = 0; row < tokens; ++row) {
    RowOrigin& origin = shared.rows[row];
    if (!is_token_[row]) {
      if (!approximate_) origin.source = RowOrigin::kPadding;
      continue;
    }
    std::vector<RowOrigin> having;
    bool base_has = false;
    for (int source = 0; source < count; ++source) {
      const int64_t own = row_of(source, row);
      if (own < 0) continue;
      const RowOrigin here{.source = source, .row = static_cast<int32_t>(own)};
      if (models[source] == base_) {
        base_has = true;
        origin = here;
      }
      having.push_back(here);
    }
    const auto rule = rules_.find(row);
    const bool force = rule != rules_.end() && rule->second.force;
    if (force) forced[row] = true;
    if (static_cast<int>(having.size()) == count && !force) continue;  // nobody takes it
    if (rule != rules_.end()) {
      ASSIGN_OR_RETURN(const int64_t given, RuleRow(rule->second, models, sources));
      origin = {};
      if (given >= 0) {
        const auto at = std::find(models.begin(), models.end(), rule->second.model);
        origin = {.source = static_cast<int32_t>(at - models.begin()),
                  .row = static_cast<int32_t>(given)};
      }
    } else if (row < made) {
      continue;  // each model has a way of its own
    } else if (having.empty()) {
      zeros.push_back(tokens_[row]);
    } else if (having.size() == 1) {
      origin = having[0];
    } else if (!base_has) {
      origin = {.source = RowOrigin::kMean, .row = static_cast<int32_t>(shared.means.size())};
      shared.means.push_back(std::move(having));
    }
  }
  if (!zeros.empty()) {
    warnings.push_back(
        absl::StrCat(zeros.size(), zeros.size() == 1 ? " token is" : " tokens are",
                     " in no model that has the tensor, so their rows are zeros: ", Shown(zeros)));
  }

  std::vector<std::shared_ptr<const TensorSource>> views;
  for (int self = 0; self < count; ++self) {
    RowTable table = shared;
    bool unchanged = sources[self]->shape()[0] == rows_ && tokens == rows_;
    std::vector<int32_t> wanted;
    for (int64_t row = 0; row < tokens; ++row) {
      RowOrigin& origin = table.rows[row];
      const int64_t own = row_of(self, row);
      if (own >= 0 && !forced.contains(row)) {
        origin = {.source = self, .row = static_cast<int32_t>(own)};
      } else if (row < made && is_token_[row] && !rules_.contains(row)) {
        const int64_t like = LikeRow(models[self], row, donor.head);
        if (like == kJunk) {
          origin = {};
        } else if (like >= 0 && like < sources[self]->shape()[0]) {
          origin = {.source = self, .row = static_cast<int32_t>(like)};
        } else {
          origin = {.source = RowOrigin::kMade, .row = static_cast<int32_t>(wanted.size())};
          wanted.push_back(static_cast<int32_t>(row));
        }
      }
      unchanged = unchanged && origin.source == self && origin.row == row;
    }
    if (unchanged) {
      views.push_back(sources[self]);
      continue;
    }
    std::shared_ptr<const RowApproximator> approximator;
    if (!wanted.empty()) {
      RowProblem problem{.how = *approximate_,
                         .own = sources[self],
                         .donor = donor.rows,
                         .head = donor.head,
                         .own_heads = heads_[models[self]],
                         .donor_heads = heads_.back(),
                         .device = donor.device,
                         .threads = donor.threads,
                         .seed = donor.seed,
                         .name = absl::StrCat(donor.name, "#", models[self])};
      for (int64_t row = 0; row < made; ++row) {
        const int64_t own = row_of(self, row);
        if (own < 0) continue;
        problem.shared.emplace_back(static_cast<int32_t>(row), static_cast<int32_t>(own));
      }
      if (approximate_->method == TokenApproximation::Method::kSubword) {
        ASSIGN_OR_RETURN(problem.pieces, PiecesOf(models[self], wanted, *sources[self]));
      }
      problem.wanted = std::move(wanted);
      ASSIGN_OR_RETURN(approximator, RowApproximator::Make(std::move(problem)));
    }
    ASSIGN_OR_RETURN(const Shape shape, WithRows(sources[self]->shape(), rows_));
    views.push_back(std::make_shared<AlignedSource>(
        self, std::vector<std::shared_ptr<const TensorSource>>(sources.begin(), sources.end()),
        std::move(table), shape, std::move(approximator)));
  }
  return views;
}

// A row of the model itself for a token that it does not have, -1 for none, or kJunk.
int64_t TokenAlignment::LikeRow(int model, int64_t row, bool head) const {
  using Match = TokenApproximation::Match;
  const TokenMatches& matches = matches_[model];
  const auto asked = [&](Match match) {
    return match == Match::kBoth || match == (head ? Match::kHead : Match::kEmbeddings);
  };
  const auto index = static_cast<size_t>(row);
  if (index < matches.junk.size() && matches.junk[index]) return kJunk;
  if (asked(approximate_->byte) && index < matches.byte.size() && matches.byte[index] >= 0) {
    return matches.byte[index];
  }
  return asked(approximate_->prefix) && index < matches.prefix.size() ? matches.prefix[index] : -1;
}

// Rows of the model's tokens that make up the text of each token.
absl::StatusOr<std::vector<std::vector<int32_t>>> TokenAlignment::PiecesOf(
    int model, absl::Span<const int32_t> wanted, const TensorSource& source) const {
  std::vector<std::vector<int32_t>> pieces;
  for (int32_t row : wanted) {
    auto ids = texts_[model]->Encode(written_[row]);
    if (!ids.ok()) {
      return Annotate(ids.status(), absl::StrCat("model ", models_[model], ", text of token ",
                                                 Printable(tokens_[row])));
    }
    std::vector<int32_t>& found = ids->ids;
    found.erase(std::remove_if(found.begin(), found.end(),
                               [&](int32_t id) { return id >= source.shape()[0]; }),
                found.end());
    pieces.push_back(std::move(found));
  }
  return pieces;
}

// The row of the source's tensor that a rule gives, -1 for zeros.
absl::StatusOr<int64_t> TokenAlignment::RuleRow(
    const Rule& rule, absl::Span<const int> models,
    absl::Span<const std::shared_ptr<const TensorSource>> sources) const {
  if (rule.model < 0) return -1;
  const auto at = std::find(models.begin(), models.end(), rule.model);
  if (at == models.end()) {
    return absl::FailedPreconditionError(absl::StrCat(
        rule.at.ToString(), ": token ", Printable(rule.token), " takes its row from model ",
        models_[rule.model], ", which this tensor is not merged from"));
  }
  const TensorSource& source = *sources[at - models.begin()];
  if (rule.row >= source.shape()[0]) {
    return absl::FailedPreconditionError(
        absl::StrCat(rule.at.ToString(), ": token ", Printable(rule.token), " takes row ", rule.row,
                     " of ", source.name(), ", which has ", source.shape()[0], " rows"));
  }
  return rule.row;
}

absl::StatusOr<std::shared_ptr<const TensorSource>> FirstRows(
    std::shared_ptr<const TensorSource> source, int64_t rows) {
  if (source->shape()[0] == rows) return source;
  ASSIGN_OR_RETURN(const Shape shape, WithRows(source->shape(), rows));
  return std::make_shared<FirstRowsSource>(std::move(source), shape);
}

}  // namespace pewter
