#!/usr/bin/env python3
"""Writes names.json: what checkpoints of each known architecture call their tensors.

Needs transformers (made with 5.23) and torch. Models are instantiated with few layers on the meta
device, so nothing is downloaded and nothing computed. For every model two lists are made: the names
that save_pretrained gives the files ("stored"), and those of the module tree where they differ
("tree"). Names are folded: "layers.{2}.{weight,bias}" stands for four. All stacks have three layers.

    make_names.py > names.json
"""

import collections
import itertools
import json
import re
import sys

import torch
import transformers
from transformers.core_model_loading import revert_weight_conversion
from transformers.initialization import no_init_weights

LAYERS = {
    "num_hidden_layers": 3,
    "n_layer": 3,
    "n_layers": 3,
    "num_layers": 3,
    "num_decoder_layers": 3,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "depth": 3,
}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
}
PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type",
             "attention_layers")
# What a configuration needs to be made at all.
CONFIG = {
    "Dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "HunYuanDenseV1": {"head_dim": 64},
    "Nemotron": {"num_key_value_heads": 8},
}
# Module trees that no checkpoint has: save_pretrained always undoes these renamings.
FILES_ONLY = {"vit", "dinov2"}


def heads(family, names, **config):
    """The classes FAMILY + NAME with one configuration."""
    return [(family + name, config) for name in names.split()]


TEXT = "ForCausalLM ForSequenceClassification Model"
ENCODER = ("Model ForMaskedLM ForSequenceClassification ForTokenClassification "
           "ForMultipleChoice ForQuestionAnswering")

