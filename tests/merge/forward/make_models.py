"""Tiny random models and what PyTorch makes of them: the references of forward_test.

    python3 make_models.py      # needs torch, transformers and safetensors

Writes NAME/config.json, NAME/model.safetensors and NAME/io.safetensors (input_ids or pixel_values,
attention_mask, `outputs` of every token, with zeros where the mask is 0) beside itself.
"""

import json
import pathlib

import torch
import transformers as tf
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).parent
SMALL = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, vocab_size=24)
BERT = dict(SMALL, max_position_embeddings=16, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0)
ROBERTA = dict(BERT, pad_token_id=1, type_vocab_size=1)
LLAMA = dict(SMALL, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32, head_dim=4)
DISTIL = dict(
    vocab_size=24, max_position_embeddings=16, dim=8, n_layers=2, n_heads=2, hidden_dim=12, dropout=0.0,
    attention_dropout=0.0,
)
T5 = dict(
    vocab_size=24, d_model=8, d_kv=4, num_heads=2, d_ff=12, num_layers=2, num_decoder_layers=1,
    relative_attention_num_buckets=8, relative_attention_max_distance=10, decoder_start_token_id=0,
)


def rope(**settings):
    return {"rope_parameters": dict({"rope_theta": 100.0}, **settings)}


MODELS = {
    "bert": (tf.BertForMaskedLM, tf.BertConfig(**BERT, hidden_act="gelu_new")),
    "bert_classifier": (tf.BertForSequenceClassification, tf.BertConfig(**BERT, num_labels=3)),
    "roberta": (tf.RobertaForMaskedLM, tf.RobertaConfig(**ROBERTA)),
    "roberta_classifier": (tf.RobertaForSequenceClassification, tf.RobertaConfig(**ROBERTA, num_labels=3)),
    "distilbert": (tf.DistilBertForMaskedLM, tf.DistilBertConfig(**DISTIL)),
    "distilbert_classifier": (
        tf.DistilBertForSequenceClassification,
        tf.DistilBertConfig(**DISTIL, num_labels=3, seq_classif_dropout=0.0),
    ),
    "gpt2": (
        tf.GPT2LMHeadModel,
        tf.GPT2Config(
            vocab_size=24, n_positions=16, n_embd=8, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, scale_attn_by_inverse_layer_idx=True,
        ),
    ),
    "llama3": (
        tf.LlamaForCausalLM,
        tf.LlamaConfig(
            **LLAMA,
            attention_bias=True,
            mlp_bias=True,
            **rope(
                rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=16,
            ),
        ),
    ),
    "llama_linear": (tf.LlamaForCausalLM, tf.LlamaConfig(**LLAMA, **rope(rope_type="linear", factor=2.0))),
    "mistral_window": (tf.MistralForCausalLM, tf.MistralConfig(**LLAMA, sliding_window=3, **rope(rope_type="default"))),
    "qwen2_yarn": (
        tf.Qwen2ForCausalLM,
        tf.Qwen2Config(
            **LLAMA,
            tie_word_embeddings=True,
            **rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=8, beta_fast=2.0, beta_slow=0.5),
        ),
    ),
    "qwen3": (tf.Qwen3ForCausalLM, tf.Qwen3Config(**LLAMA)),
    "vit": (
        tf.ViTForImageClassification,
        tf.ViTConfig(
            hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, image_size=8,
            patch_size=4, num_channels=2, num_labels=3,
        ),
    ),
    "t5_encoder": (tf.T5EncoderModel, tf.T5Config(**T5, feed_forward_proj="relu")),
    "t5_gated_encoder": (tf.T5EncoderModel, tf.T5Config(**T5, feed_forward_proj="gated-gelu")),
}


def make(name, kind, config):
    torch.manual_seed(sum(name.encode()))
    model = kind(config).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            norm = value.dim() == 1 and key.endswith("weight")
            value.copy_(torch.randn_like(value) * (0.2 if norm else 0.4) + (1.0 if norm else 0.0))
        model.tie_weights()
        if name == "vit":
            inputs = {"pixel_values": torch.randn(3, 2, 8, 8)}
            outputs = model(**inputs).logits
        else:
            ids = torch.randint(2, 24, (4, 12))
            mask = torch.ones_like(ids)
            # Padding behind, and in front where it is the model's own way; a hole in the middle.
            mask[1, 9:] = 0
            mask[2, 5:] = 0
            mask[3, 4] = 0
            if "roberta" in name:
                ids[mask == 0] = 1
            inputs = {"input_ids": ids, "attention_mask": mask}
            if kind is tf.BertForMaskedLM:
                inputs["token_type_ids"] = torch.arange(12).ge(6).long().expand(4, 12).contiguous()
            result = model(**inputs)
            outputs = result.last_hidden_state if "encoder" in name else result.logits
            if outputs.dim() == 3:
                outputs = outputs * mask[:, :, None]
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    model.save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    settings.pop("transformers_version", None)
    (folder / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
    (folder / "generation_config.json").unlink(missing_ok=True)
    tensors = {key: value.contiguous() for key, value in inputs.items()}
    save_file(dict(tensors, outputs=outputs.contiguous()), folder / "io.safetensors")


if __name__ == "__main__":
    for case, (kind, config) in MODELS.items():
        make(case, kind, config)
