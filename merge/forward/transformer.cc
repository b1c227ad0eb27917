#include "merge/forward/transformer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/strip.h"
#include "base/dtype_names.h"
#include "base/status.h"
#include "base/units.h"

namespace pewter {
namespace {

using kernels::Activation;
using kernels::Backend;
using kernels::Buffer;
using kernels::ConstFloats;
using kernels::Floats;
using kernels::Network;
using kernels::Transpose;

constexpr int64_t kWidth = sizeof(float);
// Weights on their way to a device.
constexpr int64_t kStagedElements = int64_t{4} << 20;
// Of an embedding table, rows that are this near to each other are read together.
constexpr int64_t kNearRows = 8;
constexpr int64_t kRunElements = int64_t{1} << 18;

absl::Span<std::byte> Bytes(float* data, int64_t elements) {
  return absl::MakeSpan(reinterpret_cast<std::byte*>(data), elements * kWidth);
}

using SourcePtr = std::shared_ptr<const TensorSource>;

}  // namespace

std::vector<Batch> MakeBatches(const ForwardData& data, const NetworkShape& shape, int64_t tokens) {
  std::vector<Batch> batches;
  const int64_t length = data.has_tokens() ? data.length() : shape.tokens_of_image();
  std::vector<int32_t> columns;
  for (int64_t row = 0; row < data.rows(); ++row) {
    columns.clear();
    for (int64_t column = 0; column < length; ++column) {
      if (!data.has_tokens() || data.real(row, column)) {
        columns.push_back(static_cast<int32_t>(column));
      }
    }
    const int64_t count = static_cast<int64_t>(columns.size());
    if (batches.empty() || batches.back().tokens() + count > tokens) {
      batches.push_back({.first_row = row, .starts = {0}});
    }
    Batch& batch = batches.back();
    ++batch.rows;
    batch.columns.insert(batch.columns.end(), columns.begin(), columns.end());
    batch.starts.push_back(batch.tokens() + count);
  }
  return batches;
}

absl::StatusOr<FloatBuffer> FloatBuffer::Make(Backend& backend, int64_t elements) {
  FloatBuffer made;
  ASSIGN_OR_RETURN(made.buffer_, backend.Allocate(elements * kWidth));
  return made;
}

struct Transformer::Data {
  // A linear layer, or several that read the same: their outputs stand side by side.
  struct Linear {
    FloatBuffer weight, bias;
    ConstFloats view;
    bool biased = false;
  };
  struct Norm {
    FloatBuffer weight, bias;
    bool biased = false;
    bool there() const { return !weight.empty(); }
  };
  struct Layer {
    Linear qkv, attention_out, expand, contract;
    Norm attention, ffn, query, key;
    int64_t number = -1;
  };
  struct LinearNames {
    std::vector<std::string> names;
    std::vector<int64_t> outputs;
    int64_t inputs = 0;
    bool needs_bias = false;
    bool transposed = false;

    int64_t all_outputs() const {
      return std::accumulate(outputs.begin(), outputs.end(), int64_t{0});
    }
    int64_t elements() const { return (inputs + 1) * all_outputs(); }
  };

  Data(const ForwardModel& forward_model, Backend& on) : model(forward_model), backend(on) {}

  // --- Names ---

  const Family& family() const { return *shape.family; }
  std::string Inside(const char* name) const { return absl::StrCat(prefix, name); }
  std::string InLayer(int64_t layer, const char* name) const {
    return absl::StrReplaceAll(absl::StrCat(prefix, family().layer, name),
                               {{"{layer}", absl::StrCat(layer)}});
  }
  int64_t query_columns() const { return shape.heads * shape.head; }
  int64_t key_columns() const { return shape.key_heads * shape.head; }
  int64_t inner_columns() const { return shape.gated ? 2 * shape.inner : shape.inner; }

  LinearNames QkvNames(int64_t layer) const {
    const Family& f = family();
    LinearNames names = {.inputs = shape.width,
                         .needs_bias = f.centre && f.patches == nullptr,
                         .transposed = f.transposed};
    if (f.key == nullptr) {
      names.names = {InLayer(layer, f.query)};
      names.outputs = {query_columns() + 2 * key_columns()};
    } else {
      names.names = {InLayer(layer, f.query), InLayer(layer, f.key), InLayer(layer, f.value)};
      names.outputs = {query_columns(), key_columns(), key_columns()};
    }
    return names;
  }
  LinearNames AttentionOutNames(int64_t layer) const {
    return One(InLayer(layer, family().attention_out), query_columns(), shape.width);
  }
  LinearNames ExpandNames(int64_t layer) const {
    const Family& f = family();
    if (!shape.gated) {
      return One(InLayer(layer, f.plain != nullptr ? f.plain : f.up), shape.width, shape.inner);
    }
    LinearNames names = One(InLayer(layer, f.gate), shape.width, shape.inner);
    names.names.push_back(InLayer(layer, f.up));
    names.outputs.push_back(shape.inner);
    return names;
  }
  LinearNames ContractNames(int64_t layer) const {
    return One(InLayer(layer, family().down), shape.inner, shape.width);
  }
  LinearNames One(std::string name, int64_t inputs, int64_t outputs) const {
    return {.names = {std::move(name)},
            .outputs = {outputs},
            .inputs = inputs,
            .needs_bias = family().centre,
            .transposed = family().transposed};
  }
  // The head's layer before the last.
  LinearNames HeadNames() const {
    const Family& f = family();
    std::string name = shape.head_kind == HeadKind::kMasked ? f.transform
                       : f.pooler_inside                    ? Inside(f.pooler)
                                                            : f.pooler;
    LinearNames names = One(std::move(name), shape.width, shape.width);
    names.transposed = false;
    return names;
  }
  bool has_head_layer() const {
    return (shape.head_kind == HeadKind::kMasked && family().transform != nullptr) ||
           (shape.head_kind == HeadKind::kClassifier && family().pooler != nullptr);
  }

