#include "merge/checkpoint/lora_adapter.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <list>
#include <mutex>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "base/dtype_names.h"
#include "base/status.h"
#include "kernels/backend.h"
#include "kernels/low_rank_product.h"
#include "merge/checkpoint/lora_config.h"
#include "merge/checkpoint/lora_file.h"
#include "merge/checkpoint/printable.h"
#include "merge/checkpoint/stored_source.h"

namespace pewter {
namespace {

using kernels::LowRankProduct;

// A model that was wrapped by a head or saved without it has or lacks one of these.
constexpr absl::string_view kModelPrefixes[] = {
    "model.",   "transformer.", "bert.", "roberta.",        "distilbert.", "electra.",
    "deberta.", "gpt_neox.",    "vit.",  "language_model.", "base_model.",
};

// The first of `name`, `name` with a prefix and `name` without one that the model has.
const TensorInfo* Match(absl::string_view name,
                        absl::FunctionRef<const TensorInfo*(absl::string_view)> find) {
  if (const TensorInfo* info = find(name)) return info;
  for (absl::string_view prefix : kModelPrefixes) {
    if (const TensorInfo* info = find(absl::StrCat(prefix, name))) return info;
    absl::string_view bare = name;
    if (absl::ConsumePrefix(&bare, prefix)) {
      if (const TensorInfo* info = find(bare)) return info;
    }
  }
  return nullptr;
}

// Rows and columns of the tensor seen as a matrix.
int64_t Columns(const Shape& shape) {
  return shape.rank() == 0 || shape[0] == 0 ? 0 : shape.elements() / shape[0];
}

// True when two tensors of a file have the same type, shape and bytes.
absl::StatusOr<bool> SameBytes(ObjectStore& store, absl::string_view key, const TensorInfo& a,
                               const TensorInfo& b) {
  if (a.dtype != b.dtype || !(a.shape == b.shape)) return false;
  constexpr int64_t kChunk = int64_t{1} << 20;
  std::vector<std::byte> of_a(std::min(kChunk, a.bytes)), of_b(of_a.size());
  for (int64_t at = 0; at < a.bytes; at += kChunk) {
    const int64_t size = std::min(kChunk, a.bytes - at);
    RETURN_IF_ERROR(store.ReadInto(key, a.offset + at, absl::MakeSpan(of_a).subspan(0, size)));
    RETURN_IF_ERROR(store.ReadInto(key, b.offset + at, absl::MakeSpan(of_b).subspan(0, size)));
    if (std::memcmp(of_a.data(), of_b.data(), size) != 0) return false;
  }
  return true;
}

// Decides how the factors fit `weight`; the one orientation that fits wins, and the configuration
// decides for a square matrix, as in PEFT.
absl::StatusOr<LoraAdapter::LowRank> Fit(const TensorInfo& weight, const TensorInfo& a,
                                         const TensorInfo& b, bool embedding, bool fan_in_fan_out,
                                         int64_t rank, float scale) {
  if (!IsFloat(weight.dtype)) {
    return absl::FailedPreconditionError(absl::StrCat("tensor ", Printable(weight.name), " is ",
                                                      SafetensorsName(weight.dtype),
                                                      "; LoRA needs floating types"));
  }
  const auto misfit = [&](absl::string_view what) {
    return absl::FailedPreconditionError(absl::StrCat(what, ": tensor ", weight.shape.ToString(),
                                                      ", A ", a.shape.ToString(), ", B ",
                                                      b.shape.ToString()));
  };
  if (weight.shape.rank() < 2) return misfit("LoRA changes matrices");
  // A convolution's A has the kernel's extents: [rank, in, h, w].
  const bool direct = !embedding && b.shape[0] == weight.shape[0] &&
                      a.shape.extents().subspan(1) == weight.shape.extents().subspan(1);
  const bool transposed = weight.shape.rank() == 2 && a.shape.rank() == 2 &&
                          a.shape[1] == weight.shape[0] && b.shape[0] == weight.shape[1];
  if (!direct && !transposed) return misfit("the factors do not fit the tensor");
  return LoraAdapter::LowRank{.a = a,
                              .b = b,
                              .rank = rank,
                              .scale = scale,
                              .transposed = transposed && (!direct || fan_in_fan_out)};
}

template <typename T>
void Add(const float* delta, int64_t count, std::byte* target) {
  for (int64_t i = 0; i < count; ++i) {  // memcpy: a tile may lie at any address
    T value;
    std::memcpy(&value, target + i * sizeof(T), sizeof(T));
    value += delta[i];
    std::memcpy(target + i * sizeof(T), &value, sizeof(T));
  }
}

// target[i] = round(float32(target[i]) + delta[i]); F64 adds in double.
void AddDelta(const float* delta, int64_t count, DType dtype, std::byte* target) {
  if (dtype == DType::kF64) return Add<double>(delta, count, target);
  if (dtype == DType::kF32) return Add<float>(delta, count, target);
  std::array<float, 4096> values;
  const int64_t width = ByteWidth(dtype);
  for (int64_t done = 0; done < count; done += static_cast<int64_t>(values.size())) {
    const int64_t elements = std::min<int64_t>(values.size(), count - done);
    std::byte* place = target + done * width;
    kernels::Convert({.data = place, .dtype = dtype, .size = elements},
                     {.data = values.data(), .dtype = DType::kF32, .size = elements});
    for (int64_t i = 0; i < elements; ++i) values[i] += delta[done + i];
    kernels::Convert({.data = values.data(), .dtype = DType::kF32, .size = elements},
                     {.data = place, .dtype = dtype, .size = elements});
  }
}

// A bias with the scaled one of the factor B added, in float32.
class BiasView final : public TensorSource {
 public:
  // `added` is F32.
  BiasView(std::shared_ptr<const TensorSource> stored, std::shared_ptr<const TensorSource> added,
           float scale)
      : stored_(std::move(stored)), added_(std::move(added)), scale_(scale) {}

