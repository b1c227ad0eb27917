#include "kernels/threshold_select.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <optional>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "kernels/radix_select.h"

namespace pewter::kernels {
namespace {

// Up to here every element is a candidate; a histogram has as many bins.
constexpr int64_t kSmall = kRadixBins;
// Short runs all over the tensor, because neighbours (of one row) are alike.
constexpr int64_t kSampleRuns = 128;
constexpr int64_t kSampleRun = 256;
constexpr int64_t kSamples = kSampleRuns * kSampleRun;
// Half the window, in ranks of the sample: more than five standard deviations of the median of
// independent draws, which runs of neighbours are not quite.
constexpr int64_t kMargin = kSamples / 64;
// Candidates that are worth collecting, as a share of all elements.
constexpr int64_t kLargestShare = 16;

// Nothing when so much lies around the k-th largest that a window is of no use.
std::optional<SiftWindow> GuessWindow(std::vector<float>& sample, double share) {
  // The largest of all, as in a histogram, and in order with the others.
  for (float& magnitude : sample) {
    if (std::isnan(magnitude)) magnitude = std::numeric_limits<float>::infinity();
  }
  const auto size = static_cast<int64_t>(sample.size());
  const auto rank = static_cast<int64_t>(share * static_cast<double>(size));
  SiftWindow window{.low = 0, .high = std::numeric_limits<float>::infinity()};
  auto begin = sample.begin(), end = sample.end();
  if (rank - kMargin >= 0) {
    begin += rank - kMargin;
    std::nth_element(sample.begin(), begin, end, std::greater<float>());
    window.high = *begin;
  }
  if (rank + kMargin < size) {
    const auto last = sample.begin() + (rank + kMargin);
    std::nth_element(begin, last, end, std::greater<float>());
    window.low = *last;
    end = last + 1;
  }
  // Deltas of checkpoints are full of zeros and of a few other repeated values. Of the ends of the
  // window there may be more outside of these samples.
  std::sort(begin, end, std::greater<float>());
  int64_t inside = 0, most = 0;
  for (auto at = begin; at != end;) {
    const auto next = std::upper_bound(at, end, *at, std::greater<float>());
    const int64_t count = *at == window.low || *at == window.high
                              ? std::count(sample.begin(), sample.end(), *at)
                              : next - at;
    inside += count;
    if (count > most) {
      most = count;
      window.common = *at;
    }
    at = next;
  }
  if ((inside - most) * kLargestShare > size) return std::nullopt;
  return window;
}

// Whether ties need no end: all that are `equal` belong, they are zeros, which add nothing, or NaN,
// which equals nothing.
bool AllTiesBelong(double value, int64_t ties, int64_t equal) {
  return value == 0 || std::isnan(value) || ties == equal;
}

template <class F>
void ForEach(const Sifted& sifted, const F& f) {
  for (const SiftedRun& run : sifted.runs) {
    for (const SiftCandidate& candidate : run.candidates) f(run, candidate);
  }
}

// Index after the nth magnitude of `tensor` that equals `value`, by a pass that counted those as
// common.
absl::StatusOr<int64_t> EndOfTies(MagnitudeScan& scan, int tensor, double value, int64_t nth,
                                  std::vector<SiftedRun>& runs) {
  std::sort(runs.begin(), runs.end(),
            [](const SiftedRun& a, const SiftedRun& b) { return a.first < b.first; });
  size_t at = 0;
  for (; nth > runs[at].common; ++at) nth -= runs[at].common;
  const int64_t first = runs[at].first;
  const int64_t end = at + 1 < runs.size() ? runs[at + 1].first : scan.elements();
  ASSIGN_OR_RETURN(const int64_t last, scan.FindEqual(tensor, first, end - first, value, nth));
  return last + 1;
}

struct KthCandidate {
  float value = 0;
  int64_t ties = 0;              // how many of those equal to it belong to the k largest
  std::vector<int64_t> indices;  // of all that equal it
};

// Of the candidates alone; 1 <= k <= their number.
KthCandidate FindKth(const Sifted& sifted, const SiftWindow& window, int64_t k) {
  // Magnitudes are ordered as their bits are. Bins over the window's range leave few to select
  // from.
  constexpr int kBins = 1 << 12;
  const auto key = [](double value) { return std::bit_cast<uint32_t>(static_cast<float>(value)); };
  const uint32_t low = key(window.low);
  const int shift = std::max(0, static_cast<int>(std::bit_width(key(window.high) - low)) - 12);
  const auto bin_of = [=](float magnitude) {
    return (std::bit_cast<uint32_t>(magnitude) - low) >> shift;
  };
  std::vector<int64_t> bins(kBins);
  ForEach(sifted, [&](const SiftedRun&, const SiftCandidate& candidate) {
    ++bins[bin_of(candidate.magnitude)];
  });
  uint32_t bin = kBins - 1;
  for (; k > bins[bin]; --bin) k -= bins[bin];
  std::vector<float> magnitudes;
  ForEach(sifted, [&](const SiftedRun&, const SiftCandidate& candidate) {
    if (bin_of(candidate.magnitude) == bin) magnitudes.push_back(candidate.magnitude);
  });
  const auto kth = magnitudes.begin() + (k - 1);
  std::nth_element(magnitudes.begin(), kth, magnitudes.end(), std::greater<float>());
  KthCandidate result{.value = *kth};
  // Those before the kth are at least as large.
  result.ties =
      k - std::count_if(magnitudes.begin(), kth, [&](float other) { return other > result.value; });
  ForEach(sifted, [&](const SiftedRun& run, const SiftCandidate& candidate) {
    if (candidate.magnitude == result.value) result.indices.push_back(run.first + candidate.index);
  });
  return result;
}

// The threshold by what a pass with `window` found; nothing when it lies outside.
absl::StatusOr<std::optional<Threshold>> Resolve(MagnitudeScan& scan, int tensor, int64_t k,
                                                 const SiftWindow& window, Sifted& sifted) {
  if (!sifted.complete || k <= sifted.above) return std::nullopt;
  int64_t common = 0, candidates = 0, above_common = 0;
  for (const SiftedRun& run : sifted.runs) {
    common += run.common;
    candidates += static_cast<int64_t>(run.candidates.size());
  }
  ForEach(sifted, [&](const SiftedRun&, const SiftCandidate& candidate) {
    above_common += candidate.magnitude > window.common;
  });
  int64_t rest = k - sifted.above;
  if (rest > candidates + common) return std::nullopt;
  Threshold threshold{.ties_end = scan.elements()};

  if (rest > above_common && rest <= above_common + common) {
    threshold.value = window.common;
    rest -= above_common;
    if (AllTiesBelong(threshold.value, rest, common)) return threshold;
    ASSIGN_OR_RETURN(threshold.ties_end,
                     EndOfTies(scan, tensor, threshold.value, rest, sifted.runs));
    return threshold;
  }

  if (rest > above_common) rest -= common;
  KthCandidate kth = FindKth(sifted, window, rest);
  threshold.value = kth.value;
  if (AllTiesBelong(kth.value, kth.ties, static_cast<int64_t>(kth.indices.size())))
    return threshold;
  std::nth_element(kth.indices.begin(), kth.indices.begin() + (kth.ties - 1), kth.indices.end());
  threshold.ties_end = kth.indices[kth.ties - 1] + 1;
  return threshold;
}

// Sets the thresholds that it finds and returns the tensors that are left.
absl::StatusOr<std::vector<int>> SelectBySample(MagnitudeScan& scan, std::vector<int> tensors,
                                                absl::Span<const int64_t> ks,
                                                absl::Span<Threshold> thresholds) {
  const int64_t elements = scan.elements();
  std::vector<int> left, likely;
  std::vector<SiftWindow> windows;
  if (elements <= kSmall) {
    likely = tensors;
    windows.resize(tensors.size(),
                   {.low = 0, .high = std::numeric_limits<float>::infinity(), .common = 0});
  } else {
    std::vector<std::vector<float>> samples(tensors.size());
    const int64_t slot = elements / kSampleRuns;
    for (int64_t run = 0; run < kSampleRuns; ++run) {
      // Evenly, but not at a fixed place in every row.
      const int64_t first = run * slot + run * 40503 % std::max<int64_t>(1, slot - kSampleRun);
      RETURN_IF_ERROR(scan.Sample(tensors, first, std::min(kSampleRun, elements - first),
                                  absl::MakeSpan(samples)));
    }
    for (size_t i = 0; i < tensors.size(); ++i) {
      const int tensor = tensors[i];
      const double share = static_cast<double>(ks[tensor]) / static_cast<double>(elements);
      const std::optional<SiftWindow> window = GuessWindow(samples[i], share);
      (window ? likely : left).push_back(tensor);
      if (window) windows.push_back(*window);
    }
  }
  if (likely.empty()) return left;

  std::vector<Sifted> sifted(likely.size());
  RETURN_IF_ERROR(scan.Sift(likely, windows, MostCandidates(elements), absl::MakeSpan(sifted)));
  for (size_t i = 0; i < likely.size(); ++i) {
    ASSIGN_OR_RETURN(const std::optional<Threshold> threshold,
                     Resolve(scan, likely[i], ks[likely[i]], windows[i], sifted[i]));
    if (threshold) {
      thresholds[likely[i]] = *threshold;
    } else {
      left.push_back(likely[i]);
    }
  }
  return left;
}

absl::Status SelectByRadix(MagnitudeScan& scan, const std::vector<int>& tensors,
                           absl::Span<const int64_t> ks, absl::Span<Threshold> thresholds) {
  std::vector<RadixSelect> selects;
  for (int tensor : tensors) selects.emplace_back(ks[tensor], scan.f64());
  while (!selects.front().done()) {
    std::vector<RadixLevel> levels;
    for (const RadixSelect& select : selects) levels.push_back(select.level());
    std::vector<std::vector<uint64_t>> bins(tensors.size(), std::vector<uint64_t>(kRadixBins));
    RETURN_IF_ERROR(scan.Histogram(tensors, levels, absl::MakeSpan(bins)));
    for (size_t i = 0; i < selects.size(); ++i) RETURN_IF_ERROR(selects[i].Descend(bins[i]));
  }

  // Where only some of the elements equal to a threshold belong, the index at which they end.
  std::vector<size_t> split;
  std::vector<int> split_tensors;
  std::vector<SiftWindow> windows;
  for (size_t i = 0; i < selects.size(); ++i) {
    const RadixSelect& select = selects[i];
    thresholds[tensors[i]] = {.value = select.value(), .ties_end = scan.elements()};
    if (AllTiesBelong(select.value(), select.ties(), select.equal())) continue;
    split.push_back(i);
    split_tensors.push_back(tensors[i]);
    windows.push_back({.low = select.value(), .high = select.value(), .common = select.value()});
  }
  if (split.empty()) return absl::OkStatus();
  std::vector<Sifted> sifted(split.size());
  RETURN_IF_ERROR(scan.Sift(split_tensors, windows, /*limit=*/0, absl::MakeSpan(sifted)));
  for (size_t s = 0; s < split.size(); ++s) {
    ASSIGN_OR_RETURN(thresholds[split_tensors[s]].ties_end,
                     EndOfTies(scan, split_tensors[s], windows[s].common, selects[split[s]].ties(),
                               sifted[s].runs));
  }
  return absl::OkStatus();
}

}  // namespace

int64_t MostCandidates(int64_t elements) {
  return std::max(std::min(elements, kSmall), elements / kLargestShare);
}

absl::StatusOr<std::vector<Threshold>> SelectThresholds(MagnitudeScan& scan,
                                                        absl::Span<const int64_t> ks) {
  for (int64_t k : ks) {
    if (k < 1 || k > scan.elements()) {
      return absl::InternalError(
          absl::StrCat("the ", k, " largest of ", scan.elements(), " magnitudes"));
    }
  }
  std::vector<Threshold> thresholds(ks.size());
  std::vector<int> tensors(ks.size());
  std::iota(tensors.begin(), tensors.end(), 0);
  if (!scan.f64()) {
    ASSIGN_OR_RETURN(tensors,
                     SelectBySample(scan, std::move(tensors), ks, absl::MakeSpan(thresholds)));
  }
  if (!tensors.empty()) {
    RETURN_IF_ERROR(SelectByRadix(scan, tensors, ks, absl::MakeSpan(thresholds)));
  }
  return thresholds;
}

}  // namespace pewter::kernels