  // --- Looking up ---

  absl::Status Wrong(absl::string_view what) const {
    return absl::FailedPreconditionError(absl::StrCat("model ", model.name, ": ", what));
  }

  // Null when there is none.
  absl::StatusOr<SourcePtr> Find(const std::string& name) const {
    ASSIGN_OR_RETURN(SourcePtr source, model.tensors(name));
    if (source == nullptr) return source;
    if (!IsFloat(source->dtype())) {
      return Wrong(absl::StrCat("tensor ", name, " is ", SafetensorsName(source->dtype()),
                                " and not of a floating type"));
    }
    return CastSource(std::move(source), DType::kF32);
  }
  // Errors when there is none or has another shape.
  absl::StatusOr<SourcePtr> Need(const std::string& name, const Shape& wanted) const {
    ASSIGN_OR_RETURN(SourcePtr source, Find(name));
    if (source == nullptr) return Wrong(absl::StrCat("there is no tensor ", name));
    RETURN_IF_ERROR(CheckShape(*source, name, wanted));
    return source;
  }
  // Null when there is none.
  absl::StatusOr<SourcePtr> Maybe(const std::string& name, const Shape& wanted) const {
    ASSIGN_OR_RETURN(SourcePtr source, Find(name));
    if (source != nullptr) RETURN_IF_ERROR(CheckShape(*source, name, wanted));
    return source;
  }
  absl::Status CheckShape(const TensorSource& source, const std::string& name,
                          const Shape& wanted) const {
    if (source.shape() == wanted) return absl::OkStatus();
    return Wrong(absl::StrCat("tensor ", name, " has the shape ", source.shape().ToString(),
                              "; config.json says ", wanted.ToString()));
  }
  // Old files call a norm's weight gamma and its bias beta.
  absl::StatusOr<SourcePtr> NeedNorm(const std::string& name, bool bias, int64_t columns) const {
    ASSIGN_OR_RETURN(SourcePtr older,
                     Maybe(absl::StrCat(name, bias ? ".beta" : ".gamma"), {columns}));
    if (older != nullptr) return older;
    return Need(absl::StrCat(name, bias ? ".bias" : ".weight"), {columns});
  }

  absl::Status CheckLinear(const LinearNames& names) const {
    for (size_t i = 0; i < names.names.size(); ++i) {
      RETURN_IF_ERROR(WeightOf(names, i).status());
      RETURN_IF_ERROR(BiasOf(names, i).status());
    }
    return absl::OkStatus();
  }
  absl::StatusOr<SourcePtr> WeightOf(const LinearNames& names, size_t i) const {
    const int64_t outputs = names.outputs[i];
    return Need(absl::StrCat(names.names[i], ".weight"),
                names.transposed ? Shape{names.inputs, outputs} : Shape{outputs, names.inputs});
  }
  absl::StatusOr<SourcePtr> BiasOf(const LinearNames& names, size_t i) const {
    const std::string name = absl::StrCat(names.names[i], ".bias");
    if (names.needs_bias) return Need(name, {names.outputs[i]});
    return Maybe(name, {names.outputs[i]});
  }
  absl::Status CheckNorm(const std::string& name, int64_t columns) const {
    RETURN_IF_ERROR(NeedNorm(name, false, columns).status());
    if (family().centre) RETURN_IF_ERROR(NeedNorm(name, true, columns).status());
    return absl::OkStatus();
  }

  absl::Status FindPrefix() {
    const Family& f = family();
    for (const char* candidate : f.prefixes) {
      if (candidate == nullptr) continue;
      for (const char* first : {f.words, f.words_alias, f.patches}) {
        if (first == nullptr) continue;
        const std::string name = absl::StrCat(candidate, first);
        ASSIGN_OR_RETURN(const SourcePtr source, Find(absl::StrCat(name, ".weight")));
        if (source == nullptr) continue;
        prefix = candidate;
        embedding = absl::StrCat(name, ".weight");
        return absl::OkStatus();
      }
    }
    return Wrong(absl::StrCat("there is no tensor ", f.prefixes[0],
                              f.words != nullptr ? f.words : f.patches, ".weight"));
  }

  absl::Status CheckAll() {
    const Family& f = family();
    const int64_t width = shape.width;
    RETURN_IF_ERROR(FindPrefix());
    if (f.words != nullptr) {
      RETURN_IF_ERROR(Need(embedding, {shape.vocabulary, width}).status());
    } else {
      RETURN_IF_ERROR(Need(embedding, PatchShape()).status());
      RETURN_IF_ERROR(Need(PatchBias(), {width}).status());
      RETURN_IF_ERROR(Need(Inside(f.class_token), {1, 1, width}).status());
    }
    if (f.position_table != nullptr) RETURN_IF_ERROR(PositionTable().status());
    if (f.types != nullptr) {
      RETURN_IF_ERROR(
          Need(absl::StrCat(Inside(f.types), ".weight"), {shape.types, width}).status());
    }
    if (f.embedding_norm != nullptr) RETURN_IF_ERROR(CheckNorm(Inside(f.embedding_norm), width));
    for (int64_t layer = 0; layer < shape.layers; ++layer) {
      RETURN_IF_ERROR(CheckLinear(QkvNames(layer)));
      RETURN_IF_ERROR(CheckLinear(AttentionOutNames(layer)));
      RETURN_IF_ERROR(CheckLinear(ExpandNames(layer)));
      RETURN_IF_ERROR(CheckLinear(ContractNames(layer)));
      RETURN_IF_ERROR(CheckNorm(InLayer(layer, f.attention_norm), width));
      RETURN_IF_ERROR(CheckNorm(InLayer(layer, f.ffn_norm), width));
      if (f.query_norm != nullptr) {
        RETURN_IF_ERROR(CheckNorm(InLayer(layer, f.query_norm), shape.head));
        RETURN_IF_ERROR(CheckNorm(InLayer(layer, f.key_norm), shape.head));
      }
    }
    if (f.relative_bias != nullptr) RETURN_IF_ERROR(RelativeTable().status());
    if (f.final_norm != nullptr) RETURN_IF_ERROR(CheckNorm(Inside(f.final_norm), width));
    return CheckHead();
  }