  DType dtype() const override { return stored_->dtype(); }
  const Shape& shape() const override { return stored_->shape(); }
  const std::string& name() const override { return stored_->name(); }
  int64_t resident_bytes() const override { return stored_->resident_bytes(); }
  void WillRead(ReadIntents& intents) const override { stored_->WillRead(intents); }

  absl::Status Read(int64_t first, int64_t count, absl::Span<std::byte> out,
                    ReadObserver* observer) const override {
    RETURN_IF_ERROR(stored_->Read(first, count, out, observer));
    std::vector<float> delta(count);
    RETURN_IF_ERROR(added_->Read(
        first, count,
        absl::MakeSpan(reinterpret_cast<std::byte*>(delta.data()), delta.size() * sizeof(float)),
        observer));
    for (float& value : delta) value *= scale_;
    AddDelta(delta.data(), count, dtype(), out.data());
    return absl::OkStatus();
  }

 private:
  const std::shared_ptr<const TensorSource> stored_, added_;
  const float scale_;
};

std::vector<float> Transposed(const std::vector<float>& matrix, int64_t rows) {
  const int64_t columns = rows == 0 ? 0 : static_cast<int64_t>(matrix.size()) / rows;
  std::vector<float> result(matrix.size());
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) result[j * rows + i] = matrix[i * columns + j];
  }
  return result;
}

}  // namespace

// Factors of the tensors read last. A view reads its factors when they are not in memory; as
// tensors are read one after the other, in tiles, a small number of pairs is enough and memory
// stays bounded whatever the adapter's size.
class LoraAdapter::Factors {
 public:
  Factors(std::shared_ptr<ObjectStore> store, std::string key, std::string name)
      : store_(std::move(store)), key_(std::move(key)), name_(std::move(name)) {}

