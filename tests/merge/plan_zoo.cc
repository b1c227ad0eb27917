#include "plan_zoo.h"

#include <filesystem>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"

namespace pewter::testing {
namespace {

namespace fs = std::filesystem;

class Tensors {
 public:
  Tensors& Add(const std::string& name, Shape shape, DType dtype = DType::kF32) {
    list_.push_back(RandomTensor(name, dtype, shape, static_cast<int>(list_.size())));
    return *this;
  }
  Tensors& Ids(const std::string& name, int64_t count, double first = 0) {
    TinyTensor tensor{name, DType::kI64, {1, count}, {}};
    for (int64_t i = 0; i < count; ++i) tensor.values.push_back(first + static_cast<double>(i));
    list_.push_back(std::move(tensor));
    return *this;
  }
  Tensors Without(absl::string_view part) const {
    Tensors result;
    for (const TinyTensor& tensor : list_) {
      if (!absl::StrContains(tensor.name, part)) result.list_.push_back(tensor);
    }
    return result;
  }
  Tensors Renamed(absl::string_view from, absl::string_view to) const {
    Tensors result = *this;
    for (TinyTensor& tensor : result.list_) {
      tensor.name = absl::StrReplaceAll(tensor.name, {{from, to}});
    }
    return result;
  }
  const std::vector<TinyTensor>& list() const { return list_; }

