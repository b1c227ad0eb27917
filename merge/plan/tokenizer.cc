#include "merge/plan/tokenizer.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "base/status.h"
#include "kernels/backend.h"

namespace pewter {
namespace {

using nlohmann::json;

constexpr int64_t kMaxTokenizerBytes = int64_t{256} << 20;
constexpr int64_t kMaxTokens = int64_t{1} << 24;

// Text of a model's file; nullopt when it has none.
absl::StatusOr<std::optional<std::string>> ReadOptional(const Checkpoint& model,
                                                        absl::string_view key) {
  const auto stat = model.store().Stat(key);
  if (absl::IsNotFound(stat.status())) return std::nullopt;
  if (!stat.ok()) return stat.status();
  ASSIGN_OR_RETURN(std::string text, ReadText(model.store(), key, kMaxTokenizerBytes));
  return text;
}

class VocabularyReader {
 public:
  explicit VocabularyReader(const Checkpoint& model) : model_(model) {}

  absl::StatusOr<std::optional<Vocabulary>> Read() {
    ASSIGN_OR_RETURN(const std::optional<std::string> fast, ReadOptional(model_, kTokenizer));
    if (fast) {
      RETURN_IF_ERROR(ReadFast(*fast));
      return std::move(vocabulary_);
    }
    ASSIGN_OR_RETURN(const std::optional<std::string> map, ReadOptional(model_, "vocab.json"));
    ASSIGN_OR_RETURN(const std::optional<std::string> lines, ReadOptional(model_, "vocab.txt"));
    if (map) {
      RETURN_IF_ERROR(AddMap("vocab.json", json::parse(*map, nullptr, false)));
    } else if (lines) {
      int64_t id = 0;
      for (absl::string_view line : absl::StrSplit(absl::StripSuffix(*lines, "\n"), '\n')) {
        RETURN_IF_ERROR(Add("vocab.txt", absl::StripSuffix(line, "\r"), id++));
      }
    } else {
      return std::nullopt;
    }
    ASSIGN_OR_RETURN(const std::optional<std::string> added,
                     ReadOptional(model_, "added_tokens.json"));
    if (added) RETURN_IF_ERROR(AddMap("added_tokens.json", json::parse(*added, nullptr, false)));
    return std::move(vocabulary_);
  }

 private:
  static constexpr absl::string_view kTokenizer = "tokenizer.json";

  absl::Status Malformed(absl::string_view key, absl::string_view why) const {
    return absl::DataLossError(absl::StrCat(model_.store().Describe(key), ": ", why));
  }

  absl::Status Add(absl::string_view key, absl::string_view token, int64_t id) {
    if (id < 0 || id >= kMaxTokens) {
      return Malformed(key, absl::StrCat("token id ", id, " is out of range"));
    }
    vocabulary_[token] = id;
    return absl::OkStatus();
  }

  // {TOKEN: ID, ...}
  absl::Status AddMap(absl::string_view key, const json& map) {
    if (!map.is_object()) return Malformed(key, "not a JSON object of tokens");
    for (const auto& [token, id] : map.items()) {
      if (!id.is_number_integer()) return Malformed(key, "a token id is not a whole number");
      RETURN_IF_ERROR(Add(key, token, id.get<int64_t>()));
    }
    return absl::OkStatus();
  }

  // {"model": {"vocab": {TOKEN: ID} or [[TOKEN, SCORE], ...]}, "added_tokens": [{id, content}]}
  absl::Status ReadFast(const std::string& text) {
    const json root = json::parse(text, nullptr, /*allow_exceptions=*/false);
    const json* vocab = nullptr;
    if (root.is_object() && root.contains("model") && root["model"].is_object() &&
        root["model"].contains("vocab")) {
      vocab = &root["model"]["vocab"];
    }
    if (vocab == nullptr) return Malformed(kTokenizer, "has no model.vocab");
    if (vocab->is_array()) {
      int64_t id = 0;
      for (const json& entry : *vocab) {
        if (!entry.is_array() || entry.empty() || !entry[0].is_string()) {
          return Malformed(kTokenizer, "model.vocab has an entry that is not [token, score]");
        }
        RETURN_IF_ERROR(Add(kTokenizer, entry[0].get_ref<const std::string&>(), id++));
      }
    } else {
      RETURN_IF_ERROR(AddMap(kTokenizer, *vocab));
    }
    const auto added = root.find("added_tokens");
    if (added == root.end() || added->is_null()) return absl::OkStatus();
    for (const json& entry : *added) {
      if (!entry.is_object() || !entry.contains("id") || !entry["id"].is_number_integer() ||
          !entry.contains("content") || !entry["content"].is_string()) {
        return Malformed(kTokenizer, "added_tokens has an entry without id and content");
      }
      RETURN_IF_ERROR(Add(kTokenizer, entry["content"].get_ref<const std::string&>(),
                          entry["id"].get<int64_t>()));
    }
    return absl::OkStatus();
  }