MODELS = [
    *heads("Llama", TEXT + " ForTokenClassification ForQuestionAnswering"),
    *heads("Llama", "ForCausalLM", attention_bias=True, mlp_bias=True),
    *heads("Mistral", TEXT + " ForTokenClassification"),
    *heads("Mixtral", TEXT),
    *heads("Qwen2", TEXT + " ForTokenClassification"),
    *heads("Qwen2Moe", TEXT),
    *heads("Qwen2Moe", "ForCausalLM", decoder_sparse_step=2, mlp_only_layers=[0]),
    *heads("Qwen3", TEXT),
    *heads("Qwen3Moe", TEXT),
    *heads("Qwen3Next", "ForCausalLM", full_attention_interval=2,
           layer_types=["linear_attention", "full_attention", "linear_attention"]),
    *heads("Gemma", TEXT),
    *heads("Gemma2", TEXT),
    *heads("Gemma3", "ForCausalLM"),
    ("Gemma3TextModel", {}),
    *heads("Phi", TEXT),
    *heads("Phi", "ForCausalLM", qk_layernorm=True),
    *heads("Phi3", TEXT),
    *heads("Phimoe", "ForCausalLM"),
    *heads("GPT2", "LMHeadModel ForSequenceClassification ForTokenClassification Model"),
    *heads("GPTNeoX", TEXT + " ForTokenClassification"),
    *heads("GPTNeo", "ForCausalLM Model"),
    *heads("GPTJ", "ForCausalLM Model"),
    *heads("CodeGen", "ForCausalLM Model"),
    *heads("GPTBigCode", TEXT),
    *heads("GPTBigCode", "ForCausalLM", multi_query=False),
    *heads("Starcoder2", TEXT),
    *heads("Starcoder2", "ForCausalLM", use_bias=False),
    *heads("Falcon", TEXT),
    *heads("Falcon", "ForCausalLM", new_decoder_architecture=True),
    *heads("Falcon", "ForCausalLM", parallel_attn=False, alibi=True, bias=True),
    *heads("Bloom", TEXT),
    *heads("OPT", "ForCausalLM ForSequenceClassification Model"),
    *heads("OPT", "ForCausalLM", word_embed_proj_dim=64),
    *heads("Mpt", "ForCausalLM Model"),
    *heads("Cohere", "ForCausalLM Model"),
    *heads("Cohere", "ForCausalLM", use_qk_norm=True, attention_bias=True),
    *heads("Cohere2", "ForCausalLM Model"),
    *heads("Olmo", "ForCausalLM Model"),
    *heads("Olmo2", "ForCausalLM Model"),
    *heads("Olmo3", "ForCausalLM Model"),
    *heads("Olmoe", "ForCausalLM Model"),
    *heads("Granite", "ForCausalLM Model"),
    *heads("Granite", "ForCausalLM", attention_bias=True, mlp_bias=True),
    *heads("GraniteMoe", "ForCausalLM Model"),
    *heads("GraniteMoeShared", "ForCausalLM", shared_intermediate_size=64),
    *heads("GraniteMoeHybrid", "ForCausalLM Model",
           layer_types=["mamba", "attention", "mamba"]),
    *heads("GraniteMoeHybrid", "ForCausalLM", num_local_experts=0,
           layer_types=["attention", "attention", "mamba"]),
    *heads("StableLm", TEXT),
    *heads("StableLm", "ForCausalLM", use_qkv_bias=True, qk_layernorm=True),
    *heads("Glm", "ForCausalLM Model"),
    *heads("Glm4", "ForCausalLM Model"),
    *heads("Glm4Moe", "ForCausalLM Model", first_k_dense_replace=1),
    *heads("Glm4Moe", "ForCausalLM", use_qk_norm=True),
    *heads("Afmoe", "ForCausalLM Model", num_dense_layers=1),
    *heads("Apertus", "ForCausalLM Model"),
    *heads("Arcee", TEXT),
    *heads("Lfm2", "ForCausalLM Model", layer_types=["conv", "full_attention", "conv"]),
    *heads("Lfm2Moe", "ForCausalLM", layer_types=["conv", "full_attention", "conv"],
           num_dense_layers=1),
    *heads("Mamba", "ForCausalLM Model"),
    *heads("Mamba", "ForCausalLM", use_bias=True),
    *heads("Mamba2", "ForCausalLM Model"),
    *heads("FalconMamba", "ForCausalLM"),
    *heads("Jamba", "ForCausalLM Model"),
    *heads("DeepseekV2", "ForCausalLM Model", first_k_dense_replace=1),
    *heads("DeepseekV2", "ForCausalLM", q_lora_rank=None, first_k_dense_replace=1),
    *heads("DeepseekV3", "ForCausalLM Model", first_k_dense_replace=1),
    *heads("Dots1", "ForCausalLM", first_k_dense_replace=1),
    *heads("Ernie4_5", "ForCausalLM"),
    *heads("Ernie4_5_Moe", "ForCausalLM", moe_layer_start_index=1),
    *heads("HunYuanDenseV1", "ForCausalLM"),
    *heads("Exaone4", "ForCausalLM Model"),
    *heads("SmolLM3", "ForCausalLM Model"),
    *heads("SeedOss", "ForCausalLM"),
    *heads("Nemotron", "ForCausalLM Model"),
    *heads("Helium", "ForCausalLM"),
    *heads("GptOss", "ForCausalLM Model"),
    *heads("DeepseekV3", "ForCausalLM", q_lora_rank=None),
    *heads("XGLM", "ForCausalLM"),
    *heads("Bert", ENCODER + " ForPreTraining ForNextSentencePrediction LMHeadModel"),
    *heads("Roberta", ENCODER + " ForCausalLM"),
    *heads("XLMRoberta", ENCODER),
    *heads("Camembert", ENCODER),
    *heads("DistilBert", ENCODER),
    *heads("Electra", "Model ForMaskedLM ForPreTraining ForSequenceClassification "
           "ForTokenClassification ForMultipleChoice ForQuestionAnswering"),
    *heads("DebertaV2", ENCODER),
    *heads("MPNet", ENCODER),
    *heads("ModernBert", "Model ForMaskedLM ForSequenceClassification ForTokenClassification "
           "ForQuestionAnswering"),
    *heads("T5", "ForConditionalGeneration EncoderModel Model ForSequenceClassification "
           "ForTokenClassification"),
    *heads("T5", "ForConditionalGeneration", feed_forward_proj="gated-gelu",
           tie_word_embeddings=False),
    *heads("MT5", "ForConditionalGeneration EncoderModel Model"),
    *heads("UMT5", "ForConditionalGeneration"),
    *heads("Bart", "ForConditionalGeneration Model ForSequenceClassification"),
    *heads("MBart", "ForConditionalGeneration"),
    *heads("Pegasus", "ForConditionalGeneration"),
    *heads("Whisper", "ForConditionalGeneration Model ForAudioClassification"),
    *heads("ViT", "Model ForImageClassification"),
    *heads("Dinov2", "Model ForImageClassification"),
    *heads("CLIP", "Model VisionModel VisionModelWithProjection TextModel "
           "TextModelWithProjection"),
    *heads("Siglip", "VisionModel"),
    *heads("Mistral3", "ForConditionalGeneration"),
    *heads("Llava", "ForConditionalGeneration"),
    *heads("Llama4", "ForConditionalGeneration ForCausalLM"),
    *heads("Gemma3", "ForConditionalGeneration"),
    *heads("PaliGemma", "ForConditionalGeneration"),
    *heads("Qwen2VL", "ForConditionalGeneration"),
    *heads("Qwen2_5_VL", "ForConditionalGeneration"),
    *heads("Qwen3VL", "ForConditionalGeneration"),
    *heads("Qwen3VLMoe", "ForConditionalGeneration"),
]


