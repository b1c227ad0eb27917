#include "merge/forward/forward_pass.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "base/units.h"

namespace pewter {
namespace {

using kernels::ConstFloats;
using kernels::Floats;

// The sites of a classifier's head have one row a sequence; that of a first token.
std::vector<int32_t> FirstTokens(const Batch& batch) {
  return {batch.starts.begin(), batch.starts.end() - 1};
}

absl::Status CheckAlike(const Transformer& a, const Transformer& b) {
  const NetworkShape &x = a.shape(), &y = b.shape();
  const auto differ = [&](absl::string_view what, const auto& in_a, const auto& in_b) {
    return absl::FailedPreconditionError(
        absl::StrCat("models of one pass must have the same sites: model ", a.name(), " has ", what,
                     " ", in_a, " and model ", b.name(), " ", in_b));
  };
  if (x.layers != y.layers) return differ("layers:", x.layers, y.layers);
  if (x.head_kind != y.head_kind) {
    return differ("the head", HeadName(x.head_kind), HeadName(y.head_kind));
  }
  if (x.family->post_norm != y.family->post_norm) {
    return differ("the family", x.family->model_type, y.family->model_type);
  }
  if (x.family->words == nullptr && x.tokens_of_image() != y.tokens_of_image()) {
    return differ("patches of an image:", x.tokens_of_image() - 1, y.tokens_of_image() - 1);
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<kernels::Buffer>> UploadIntegers(kernels::Backend& backend,
                                                                absl::Span<const int32_t> values) {
  const int64_t bytes = static_cast<int64_t>(values.size()) * sizeof(int32_t);
  ASSIGN_OR_RETURN(std::unique_ptr<kernels::Buffer> buffer, backend.Allocate(bytes));
  RETURN_IF_ERROR(backend.Upload(values.data(), buffer->data(), bytes));
  RETURN_IF_ERROR(backend.Synchronize());
  return buffer;
}

absl::StatusOr<std::unique_ptr<ForwardPass>> ForwardPass::Open(
    absl::Span<const ForwardModel> models, std::shared_ptr<const ForwardData> data,
    ForwardOptions options) {
  if (models.empty()) return absl::InternalError("a forward pass without models");
  std::unique_ptr<ForwardPass> pass(new ForwardPass);
  for (const ForwardModel& model : models) {
    ASSIGN_OR_RETURN(auto opened, Transformer::Open(model, *options.backend));
    RETURN_IF_ERROR(opened->Check(*data));
    if (!pass->models_.empty()) RETURN_IF_ERROR(CheckAlike(*pass->models_[0], *opened));
    pass->models_.push_back(std::move(opened));
  }
  const NetworkShape& shape = pass->models_[0]->shape();
  if (shape.head_kind == HeadKind::kClassifier && data->has_tokens()) {
    for (int64_t row = 0; row < data->rows(); ++row) {
      if (data->real(row, 0)) continue;
      return absl::FailedPreconditionError(absl::StrCat("data ", data->name(),
                                                        ": attention_mask is 0 at [", row,
                                                        ", 0], the token that a classifier reads"));
    }
  }
  pass->batches_ = MakeBatches(*data, shape, options.batch_tokens);
  for (const Batch& batch : pass->batches_) {
    pass->largest_batch_ = std::max(pass->largest_batch_, batch.tokens());
  }
  pass->data_ = std::move(data);
  pass->options_ = std::move(options);
  return pass;
}

int64_t ForwardPass::length() const {
  return data_->has_tokens() ? data_->length() : models_[0]->shape().tokens_of_image();
}

std::vector<Site> ForwardPass::SitesOf(int64_t stage) const {
  std::vector<Site> sites;
  const auto add = [&](std::string name, auto width) {
    sites.push_back({.name = std::move(name), .widths = {}});
    for (const auto& model : models_) sites.back().widths.push_back(width(model->shape()));
  };
  const auto width = [](const NetworkShape& shape) { return shape.width; };
  const auto queries = [](const NetworkShape& shape) { return shape.heads * shape.head; };
  const auto keys = [](const NetworkShape& shape) { return shape.key_heads * shape.head; };
  const auto inner = [](const NetworkShape& shape) { return shape.inner; };
  if (stage == 0) {
    add("residual.0", width);
  } else if (stage + 1 < stages()) {
    const int64_t layer = stage - 1;
    add(absl::StrCat("attention_input.", layer), width);
    add(absl::StrCat("query.", layer), queries);
    add(absl::StrCat("key.", layer), keys);
    add(absl::StrCat("value.", layer), keys);
    add(absl::StrCat("attention.", layer), queries);
    add(absl::StrCat("residual.", 2 * layer + 1), width);
    add(absl::StrCat("ffn_input.", layer), width);
    add(absl::StrCat("ffn.", layer), inner);
    add(absl::StrCat("residual.", 2 * layer + 2), width);
  } else {
    const NetworkShape& shape = models_[0]->shape();
    const bool pooled = shape.family->pooler != nullptr;
    if (shape.head_kind == HeadKind::kMasked) add("transform_input", width);
    if (shape.head_kind == HeadKind::kMasked || shape.head_kind == HeadKind::kCausal) {
      add("head_input", width);
    }
    if (shape.head_kind == HeadKind::kClassifier && pooled) add("pooler_input", width);
    if (shape.head_kind == HeadKind::kClassifier) add("classifier_input", width);
  }
  return sites;
}

int64_t ForwardPass::Bytes(int64_t tokens) const {
  int64_t bytes = tokens * static_cast<int64_t>(sizeof(int32_t));
  for (const auto& model : models_) {
    // Also the rows that a head reads, of one batch.
    bytes += (tokens + largest_batch_) * model->shape().width * static_cast<int64_t>(sizeof(float));
    bytes += model->FeatureBytes(largest_batch_, length()) + model->WeightBytes(length());
  }
  return bytes;
}

absl::StatusOr<int64_t> ForwardPass::BatchesThatFit(
    int64_t first, absl::FunctionRef<int64_t(int64_t last)> extra_bytes) const {
  const int64_t all = static_cast<int64_t>(batches_.size());
  if (options_.memory_bytes == 0) return all - first;
  int64_t tokens = 0, last = first, bytes = 0;
  for (; last < all; ++last) {
    tokens += batches_[last].tokens();
    bytes = Bytes(tokens) + extra_bytes(last + 1);
    if (bytes > options_.memory_bytes) break;
  }
  if (last > first || first == all) return last - first;
  return absl::ResourceExhaustedError(
      absl::StrCat("a forward pass of ", tokens, " tokens at a time takes ", FormatBytes(bytes),
                   " and the memory is ", FormatBytes(options_.memory_bytes)));
}

template <class F>
absl::Status ForwardPass::ForModels(const F& step) {
  for (const auto& model : models_) RETURN_IF_ERROR(step(*model));
  return absl::OkStatus();
}

template <class Features>
absl::Status ForwardPass::Visit(FeatureObserver* observer, const std::string& site,
                                const Features& features) {
  if (observer == nullptr || !observer->Wants(site)) return absl::OkStatus();
  std::vector<ConstFloats> all;
  for (int64_t i = 0; i < models(); ++i) all.push_back(features(i));
  return observer->Visit(site, all);
}

absl::Status ForwardPass::Advance() {
  if (options_.stop.stop_requested()) return absl::CancelledError("the forward pass was stopped");
  ++done_;
  if (options_.progress != nullptr) options_.progress(done_, total_);
  return absl::OkStatus();
}

Floats ForwardPass::stream(int64_t model, int64_t batch) const {
  return streams_[model][batch - first_].View(batches_[batch].tokens(),
                                              models_[model]->shape().width);
}

absl::Status ForwardPass::Run(int64_t first, int64_t last, int64_t last_stage,
                              FeatureObserver* observer) {
  kernels::Backend& backend = *options_.backend;
  RETURN_IF_ERROR(backend.Synchronize());
  streams_.clear();
  positions_.clear();
  first_ = first;
  last_ = last;
  const int64_t per_sweep = static_cast<int64_t>(batches_.size()) * (last_stage + 1);
  if (first == 0) done_ = 0;
  total_ = per_sweep;
  streams_.resize(models());
  for (int64_t batch = first; batch < last; ++batch) {
    ASSIGN_OR_RETURN(auto positions, UploadIntegers(backend, batches_[batch].columns));
    positions_.push_back(std::move(positions));
    for (int64_t i = 0; i < models(); ++i) {
      ASSIGN_OR_RETURN(
          FloatBuffer stream,
          FloatBuffer::Make(backend, batches_[batch].tokens() * models_[i]->shape().width));
      streams_[i].push_back(std::move(stream));
    }
  }
  for (int64_t stage = 0; stage <= last_stage; ++stage) {
    if (observer != nullptr) RETURN_IF_ERROR(observer->Begin(stage));
    if (stage == 0) {
      RETURN_IF_ERROR(RunEmbedding(observer));
    } else if (stage + 1 < stages()) {
      RETURN_IF_ERROR(RunLayer(stage - 1, observer));
    } else {
      RETURN_IF_ERROR(RunHead(observer));
    }
    if (observer != nullptr) RETURN_IF_ERROR(observer->End(stage));
  }
  return backend.Synchronize();
}

absl::Status ForwardPass::RunEmbedding(FeatureObserver* observer) {
  RETURN_IF_ERROR(ForModels([&](Transformer& model) { return model.BeginEmbedding(length()); }));
  for (int64_t batch = first_; batch < last_; ++batch) {
    for (int64_t i = 0; i < models(); ++i) {
      RETURN_IF_ERROR(models_[i]->Embed(*data_, batches_[batch], stream(i, batch)));
    }
    RETURN_IF_ERROR(
        Visit(observer, "residual.0", [&](int64_t i) -> ConstFloats { return stream(i, batch); }));
    RETURN_IF_ERROR(Advance());
  }
  RETURN_IF_ERROR(ForModels([](Transformer& model) { return model.EndEmbedding(); }));
  return ForModels([&](Transformer& model) { return model.Reserve(largest_batch_); });
}

absl::Status ForwardPass::RunLayer(int64_t layer, FeatureObserver* observer) {
  RETURN_IF_ERROR(ForModels([&](Transformer& model) { return model.LoadLayer(layer, length()); }));
  const std::string at = absl::StrCat(".", layer);
  const std::string after_attention = absl::StrCat("residual.", 2 * layer + 1);
  const std::string after_ffn = absl::StrCat("residual.", 2 * layer + 2);
  for (int64_t batch = first_; batch < last_; ++batch) {
    const auto stream_of = [&](int64_t i) -> ConstFloats { return stream(i, batch); };
    const auto* const positions = static_cast<const int32_t*>(positions_[batch - first_]->data());
    const auto step = [&](const auto& of) -> absl::Status {
      for (int64_t i = 0; i < models(); ++i) RETURN_IF_ERROR(of(*models_[i], stream(i, batch)));
      return absl::OkStatus();
    };
    const auto visit = [&](const std::string& site, ConstFloats (Transformer::*feature)() const) {
      return Visit(observer, site, [&](int64_t i) { return (*models_[i].*feature)(); });
    };
    RETURN_IF_ERROR(step([](Transformer& m, const Floats& s) { return m.ReadForAttention(s); }));
    RETURN_IF_ERROR(visit("attention_input" + at, &Transformer::input));
    RETURN_IF_ERROR(step([](Transformer& m, const Floats&) { return m.Project(); }));
    RETURN_IF_ERROR(visit("query" + at, &Transformer::query));
    RETURN_IF_ERROR(visit("key" + at, &Transformer::key));
    RETURN_IF_ERROR(visit("value" + at, &Transformer::value));
    RETURN_IF_ERROR(
        step([&](Transformer& m, const Floats&) { return m.Attend(batches_[batch], positions); }));
    RETURN_IF_ERROR(visit("attention" + at, &Transformer::context));
    RETURN_IF_ERROR(step([](Transformer& m, const Floats& s) { return m.AddAttention(s); }));
    RETURN_IF_ERROR(Visit(observer, after_attention, stream_of));
    RETURN_IF_ERROR(step([](Transformer& m, const Floats& s) { return m.ReadForFeedForward(s); }));
    RETURN_IF_ERROR(visit("ffn_input" + at, &Transformer::input));
    RETURN_IF_ERROR(step([](Transformer& m, const Floats&) { return m.Expand(); }));
    RETURN_IF_ERROR(visit("ffn" + at, &Transformer::inner));
    RETURN_IF_ERROR(step([](Transformer& m, const Floats& s) { return m.AddFeedForward(s); }));
    RETURN_IF_ERROR(Visit(observer, after_ffn, stream_of));
    RETURN_IF_ERROR(Advance());
  }
  return absl::OkStatus();
}

absl::Status ForwardPass::RunHead(FeatureObserver* observer) {
  kernels::Backend& backend = *options_.backend;
  ASSIGN_OR_RETURN(kernels::Network* const network, backend.network());
  RETURN_IF_ERROR(ForModels([](Transformer& model) { return model.LoadHead(); }));
  const bool classifier = models_[0]->shape().head_kind == HeadKind::kClassifier;
  const std::string last_site = classifier ? "classifier_input" : "head_input";
  const std::string read_site = classifier ? "pooler_input" : "transform_input";
  const std::vector<Site> sites = SitesOf(stages() - 1);
  const auto wanted = [&](const std::string& site) {
    return observer != nullptr && observer->Wants(site) &&
           std::any_of(sites.begin(), sites.end(), [&](const Site& s) { return s.name == site; });
  };
  for (int64_t batch = first_; batch < last_; ++batch) {
    std::vector<FloatBuffer> memory;  // of this batch
    std::vector<ConstFloats> read, last;
    for (int64_t i = 0; i < models(); ++i) {
      const Floats whole = stream(i, batch);
      RETURN_IF_ERROR(models_[i]->FinishStream(whole));
      if (!wanted(last_site) && !wanted(read_site)) continue;
      const int64_t width = whole.columns;
      const auto make = [&](int64_t rows) -> absl::StatusOr<Floats> {
        ASSIGN_OR_RETURN(FloatBuffer buffer, FloatBuffer::Make(backend, rows * width));
        memory.push_back(std::move(buffer));
        return memory.back().View(rows, width);
      };
      ConstFloats from = whole;
      if (classifier) {
        const std::vector<int32_t> rows = FirstTokens(batches_[batch]);
        ASSIGN_OR_RETURN(const auto indexes, UploadIntegers(backend, rows));
        ASSIGN_OR_RETURN(const Floats firsts, make(static_cast<int64_t>(rows.size())));
        RETURN_IF_ERROR(
            network->Gather(whole, static_cast<const int32_t*>(indexes->data()), firsts));
        RETURN_IF_ERROR(backend.Synchronize());
        from = firsts;
      }
      read.push_back(from);
      if (!wanted(last_site)) continue;
      ASSIGN_OR_RETURN(const Floats out, make(from.rows));
      RETURN_IF_ERROR(models_[i]->ReadForHead(from, out));
      last.push_back(out);
    }
    if (wanted(read_site)) RETURN_IF_ERROR(observer->Visit(read_site, read));
    if (wanted(last_site)) RETURN_IF_ERROR(observer->Visit(last_site, last));
    RETURN_IF_ERROR(backend.Synchronize());  // before the memory goes
    RETURN_IF_ERROR(Advance());
  }
  return absl::OkStatus();
}

}  // namespace pewter
