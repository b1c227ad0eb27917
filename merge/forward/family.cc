#include "merge/forward/family.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <numbers>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/status.h"

namespace pewter {
namespace {

using kernels::Activation;
using nlohmann::json;

constexpr int64_t kMostLayers = 100'000;
// Products of a few extents stay far below 2^63.
constexpr int64_t kMostWidth = int64_t{1} << 20;
constexpr int64_t kMostSide = int64_t{1} << 14;  // of an image
constexpr int64_t kMostChannels = int64_t{1} << 12;

constexpr Family kBert = {.model_type = "bert",
                          .prefixes = {"bert.", ""},
                          .post_norm = true,
                          .words = "embeddings.word_embeddings",
                          .position_table = "embeddings.position_embeddings.weight",
                          .types = "embeddings.token_type_embeddings",
                          .embedding_norm = "embeddings.LayerNorm",
                          .layer = "encoder.layer.{layer}.",
                          .query = "attention.self.query",
                          .key = "attention.self.key",
                          .value = "attention.self.value",
                          .attention_out = "attention.output.dense",
                          .attention_norm = "attention.output.LayerNorm",
                          .up = "intermediate.dense",
                          .down = "output.dense",
                          .ffn_norm = "output.LayerNorm",
                          .transform = "cls.predictions.transform.dense",
                          .transform_norm = "cls.predictions.transform.LayerNorm",
                          .decoder = "cls.predictions.decoder",
                          .decoder_bias = "cls.predictions.bias",
                          .pooler = "pooler.dense",
                          .classifier = "classifier",
                          .pooler_inside = true};

Family Roberta(const char* model_type) {
  Family family = kBert;
  family.model_type = model_type;
  family.prefixes[0] = "roberta.";
  family.positions_skip_padding = true;
  family.transform = "lm_head.dense";
  family.transform_norm = "lm_head.layer_norm";
  family.decoder = "lm_head.decoder";
  family.decoder_bias = "lm_head.bias";
  family.pooler = "classifier.dense";
  family.classifier = "classifier.out_proj";
  family.pooler_inside = false;
  return family;
}

constexpr Family kDistilBert = {.model_type = "distilbert",
                                .prefixes = {"distilbert.", ""},
                                .post_norm = true,
                                .words = "embeddings.word_embeddings",
                                .position_table = "embeddings.position_embeddings.weight",
                                .embedding_norm = "embeddings.LayerNorm",
                                .layer = "transformer.layer.{layer}.",
                                .query = "attention.q_lin",
                                .key = "attention.k_lin",
                                .value = "attention.v_lin",
                                .attention_out = "attention.out_lin",
                                .attention_norm = "sa_layer_norm",
                                .up = "ffn.lin1",
                                .down = "ffn.lin2",
                                .ffn_norm = "output_layer_norm",
                                .transform = "vocab_transform",
                                .transform_norm = "vocab_layer_norm",
                                .decoder = "vocab_projector",
                                .decoder_bias = "vocab_projector.bias",
                                .pooler = "pre_classifier",
                                .classifier = "classifier",
                                .pooler_activation = Activation::kRelu,
                                .width_key = "dim",
                                .layers_key = "n_layers",
                                .heads_key = "n_heads",
                                .inner_key = "hidden_dim",
                                .activation_key = "activation"};

constexpr Family kGpt2 = {.model_type = "gpt2",
                          .prefixes = {"transformer.", ""},
                          .causal = true,
                          .transposed = true,
                          .words = "wte",
                          .position_table = "wpe.weight",
                          .layer = "h.{layer}.",
                          .query = "attn.c_attn",
                          .attention_out = "attn.c_proj",
                          .attention_norm = "ln_1",
                          .up = "mlp.c_fc",
                          .down = "mlp.c_proj",
                          .ffn_norm = "ln_2",
                          .final_norm = "ln_f",
                          .decoder = "lm_head",
                          .width_key = "n_embd",
                          .layers_key = "n_layer",
                          .heads_key = "n_head",
                          .inner_key = "n_inner",
                          .positions_key = "n_positions",
                          .epsilon_key = "layer_norm_epsilon",
                          .activation_key = "activation_function",
                          .activation = "gelu_new",
                          .epsilon = 1e-5,
                          .inner_per_width = 4};

Family Llama(const char* model_type) {
  return {.model_type = model_type,
          .prefixes = {"model.", ""},
          .centre = false,
          .causal = true,
          .positions = PositionKind::kRotary,
          .words = "embed_tokens",
          .layer = "layers.{layer}.",
          .query = "self_attn.q_proj",
          .key = "self_attn.k_proj",
          .value = "self_attn.v_proj",
          .attention_out = "self_attn.o_proj",
          .attention_norm = "input_layernorm",
          .gate = "mlp.gate_proj",
          .up = "mlp.up_proj",
          .down = "mlp.down_proj",
          .ffn_norm = "post_attention_layernorm",
          .final_norm = "norm",
          .decoder = "lm_head",
          .epsilon_key = "rms_norm_eps",
          .activation = "silu",
          .epsilon = 1e-6};
}

Family Qwen3() {
  Family family = Llama("qwen3");
  family.query_norm = "self_attn.q_norm";
  family.key_norm = "self_attn.k_norm";
  return family;
}

constexpr Family kVit = {.model_type = "vit",
                         .prefixes = {"vit.", ""},
                         .patches = "embeddings.patch_embeddings.projection",
                         .class_token = "embeddings.cls_token",
                         .position_table = "embeddings.position_embeddings",
                         .layer = "encoder.layer.{layer}.",
                         .query = "attention.attention.query",
                         .key = "attention.attention.key",
                         .value = "attention.attention.value",
                         .attention_out = "attention.output.dense",
                         .attention_norm = "layernorm_before",
                         .up = "intermediate.dense",
                         .down = "output.dense",
                         .ffn_norm = "layernorm_after",
                         .final_norm = "layernorm",
                         .classifier = "classifier"};

// The encoder alone.
constexpr Family kT5 = {
    .model_type = "t5",
    .prefixes = {"", "transformer."},
    .centre = false,
    .scaled = false,
    .positions = PositionKind::kRelative,
    .words = "shared",
    .words_alias = "encoder.embed_tokens",
    .layer = "encoder.block.{layer}.",
    .query = "layer.0.SelfAttention.q",
    .key = "layer.0.SelfAttention.k",
    .value = "layer.0.SelfAttention.v",
    .attention_out = "layer.0.SelfAttention.o",
    .attention_norm = "layer.0.layer_norm",
    .gate = "layer.1.DenseReluDense.wi_0",
    .up = "layer.1.DenseReluDense.wi_1",
    .plain = "layer.1.DenseReluDense.wi",
    .down = "layer.1.DenseReluDense.wo",
    .ffn_norm = "layer.1.layer_norm",
    .relative_bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
    .final_norm = "encoder.final_layer_norm",
    .width_key = "d_model",
    .layers_key = "num_layers",
    .heads_key = "num_heads",
    .inner_key = "d_ff",
    .epsilon_key = "layer_norm_epsilon",
    .epsilon = 1e-6};

// --- config.json --------------------------------------------------------------------------------

absl::Status Wrong(absl::string_view key, absl::string_view what) {
  return absl::FailedPreconditionError(absl::StrCat("config.json: ", key, " ", what));
}
absl::Status Unknown(absl::string_view key, const json& value) {
  return Wrong(key, absl::StrCat("is ", value.dump(), ", which a forward pass here does not know"));
}

class Config {
 public:
  explicit Config(const json& object) : object_(object) {}

