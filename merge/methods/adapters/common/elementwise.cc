#include "merge/methods/adapters/common/elementwise.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"

namespace pewter::adapters {
namespace {

constexpr int64_t kStep = int64_t{1} << 16;

// Magnitudes as integers: their order is total, whatever the values are.
uint32_t Magnitude(float value) { return std::bit_cast<uint32_t>(value) & 0x7fffffffu; }

}  // namespace

Combination::Combination(const Elementwise& operation, bool by_frequency, std::vector<Term> terms)
    : operation_(operation),
      by_frequency_(by_frequency),
      terms_(std::move(terms)),
      keep_(terms_.size(), Keep::kAll),
      thresholds_(terms_.size()) {
  for (size_t i = 0; i < terms_.size(); ++i) {
    if (operation_.prune == Elementwise::Prune::kNone || terms_[i].density >= 1) continue;
    const bool random = operation_.prune == Elementwise::Prune::kRandom;
    keep_[i] = terms_[i].density <= 0 ? Keep::kNone : random ? Keep::kDrawn : Keep::kLargest;
  }
}

void Combination::Rank(size_t i, absl::Span<float> scratch, ReadElements read) {
  if (keep_[i] != Keep::kLargest) return;
  const auto size = static_cast<int64_t>(scratch.size());
  const auto kept = static_cast<int64_t>(terms_[i].density * static_cast<double>(size));
  if (kept == 0) {
    keep_[i] = Keep::kNone;
    return;
  }
  for (int64_t first = 0; first < size; first += kStep) {
    read(first, std::min(kStep, size - first), scratch.data() + first);
  }
  const auto last = scratch.begin() + (kept - 1);
  std::nth_element(scratch.begin(), last, scratch.end(),
                   [](float a, float b) { return Magnitude(a) > Magnitude(b); });
  const uint32_t threshold = Magnitude(*last);
  int64_t equal = std::count_if(scratch.begin(), scratch.begin() + kept,
                                [&](float value) { return Magnitude(value) == threshold; });
  thresholds_[i] = {.value = std::bit_cast<float>(threshold), .ties_end = size};
  // The first `equal` of those that equal it are kept; the tensor is in another order now.
  std::vector<float> values(std::min(kStep, size));
  for (int64_t first = 0; first < size; first += kStep) {
    const int64_t count = std::min(kStep, size - first);
    read(first, count, values.data());
    for (int64_t j = 0; j < count; ++j) {
      if (Magnitude(values[j]) != threshold || --equal > 0) continue;
      thresholds_[i].ties_end = first + j + 1;
      return;
    }
  }
}

void Combination::Prune(size_t i, int64_t first, int64_t count, float* values) const {
  switch (keep_[i]) {
    case Keep::kAll:
      return;
    case Keep::kNone:
      std::fill(values, values + count, 0.0f);
      return;
    case Keep::kLargest: {
      const uint32_t threshold = Magnitude(static_cast<float>(thresholds_[i].value));
      const int64_t ties_end = thresholds_[i].ties_end;
      for (int64_t j = 0; j < count; ++j) {
        const uint32_t magnitude = Magnitude(values[j]);
        if (magnitude < threshold || (magnitude == threshold && first + j >= ties_end)) {
          values[j] = 0;
        }
      }
      return;
    }
    case Keep::kDrawn: {
      const auto below = static_cast<uint64_t>(std::llround(terms_[i].density * 0x1p32));
      const auto density = static_cast<float>(terms_[i].density);
      const uint64_t upper_below = below >> 16;
      uint32_t words[4];
      for (int64_t j = 0; j < count; ++j) {
        const auto element = static_cast<uint64_t>(first + j);
        if (j == 0 || element % 8 == 0) PhiloxBlock(terms_[i].key, element / 8, 0, words);
        // The upper half of the draw nearly always decides.
        const uint32_t upper = PhiloxHalf(words, element);
        const bool kept =
            upper == upper_below ? PhiloxWord(terms_[i].key, element) < below : upper < upper_below;
        values[j] = kept ? values[j] / density : 0;
      }
      return;
    }
  }
}

void Combination::Combine(int64_t first, int64_t count, absl::Span<float* const> values,
                          float* out) const {
  for (size_t i = 0; i < terms_.size(); ++i) Prune(i, first, count, values[i]);
  for (int64_t j = 0; j < count; ++j) {
    double total = 0, sum = 0;
    for (size_t i = 0; i < terms_.size(); ++i) {
      const double value = values[i][j];
      total += by_frequency_ ? (value > 0) - (value < 0) : value;
      sum += terms_[i].weight * value;
    }
    if (operation_.elect_sign) {
      const double majority = total >= 0 ? 1 : -1;
      int agree = 0;
      sum = 0;
      for (size_t i = 0; i < terms_.size(); ++i) {
        const double value = values[i][j];
        if (!(value * majority > 0)) continue;
        sum += terms_[i].weight * value;
        ++agree;
      }
      sum /= std::max(agree, 1);
    }
    out[j] = static_cast<float>(sum);
  }
}

std::vector<Combination::Term> TermsOf(const AdapterModule& module, absl::string_view scope) {
  std::vector<Combination::Term> terms;
  for (size_t i = 0; i < module.inputs.size(); ++i) {
    const AdapterInput& input = module.inputs[i];
    const bool pruned = input.params.contains("density");
    terms.push_back(
        {.weight = input.number("weight"),
         .density = pruned ? input.number("density") : 1,
         .key = MakePhiloxKey(module.seed, absl::StrCat(module.name, ".", scope, "#", i))});
  }
  return terms;
}

bool ByFrequency(const AdapterModule& module) {
  const ParamValue* const method = module.Find("majority_sign_method");
  return method != nullptr && std::get<std::string>(*method) == "frequency";
}

Param WeightParam() {
  return {.name = "weight", .help = "factor of this adapter", .scope = ParamScopeKind::kModel};
}

Param DensityParam(bool random) {
  return {.name = "density",
          .help = random ? "probability that an element is kept"
                         : "share of the elements that is kept, largest first",
          .scope = ParamScopeKind::kModel,
          .min = 0};
}

Param MajoritySignParam() {
  return {.name = "majority_sign_method",
          .help = "the sign of the sum of the elements, or the more frequent one",
          .type = ParamType::kString,
          .fallback = "total",
          .choices = {"total", "frequency"}};
}

}  // namespace pewter::adapters