 private:
  std::vector<TinyTensor> list_;
};

// One decoder layer needs no real geometry here: every matrix is [width, width].
Tensors Decoder(int layers, int64_t tokens, int64_t width, DType dtype, bool qkv_bias = false,
                bool all_biases = false) {
  Tensors tensors;
  tensors.Add("model.embed_tokens.weight", {tokens, width}, dtype);
  for (int i = 0; i < layers; ++i) {
    const std::string layer = absl::StrCat("model.layers.", i, ".");
    for (const char* norm : {"input_layernorm", "post_attention_layernorm"}) {
      tensors.Add(absl::StrCat(layer, norm, ".weight"), {width}, dtype);
    }
    for (const char* matrix :
         {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
          "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}) {
      const std::string name = absl::StrCat(layer, matrix);
      tensors.Add(name + ".weight", {width, width}, dtype);
      const bool qkv = !absl::EndsWith(name, "o_proj") && absl::StrContains(name, "self_attn");
      if (all_biases || (qkv_bias && qkv)) tensors.Add(name + ".bias", {width}, dtype);
    }
  }
  tensors.Add("model.norm.weight", {width}, dtype);
  tensors.Add("lm_head.weight", {tokens, width}, dtype);
  return tensors;
}

std::string DecoderConfig(const std::string& name, const std::string& type, int layers,
                          int64_t tokens, const std::string& dtype, const std::string& more = "") {
  return absl::StrCat("{\n  \"architectures\": [\"", name, "\"],\n  \"model_type\": \"", type,
                      "\",\n  \"num_hidden_layers\": ", layers, ",\n  \"vocab_size\": ", tokens,
                      more, ",\n  \"torch_dtype\": \"", dtype, "\"\n}\n");
}

Tensors Bert(const std::string& prefix) {
  Tensors tensors;
  for (const char* name : {"word", "position", "token_type"}) {
    tensors.Add(absl::StrCat(prefix, "embeddings.", name, "_embeddings.weight"), {6, 4});
  }
  const auto linear = [&](const std::string& name, Shape shape) {
    tensors.Add(prefix + name + ".weight", shape).Add(prefix + name + ".bias", {4});
  };
  linear("embeddings.LayerNorm", {4});
  const std::string layer = "encoder.layer.0.";
  for (const char* name : {"attention.self.query", "attention.self.key", "attention.self.value",
                           "attention.output.dense", "intermediate.dense", "output.dense"}) {
    linear(layer + name, {4, 4});
  }
  linear(layer + "attention.output.LayerNorm", {4});
  linear(layer + "output.LayerNorm", {4});
  return tensors;
}

std::string Tokenizer(const std::vector<std::string>& tokens) {
  std::string vocabulary;
  for (size_t i = 0; i < tokens.size(); ++i) {
    absl::StrAppend(&vocabulary, i == 0 ? "" : ", ", "\"", tokens[i], "\": ", i);
  }
  return absl::StrCat("{\"model\": {\"type\": \"BPE\", \"vocab\": {", vocabulary,
                      "}}, \"added_tokens\": []}");
}

}  // namespace

PlanZoo::PlanZoo() : old_path_(fs::current_path()) {
  fs::current_path(folder_.path());
  const auto llama = [](int layers, int64_t tokens, const std::string& dtype) {
    return DecoderConfig("LlamaForCausalLM", "llama", layers, tokens, dtype);
  };
  const Tensors plain = Decoder(2, 6, 4, DType::kF32);
  for (const char* name : {"llama_base", "llama_a", "llama_b"}) {
    Model(name, llama(2, 6, "float32"), plain.list());
    folder_.Write(absl::StrCat(name, "/tokenizer.json"), Tokenizer({"a", "b", "c", "d", "e", "f"}));
    folder_.Write(absl::StrCat(name, "/tokenizer_config.json"), "{}");
  }
  Model("llama_base",
        DecoderConfig("LlamaForCausalLM", "llama", 2, 6, "float32",
                      ",\n  \"bos_token_id\": 1,\n  \"eos_token_id\": [2, 5],\n"
                      "  \"pad_token_id\": 3"),
        plain.list());
  folder_.Write("llama_base/generation_config.json", "{\"bos_token_id\": 1}");
  Model("llama_few", llama(2, 2, "float32"), Decoder(2, 2, 4, DType::kF32).list());
  Model("llama_odd", llama(2, 6, "float32"), plain.list());
  folder_.Write("llama_odd/tokenizer.json", "{\"model\": {\"vocab\": {\"a\": 1, \"b\": 1}}}");
  folder_.Write("llama_few/tokenizer.json", Tokenizer({"b", "<pad>"}));
  folder_.Write("llama_few/tokenizer_config.json", "{\"pad_token\": \"<pad>\"}");
  Model("llama_3", llama(3, 6, "float32"), Decoder(3, 6, 4, DType::kF32).list());
  Model("llama_bf16", llama(2, 6, "bfloat16"), Decoder(2, 6, 4, DType::kBF16).list());
  Model("llama_tied", llama(2, 6, "float32"), plain.Without("lm_head").list());
  Model("llama_headless", llama(2, 6, "float32"), plain.Without("model.norm").list());
  Model("llama_wide", llama(2, 6, "float32"), Decoder(2, 6, 8, DType::kF32).list());
  Model("llama_vocab8", llama(2, 8, "float32"), Decoder(2, 8, 4, DType::kF32).list());
  folder_.Write("llama_vocab8/tokenizer.json", Tokenizer({"b", "a", "c", "d", "e", "f", "g", "h"}));
  Model("llama_extra", llama(2, 6, "float32"),
        Tensors(plain).Add("model.layers.0.rotary.inv_freq", {2}).Add("adapter.x", {2}).list());
  const auto granite = DecoderConfig("GraniteForCausalLM", "granite", 1, 6, "float32");
  Model("granite_a", granite, Decoder(1, 6, 4, DType::kF32).list());
  Model("granite_b", granite, Decoder(1, 6, 4, DType::kF32, false, true).list());
  Model("granite_c", granite, Decoder(1, 6, 4, DType::kF32, false, true).list());
  for (const char* name : {"qwen2_a", "qwen2_b"}) {
    const std::string types = absl::EndsWith(name, "a") ? "\"a0\", \"a1\"" : "\"b0\", \"b1\"";
    Model(name,
          DecoderConfig("Qwen2ForCausalLM", "qwen2", 2, 6, "float32",
                        absl::StrCat(",\n  \"layer_types\": [", types, "]")),
          Decoder(2, 6, 4, DType::kF32, true).Without("lm_head").list());
  }
  Model("mistral_a", DecoderConfig("MistralForCausalLM", "mistral", 2, 6, "float32"), plain.list());

  Tensors gpt2;
  gpt2.Add("transformer.wte.weight", {6, 4}).Add("transformer.wpe.weight", {6, 4});
  for (const char* name :
       {"ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"}) {
    gpt2.Add(absl::StrCat("transformer.h.0.", name, ".weight"), {4, 4});
    gpt2.Add(absl::StrCat("transformer.h.0.", name, ".bias"), {4});
  }
  gpt2.Add("transformer.ln_f.weight", {4}).Add("transformer.ln_f.bias", {4});
  const std::string gpt2_config =
      "{\"architectures\": [\"GPT2LMHeadModel\"], \"model_type\": \"gpt2\", \"n_layer\": 1, "
      "\"vocab_size\": 6}";
  Model("gpt2_a", gpt2_config, gpt2.list());
  Model("gpt2_short", gpt2_config, gpt2.Renamed("transformer.", "").list());

  const std::string bert =
      "{\"architectures\": [\"BertForMaskedLM\"], \"model_type\": \"bert\", "
      "\"num_hidden_layers\": 1, \"vocab_size\": 6}";
  const Tensors head = Bert("bert.")
                           .Add("cls.predictions.bias", {6})
                           .Add("cls.predictions.transform.dense.weight", {4, 4});
  Model("bert_a", bert, Tensors(head).Ids("bert.embeddings.position_ids", 6).list());
  Model("bert_old", bert,
        Tensors(head)
            .Ids("bert.embeddings.position_ids", 6)
            .Renamed("LayerNorm.weight", "LayerNorm.gamma")
            .Renamed("LayerNorm.bias", "LayerNorm.beta")
            .list());
  Model("bert_ids", bert, Tensors(head).Ids("bert.embeddings.position_ids", 6, 1).list());

  const std::string encoder =
      "{\"architectures\": [\"BertModel\"], \"model_type\": \"bert\", \"num_hidden_layers\": 1, "
      "\"vocab_size\": 6, \"dtype\": \"float32\"}";
  Model("encoder_a", encoder, Bert("").list());
  Model("encoder_b", encoder,
        Bert("bert.")
            .Add("bert.pooler.dense.weight", {4, 4})
            .Add("bert.pooler.dense.bias", {4})
            .list());
  folder_.Write("encoder_a/vocab.txt", "a\nb\nc\nd\ne\nf\n");
  folder_.Write("encoder_a/modules.json",
                "[{\"path\": \"\"}, {\"path\": \"1_Pooling\"}, {\"path\": \"../llama_a\"}]");
  folder_.Write("encoder_a/1_Pooling/config.json", "{}");

  Tensors strange;
  strange.Add("model.decoder.embed_tokens.weight", {6, 4});
  for (int i = 0; i < 2; ++i) {
    strange.Add(absl::StrCat("model.decoder.layers.", i, ".fc1.weight"), {4, 4});
    strange.Add(absl::StrCat("model.decoder.layers.", i, ".fc1.bias"), {4});
  }
  const std::string strange_config =
      DecoderConfig("StrangeForCausalLM", "strange", 2, 6, "float32");
  Model("strange_a", strange_config, strange.list());
  Model("strange_b", strange_config, strange.Without("layers.1.fc1.bias").list());
  Model("strange_head", strange_config, Tensors(strange).Add("lm_head.weight", {6, 4}).list());
  Model("strange_untied",
        DecoderConfig("StrangeForCausalLM", "strange", 2, 6, "float32",
                      ", \"tie_word_embeddings\": false"),
        strange.list());

  const auto mixtral = [&](const std::string& name, int experts, bool fused) {
    Tensors tensors = Decoder(1, 6, 4, DType::kF32).Without(".mlp.");
    const std::string layer = "model.layers.0.";
    if (fused) {
      tensors.Add(layer + "mlp.gate.weight", {experts, 4});
      tensors.Add(layer + "mlp.experts.gate_up_proj", {experts, 8, 4});
      tensors.Add(layer + "mlp.experts.down_proj", {experts, 4, 4});
    } else {
      tensors.Add(layer + "block_sparse_moe.gate.weight", {experts, 4});
      for (int i = 0; i < experts; ++i) {
        for (const char* part : {".w1", ".w2", ".w3"}) {
          tensors.Add(absl::StrCat(layer, "block_sparse_moe.experts.", i, part, ".weight"), {4, 4});
        }
      }
    }
    Model(name, DecoderConfig("MixtralForCausalLM", "mixtral", 1, 6, "float32"), tensors.list());
  };
  mixtral("mixtral_a", 2, false);
  mixtral("mixtral_b", 2, false);
  mixtral("mixtral_three", 3, false);
  mixtral("mixtral_fused", 2, true);

  const auto t5 = [&](const std::string& name, bool gated) {
    Tensors tensors;
    tensors.Add("shared.weight", {6, 4});
    for (const std::string stack : {"encoder", "decoder"}) {
      std::vector<std::string> parts = {"SelfAttention", "EncDecAttention", "DenseReluDense"};
      if (stack == "encoder") parts.erase(parts.begin() + 1);
      for (int layer : {0, 1}) {
        for (size_t i = 0; i < parts.size(); ++i) {
          const std::string at = absl::StrCat(stack, ".block.", layer, ".layer.", i, ".");
          tensors.Add(at + "layer_norm.weight", {4});
          std::vector<std::string> matrices = {"q", "k", "v", "o"};
          if (i + 1 == parts.size()) matrices = {"wi", "wo"};
          if (i + 1 == parts.size() && gated) matrices = {"wi_0", "wi_1", "wo"};
          for (const std::string& matrix : matrices) {
            tensors.Add(absl::StrCat(at, parts[i], ".", matrix, ".weight"), {4, 4});
          }
        }
      }
      tensors.Add(stack + ".final_layer_norm.weight", {4});
    }
    Model(name,
          "{\"architectures\": [\"T5ForConditionalGeneration\"], \"model_type\": \"t5\", "
          "\"num_layers\": 2, \"num_decoder_layers\": 2, \"vocab_size\": 6}",
          tensors.list());
  };
  t5("t5_a", false);
  t5("t5_gated", true);

  Tensors stacks;
  stacks.Add("shared.weight", {6, 4});
  stacks.Add("encoder.block.0.wi.weight", {4, 4}).Add("encoder.block.1.wi.weight", {4, 4});
  stacks.Add("decoder.block.0.wi.weight", {4, 4});
  Model("t5ish", "{\"architectures\": [\"T5ish\"], \"model_type\": \"t5ish\"}", stacks.list());

  WriteSafetensors(folder_ / "raw_a.safetensors",
                   Tensors().Add("w", {2, 3}).Ids("steps", 1).list());
  WriteSafetensors(folder_ / "raw_b.safetensors",
                   Tensors().Add("w", {2, 3}).Ids("steps", 1).list());
  WriteSafetensors(folder_ / "raw_more.safetensors",
                   Tensors().Add("w", {2, 3}).Ids("steps", 1).Add("only_here", {2}).list());
}

PlanZoo::~PlanZoo() { fs::current_path(old_path_); }

void PlanZoo::Model(const std::string& name, const std::string& config,
                    const std::vector<TinyTensor>& tensors) {
  folder_.Write(name + "/config.json", config);
  WriteSafetensors(folder_ / (name + "/model.safetensors"), tensors);
}

}  // namespace pewter::testing