  // Null when it is absent or null.
  const json* Find(const char* key) const {
    const auto found = object_.find(key);
    return found == object_.end() || found->is_null() ? nullptr : &*found;
  }

  absl::StatusOr<int64_t> Integer(const char* key, int64_t least, int64_t most) const {
    const json* const value = Find(key);
    if (value == nullptr) return Wrong(key, "is missing");
    if (!value->is_number_integer()) return Wrong(key, "must be an integer");
    const bool fits =
        !value->is_number_unsigned() ||
        value->get<uint64_t>() <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
    const int64_t number = fits ? value->get<int64_t>() : -1;
    if (!fits || number < least || number > most) {
      return Wrong(key,
                   absl::StrCat("is ", value->dump(), "; it must be in ", least, " to ", most));
    }
    return number;
  }
  absl::StatusOr<int64_t> IntegerOr(const char* key, int64_t least, int64_t most,
                                    int64_t absent) const {
    if (Find(key) == nullptr) return absent;
    return Integer(key, least, most);
  }
  absl::StatusOr<double> NumberOr(const char* key, double absent) const {
    const json* const value = Find(key);
    if (value == nullptr) return absent;
    if (!value->is_number()) return Wrong(key, "must be a number");
    const double number = value->get<double>();
    if (!(number > 0) || !std::isfinite(number)) return Wrong(key, "must be positive");
    return number;
  }
  absl::StatusOr<bool> BoolOr(const char* key, bool absent) const {
    const json* const value = Find(key);
    if (value == nullptr) return absent;
    if (!value->is_boolean()) return Wrong(key, "must be true or false");
    return value->get<bool>();
  }
  absl::StatusOr<std::string> TextOr(const char* key, absl::string_view absent) const {
    const json* const value = Find(key);
    if (value == nullptr) return std::string(absent);
    if (!value->is_string()) return Wrong(key, "must be a text");
    return value->get<std::string>();
  }
  // A setting under which results would be others.
  absl::Status Want(const char* key, bool wanted) const {
    ASSIGN_OR_RETURN(const bool value, BoolOr(key, wanted));
    return value == wanted ? absl::OkStatus() : Unknown(key, json(value));
  }

