#include "merge/forward/collect.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <nlohmann/json.hpp>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/digest.h"
#include "base/status.h"
#include "base/units.h"
#include "merge/checkpoint/safetensors.h"
#include "merge/forward/statistics_format.h"

namespace pewter {
namespace {

using kernels::Backend;
using kernels::Buffer;
using kernels::ConstFloats;
using nlohmann::json;

constexpr int64_t kCopyBytes = int64_t{1} << 20;
constexpr char kFingerprintKey[] = "fingerprint";

absl::Span<const std::byte> BytesOf(const void* data, int64_t bytes) {
  return absl::MakeConstSpan(static_cast<const std::byte*>(data), bytes);
}

// Which matrices a choice means, i <= j.
bool Collected(Grams grams, int i, int j) {
  if (grams == Grams::kAll) return true;
  return i == j ? grams == Grams::kOwn : grams == Grams::kCross;
}

// The tensors of a site, in the order in which they are written.
std::vector<TensorInfo> TensorsOf(const Site& site, Grams grams) {
  std::vector<TensorInfo> tensors;
  const int models = static_cast<int>(site.widths.size());
  const auto add = [&](std::string name, DType dtype, Shape shape) {
    tensors.push_back({.name = std::move(name), .dtype = dtype, .shape = shape});
  };
  add(CountName(site.name), DType::kI64, {});
  for (int i = 0; i < models; ++i) {
    add(SumName(site.name, i), DType::kF64, {site.widths[i]});
    add(SquareName(site.name, i), DType::kF64, {site.widths[i]});
    for (int j = i; j < models; ++j) {
      if (!Collected(grams, i, j)) continue;
      add(GramName(site.name, i, j), DType::kF64, {site.widths[i], site.widths[j]});
    }
  }
  return tensors;
}

// Doubles in the backend's memory, zero at first.
class Accumulator {
 public:
  static absl::StatusOr<Accumulator> Make(Backend& backend, int64_t elements) {
    Accumulator made;
    made.elements_ = elements;
    ASSIGN_OR_RETURN(made.buffer_, backend.Allocate(elements * 8));
    const std::vector<double> zeros(std::min<int64_t>(elements, kCopyBytes / 8), 0.0);
    const auto run = static_cast<int64_t>(zeros.size());
    for (int64_t at = 0; at < elements; at += run) {
      RETURN_IF_ERROR(
          backend.Upload(zeros.data(), made.data() + at, std::min(run, elements - at) * 8));
    }
    RETURN_IF_ERROR(backend.Synchronize());
    return made;
  }
  double* data() const { return static_cast<double*>(buffer_->data()); }

  // The values on the host, in `copy` where the backend's memory is another.
  absl::StatusOr<double*> Fetch(Backend& backend, std::vector<double>& copy) const {
    RETURN_IF_ERROR(backend.Synchronize());
    double* values = data();
    if (!backend.host_memory()) {
      copy.resize(elements_);
      RETURN_IF_ERROR(backend.Download(data(), copy.data(), elements_ * 8));
      RETURN_IF_ERROR(backend.Synchronize());
      values = copy.data();
    }
    return values;
  }

 private:
  std::unique_ptr<Buffer> buffer_;
  int64_t elements_ = 0;
};

struct Stage {
  std::vector<Site> sites;  // those that are collected
  std::vector<Grams> grams;
  bool finished = false;  // its part is there

  std::vector<TensorInfo> Tensors() const {
    std::vector<TensorInfo> tensors;
    for (size_t i = 0; i < sites.size(); ++i) {
      for (TensorInfo& tensor : TensorsOf(sites[i], grams[i])) tensors.push_back(std::move(tensor));
    }
    return tensors;
  }
  int64_t Bytes() const {
    int64_t bytes = 0;
    for (const TensorInfo& tensor : Tensors()) bytes += tensor.shape.elements() * 8;
    return bytes;
  }
};

class Collector final : public FeatureObserver {
 public:
  Collector(Backend& backend, int64_t models, std::vector<Stage> stages,
            std::shared_ptr<ObjectStore> store, std::string key, std::string fingerprint)
      : backend_(backend),
        models_(models),
        stages_(std::move(stages)),
        store_(std::move(store)),
        key_(std::move(key)),
        fingerprint_(std::move(fingerprint)) {}

  std::string PartKey(int64_t stage) const { return absl::StrCat(key_, ".part-", stage); }