def shorten(config, overrides):
    """Few layers and experts, in sub-configurations too."""
    for key, value in {**LAYERS, **EXPERTS}.items():
        if key not in overrides and getattr(config, key, None) is not None:
            try:
                setattr(config, key, value)
            except AttributeError:
                pass  # computed from others
    for key in getattr(config, "sub_configs", {}):
        if getattr(config, key, None) is not None:
            shorten(getattr(config, key), {})
    for key in PER_LAYER:
        value = config.__dict__.get(key)
        if isinstance(value, list) and key not in overrides:
            setattr(config, key, value[:3])


def make(name, overrides):
    cls = getattr(transformers, name)
    needed = next((value for key, value in CONFIG.items() if name.startswith(key)), {})
    config = cls.config_class(**needed)
    shorten(config, overrides)
    for key, value in overrides.items():
        setattr(config, key, value)
    with torch.device("meta"), no_init_weights():
        model = cls(config)
        model.tie_weights()
    return model, config


def tree_names(model):
    """Of the module tree, tied tensors once: under the name that save_pretrained keeps."""
    state = model.state_dict()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for target, source in model.all_tied_weights_keys.items():
        if parameters.get(target) is parameters.get(source, state):
            state.pop(target, None)
    return state


def fold(names):
    """Makes runs of numbers 0..n-1 in the same place one name with {n}."""
    for _ in range(4):
        groups, result = collections.defaultdict(set), []
        for name in names:
            parts = name.split(".")
            numbers = [i for i, part in enumerate(parts) if part.isdigit()]
            if numbers:
                i = numbers[-1]
                groups[(tuple(parts[:i]), tuple(parts[i + 1:]))].add(int(parts[i]))
            else:
                result.append(name)
        for (before, after), values in groups.items():
            if values == set(range(len(values))) and len(values) > 1:
                result.append(".".join([*before, "{%d}" % len(values), *after]))
            else:
                result += [".".join([*before, "<%d>" % value, *after]) for value in values]
        names = result
    stems = collections.defaultdict(list)
    for name in names:
        stem, _, leaf = name.replace("<", "").replace(">", "").rpartition(".")
        stems[stem].append(leaf)
    result = []
    for stem, leaves in stems.items():
        leaf = leaves[0] if len(leaves) == 1 else "{%s}" % ",".join(sorted(leaves))
        result.append(f"{stem}.{leaf}" if stem else leaf)
    return sorted(result)


def unfold(names):
    for name in names:
        pieces = re.split(r"\{([^}]*)\}", name)
        lists = [range(int(text)) if text.isdigit() else text.split(",")
                 for text in pieces[1::2]]
        for values in itertools.product(*lists):
            yield "".join(a + str(b) for a, b in zip(pieces[::2], [*values, ""]))


def main():
    result = []
    for name, overrides in MODELS:
        try:
            model, config = make(name, overrides)
            tree = tree_names(model)
            stored = revert_weight_conversion(model, dict(tree))
        except Exception as error:  # a family that this transformers does not make
            print(f"{name} {overrides}: {type(error).__name__}: {error}", file=sys.stderr)
            if "--keep-going" not in sys.argv:
                raise
            continue
        entry = {"architecture": name, "model_type": config.model_type,
                 "stored": fold(list(stored))}
        assert sorted(unfold(entry["stored"])) == sorted(stored), name
        if set(tree) != set(stored) and config.model_type not in FILES_ONLY:
            entry["tree"] = fold(list(tree))
        result.append(entry)
    lines = [json.dumps(entry, separators=(",", ":")) for entry in result]
    print("[\n" + ",\n".join(lines) + "\n]")


if __name__ == "__main__":
    main()
