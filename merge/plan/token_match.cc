#include "merge/plan/token_match.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/strip.h"
#include "base/status.h"
#include "merge/checkpoint/held_source.h"
#include "merge/plan/utf8.h"

namespace pewter {
namespace {

constexpr absl::string_view kByteLevelSpace = "\xc4\xa0";          // U+0120
constexpr absl::string_view kSentencePieceSpace = "\xe2\x96\x81";  // U+2581
// Control characters keep what is said apart from tokens that are written so.
constexpr absl::string_view kWord = "\x01word:", kRole = "\x01role:";
// The first of its roles is what a token stands for.
constexpr absl::string_view kRoles[] = {"bos_token", "eos_token", "unk_token", "sep_token",
                                        "pad_token", "cls_token", "mask_token"};
// Quantile of norms, and of likenesses from the other end, beyond which rows count as untrained.
constexpr double kUntrained = 0.01;
constexpr double kLeastLikeness = 0.5;
constexpr double kLeastNorm = 1e-8;

// "<0x41>" for "A" and the reverse, where a token is one or the other.
std::optional<std::string> ByteCounterpart(absl::string_view meaning) {
  const std::optional<std::u32string> text = DecodeUtf8(meaning);
  if (text && text->size() == 1 && (*text)[0] < 256) {
    return absl::StrFormat("<0x%02X>", static_cast<unsigned>((*text)[0]));
  }
  if (meaning.size() != 6 || !absl::ConsumePrefix(&meaning, "<0x") ||
      !absl::ConsumeSuffix(&meaning, ">") || !absl::ascii_isxdigit(meaning[0]) ||
      !absl::ascii_isxdigit(meaning[1])) {
    return std::nullopt;
  }
  uint32_t byte = 0;
  if (!absl::SimpleHexAtoi(meaning, &byte)) return std::nullopt;
  return EncodeUtf8(byte);
}

// Calls fn for the beginnings of a token, longest first, until it says true. Roles have none, nor
// do beginnings of white space count.
template <class F>
void ForPrefixes(const std::string& meaning, const F& fn) {
  if (absl::StartsWith(meaning, kRole)) return;
  const size_t start = absl::StartsWith(meaning, kWord) ? kWord.size() : 0;
  for (size_t end = meaning.size(); end-- > start + 1;) {
    const auto byte = static_cast<unsigned char>(meaning[end]);
    if ((byte & 0xc0) == 0x80) continue;  // within a character
    const std::string prefix = meaning.substr(0, end);
    if (absl::StripAsciiWhitespace(absl::string_view(prefix).substr(start)).empty()) return;
    if (fn(prefix)) return;
  }
}

double Quantile(std::vector<double> values, double share) {
  const double at = share * static_cast<double>(values.size() - 1);
  const auto below = static_cast<size_t>(at);
  std::nth_element(values.begin(), values.begin() + below, values.end());
  const double low = values[below];
  if (below + 1 == values.size()) return low;
  const double high = *std::min_element(values.begin() + below + 1, values.end());
  return low + (at - static_cast<double>(below)) * (high - low);
}

// fn(row, its elements) for all rows of a matrix.
template <class F>
absl::Status ForRows(const TensorSource& source, const F& fn) {
  constexpr int64_t kBlockElements = int64_t{1} << 18;
  const int64_t rows = source.shape()[0], width = source.shape()[1];
  const int64_t block = std::max<int64_t>(1, kBlockElements / std::max<int64_t>(1, width));
  std::vector<double> values(block * width);
  for (int64_t first = 0; first < rows; first += block) {
    const int64_t elements = std::min(block, rows - first) * width;
    RETURN_IF_ERROR(ReadDoubles(source, first * width, {values.data(), size_t(elements)}));
    for (int64_t i = 0; i < elements / width; ++i) {
      fn(first + i, absl::MakeConstSpan(values).subspan(i * width, width));
    }
  }
  return absl::OkStatus();
}

double Norm(absl::Span<const double> row) {
  double sum = 0;
  for (double value : row) sum += value * value;
  return std::sqrt(sum);
}

// Marks the rows of a matrix that are like the mean of the unused ones.
absl::Status MarkUnused(const TensorSource& source, const std::vector<bool>& unused,
                        std::vector<bool>& trained) {
  std::vector<double> mean(source.shape()[1], 0.0);
  int64_t count = 0;
  RETURN_IF_ERROR(ForRows(source, [&](int64_t row, absl::Span<const double> values) {
    if (row >= static_cast<int64_t>(unused.size()) || !unused[row]) return;
    ++count;
    for (size_t i = 0; i < values.size(); ++i) mean[i] += values[i];
  }));
  if (count == 0) return absl::OkStatus();
  for (double& value : mean) value /= static_cast<double>(count);
  const double of_mean = std::max(Norm(mean), kLeastNorm);
  std::vector<double> likeness;
  RETURN_IF_ERROR(ForRows(source, [&](int64_t, absl::Span<const double> values) {
    double product = 0;
    for (size_t i = 0; i < values.size(); ++i) product += values[i] * mean[i];
    likeness.push_back(product / (std::max(Norm(values), kLeastNorm) * of_mean));
  }));
  const double bound = std::max(kLeastLikeness, Quantile(likeness, 1 - kUntrained));
  for (size_t row = 0; row < std::min(likeness.size(), trained.size()); ++row) {
    if (likeness[row] > bound) trained[row] = false;
  }
  return absl::OkStatus();
}

}  // namespace

TokenMeanings::TokenMeanings(const Tokenizer& tokenizer) {
  for (absl::string_view role : kRoles) {
    const auto token = tokenizer.roles.find(std::string(role));
    if (token != tokenizer.roles.end()) roles_.try_emplace(token->second, role);
  }
  int64_t byte_level = 0, sentence_piece = 0;
  for (const auto& [token, id] : tokenizer.vocabulary) {
    byte_level += absl::StartsWith(token, kByteLevelSpace) ? 1 : 0;
    sentence_piece += absl::StartsWith(token, kSentencePieceSpace) ? 1 : 0;
  }
  space_ = sentence_piece > byte_level ? kSentencePieceSpace : kByteLevelSpace;
}

std::string TokenMeanings::Of(absl::string_view token) const {
  if (absl::ConsumePrefix(&token, space_)) return absl::StrCat(kWord, token);
  const auto role = roles_.find(std::string(token));
  return role == roles_.end() ? std::string(token) : absl::StrCat(kRole, role->second);
}

std::string TokenMeanings::Text(absl::string_view token) const {
  const auto role = roles_.find(std::string(token));
  if (role != roles_.end()) return role->second;
  if (space_ == kByteLevelSpace) {
    // Bytes that are no text by themselves stay as they are written.
    const std::optional<std::string> bytes = DecodeByteLevel(token);
    if (bytes && DecodeUtf8(*bytes)) return *bytes;
    return std::string(token);
  }
  return absl::StrReplaceAll(token, {{space_, " "}});
}

absl::StatusOr<std::vector<bool>> TrainedRows(const Vocabulary& vocabulary,
                                              const TensorSource& embedding,
                                              const TensorSource* head) {
  std::vector<bool> unused(embedding.shape()[0], true);
  for (const auto& [token, id] : vocabulary) {
    if (id < static_cast<int64_t>(unused.size())) {
      unused[id] = absl::StrContains(token, "unused_token") ||
                   absl::StrContains(token, "reserved_special_token");
    }
  }
  std::vector<bool> trained(unused.size());
  for (size_t row = 0; row < unused.size(); ++row) trained[row] = !unused[row];
  if (head != nullptr) {
    // Without a head of its own the norms of rare tokens say nothing.
    std::vector<double> norms;
    RETURN_IF_ERROR(ForRows(embedding, [&](int64_t, absl::Span<const double> values) {
      norms.push_back(Norm(values));
    }));
    const double bound = norms.empty() ? 0 : Quantile(norms, kUntrained);
    for (size_t row = 0; row < norms.size(); ++row) {
      if (norms[row] < bound) trained[row] = false;
    }
  }
  RETURN_IF_ERROR(MarkUnused(embedding, unused, trained));
  if (head != nullptr) RETURN_IF_ERROR(MarkUnused(*head, unused, trained));
  return trained;
}

TokenMatches MatchTokens(const TokenApproximation& how, const Tokenizer& own,
                         const Tokenizer& other, const std::vector<bool>* trained_own,
                         const std::vector<bool>* trained_other) {
  const auto is_trained = [](const std::vector<bool>* trained, int64_t id) {
    return trained == nullptr || (id < static_cast<int64_t>(trained->size()) && (*trained)[id]);
  };
  const TokenMeanings own_meanings(own), other_meanings(other);
  struct Known {
    int64_t id = -1;
    bool trained = false;
  };
  absl::flat_hash_map<std::string, Known> known;
  for (const auto& [token, id] : own.vocabulary) {
    Known& one = known[own_meanings.Of(token)];
    if (one.id < 0 || id < one.id) one = {id, is_trained(trained_own, id)};
  }
  // A token that only one of the models was trained on is shared by neither.
  absl::flat_hash_map<std::string, bool> trained_by_meaning;
  int64_t ids = 0;
  for (const auto& [token, id] : other.vocabulary) {
    ids = std::max(ids, id + 1);
    trained_by_meaning[other_meanings.Of(token)] |= is_trained(trained_other, id);
  }
  const auto find = [&](const std::string& meaning) -> int64_t {
    const auto one = known.find(meaning);
    if (one == known.end() || !one->second.trained) return -1;
    if (trained_other != nullptr) {
      const auto in_other = trained_by_meaning.find(meaning);
      if (in_other == trained_by_meaning.end() || !in_other->second) return -1;
    }
    return one->second.id;
  };
  TokenMatches matches{.same = std::vector<int64_t>(ids, -1)};
  if (how.byte != TokenApproximation::Match::kNo) matches.byte.assign(ids, -1);
  if (how.prefix != TokenApproximation::Match::kNo) matches.prefix.assign(ids, -1);
  if (trained_own != nullptr) matches.junk.assign(ids, false);
  for (const auto& [token, id] : other.vocabulary) {
    const std::string meaning = other_meanings.Of(token);
    matches.same[id] = find(meaning);
    if (!matches.byte.empty()) {
      const std::optional<std::string> counterpart = ByteCounterpart(meaning);
      if (counterpart) matches.byte[id] = find(*counterpart);
    }
    if (!matches.prefix.empty()) {
      int64_t& row = matches.prefix[id];
      ForPrefixes(meaning, [&](const std::string& prefix) {
        row = find(prefix);
        return row >= 0;
      });
    }
    if (!matches.junk.empty()) {
      const auto one = known.find(meaning);
      const bool trained = one != known.end() && one->second.trained;
      matches.junk[id] = !is_trained(trained_other, id) && !trained;
    }
  }
  return matches;
}

}  // namespace pewter