  // Finds the parts that are finished; removes the others.
  absl::Status FindFinished(bool resumable) {
    for (size_t i = 0; i < stages_.size(); ++i) {
      Stage& stage = stages_[i];
      const std::string part = PartKey(static_cast<int64_t>(i));
      const absl::StatusOr<ObjectStat> stat = store_->Stat(part);
      if (absl::IsNotFound(stat.status())) continue;
      RETURN_IF_ERROR(stat.status());
      absl::StatusOr<SafetensorsHeader> header = ReadSafetensorsHeader(*store_, part, stat->size);
      stage.finished = resumable && header.ok() &&
                       header->metadata[kFingerprintKey] == fingerprint_ && !stage.sites.empty();
      if (!stage.finished) RETURN_IF_ERROR(store_->Remove(part));
    }
    return absl::OkStatus();
  }
  int64_t finished() const {
    return std::count_if(stages_.begin(), stages_.end(),
                         [](const Stage& stage) { return stage.finished; });
  }
  // -1: there is nothing left to do.
  int64_t last_unfinished() const {
    for (int64_t i = static_cast<int64_t>(stages_.size()) - 1; i >= 0; --i) {
      if (!stages_[i].finished && !stages_[i].sites.empty()) return i;
    }
    return -1;
  }

  absl::Status Begin(int64_t number) override {
    ASSIGN_OR_RETURN(network_, backend_.network());
    scratch_.resize(models_);
    scratch_elements_.resize(models_);
    moments_.clear();
    const Stage& stage = stages_[number];
    if (stage.finished) return absl::OkStatus();
    for (size_t i = 0; i < stage.sites.size(); ++i) {
      Moments& moments = moments_[stage.sites[i].name];
      const std::vector<int64_t>& widths = stage.sites[i].widths;
      for (size_t a = 0; a < widths.size(); ++a) {
        ASSIGN_OR_RETURN(Accumulator sums, Accumulator::Make(backend_, widths[a]));
        ASSIGN_OR_RETURN(Accumulator squares, Accumulator::Make(backend_, widths[a]));
        moments.sums.push_back(std::move(sums));
        moments.squares.push_back(std::move(squares));
        for (size_t b = a; b < widths.size(); ++b) {
          if (!Collected(stage.grams[i], static_cast<int>(a), static_cast<int>(b))) continue;
          ASSIGN_OR_RETURN(Accumulator gram, Accumulator::Make(backend_, widths[a] * widths[b]));
          moments.grams.emplace(std::make_pair(a, b), std::move(gram));
        }
      }
    }
    return absl::OkStatus();
  }

  bool Wants(const std::string& site) const override { return moments_.contains(site); }

  absl::Status Visit(const std::string& site, absl::Span<const ConstFloats> features) override {
    Moments& moments = moments_.at(site);
    const bool first = moments.count == 0;
    moments.count += features[0].rows;
    std::vector<kernels::Floats> centred;
    for (size_t i = 0; i < features.size(); ++i) {
      RETURN_IF_ERROR(
          network_->AddMoments(features[i], moments.sums[i].data(), moments.squares[i].data()));
      if (moments.grams.empty()) continue;
      const int64_t width = features[i].columns;
      if (first) RETURN_IF_ERROR(FindMeans(moments, i, width));
      FloatBuffer& scratch = scratch_[i];
      if (scratch_elements_[i] < features[i].rows * width) {
        RETURN_IF_ERROR(backend_.Synchronize());
        ASSIGN_OR_RETURN(scratch, FloatBuffer::Make(backend_, features[i].rows * width));
        scratch_elements_[i] = features[i].rows * width;
      }
      centred.push_back(scratch.View(features[i].rows, width));
      RETURN_IF_ERROR(
          network_->Subtract(features[i], moments.means_there[i].data(), centred.back()));
    }
    for (const auto& [pair, gram] : moments.grams) {
      RETURN_IF_ERROR(network_->AddGram(centred[pair.first], centred[pair.second], gram.data()));
    }
    return absl::OkStatus();
  }

  absl::Status End(int64_t number) override {
    Stage& stage = stages_[number];
    if (stage.finished || stage.sites.empty()) return absl::OkStatus();
    std::vector<TensorInfo> tensors = stage.Tensors();
    ASSIGN_OR_RETURN(const std::string header,
                     LayOutSafetensors(tensors, {{kFingerprintKey, fingerprint_}}));
    ASSIGN_OR_RETURN(auto writer, store_->Create(PartKey(number)));
    RETURN_IF_ERROR(writer->Append(BytesOf(header.data(), static_cast<int64_t>(header.size()))));
    std::vector<double> copy, sum_copy;
    const auto append = [&](const double* values, int64_t elements) {
      return writer->Append(BytesOf(values, elements * 8));
    };
    for (const Site& site : stage.sites) {
      const Moments& moments = moments_.at(site.name);
      const size_t models = site.widths.size();
      RETURN_IF_ERROR(writer->Append(BytesOf(&moments.count, 8)));
      std::vector<std::vector<double>> sums(models);
      for (size_t i = 0; i < models; ++i) {
        ASSIGN_OR_RETURN(const double* const values, moments.sums[i].Fetch(backend_, sum_copy));
        sums[i].assign(values, values + site.widths[i]);
      }
      for (size_t i = 0; i < models; ++i) {
        RETURN_IF_ERROR(append(sums[i].data(), site.widths[i]));
        ASSIGN_OR_RETURN(const double* const squares, moments.squares[i].Fetch(backend_, copy));
        RETURN_IF_ERROR(append(squares, site.widths[i]));
        for (size_t j = i; j < models; ++j) {
          const auto gram = moments.grams.find({i, j});
          if (gram == moments.grams.end()) continue;
          ASSIGN_OR_RETURN(double* const values, gram->second.Fetch(backend_, copy));
          moments.PutMeansBack(i, j, sums, values);
          RETURN_IF_ERROR(append(values, site.widths[i] * site.widths[j]));
        }
      }
    }
    RETURN_IF_ERROR(writer->Commit());
    stage.finished = true;
    moments_.clear();
    return absl::OkStatus();
  }