  absl::StatusOr<std::shared_ptr<const LowRankProduct>> Load(const LowRank& low_rank, int file,
                                                             ReadObserver* observer) const {
    ASSIGN_OR_RETURN(std::vector<float> a, ReadFloats(low_rank.a, file, observer));
    ASSIGN_OR_RETURN(std::vector<float> b, ReadFloats(low_rank.b, file, observer));
    if (low_rank.transposed) {
      a = Transposed(a, low_rank.rank);
      b = Transposed(b, low_rank.b.shape[0]);
      std::swap(a, b);
    }
    return std::make_shared<const LowRankProduct>(std::move(b), a, low_rank.rank, low_rank.scale);
  }

  // A factor as float32.
  std::shared_ptr<const TensorSource> Source(const TensorInfo& info, int file) const {
    return CastSource(std::make_shared<StoredSource>(
                          store_, key_, info, absl::StrCat(name_, ", tensor ", info.name), file),
                      DType::kF32);
  }

  // Marks `product` as the one used last and lets the oldest ones go.
  void Keep(std::shared_ptr<const LowRankProduct> product) {
    std::lock_guard lock(mutex_);
    if (!kept_.empty() && kept_.front() == product) return;
    const auto found = std::find(kept_.begin(), kept_.end(), product);
    if (found != kept_.end()) {
      kept_.splice(kept_.begin(), kept_, found);
      return;
    }
    bytes_ += product->bytes();
    kept_.push_front(std::move(product));
    while (bytes_ > kLimit && kept_.size() > 1) {
      bytes_ -= kept_.back()->bytes();
      kept_.pop_back();
    }
  }

 private:
  static constexpr int64_t kLimit = int64_t{16} << 20;

  absl::StatusOr<std::vector<float>> ReadFloats(const TensorInfo& info, int file,
                                                ReadObserver* observer) const {
    const std::shared_ptr<const TensorSource> source = Source(info, file);
    std::vector<float> values(info.shape.elements());
    RETURN_IF_ERROR(source->Read(
        0, info.shape.elements(),
        absl::MakeSpan(reinterpret_cast<std::byte*>(values.data()), values.size() * sizeof(float)),
        observer));
    return values;
  }

  const std::shared_ptr<ObjectStore> store_;
  const std::string key_;
  const std::string name_;
  std::mutex mutex_;
  std::list<std::shared_ptr<const LowRankProduct>> kept_;  // newest first; guarded by mutex_
  int64_t bytes_ = 0;                                      // guarded by mutex_
};

class LoraAdapter::View final : public TensorSource {
 public:
  // `whole`: the product is all that the adapter changes.
  View(std::shared_ptr<const TensorSource> stored, const LowRank& low_rank,
       std::shared_ptr<Factors> factors, int file, bool whole)
      : stored_(std::move(stored)),
        low_rank_(low_rank),
        factors_(std::move(factors)),
        file_(file),
        update_{.left = factors_->Source(low_rank.transposed ? low_rank.a : low_rank.b, file),
                .right = factors_->Source(low_rank.transposed ? low_rank.b : low_rank.a, file),
                .rank = low_rank.rank,
                .scale = low_rank.scale,
                .transposed = low_rank.transposed},
        whole_(whole) {}

  DType dtype() const override { return stored_->dtype(); }
  const Shape& shape() const override { return stored_->shape(); }
  const std::string& name() const override { return stored_->name(); }
  int64_t resident_bytes() const override {
    return stored_->resident_bytes() +
           LowRankProduct::Bytes(shape()[0], low_rank_.rank, Columns(shape()));
  }
  const LowRankUpdate* update() const override { return whole_ ? &update_ : nullptr; }
  void WillRead(ReadIntents& intents) const override { stored_->WillRead(intents); }