  const Checkpoint& model_;
  Vocabulary vocabulary_;
};

// config.json's vocab_size; the greatest int64 when there is none.
int64_t VocabularySize(const Checkpoint& model) {
  const json config = json::parse(model.config_json(), nullptr, /*allow_exceptions=*/false);
  if (!config.is_object()) return std::numeric_limits<int64_t>::max();
  const auto size = config.find("vocab_size");
  return size != config.end() && size->is_number_integer() ? size->get<int64_t>()
                                                           : std::numeric_limits<int64_t>::max();
}

// Where a row of a view comes from.
struct RowOrigin {
  static constexpr int32_t kZeros = -1;
  static constexpr int32_t kMean = -2;  // `row` is an index into RowTable::means
  int32_t source = kZeros;              // index of the source
  int32_t row = 0;
};

struct RowTable {
  std::vector<RowOrigin> rows;
  std::vector<std::vector<RowOrigin>> means;
};

class AlignedSource final : public TensorSource {
 public:
  AlignedSource(int self, std::vector<std::shared_ptr<const TensorSource>> sources, RowTable table,
                Shape shape)
      : self_(self), sources_(std::move(sources)), table_(std::move(table)), shape_(shape) {
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
    return bytes + sources_[self_]->resident_bytes();
  }

  absl::Status Read(int64_t first, int64_t count, absl::Span<std::byte> out,
                    ReadObserver* observer) const override {
    const int64_t element = ByteWidth(dtype());
    while (count > 0) {
      const int64_t row = first / width_;
      const int64_t within = first % width_;
      int64_t run = 1;  // rows that follow one another in their source too
      const RowOrigin origin = table_.rows[row];
      while (origin.source >= 0 && run * width_ < within + count &&
             table_.rows[row + run].source == origin.source &&
             table_.rows[row + run].row == origin.row + run) {
        ++run;
      }
      const int64_t part = std::min(count, run * width_ - within);
      const absl::Span<std::byte> to = out.subspan(0, part * element);
      if (origin.source >= 0) {
        RETURN_IF_ERROR(
            sources_[origin.source]->Read(origin.row * width_ + within, part, to, observer));
      } else if (origin.source == RowOrigin::kMean) {
        RETURN_IF_ERROR(ReadMean(table_.means[origin.row], within, part, to, observer));
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

  const int self_;
  const std::vector<std::shared_ptr<const TensorSource>> sources_;
  const RowTable table_;
  const Shape shape_;
  int64_t width_ = 1;
};

}  // namespace

absl::StatusOr<std::optional<Vocabulary>> ReadVocabulary(const Checkpoint& model) {
  auto vocabulary = VocabularyReader(model).Read();
  if (!vocabulary.ok()) {
    return Annotate(vocabulary.status(), absl::StrCat("model ", model.ref().ToString()));
  }
  return vocabulary;
}

absl::StatusOr<bool> VocabulariesDiffer(const Checkpoint& a, const Checkpoint& b) {
  for (absl::string_view key : {"tokenizer.json", "vocab.json", "vocab.txt"}) {
    ASSIGN_OR_RETURN(const auto text_a, ReadOptional(a, key));
    ASSIGN_OR_RETURN(const auto text_b, ReadOptional(b, key));
    if (text_a.has_value() != text_b.has_value()) break;
    if (!text_a.has_value()) continue;
    if (*text_a == *text_b) return false;
    break;
  }
  ASSIGN_OR_RETURN(const auto vocabulary_a, ReadVocabulary(a));
  ASSIGN_OR_RETURN(const auto vocabulary_b, ReadVocabulary(b));
  return vocabulary_a && vocabulary_b && *vocabulary_a != *vocabulary_b;
}

absl::StatusOr<TokenAlignment> TokenAlignment::Make(
    absl::Span<const std::shared_ptr<const Checkpoint>> models, int base,
    const Checkpoint& tokenizer, const Checkpoint& fallback, std::vector<std::string>& warnings) {
  const auto require = [](const Checkpoint& model) -> absl::StatusOr<Vocabulary> {
    ASSIGN_OR_RETURN(std::optional<Vocabulary> vocabulary, ReadVocabulary(model));
    if (!vocabulary) {
      return absl::FailedPreconditionError(
          absl::StrCat("model ", model.ref().ToString(),
                       ": its tokenizer is needed and it has none of tokenizer.json, vocab.json "
                       "and vocab.txt"));
    }
    return *std::move(vocabulary);
  };

  ASSIGN_OR_RETURN(const Vocabulary output, require(tokenizer));
  TokenAlignment alignment;
  alignment.base_ = base;
  for (const auto& [token, id] : output) alignment.rows_ = std::max(alignment.rows_, id + 1);
  if (const int64_t size = VocabularySize(tokenizer); alignment.rows_ > size) {
    return absl::FailedPreconditionError(absl::StrCat(
        "model ", tokenizer.ref().ToString(), ": its tokenizer has ids up to ", alignment.rows_ - 1,
        " and config.json's vocab_size is ", size,
        "; a tokenizer with surplus tokens cannot be the output's in this version of Pewter"));
  }

  std::vector<bool> held(alignment.rows_, false);
  for (const auto& model : models) {
    ASSIGN_OR_RETURN(std::optional<Vocabulary> own, ReadVocabulary(*model));
    if (!own) {
      warnings.push_back(absl::StrCat("model ", model->ref().ToString(),
                                      " has no tokenizer; it is taken to have that of ",
                                      fallback.ref().ToString()));
      ASSIGN_OR_RETURN(own, require(fallback));
    }
    const int64_t size = VocabularySize(*model);
    std::vector<int64_t>& rows = alignment.own_.emplace_back(alignment.rows_, -1);
    for (const auto& [token, id] : output) {
      const auto it = own->find(token);
      if (it == own->end() || it->second >= size) continue;
      rows[id] = it->second;
      held[id] = true;
    }
  }
  if (const auto empty = std::count(held.begin(), held.end(), false); empty > 0) {
    warnings.push_back(absl::StrCat(empty, " of ", alignment.rows_,
                                    " rows of the vocabulary belong to no model's token and "
                                    "become zeros"));
  }
  return alignment;
}

absl::StatusOr<std::vector<std::shared_ptr<const TensorSource>>> TokenAlignment::Align(
    absl::Span<const int> models,
    absl::Span<const std::shared_ptr<const TensorSource>> sources) const {
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

  std::vector<std::shared_ptr<const TensorSource>> views;
  for (int self = 0; self < count; ++self) {
    RowTable table;
    table.rows.resize(rows_);
    bool unchanged = sources[self]->shape()[0] == rows_;
    for (int64_t row = 0; row < rows_; ++row) {
      RowOrigin& origin = table.rows[row];
      if (const int64_t own = row_of(self, row); own >= 0) {
        origin = {.source = self, .row = static_cast<int32_t>(own)};
        unchanged = unchanged && own == row;
        continue;
      }
      unchanged = false;
      std::vector<RowOrigin> others;
      for (int other = 0; other < count; ++other) {
        const int64_t own = row_of(other, row);
        if (own < 0) continue;
        others.push_back({.source = other, .row = static_cast<int32_t>(own)});
        if (models[other] == base_) {
          others = {others.back()};
          break;
        }
      }
      if (others.size() == 1) {
        origin = others[0];
      } else if (!others.empty()) {
        origin = {.source = RowOrigin::kMean, .row = static_cast<int32_t>(table.means.size())};
        table.means.push_back(std::move(others));
      }
    }
    if (unchanged) {
      views.push_back(sources[self]);
      continue;
    }
    std::vector<int64_t> extents(sources[self]->shape().extents().begin(),
                                 sources[self]->shape().extents().end());
    extents[0] = rows_;
    ASSIGN_OR_RETURN(const Shape shape, Shape::Make(extents));
    views.push_back(std::make_shared<AlignedSource>(
        self, std::vector<std::shared_ptr<const TensorSource>>(sources.begin(), sources.end()),
        std::move(table), shape));
  }
  return views;
}

}  // namespace pewter