  // Puts the parts together.
  absl::Status Finish(std::map<std::string, std::string> metadata) {
    std::vector<TensorInfo> tensors;
    std::vector<std::string> sites;
    for (const Stage& stage : stages_) {
      for (TensorInfo& tensor : stage.Tensors()) tensors.push_back(std::move(tensor));
      for (const Site& site : stage.sites) sites.push_back(site.name);
    }
    metadata[kFingerprintKey] = fingerprint_;
    metadata[kStatisticsSitesKey] = json(sites).dump();
    ASSIGN_OR_RETURN(const std::string header, LayOutSafetensors(tensors, metadata));
    ASSIGN_OR_RETURN(auto writer, store_->Create(key_));
    RETURN_IF_ERROR(writer->Append(BytesOf(header.data(), static_cast<int64_t>(header.size()))));
    std::vector<std::byte> block(kCopyBytes);
    for (size_t i = 0; i < stages_.size(); ++i) {
      if (stages_[i].sites.empty()) continue;
      const std::string part = PartKey(static_cast<int64_t>(i));
      ASSIGN_OR_RETURN(const ObjectStat stat, store_->Stat(part));
      ASSIGN_OR_RETURN(const SafetensorsHeader laid_out,
                       ReadSafetensorsHeader(*store_, part, stat.size));
      if (stat.size - laid_out.data_begin != stages_[i].Bytes()) {
        return absl::DataLossError(absl::StrCat(store_->Describe(part), " has ", stat.size,
                                                " bytes; remove it and start again"));
      }
      for (int64_t at = laid_out.data_begin; at < stat.size; at += kCopyBytes) {
        const auto bytes = absl::MakeSpan(block).first(std::min(kCopyBytes, stat.size - at));
        RETURN_IF_ERROR(store_->ReadInto(part, at, bytes));
        RETURN_IF_ERROR(writer->Append(bytes));
      }
    }
    RETURN_IF_ERROR(writer->Commit());
    for (size_t i = 0; i < stages_.size(); ++i) {
      RETURN_IF_ERROR(store_->Remove(PartKey(static_cast<int64_t>(i))));
    }
    return absl::OkStatus();
  }

 private:
  struct Moments {
    int64_t count = 0;
    std::vector<Accumulator> sums, squares;  // by model
    // Of centred features, and what was taken from them, on the host and in the backend's memory.
    std::map<std::pair<size_t, size_t>, Accumulator> grams;
    std::vector<std::vector<float>> means;
    std::vector<FloatBuffer> means_there;

    // sum x y = sum (x - a)(y - b) + a sum y + b sum x - n a b. Of a model with itself the upper
    // triangle comes from the lower one.
    void PutMeansBack(size_t i, size_t j, const std::vector<std::vector<double>>& all_sums,
                      double* gram) const {
      const auto rows = static_cast<int64_t>(means[i].size());
      const auto columns = static_cast<int64_t>(means[j].size());
      for (int64_t row = 0; row < rows; ++row) {
        const double a = means[i][row], sum = all_sums[i][row] - static_cast<double>(count) * a;
        double* const values = gram + row * columns;
        for (int64_t column = 0; column < (i == j ? row + 1 : columns); ++column) {
          values[column] += a * all_sums[j][column] + sum * double{means[j][column]};
          if (i == j) gram[column * columns + row] = values[column];
        }
      }
    }
  };

  // The first batch's means, of model i.
  absl::Status FindMeans(Moments& moments, size_t i, int64_t width) {
    std::vector<double> copy;
    ASSIGN_OR_RETURN(const double* const sums, moments.sums[i].Fetch(backend_, copy));
    std::vector<float>& means = moments.means.emplace_back();
    for (int64_t j = 0; j < width; ++j) {
      // A feature that is not finite says so in its sums.
      const double mean = sums[j] / static_cast<double>(moments.count);
      means.push_back(std::isfinite(mean) ? static_cast<float>(mean) : 0.0f);
    }
    ASSIGN_OR_RETURN(FloatBuffer there, FloatBuffer::Make(backend_, width));
    RETURN_IF_ERROR(backend_.Upload(means.data(), there.data(), width * 4));
    RETURN_IF_ERROR(backend_.Synchronize());
    moments.means_there.push_back(std::move(there));
    return absl::OkStatus();
  }