  Shape PatchShape() const {
    return {shape.width, shape.channels, shape.patch_height, shape.patch_width};
  }
  std::string PatchBias() const {
    return absl::StrCat(absl::StripSuffix(embedding, "weight"), "bias");
  }
  absl::StatusOr<SourcePtr> PositionTable() const {
    const std::string name = Inside(family().position_table);
    return family().patches != nullptr ? Need(name, {1, shape.position_rows, shape.width})
                                       : Need(name, {shape.position_rows, shape.width});
  }
  absl::StatusOr<SourcePtr> RelativeTable() const {
    return Need(absl::StrCat(Inside(family().relative_bias), ".weight"),
                {shape.buckets, shape.heads});
  }

  // Finds the head's last layer.
  absl::Status CheckHead() {
    const Family& f = family();
    if (shape.head_kind == HeadKind::kNone) return absl::OkStatus();
    if (shape.head_kind == HeadKind::kClassifier) {
      if (f.classifier == nullptr) return NoHead();
      const std::string name = absl::StrCat(f.classifier, ".weight");
      ASSIGN_OR_RETURN(decoder, Find(name));
      if (decoder == nullptr) return Wrong(absl::StrCat("there is no tensor ", name));
      if (decoder->shape().rank() != 2 || decoder->shape()[1] != shape.width) {
        return Wrong(absl::StrCat("tensor ", name, " has the shape ", decoder->shape().ToString()));
      }
      ASSIGN_OR_RETURN(decoder_bias,
                       Need(absl::StrCat(f.classifier, ".bias"), {decoder->shape()[0]}));
    } else {
      const bool masked = shape.head_kind == HeadKind::kMasked;
      if (f.decoder == nullptr || masked != (f.transform != nullptr)) return NoHead();
      const Shape wanted = {shape.vocabulary, shape.width};
      if (!shape.tied) {
        ASSIGN_OR_RETURN(decoder, Maybe(absl::StrCat(f.decoder, ".weight"), wanted));
      }
      if (decoder == nullptr) {
        if (shape.tie_is_said && !shape.tied) {
          return Wrong(absl::StrCat("there is no tensor ", f.decoder,
                                    ".weight, and config.json says that it is not tied"));
        }
        ASSIGN_OR_RETURN(decoder, Need(embedding, wanted));
      }
      if (masked) {
        // Some files have the decoder's name for it.
        ASSIGN_OR_RETURN(decoder_bias, Maybe(absl::StrCat(f.decoder, ".bias"), {shape.vocabulary}));
        if (decoder_bias == nullptr) {
          ASSIGN_OR_RETURN(decoder_bias, Need(f.decoder_bias, {shape.vocabulary}));
        }
        RETURN_IF_ERROR(CheckNorm(f.transform_norm, shape.width));
      }
    }
    if (has_head_layer()) return CheckLinear(HeadNames());
    return absl::OkStatus();
  }
  absl::Status NoHead() const {
    return Wrong(absl::StrCat("a ", HeadName(shape.head_kind), " of the family ",
                              family().model_type, " is not known to the forward pass"));
  }

  // --- Reading ---

  // Elements [first, first + count) into the backend's memory.
  absl::Status ReadInto(const TensorSource& source, int64_t first, int64_t count, float* to) {
    if (backend.host_memory()) return source.Read(first, count, Bytes(to, count), nullptr);
    const int64_t most = std::min(count, kStagedElements);
    if (staging == nullptr || staging->bytes() < most * kWidth) {
      ASSIGN_OR_RETURN(staging, backend.AllocateHost(most * kWidth));
    }
    auto* const staged = static_cast<float*>(staging->data());
    for (int64_t done = 0; done < count; done += most) {
      const int64_t elements = std::min(most, count - done);
      RETURN_IF_ERROR(source.Read(first + done, elements, Bytes(staged, elements), nullptr));
      RETURN_IF_ERROR(backend.Upload(staged, to + done, elements * kWidth));
      RETURN_IF_ERROR(backend.Synchronize());
    }
    return absl::OkStatus();
  }
  absl::Status UploadValues(const std::vector<float>& values, FloatBuffer& buffer) {
    const int64_t count = static_cast<int64_t>(values.size());
    ASSIGN_OR_RETURN(buffer, FloatBuffer::Make(backend, count));
    RETURN_IF_ERROR(backend.Upload(values.data(), buffer.data(), count * kWidth));
    return backend.Synchronize();
  }
  absl::StatusOr<std::vector<float>> ReadValues(const TensorSource& source, int64_t first,
                                                int64_t count) const {
    std::vector<float> values(count);
    RETURN_IF_ERROR(source.Read(first, count, Bytes(values.data(), count), nullptr));
    return values;
  }