 private:
  const json& object_;
};

absl::StatusOr<Activation> ParseActivation(absl::string_view key, const std::string& name) {
  if (name == "gelu" || name == "gelu_python") return Activation::kGelu;
  if (name == "gelu_new" || name == "gelu_pytorch_tanh" || name == "gelu_fast") {
    return Activation::kGeluTanh;
  }
  if (name == "quick_gelu") return Activation::kQuickGelu;
  if (name == "relu") return Activation::kRelu;
  if (name == "silu" || name == "swish") return Activation::kSilu;
  if (name == "tanh") return Activation::kTanh;
  return Unknown(key, json(name));
}

// The head, by the class's name.
absl::StatusOr<HeadKind> ParseHead(const Config& config) {
  const json* const names = config.Find("architectures");
  if (names == nullptr) return HeadKind::kNone;
  if (!names->is_array() || names->size() != 1 || !(*names)[0].is_string()) {
    return Wrong("architectures", "must be a list of one name");
  }
  const std::string name = (*names)[0].get<std::string>();
  if (absl::EndsWith(name, "ForMaskedLM") || absl::EndsWith(name, "ForPreTraining")) {
    return HeadKind::kMasked;
  }
  if (absl::EndsWith(name, "ForCausalLM") || absl::EndsWith(name, "GPT2LMHeadModel")) {
    return HeadKind::kCausal;
  }
  if (absl::EndsWith(name, "ForSequenceClassification") ||
      absl::EndsWith(name, "ForImageClassification")) {
    return HeadKind::kClassifier;
  }
  return HeadKind::kNone;
}

// Rotary frequencies, by the formulas that config.json's kinds stand for: linear interpolation,
// Llama 3's by wavelength, and YaRN (arXiv 2309.00071, with its attention factor). Of `dynamic`
// only lengths beyond the trained ones, which are refused anyway, have others than the default.
absl::Status ParseRotary(const Config& config, NetworkShape& shape) {
  // Newer files have one object of all settings; older ones rope_theta, and an object of scaling.
  const json* object = config.Find("rope_parameters");
  const bool one_object = object != nullptr;
  const char* const key = one_object ? "rope_parameters" : "rope_scaling";
  if (!one_object) object = config.Find("rope_scaling");
  static const json* const empty = new json(json::object());
  if (object == nullptr) object = empty;
  if (!object->is_object()) return Wrong(key, "must be an object");
  if (!object->empty() && std::all_of(object->begin(), object->end(),
                                      [](const json& value) { return value.is_object(); })) {
    return Wrong(key,
                 "has settings for each kind of layer, which a forward pass here does not know");
  }
  const Config rope(*object);
  ASSIGN_OR_RETURN(const double older_base, config.NumberOr("rope_theta", 10000));
  ASSIGN_OR_RETURN(const double base, rope.NumberOr("rope_theta", older_base));
  ASSIGN_OR_RETURN(const double whole, config.NumberOr("partial_rotary_factor", 1));
  ASSIGN_OR_RETURN(const double part, rope.NumberOr("partial_rotary_factor", whole));
  const int64_t columns = static_cast<int64_t>(static_cast<double>(shape.head) * part);
  if (columns < 2 || columns % 2 != 0 || columns > shape.head) {
    return Wrong(key, absl::StrCat("rotates ", columns, " of a head's ", shape.head, " columns"));
  }
  ASSIGN_OR_RETURN(const std::string older_kind, rope.TextOr("type", "default"));
  ASSIGN_OR_RETURN(const std::string kind, rope.TextOr("rope_type", older_kind));
  ASSIGN_OR_RETURN(const double factor, rope.NumberOr("factor", 1));

  std::vector<double> frequencies;
  for (int64_t i = 0; i < columns; i += 2) {
    frequencies.push_back(std::pow(base, -static_cast<double>(i) / static_cast<double>(columns)));
  }
  ASSIGN_OR_RETURN(const double trained, rope.NumberOr("original_max_position_embeddings",
                                                       static_cast<double>(shape.positions)));
  if (kind == "linear") {
    for (double& frequency : frequencies) frequency /= factor;
  } else if (kind == "llama3") {
    ASSIGN_OR_RETURN(const double low, rope.NumberOr("low_freq_factor", 1));
    ASSIGN_OR_RETURN(const double high, rope.NumberOr("high_freq_factor", 4));
    for (double& frequency : frequencies) {
      const double turns = trained * frequency / (2 * std::numbers::pi);  // in the trained length
      const double kept = turns <= low ? 0 : turns >= high ? 1 : (turns - low) / (high - low);
      frequency *= kept + (1 - kept) / factor;
    }
  } else if (kind == "yarn") {
    ASSIGN_OR_RETURN(const double fast, rope.NumberOr("beta_fast", 32));
    ASSIGN_OR_RETURN(const double slow, rope.NumberOr("beta_slow", 1));
    ASSIGN_OR_RETURN(const bool truncate, rope.BoolOr("truncate", true));
    // The pair that turns so often in the trained length.
    const auto pair_of = [&](double turns) {
      return static_cast<double>(columns) * std::log(trained / (turns * 2 * std::numbers::pi)) /
             (2 * std::log(base));
    };
    double first = pair_of(fast), last = pair_of(slow);
    if (truncate) first = std::floor(first), last = std::ceil(last);
    first = std::max(first, 0.0);
    last = std::min(last, static_cast<double>(columns - 1));
    if (first == last) last += 0.001;
    for (size_t i = 0; i < frequencies.size(); ++i) {
      const double scaled = std::clamp((static_cast<double>(i) - first) / (last - first), 0.0, 1.0);
      frequencies[i] *= (1 - scaled) + scaled / factor;
    }
    const auto temperature = [&](double scale) {
      return factor <= 1 ? 1 : 0.1 * scale * std::log(factor) + 1;
    };
    double attention = temperature(1);
    if (rope.Find("mscale") != nullptr && rope.Find("mscale_all_dim") != nullptr) {
      ASSIGN_OR_RETURN(const double over, rope.NumberOr("mscale", 1));
      ASSIGN_OR_RETURN(const double under, rope.NumberOr("mscale_all_dim", 1));
      attention = temperature(over) / temperature(under);
    }
    ASSIGN_OR_RETURN(attention, rope.NumberOr("attention_factor", attention));
    shape.rotary_scale = static_cast<float>(attention);
  } else if (kind != "default" && kind != "dynamic") {
    return Unknown(absl::StrCat(key, ".rope_type"), json(kind));
  }
  shape.frequencies.assign(frequencies.begin(), frequencies.end());
  return absl::OkStatus();
}

// Which layers see only the nearest keys.
absl::Status ParseWindows(const Config& config, NetworkShape& shape) {
  shape.windows.assign(shape.layers, 0);
  ASSIGN_OR_RETURN(const int64_t window,
                   config.IntegerOr("sliding_window", 1, std::numeric_limits<int32_t>::max(), 0));
  const json* const types = config.Find("layer_types");
  if (types == nullptr) {
    // Mistral has no switch; in Qwen's files the window counts only when it is on, from
    // max_window_layers on.
    const bool qwen = absl::StartsWith(shape.family->model_type, "qwen");
    ASSIGN_OR_RETURN(const bool on, config.BoolOr("use_sliding_window", !qwen));
    ASSIGN_OR_RETURN(const int64_t first,
                     config.IntegerOr("max_window_layers", 0, kMostLayers, qwen ? 28 : 0));
    if (window == 0 || !on) return absl::OkStatus();
    for (int64_t layer = qwen ? first : 0; layer < shape.layers; ++layer) {
      shape.windows[layer] = window;
    }
    return absl::OkStatus();
  }
  if (!types->is_array() || static_cast<int64_t>(types->size()) != shape.layers) {
    return Wrong("layer_types", absl::StrCat("must be a list of ", shape.layers, " names"));
  }
  for (int64_t layer = 0; layer < shape.layers; ++layer) {
    const json& type = (*types)[layer];
    if (type == "full_attention") continue;
    if (type != "sliding_attention") return Unknown("layer_types", type);
    if (window == 0) return Wrong("sliding_window", "is missing");
    shape.windows[layer] = window;
  }
  return absl::OkStatus();
}

// One number for both sides, or [height, width].
absl::Status ParseSides(const Config& config, const char* key, int64_t* height, int64_t* width) {
  const json* const value = config.Find(key);
  if (value != nullptr && value->is_array() && value->size() == 2) {
    const json sides = {{"height", (*value)[0]}, {"width", (*value)[1]}};
    ASSIGN_OR_RETURN(*height, Config(sides).Integer("height", 1, kMostSide));
    ASSIGN_OR_RETURN(*width, Config(sides).Integer("width", 1, kMostSide));
    return absl::OkStatus();
  }
  ASSIGN_OR_RETURN(*height, config.Integer(key, 1, kMostSide));
  *width = *height;
  return absl::OkStatus();
}

absl::Status ParseFeedForward(const Config& config, NetworkShape& shape) {
  const Family& family = *shape.family;
  const bool t5 = family.positions == PositionKind::kRelative;
  if (!t5) {
    shape.gated = family.gate != nullptr;
    ASSIGN_OR_RETURN(const std::string name,
                     config.TextOr(family.activation_key, family.activation));
    ASSIGN_OR_RETURN(shape.activation, ParseActivation(family.activation_key, name));
    return absl::OkStatus();
  }
  // "relu", or "gated-gelu", which means the tanh formula.
  ASSIGN_OR_RETURN(std::string name, config.TextOr("feed_forward_proj", "relu"));
  shape.gated = absl::StartsWith(name, "gated-");
  if (shape.gated) name = name == "gated-gelu" ? "gelu_new" : name.substr(6);
  ASSIGN_OR_RETURN(shape.activation, ParseActivation("feed_forward_proj", name));
  return absl::OkStatus();
}

absl::Status ParseEmbedding(const Config& config, NetworkShape& shape) {
  const Family& family = *shape.family;
  if (family.patches != nullptr) {
    RETURN_IF_ERROR(ParseSides(config, "image_size", &shape.image_height, &shape.image_width));
    RETURN_IF_ERROR(ParseSides(config, "patch_size", &shape.patch_height, &shape.patch_width));
    ASSIGN_OR_RETURN(shape.channels, config.IntegerOr("num_channels", 1, kMostChannels, 3));
    if (shape.image_height % shape.patch_height != 0 ||
        shape.image_width % shape.patch_width != 0) {
      return Wrong("image_size", "is not a multiple of patch_size");
    }
    shape.position_rows = shape.tokens_of_image();
    return absl::OkStatus();
  }
  ASSIGN_OR_RETURN(shape.vocabulary,
                   config.Integer("vocab_size", 1, std::numeric_limits<int32_t>::max()));
  if (family.positions != PositionKind::kRelative) {
    ASSIGN_OR_RETURN(shape.positions,
                     config.Integer(family.positions_key, 1, std::numeric_limits<int32_t>::max()));
  }
  if (family.types != nullptr) {
    ASSIGN_OR_RETURN(shape.types, config.IntegerOr("type_vocab_size", 1,
                                                   std::numeric_limits<int32_t>::max(), 2));
  }
  if (const json* const padding = config.Find("pad_token_id");
      padding != nullptr && padding->is_number_integer()) {
    shape.padding = static_cast<int32_t>(padding->get<int64_t>());
  }
  shape.position_rows = shape.positions;
  if (family.positions_skip_padding) {
    if (shape.padding < 0)
      return Wrong("pad_token_id", "is missing: positions are counted from it");
    shape.first_position = int64_t{shape.padding} + 1;
    shape.positions -= shape.first_position;
    if (shape.positions < 1) return Wrong(family.positions_key, "leaves no positions");
  }
  return absl::OkStatus();
}

absl::Status Parse(const Config& config, NetworkShape& shape) {
  const Family& family = *shape.family;
  if (config.Find("quantization_config") != nullptr) {
    return Wrong("quantization_config", "is there; quantised weights are not computed with here");
  }
  RETURN_IF_ERROR(config.Want("is_decoder", false));
  RETURN_IF_ERROR(config.Want("add_cross_attention", false));
  RETURN_IF_ERROR(config.Want("attention_k_eq_v", false));
  ASSIGN_OR_RETURN(const std::string embedding,
                   config.TextOr("position_embedding_type", "absolute"));
  if (embedding != "absolute") return Unknown("position_embedding_type", json(embedding));

  ASSIGN_OR_RETURN(shape.head_kind, ParseHead(config));
  ASSIGN_OR_RETURN(shape.width, config.Integer(family.width_key, 1, kMostWidth));
  ASSIGN_OR_RETURN(shape.layers, config.Integer(family.layers_key, 1, kMostLayers));
  ASSIGN_OR_RETURN(shape.heads, config.Integer(family.heads_key, 1, kMostWidth));
  ASSIGN_OR_RETURN(shape.inner, config.IntegerOr(family.inner_key, 1, kMostWidth,
                                                 family.inner_per_width * shape.width));
  if (shape.inner == 0) return Wrong(family.inner_key, "is missing");
  ASSIGN_OR_RETURN(shape.key_heads,
                   config.IntegerOr("num_key_value_heads", 1, kMostWidth, shape.heads));
  if (shape.heads % shape.key_heads != 0) {
    return Wrong("num_key_value_heads", absl::StrCat("is ", shape.key_heads, " for ", shape.heads,
                                                     " query heads, which it does not divide"));
  }
  const char* const head_key = family.positions == PositionKind::kRelative ? "d_kv" : "head_dim";
  if (config.Find(head_key) == nullptr && shape.width % shape.heads != 0) {
    return Wrong(family.heads_key,
                 absl::StrCat("is ", shape.heads, ", which does not divide ", shape.width));
  }
  ASSIGN_OR_RETURN(shape.head,
                   config.IntegerOr(head_key, 1, kMostWidth, shape.width / shape.heads));
  if (shape.heads > kMostWidth / shape.head) return Wrong(family.heads_key, "is too large");
  ASSIGN_OR_RETURN(const double epsilon, config.NumberOr(family.epsilon_key, family.epsilon));
  shape.epsilon = static_cast<float>(epsilon);
  ASSIGN_OR_RETURN(shape.tied, config.BoolOr("tie_word_embeddings", false));
  shape.tie_is_said = config.Find("tie_word_embeddings") != nullptr;

  ASSIGN_OR_RETURN(const bool scaled, config.BoolOr("scale_attn_weights", family.scaled));
  ASSIGN_OR_RETURN(const bool by_layer, config.BoolOr("scale_attn_by_inverse_layer_idx", false));
  for (int64_t layer = 0; layer < shape.layers; ++layer) {
    const double scale = scaled ? 1 / std::sqrt(static_cast<double>(shape.head)) : 1;
    shape.scales.push_back(
        static_cast<float>(by_layer ? scale / static_cast<double>(layer + 1) : scale));
  }
  RETURN_IF_ERROR(ParseFeedForward(config, shape));
  RETURN_IF_ERROR(ParseEmbedding(config, shape));
  RETURN_IF_ERROR(ParseWindows(config, shape));
  if (family.positions == PositionKind::kRotary) return ParseRotary(config, shape);
  if (family.positions == PositionKind::kRelative) {
    ASSIGN_OR_RETURN(shape.buckets,
                     config.IntegerOr("relative_attention_num_buckets", 4, 1 << 20, 32));
    ASSIGN_OR_RETURN(shape.farthest,
                     config.IntegerOr("relative_attention_max_distance", 1, 1 << 30, 128));
    if (shape.farthest <= shape.buckets / 4) {
      return Wrong("relative_attention_max_distance", "is too small for the number of buckets");
    }
  }
  return absl::OkStatus();
}

}  // namespace

const std::vector<Family>& Families() {
  static const auto* const families = new std::vector<Family>{kBert,
                                                              Roberta("roberta"),
                                                              Roberta("xlm-roberta"),
                                                              Roberta("camembert"),
                                                              kDistilBert,
                                                              kGpt2,
                                                              Llama("llama"),
                                                              Llama("mistral"),
                                                              Llama("qwen2"),
                                                              Qwen3(),
                                                              kVit,
                                                              kT5};
  return *families;
}

const char* HeadName(HeadKind head) {
  switch (head) {
    case HeadKind::kNone:
      return "no head";
    case HeadKind::kMasked:
      return "masked language model";
    case HeadKind::kCausal:
      return "causal language model";
    case HeadKind::kClassifier:
      return "classifier";
  }
  return "";
}

absl::StatusOr<NetworkShape> ParseNetworkShape(absl::string_view config_json) {
  const json object =
      json::parse(config_json.begin(), config_json.end(), nullptr, /*allow_exceptions=*/false);
  if (!object.is_object()) return absl::DataLossError("config.json is not a JSON object");
  const Config config(object);
  ASSIGN_OR_RETURN(const std::string type, config.TextOr("model_type", ""));
  NetworkShape shape;
  std::vector<absl::string_view> known;
  for (const Family& family : Families()) {
    known.push_back(family.model_type);
    if (type == family.model_type) shape.family = &family;
  }
  if (shape.family == nullptr) {
    return Wrong("model_type",
                 absl::StrCat("is \"", type, "\"; the forward pass of these is known: ",
                              absl::StrJoin(known, ", ")));
  }
  RETURN_IF_ERROR(Parse(config, shape));
  return shape;
}

int64_t RelativeBucket(int64_t distance, int64_t buckets, int64_t farthest) {
  // Half of the buckets for keys after the query; of each half, one half for distances one by one
  // and the rest for logarithmically growing ranges.
  const int64_t half = buckets / 2, exact = half / 2;
  const int64_t side = distance > 0 ? half : 0;
  const int64_t apart = std::abs(distance);
  if (apart < exact) return side + apart;
  const auto ratio = [](int64_t a, int64_t b) {
    return static_cast<float>(a) / static_cast<float>(b);
  };
  const float grown =
      std::log(ratio(apart, exact)) /
      static_cast<float>(std::log(static_cast<double>(farthest) / static_cast<double>(exact))) *
      static_cast<float>(half - exact);
  return side + std::min(exact + static_cast<int64_t>(grown), half - 1);
}

}  // namespace pewter