  Backend& backend_;
  const int64_t models_;
  std::vector<Stage> stages_;
  const std::shared_ptr<ObjectStore> store_;
  const std::string key_, fingerprint_;
  kernels::Network* network_ = nullptr;
  std::map<std::string, Moments> moments_;  // of the stage
  // Centred features of each model.
  std::vector<FloatBuffer> scratch_;
  std::vector<int64_t> scratch_elements_;
};

}  // namespace

absl::StatusOr<StatisticsResult> CollectStatistics(absl::Span<const ForwardModel> models,
                                                   std::shared_ptr<const ForwardData> data,
                                                   const StatisticsOptions& options,
                                                   std::shared_ptr<ObjectStore> store,
                                                   absl::string_view key) {
  ASSIGN_OR_RETURN(const auto pass, ForwardPass::Open(models, data, options.forward));
  std::vector<Stage> stages(pass->stages());
  std::vector<std::string> names;
  Sha256 fingerprint;
  bool resumable = true;
  for (const ForwardModel& model : models) {
    names.push_back(model.name);
    fingerprint.Update(absl::StrCat(model.identity, "\n"));
    resumable = resumable && !model.identity.empty();
  }
  fingerprint.Update(absl::StrCat(kStatisticsFormat, "\n", data->digest(), "\n",
                                  options.forward.backend->name(), "\n",
                                  options.forward.batch_tokens, "\n"));
  int64_t largest = 0, widest = 0, longest = 0;
  bool anything = false;
  for (int64_t i = 0; i < pass->stages(); ++i) {
    for (Site& site : pass->SitesOf(i)) {
      const Grams grams = options.choose(site.name);
      if (grams == Grams::kNone) continue;
      anything = true;
      fingerprint.Update(absl::StrCat(site.name, " ", static_cast<int>(grams), "\n"));
      if (grams != Grams::kDiagonals) {
        widest =
            std::max(widest, std::accumulate(site.widths.begin(), site.widths.end(), int64_t{0}));
      }
      stages[i].sites.push_back(std::move(site));
      stages[i].grams.push_back(grams);
    }
    largest = std::max(largest, stages[i].Bytes());
  }
  for (const Batch& batch : pass->batches()) longest = std::max(longest, batch.tokens());
  largest += longest * widest * 4;
  if (!anything) return absl::InvalidArgumentError("no site is chosen for statistics");
  const std::string digest = fingerprint.Finish();

  const absl::StatusOr<ObjectStat> there = store->Stat(key);
  if (!absl::IsNotFound(there.status())) RETURN_IF_ERROR(there.status());
  if (there.ok()) {
    absl::StatusOr<SafetensorsHeader> header = ReadSafetensorsHeader(*store, key, there->size);
    if (resumable && header.ok() && header->metadata[kFingerprintKey] == digest) {
      return StatisticsResult{.reused = true};
    }
    if (!options.overwrite) {
      return absl::AlreadyExistsError(absl::StrCat(
          store->Describe(key), " is there and is not of these models, data and sites"));
    }
  }

  const auto batches = static_cast<int64_t>(pass->batches().size());
  ASSIGN_OR_RETURN(const int64_t fitting,
                   pass->BatchesThatFit(0, [&](int64_t) { return largest; }));
  if (fitting < batches) {
    int64_t tokens = 0;
    for (const Batch& batch : pass->batches()) tokens += batch.tokens();
    return absl::ResourceExhaustedError(absl::StrCat(
        "statistics of ", tokens, " tokens take ", FormatBytes(pass->Bytes(tokens) + largest),
        " and the memory is ", FormatBytes(options.forward.memory_bytes),
        "; use fewer tokens or sites, or more memory"));
  }

  Collector collector(*options.forward.backend, pass->models(), std::move(stages), std::move(store),
                      std::string(key), digest);
  RETURN_IF_ERROR(collector.FindFinished(resumable));
  const StatisticsResult result = {.layers_resumed = collector.finished()};
  if (collector.last_unfinished() >= 0) {
    RETURN_IF_ERROR(pass->Run(0, batches, collector.last_unfinished(), &collector));
  }
  RETURN_IF_ERROR(collector.Finish({{kStatisticsFormatKey, kStatisticsFormat},
                                    {kStatisticsModelsKey, json(names).dump()},
                                    {kStatisticsDataKey, data->digest()}}));
  return result;
}

}  // namespace pewter