  absl::Status LoadLinear(const LinearNames& names, Linear& linear) {
    const int64_t outputs = names.all_outputs();
    if (linear.weight.empty()) {
      ASSIGN_OR_RETURN(linear.weight, FloatBuffer::Make(backend, outputs * names.inputs));
      ASSIGN_OR_RETURN(linear.bias, FloatBuffer::Make(backend, outputs));
      linear.view = names.transposed ? linear.weight.View(names.inputs, outputs)
                                     : linear.weight.View(outputs, names.inputs);
    }
    // Several that are stored [inputs, outputs] would not stand one after the other in memory; no
    // family has them.
    int64_t at = 0;
    linear.biased = false;
    std::vector<float> bias(outputs, 0.0f);
    for (size_t i = 0; i < names.names.size(); ++i) {
      ASSIGN_OR_RETURN(const SourcePtr weight, WeightOf(names, i));
      RETURN_IF_ERROR(ReadInto(*weight, 0, names.outputs[i] * names.inputs,
                               linear.weight.data() + at * names.inputs));
      ASSIGN_OR_RETURN(const SourcePtr stored, BiasOf(names, i));
      if (stored != nullptr) {
        RETURN_IF_ERROR(
            stored->Read(0, names.outputs[i], Bytes(bias.data() + at, names.outputs[i]), nullptr));
        linear.biased = true;
      }
      at += names.outputs[i];
    }
    if (!linear.biased) return absl::OkStatus();
    RETURN_IF_ERROR(backend.Upload(bias.data(), linear.bias.data(), outputs * kWidth));
    return backend.Synchronize();
  }
  absl::Status LoadNorm(const std::string& name, int64_t columns, Norm& norm) {
    norm.biased = family().centre;
    for (const bool bias : {false, true}) {
      if (bias && !norm.biased) continue;
      FloatBuffer& to = bias ? norm.bias : norm.weight;
      if (to.empty()) {
        ASSIGN_OR_RETURN(to, FloatBuffer::Make(backend, columns));
      }
      ASSIGN_OR_RETURN(const SourcePtr source, NeedNorm(name, bias, columns));
      RETURN_IF_ERROR(ReadInto(*source, 0, columns, to.data()));
    }
    return absl::OkStatus();
  }

  // --- Computing ---

  absl::Status Apply(const Linear& linear, const ConstFloats& x, Activation activation, bool add,
                     const Floats& y, bool transposed) {
    return network->Linear({.x = x,
                            .transpose_w = transposed ? Transpose::kNo : Transpose::kYes,
                            .w = linear.view,
                            .bias = linear.biased ? linear.bias.data() : nullptr,
                            .activation = activation,
                            .add = add,
                            .y = y});
  }
  absl::Status Normalize(const Norm& norm, const ConstFloats& x, const Floats& y) {
    return network->Normalize({.centre = family().centre,
                               .epsilon = shape.epsilon,
                               .x = x,
                               .weight = norm.weight.data(),
                               .bias = norm.biased ? norm.bias.data() : nullptr,
                               .y = y});
  }
  // Norms are of whole heads, which stand side by side.
  absl::Status NormalizeHeads(const Norm& norm, const Floats& columns) {
    for (int64_t at = 0; at < columns.columns; at += shape.head) {
      const Floats one = columns.Columns(at, shape.head);
      RETURN_IF_ERROR(Normalize(norm, one, one));
    }
    return absl::OkStatus();
  }
  absl::Status Rotate(const Floats& columns, const int32_t* positions) {
    return network->Rotate({.x = columns,
                            .head = shape.head,
                            .pairs = static_cast<int64_t>(shape.frequencies.size()),
                            .positions = positions,
                            .cos = cosines.data(),
                            .sin = sines.data()});
  }
  Floats Columns(const FloatBuffer& buffer, int64_t columns) const {
    return buffer.View(tokens, columns);
  }
  Floats Qkv(int64_t first, int64_t columns) const {
    return Columns(qkv, query_columns() + 2 * key_columns()).Columns(first, columns);
  }

  // Cosines and sines of every position and pair, in float32 as models are trained with.
  absl::Status LoadRotary(int64_t length) {
    std::vector<float> cos, sin;
    for (int64_t position = 0; position < length; ++position) {
      for (const float frequency : shape.frequencies) {
        const float angle = static_cast<float>(position) * frequency;
        cos.push_back(std::cos(angle) * shape.rotary_scale);
        sin.push_back(std::sin(angle) * shape.rotary_scale);
      }
    }
    RETURN_IF_ERROR(UploadValues(cos, cosines));
    return UploadValues(sin, sines);
  }
  // What each head adds to scores for each distance.
  absl::Status LoadRelative(int64_t length) {
    ASSIGN_OR_RETURN(const SourcePtr source, RelativeTable());
    ASSIGN_OR_RETURN(const std::vector<float> table,
                     ReadValues(*source, 0, shape.buckets * shape.heads));
    std::vector<float> values;
    for (int64_t head = 0; head < shape.heads; ++head) {
      for (int64_t distance = 1 - length; distance < length; ++distance) {
        const int64_t bucket = RelativeBucket(distance, shape.buckets, shape.farthest);
        values.push_back(table[bucket * shape.heads + head]);
      }
    }
    distances = length;
    return UploadValues(values, relative);
  }

  // Sum of the rows of tables for every token, on the host.
  absl::Status EmbedTokens(const ForwardData& data, const Batch& batch, float* to);
  absl::Status EmbedImages(const ForwardData& data, const Batch& batch, const Floats& stream);
  absl::Status AddTable(const TensorSource& table, absl::Span<const int32_t> rows, float* to) const;

  const ForwardModel model;
  Backend& backend;
  Network* network = nullptr;
  NetworkShape shape;
  std::string prefix, embedding;  // the latter a whole name
  SourcePtr decoder, decoder_bias;
  std::unique_ptr<Buffer> staging;

  // While embedding.
  Norm embedding_norm;
  Linear patches;
  std::vector<float> positions_table;
  std::unique_ptr<Buffer> embedding_staging;
  FloatBuffer patch_pixels;

  // While in the blocks.
  Layer layer;
  FloatBuffer cosines, sines, relative;
  int64_t distances = 0;
  FloatBuffer normed, qkv, context, inner;
  ConstFloats input;
  int64_t tokens = 0;