  absl::Status Read(int64_t first, int64_t count, absl::Span<std::byte> out,
                    ReadObserver* observer) const override {
    RETURN_IF_ERROR(stored_->Read(first, count, out, observer));
    if (count == 0) return absl::OkStatus();
    ASSIGN_OR_RETURN(const std::shared_ptr<const LowRankProduct> product, Product(observer));
    // Runs end at ends of rows, in groups of four, where rows are not too long for that.
    const int64_t columns = Columns(shape());
    const int64_t four_rows = 4 * columns;
    const int64_t run = four_rows <= kRun ? kRun / four_rows * four_rows : kRun;
    const auto delta = std::make_unique_for_overwrite<float[]>(std::min(run, count));
    while (count > 0) {
      const int64_t into_row = first % columns;
      const int64_t elements = std::min({count, run, into_row == 0 ? run : columns - into_row});
      product->Compute(first, elements, delta.get());
      AddDelta(delta.get(), elements, dtype(), out.data());
      out.remove_prefix(elements * ByteWidth(dtype()));
      first += elements;
      count -= elements;
    }
    return absl::OkStatus();
  }

 private:
  static constexpr int64_t kRun = int64_t{128} << 10;

  absl::StatusOr<std::shared_ptr<const LowRankProduct>> Product(ReadObserver* observer) const {
    std::lock_guard lock(mutex_);  // also makes concurrent readers of a tensor wait for one load
    std::shared_ptr<const LowRankProduct> product = product_.lock();
    if (product == nullptr) {
      ASSIGN_OR_RETURN(product, factors_->Load(low_rank_, file_, observer));
      product_ = product;
    }
    factors_->Keep(product);
    return product;
  }

  const std::shared_ptr<const TensorSource> stored_;
  const LowRank low_rank_;
  const std::shared_ptr<Factors> factors_;
  const int file_;
  const LowRankUpdate update_;
  const bool whole_;
  mutable std::mutex mutex_;
  mutable std::weak_ptr<const LowRankProduct> product_;  // guarded by mutex_
};