  // After them.
  Norm final_norm, head_norm;
  Linear head, classes_linear;
};

// --- Opening ------------------------------------------------------------------------------------

Transformer::Transformer(std::unique_ptr<Data> data) : data_(std::move(data)) {}
Transformer::~Transformer() = default;

absl::StatusOr<std::unique_ptr<Transformer>> Transformer::Open(const ForwardModel& model,
                                                               Backend& backend) {
  auto data = std::make_unique<Data>(model, backend);
  absl::StatusOr<NetworkShape> shape = ParseNetworkShape(model.config_json);
  if (!shape.ok()) return Annotate(shape.status(), absl::StrCat("model ", model.name));
  data->shape = *std::move(shape);
  RETURN_IF_ERROR(data->CheckAll());
  ASSIGN_OR_RETURN(data->network, backend.network());
  return std::unique_ptr<Transformer>(new Transformer(std::move(data)));
}

const std::string& Transformer::name() const { return data_->model.name; }
const NetworkShape& Transformer::shape() const { return data_->shape; }
int64_t Transformer::classes() const {
  return data_->decoder == nullptr ? 0 : data_->decoder->shape()[0];
}

absl::Status Transformer::Check(const ForwardData& data) const {
  const NetworkShape& shape = data_->shape;
  const auto wrong = [&](absl::string_view what) {
    return absl::FailedPreconditionError(
        absl::StrCat("model ", name(), " cannot read data ", data.name(), ": ", what));
  };
  if (data.has_tokens() != (shape.family->words != nullptr)) {
    return wrong(data.has_tokens() ? "it reads pixel_values and there are input_ids"
                                   : "it reads input_ids and there are pixel_values");
  }
  if (!data.has_tokens()) {
    const Shape& pixels = data.pixels()->shape();
    const Shape wanted = {pixels[0], shape.channels, shape.image_height, shape.image_width};
    if (pixels == wanted) return absl::OkStatus();
    return wrong(absl::StrCat("pixel_values have the shape ", pixels.ToString(),
                              "; config.json says ", wanted.ToString()));
  }
  if (shape.positions > 0 && data.length() > shape.positions) {
    return wrong(absl::StrCat("rows of ", data.length(), " tokens are longer than its ",
                              shape.positions, " positions"));
  }
  for (int64_t i = 0; i < static_cast<int64_t>(data.ids().size()); ++i) {
    const auto place = [&] {
      return absl::StrCat("[", i / data.length(), ", ", i % data.length(), "]");
    };
    if (!data.mask().empty() && data.mask()[i] == 0) continue;
    if (data.ids()[i] >= shape.vocabulary) {
      return wrong(absl::StrCat("input_ids", place(), " is ", data.ids()[i],
                                " and its vocabulary has ", shape.vocabulary, " tokens"));
    }
    if (data.types().empty()) continue;
    if (data.types()[i] >= std::max<int64_t>(shape.types, 1)) {
      return wrong(absl::StrCat("token_type_ids", place(), " is ", data.types()[i], " and it has ",
                                shape.types, " token types"));
    }
  }
  return absl::OkStatus();
}

// --- Memory -------------------------------------------------------------------------------------

int64_t Transformer::FeatureBytes(int64_t tokens, int64_t length) const {
  const Data& d = *data_;
  const int64_t columns = (d.family().post_norm ? 0 : d.shape.width) + 2 * d.query_columns() +
                          2 * d.key_columns() + d.inner_columns();
  // Scores of one head and some queries, on each of a few threads.
  return kWidth * (tokens * columns + 8 * 128 * length);
}

int64_t Transformer::WeightBytes(int64_t length) const {
  const Data& d = *data_;
  const int64_t layer = d.QkvNames(0).elements() + d.AttentionOutNames(0).elements() +
                        d.ExpandNames(0).elements() + d.ContractNames(0).elements() +
                        4 * d.shape.width + 2 * d.shape.head;
  const int64_t tables = 2 * length * static_cast<int64_t>(d.shape.frequencies.size()) +
                         (d.shape.buckets > 0 ? 2 * length * d.shape.heads : 0);
  int64_t resident = 0;
  for (const Data::LinearNames& names :
       {d.QkvNames(0), d.AttentionOutNames(0), d.ExpandNames(0), d.ContractNames(0)}) {
    for (size_t i = 0; i < names.names.size(); ++i) {
      const absl::StatusOr<SourcePtr> weight = d.WeightOf(names, i);
      if (weight.ok()) resident += (*weight)->resident_bytes();
    }
  }
  const int64_t head = d.has_head_layer() ? d.HeadNames().elements() : 0;
  const int64_t staged = d.backend.host_memory() ? 0 : kStagedElements;
  return kWidth * (layer + tables + head + 4 * d.shape.width + staged) + resident;
}

absl::Status Transformer::Reserve(int64_t tokens) {
  Data& d = *data_;
  if (!d.family().post_norm) {
    ASSIGN_OR_RETURN(d.normed, FloatBuffer::Make(d.backend, tokens * d.shape.width));
  }
  ASSIGN_OR_RETURN(
      d.qkv, FloatBuffer::Make(d.backend, tokens * (d.query_columns() + 2 * d.key_columns())));
  ASSIGN_OR_RETURN(d.context, FloatBuffer::Make(d.backend, tokens * d.query_columns()));
  ASSIGN_OR_RETURN(d.inner, FloatBuffer::Make(d.backend, tokens * d.inner_columns()));
  return absl::OkStatus();
}

// --- Embedding ----------------------------------------------------------------------------------

absl::Status Transformer::BeginEmbedding(int64_t length) {
  Data& d = *data_;
  const Family& f = d.family();
  if (f.embedding_norm != nullptr) {
    RETURN_IF_ERROR(d.LoadNorm(d.Inside(f.embedding_norm), d.shape.width, d.embedding_norm));
  }
  if (f.position_table != nullptr) {
    ASSIGN_OR_RETURN(const SourcePtr table, d.PositionTable());
    const int64_t rows = std::min(d.shape.position_rows, length + d.shape.first_position);
    ASSIGN_OR_RETURN(d.positions_table, d.ReadValues(*table, 0, rows * d.shape.width));
  }
  if (f.patches == nullptr) return absl::OkStatus();
  // A convolution whose strides are its sides is a linear layer over each patch's pixels.
  const int64_t pixels = d.PatchShape().elements() / d.shape.width;
  ASSIGN_OR_RETURN(d.patches.weight, FloatBuffer::Make(d.backend, d.shape.width * pixels));
  ASSIGN_OR_RETURN(d.patches.bias, FloatBuffer::Make(d.backend, d.shape.width));
  d.patches.view = d.patches.weight.View(d.shape.width, pixels);
  d.patches.biased = true;
  ASSIGN_OR_RETURN(const SourcePtr weight, d.Need(d.embedding, d.PatchShape()));
  ASSIGN_OR_RETURN(const SourcePtr bias, d.Need(d.PatchBias(), {d.shape.width}));
  RETURN_IF_ERROR(d.ReadInto(*weight, 0, d.shape.width * pixels, d.patches.weight.data()));
  return d.ReadInto(*bias, 0, d.shape.width, d.patches.bias.data());
}

absl::Status Transformer::EndEmbedding() {
  Data& d = *data_;
  RETURN_IF_ERROR(d.backend.Synchronize());
  d.embedding_norm = {};
  d.patches = {};
  d.positions_table = {};
  d.embedding_staging = nullptr;
  d.patch_pixels = {};
  return absl::OkStatus();
}

// to[i] += row rows[i] of the table. Rows are read in the table's order, near ones together.
absl::Status Transformer::Data::AddTable(const TensorSource& table, absl::Span<const int32_t> rows,
                                         float* to) const {
  const int64_t width = shape.width;
  std::vector<int32_t> order(rows.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return std::make_pair(rows[a], a) < std::make_pair(rows[b], b);
  });
  const int64_t most = std::max<int64_t>(1, kRunElements / width);
  std::vector<float> run;
  for (size_t begin = 0; begin < order.size();) {
    const int64_t first = rows[order[begin]];
    size_t end = begin;
    int64_t last = first;
    while (end < order.size() && rows[order[end]] - last <= kNearRows &&
           rows[order[end]] - first < most) {
      last = rows[order[end++]];
    }
    run.resize((last - first + 1) * width);
    RETURN_IF_ERROR(table.Read(first * width, static_cast<int64_t>(run.size()),
                               Bytes(run.data(), static_cast<int64_t>(run.size())), nullptr));
    for (; begin < end; ++begin) {
      const float* const from = run.data() + (rows[order[begin]] - first) * width;
      float* const sum = to + order[begin] * width;
      for (int64_t j = 0; j < width; ++j) sum[j] += from[j];
    }
  }
  return absl::OkStatus();
}

absl::Status Transformer::Data::EmbedTokens(const ForwardData& data, const Batch& batch,
                                            float* to) {
  const Family& f = family();
  const int64_t width = shape.width;
  std::fill(to, to + batch.tokens() * width, 0.0f);
  std::vector<int32_t> ids, types, places;
  for (int64_t row = 0; row < batch.rows; ++row) {
    const int64_t begin = (batch.first_row + row) * data.length();
    // RoBERTa's positions count what is not the padding token, also where the mask is 0.
    int64_t counted = 0, column = 0;
    for (int64_t token = batch.starts[row]; token < batch.starts[row + 1]; ++token) {
      const int64_t here = batch.columns[token];
      ids.push_back(data.ids()[begin + here]);
      if (shape.types > 0) types.push_back(data.types().empty() ? 0 : data.types()[begin + here]);
      if (!f.positions_skip_padding) {
        places.push_back(static_cast<int32_t>(here));
        continue;
      }
      for (; column < here; ++column) counted += data.ids()[begin + column] != shape.padding;
      places.push_back(ids.back() == shape.padding
                           ? shape.padding
                           : static_cast<int32_t>(shape.first_position + counted));
    }
  }
  ASSIGN_OR_RETURN(const SourcePtr words, Need(embedding, {shape.vocabulary, width}));
  RETURN_IF_ERROR(AddTable(*words, ids, to));
  if (shape.types > 0) {
    ASSIGN_OR_RETURN(const SourcePtr table,
                     Need(absl::StrCat(Inside(f.types), ".weight"), {shape.types, width}));
    RETURN_IF_ERROR(AddTable(*table, types, to));
  }
  if (f.position_table == nullptr) return absl::OkStatus();
  for (size_t i = 0; i < places.size(); ++i) {
    const float* const from = positions_table.data() + places[i] * width;
    float* const sum = to + static_cast<int64_t>(i) * width;
    for (int64_t j = 0; j < width; ++j) sum[j] += from[j];
  }
  return absl::OkStatus();
}