absl::StatusOr<std::shared_ptr<const LoraAdapter>> LoraAdapter::Open(
    std::shared_ptr<ObjectStore> store, std::string name,
    absl::FunctionRef<const TensorInfo*(absl::string_view)> find) {
  ASSIGN_OR_RETURN(AdapterConfigFile config_file, ReadAdapterConfig(store));
  const absl::StatusOr<LoraConfig> config = LoraConfig::Parse(config_file.text);
  if (!config.ok()) return Annotate(config.status(), config_file.file.Describe());

  std::shared_ptr<LoraAdapter> adapter(new LoraAdapter);
  ASSIGN_OR_RETURN(const TensorFile opened, ReadAdapterWeights(store));
  adapter->config_file_ = std::move(config_file.file);
  adapter->file_ = opened.file;
  adapter->warnings_ = opened.warnings;
  adapter->factors_ = std::make_shared<Factors>(store, opened.file.key, std::move(name));
  const std::string file = opened.file.Describe();
  ASSIGN_OR_RETURN(const LoraTensors tensors, SortLoraTensors(opened.tensors, *config, file));

  std::vector<const std::pair<std::string, TensorInfo>*> without_target;
  for (const auto& replacement : tensors.replacements) {
    const TensorInfo& tensor = replacement.second;
    const std::string where = absl::StrCat(file, ", tensor ", Printable(tensor.name));
    const TensorInfo* target = Match(replacement.first, find);
    if (target == nullptr) {
      without_target.push_back(&replacement);
      continue;
    }
    if (!(target->shape == tensor.shape)) {
      return absl::FailedPreconditionError(
          absl::StrCat(where, " replaces ", Printable(target->name), " of shape ",
                       target->shape.ToString(), " but has shape ", tensor.shape.ToString()));
    }
    if (target->dtype != tensor.dtype && !(IsFloat(target->dtype) && IsFloat(tensor.dtype))) {
      return absl::FailedPreconditionError(
          absl::StrCat(where, " is ", SafetensorsName(tensor.dtype), " and replaces ",
                       SafetensorsName(target->dtype), "; only floating types are converted"));
    }
    Change& change = adapter->changes_[target->name];
    if (std::exchange(change.has_replacement, true)) {
      return absl::FailedPreconditionError(
          absl::StrCat(where, ": another tensor replaces ", Printable(target->name), " too"));
    }
    change.replacement = tensor;
  }
  for (const auto& [module, tensor] : tensors.biases) {
    const std::string where = absl::StrCat(file, ", tensor ", Printable(tensor.name));
    const TensorInfo* target = Match(absl::StrCat(module, ".bias"), find);
    if (target == nullptr || !(target->shape == tensor.shape) || !IsFloat(tensor.dtype) ||
        !IsFloat(target->dtype)) {
      return absl::FailedPreconditionError(
          absl::StrCat(where, ": the model has no bias of its shape for ", Printable(module)));
    }
    Change& change = adapter->changes_[target->name];
    if (std::exchange(change.has_bias, true)) {
      return absl::FailedPreconditionError(
          absl::StrCat(where, ": another tensor changes ", Printable(target->name), " too"));
    }
    change.bias = tensor;
    change.bias_scale = config->Scale(module);
  }
  // PEFT needs the output head of a model that is tied to its embeddings besides those; such a
  // model has no tensor for it and takes what the embeddings become.
  for (const auto* const replacement : without_target) {
    const TensorInfo& tensor = replacement->second;
    bool tied = false;
    for (const auto& [name, change] : adapter->changes_) {
      if (tied || !change.has_replacement) continue;
      ASSIGN_OR_RETURN(tied, SameBytes(*store, opened.file.key, change.replacement, tensor));
    }
    if (!tied) {
      return absl::FailedPreconditionError(absl::StrCat(file, ", tensor ", Printable(tensor.name),
                                                        ": the model has no tensor ",
                                                        Printable(replacement->first)));
    }
  }
  for (const auto& [module, factors] : tensors.factors) {
    const std::string where = absl::StrCat(file, ", module ", Printable(module));
    const TensorInfo* target = Match(absl::StrCat(module, ".weight"), find);
    if (target == nullptr) {
      return absl::FailedPreconditionError(absl::StrCat(where, ": the model has no tensor ",
                                                        Printable(absl::StrCat(module, ".weight")),
                                                        "; is this the adapter's base model?"));
    }
    absl::StatusOr<LowRank> low_rank =
        Fit(*target, factors.a, factors.b, factors.embedding, config->fan_in_fan_out(),
            config->Rank(module), config->Scale(module));
    if (!low_rank.ok()) return Annotate(low_rank.status(), where);
    Change& change = adapter->changes_[target->name];
    if (std::exchange(change.has_low_rank, true)) {
      return absl::FailedPreconditionError(
          absl::StrCat(where, ": another module changes tensor ", Printable(target->name), " too"));
    }
    change.low_rank = *std::move(low_rank);
  }
  if (adapter->changes_.empty()) {
    return absl::FailedPreconditionError(absl::StrCat(file, " has no tensors"));
  }
  return adapter;
}

std::shared_ptr<const TensorSource> LoraAdapter::Apply(absl::string_view tensor,
                                                       std::shared_ptr<const TensorSource> stored,
                                                       int file) const {
  const Change& change = changes_.find(tensor)->second;
  if (change.has_replacement) {
    const DType dtype = stored->dtype();
    stored = CastSource(std::make_shared<StoredSource>(file_.store, file_.key, change.replacement,
                                                       stored->name(), file),
                        dtype);
  }
  if (change.has_bias) {
    auto bias = CastSource(
        std::make_shared<StoredSource>(file_.store, file_.key, change.bias, stored->name(), file),
        DType::kF32);
    stored = std::make_shared<BiasView>(std::move(stored), std::move(bias), change.bias_scale);
  }
  if (!change.has_low_rank) return stored;
  const bool whole = !change.has_replacement && !change.has_bias;
  return std::make_shared<View>(std::move(stored), change.low_rank, factors_, file, whole);
}

}  // namespace pewter