absl::Status Transformer::Data::EmbedImages(const ForwardData& data, const Batch& batch,
                                            const Floats& stream) {
  const int64_t ph = shape.patch_height, pw = shape.patch_width;
  const int64_t down = shape.image_height / ph, across = shape.image_width / pw;
  const int64_t plane = shape.image_height * shape.image_width, pixels = shape.channels * ph * pw;
  std::vector<float> image(shape.channels * plane), unfolded(down * across * pixels);
  if (patch_pixels.empty()) {
    ASSIGN_OR_RETURN(patch_pixels,
                     FloatBuffer::Make(backend, static_cast<int64_t>(unfolded.size())));
  }
  for (int64_t row = 0; row < batch.rows; ++row) {
    const int64_t elements = static_cast<int64_t>(image.size());
    RETURN_IF_ERROR(data.pixels()->Read((batch.first_row + row) * elements, elements,
                                        Bytes(image.data(), elements), nullptr));
    float* to = unfolded.data();
    for (int64_t patch = 0; patch < down * across; ++patch) {
      const int64_t corner = patch / across * ph * shape.image_width + patch % across * pw;
      for (int64_t channel = 0; channel < shape.channels; ++channel) {
        for (int64_t y = 0; y < ph; ++y, to += pw) {
          std::copy_n(image.data() + channel * plane + corner + y * shape.image_width, pw, to);
        }
      }
    }
    RETURN_IF_ERROR(backend.Upload(unfolded.data(), patch_pixels.data(),
                                   static_cast<int64_t>(unfolded.size()) * kWidth));
    RETURN_IF_ERROR(Apply(patches, patch_pixels.View(down * across, pixels), Activation::kNone,
                          /*add=*/true, stream.Rows(batch.starts[row] + 1, down * across),
                          /*transposed=*/false));
    RETURN_IF_ERROR(backend.Synchronize());  // before the next image takes the memory
  }
  return absl::OkStatus();
}

absl::Status Transformer::Embed(const ForwardData& data, const Batch& batch, const Floats& stream) {
  Data& d = *data_;
  const int64_t width = d.shape.width, elements = batch.tokens() * width;
  float* host = stream.data;
  if (!d.backend.host_memory()) {
    if (d.embedding_staging == nullptr || d.embedding_staging->bytes() < elements * kWidth) {
      ASSIGN_OR_RETURN(d.embedding_staging, d.backend.AllocateHost(elements * kWidth));
    }
    host = static_cast<float*>(d.embedding_staging->data());
  }
  if (data.has_tokens()) {
    RETURN_IF_ERROR(d.EmbedTokens(data, batch, host));
  } else {
    // Positions, and the class token in front; the patches are added.
    ASSIGN_OR_RETURN(const SourcePtr token,
                     d.Need(d.Inside(d.family().class_token), {1, 1, width}));
    ASSIGN_OR_RETURN(const std::vector<float> first, d.ReadValues(*token, 0, width));
    for (int64_t row = 0; row < batch.rows; ++row) {
      float* const to = host + batch.starts[row] * width;
      std::copy(d.positions_table.begin(), d.positions_table.end(), to);
      for (int64_t j = 0; j < width; ++j) to[j] += first[j];
    }
  }
  if (host != stream.data) {
    RETURN_IF_ERROR(d.backend.Upload(host, stream.data, elements * kWidth));
    RETURN_IF_ERROR(d.backend.Synchronize());
  }
  if (!data.has_tokens()) RETURN_IF_ERROR(d.EmbedImages(data, batch, stream));
  if (!d.embedding_norm.there()) return absl::OkStatus();
  return d.Normalize(d.embedding_norm, stream, stream);
}

// --- Blocks -------------------------------------------------------------------------------------

absl::Status Transformer::LoadLayer(int64_t layer, int64_t length) {
  Data& d = *data_;
  const Family& f = d.family();
  RETURN_IF_ERROR(d.backend.Synchronize());  // the block before has been computed
  d.layer.number = layer;
  RETURN_IF_ERROR(d.LoadLinear(d.QkvNames(layer), d.layer.qkv));
  RETURN_IF_ERROR(d.LoadLinear(d.AttentionOutNames(layer), d.layer.attention_out));
  RETURN_IF_ERROR(d.LoadLinear(d.ExpandNames(layer), d.layer.expand));
  RETURN_IF_ERROR(d.LoadLinear(d.ContractNames(layer), d.layer.contract));
  RETURN_IF_ERROR(d.LoadNorm(d.InLayer(layer, f.attention_norm), d.shape.width, d.layer.attention));
  RETURN_IF_ERROR(d.LoadNorm(d.InLayer(layer, f.ffn_norm), d.shape.width, d.layer.ffn));
  if (f.query_norm != nullptr) {
    RETURN_IF_ERROR(d.LoadNorm(d.InLayer(layer, f.query_norm), d.shape.head, d.layer.query));
    RETURN_IF_ERROR(d.LoadNorm(d.InLayer(layer, f.key_norm), d.shape.head, d.layer.key));
  }
  if (f.positions == PositionKind::kRotary && d.cosines.empty()) {
    RETURN_IF_ERROR(d.LoadRotary(length));
  }
  if (f.positions == PositionKind::kRelative && d.relative.empty()) {
    RETURN_IF_ERROR(d.LoadRelative(length));
  }
  return absl::OkStatus();
}

absl::Status Transformer::ReadForAttention(const Floats& stream) {
  Data& d = *data_;
  d.tokens = stream.rows;
  if (d.family().post_norm) {
    d.input = stream;
    return absl::OkStatus();
  }
  const Floats normed = d.Columns(d.normed, d.shape.width);
  d.input = normed;
  return d.Normalize(d.layer.attention, stream, normed);
}

absl::Status Transformer::Project() {
  Data& d = *data_;
  return d.Apply(d.layer.qkv, d.input, Activation::kNone, /*add=*/false,
                 d.Columns(d.qkv, d.query_columns() + 2 * d.key_columns()), d.family().transposed);
}

absl::Status Transformer::Attend(const Batch& batch, const int32_t* positions) {
  Data& d = *data_;
  const NetworkShape& shape = d.shape;
  const Floats query = d.Qkv(0, d.query_columns());
  const Floats key = d.Qkv(d.query_columns(), d.key_columns());
  if (d.layer.query.there()) {
    RETURN_IF_ERROR(d.NormalizeHeads(d.layer.query, query));
    RETURN_IF_ERROR(d.NormalizeHeads(d.layer.key, key));
  }
  if (!d.cosines.empty()) {
    RETURN_IF_ERROR(d.Rotate(query, positions));
    RETURN_IF_ERROR(d.Rotate(key, positions));
  }
  return d.network->Attention({.q = query,
                               .k = key,
                               .v = value(),
                               .out = d.Columns(d.context, d.query_columns()),
                               .heads = shape.heads,
                               .key_heads = shape.key_heads,
                               .head = shape.head,
                               .scale = shape.scales[d.layer.number],
                               .causal = shape.family->causal,
                               .window = shape.windows[d.layer.number],
                               .positions = positions,
                               .bias = d.relative.empty() ? nullptr : d.relative.data(),
                               .distances = d.distances,
                               .starts = batch.starts});
}

absl::Status Transformer::AddAttention(const Floats& stream) {
  Data& d = *data_;
  RETURN_IF_ERROR(d.Apply(d.layer.attention_out, context(), Activation::kNone, /*add=*/true, stream,
                          d.family().transposed));
  if (!d.family().post_norm) return absl::OkStatus();
  return d.Normalize(d.layer.attention, stream, stream);
}

absl::Status Transformer::ReadForFeedForward(const Floats& stream) {
  Data& d = *data_;
  if (d.family().post_norm) {
    d.input = stream;
    return absl::OkStatus();
  }
  const Floats normed = d.Columns(d.normed, d.shape.width);
  d.input = normed;
  return d.Normalize(d.layer.ffn, stream, normed);
}

absl::Status Transformer::Expand() {
  Data& d = *data_;
  const Floats all = d.Columns(d.inner, d.inner_columns());
  RETURN_IF_ERROR(d.Apply(d.layer.expand, d.input,
                          d.shape.gated ? Activation::kNone : d.shape.activation, /*add=*/false,
                          all, d.family().transposed));
  if (!d.shape.gated) return absl::OkStatus();
  return d.network->Gate(d.shape.activation, all.Columns(d.shape.inner, d.shape.inner),
                         all.Columns(0, d.shape.inner));
}

absl::Status Transformer::AddFeedForward(const Floats& stream) {
  Data& d = *data_;
  RETURN_IF_ERROR(d.Apply(d.layer.contract, inner(), Activation::kNone, /*add=*/true, stream,
                          d.family().transposed));
  if (!d.family().post_norm) return absl::OkStatus();
  return d.Normalize(d.layer.ffn, stream, stream);
}

ConstFloats Transformer::input() const { return data_->input; }
ConstFloats Transformer::query() const { return data_->Qkv(0, data_->query_columns()); }
ConstFloats Transformer::key() const {
  return data_->Qkv(data_->query_columns(), data_->key_columns());
}
ConstFloats Transformer::value() const {
  return data_->Qkv(data_->query_columns() + data_->key_columns(), data_->key_columns());
}
ConstFloats Transformer::context() const {
  return data_->Columns(data_->context, data_->query_columns());
}
ConstFloats Transformer::inner() const {
  return data_->Columns(data_->inner, data_->inner_columns()).Columns(0, data_->shape.inner);
}

// --- Head ---------------------------------------------------------------------------------------

absl::Status Transformer::LoadHead() {
  Data& d = *data_;
  const Family& f = d.family();
  RETURN_IF_ERROR(d.backend.Synchronize());
  d.layer = {};
  if (f.final_norm != nullptr) {
    RETURN_IF_ERROR(d.LoadNorm(d.Inside(f.final_norm), d.shape.width, d.final_norm));
  }
  if (!d.has_head_layer()) return absl::OkStatus();
  RETURN_IF_ERROR(d.LoadLinear(d.HeadNames(), d.head));
  if (d.shape.head_kind != HeadKind::kMasked) return absl::OkStatus();
  return d.LoadNorm(f.transform_norm, d.shape.width, d.head_norm);
}

absl::Status Transformer::FinishStream(const Floats& stream) {
  Data& d = *data_;
  if (!d.final_norm.there()) return absl::OkStatus();
  return d.Normalize(d.final_norm, stream, stream);
}

absl::Status Transformer::ReadForHead(const ConstFloats& stream, const Floats& out) {
  Data& d = *data_;
  if (!d.has_head_layer()) {
    return d.backend.Copy(stream.data, out.data, stream.rows * stream.columns * kWidth);
  }
  const bool masked = d.shape.head_kind == HeadKind::kMasked;
  // RoBERTa's transform is GELU whatever config.json says.
  const bool fixed = d.family().positions_skip_padding;
  const Activation activation = !masked ? d.family().pooler_activation
                                : fixed ? Activation::kGelu
                                        : d.shape.activation;
  RETURN_IF_ERROR(d.Apply(d.head, stream, activation, /*add=*/false, out, /*transposed=*/false));
  return masked ? d.Normalize(d.head_norm, out, out) : absl::OkStatus();
}

absl::Status Transformer::LoadClasses(int64_t first, int64_t count) {
  Data& d = *data_;
  RETURN_IF_ERROR(d.backend.Synchronize());
  Data::Linear& linear = d.classes_linear;
  if (linear.weight.empty() || linear.view.rows < count) {
    ASSIGN_OR_RETURN(linear.weight, FloatBuffer::Make(d.backend, count * d.shape.width));
    ASSIGN_OR_RETURN(linear.bias, FloatBuffer::Make(d.backend, count));
  }
  linear.view = linear.weight.View(count, d.shape.width);
  RETURN_IF_ERROR(
      d.ReadInto(*d.decoder, first * d.shape.width, count * d.shape.width, linear.weight.data()));
  linear.biased = d.decoder_bias != nullptr;
  if (!linear.biased) return absl::OkStatus();
  return d.ReadInto(*d.decoder_bias, first, count, linear.bias.data());
}

absl::Status Transformer::Classify(const ConstFloats& input, const Floats& logits) {
  Data& d = *data_;
  return d.Apply(d.classes_linear, input, Activation::kNone, /*add=*/false, logits,
                 /*transposed=*/false);
}

}  // namespace pewter
