#!/usr/bin/env python3
"""Writes four Llama-shaped bf16 checkpoints for benchmarks: OUT/base and its siblings OUT/ft1, OUT/ft2, OUT/ft3 (in three shards).

The values are random, the structure is that of real fine-tunes: a sibling differs from the base by small steps whose size varies from row to row, in many
tokens' embeddings not at all, and bf16 swallows what is below half a unit in the last place. The share of exact zeros that this leaves in each difference is printed.

The same arguments give the same bytes. One block of rows is in memory at a time. Needs numpy.
"""
import argparse
import json
import pathlib
import struct
import time

import numpy as np

SHAPES = {  # hidden, layers, heads, key-value heads, feed-forward, vocabulary
    "1.1b": (2048, 22, 32, 4, 5632, 32000),  # TinyLlama
    "0.2b": (1024, 12, 16, 4, 2816, 32000),
    "tiny": (64, 2, 4, 2, 176, 512),
}
SIBLINGS = {"ft1": 5e-5, "ft2": 8e-5, "ft3": 1.2e-4}  # typical step
BLOCK = 8 << 20  # elements


def tensors(shape):
    hidden, layers, heads, kv_heads, ffn, vocab = SHAPES[shape]
    kv = hidden // heads * kv_heads
    result = {"lm_head.weight": (vocab, hidden), "model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        result |= {
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "mlp.down_proj.weight": (hidden, ffn),
            prefix + "mlp.gate_proj.weight": (ffn, hidden),
            prefix + "mlp.up_proj.weight": (ffn, hidden),
            prefix + "post_attention_layernorm.weight": (hidden,),
            prefix + "self_attn.k_proj.weight": (kv, hidden),
            prefix + "self_attn.o_proj.weight": (hidden, hidden),
            prefix + "self_attn.q_proj.weight": (hidden, hidden),
            prefix + "self_attn.v_proj.weight": (kv, hidden),
        }
    return dict(sorted(result.items()))


def to_bf16(values):
    """Rounds f32 to nearest even, in place; returns the upper halves."""
    bits = values.view(np.uint32)
    bits += 0x7FFF + ((bits >> 16) & 1)
    return (bits >> 16).astype(np.uint16)


def from_bf16(values):
    return (values.astype(np.uint32) << 16).view(np.float32)


class Writer:
    """One checkpoint, written tensor after tensor in the order of `shapes`."""

    def __init__(self, folder, shapes, shards):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        names, total = list(shapes), sum(2 * int(np.prod(s)) for s in shapes.values())
        groups, size = [[]], 0
        for name in names:
            if size >= total / shards and len(groups) < shards:
                groups.append([])
                size = 0
            groups[-1].append(name)
            size += 2 * int(np.prod(shapes[name]))
        weight_map, self.headers = {}, {}
        for index, group in enumerate(groups):
            file = "model.safetensors" if shards == 1 else f"model-{index + 1:05}-of-{len(groups):05}.safetensors"
            header, at = {"__metadata__": {"format": "pt"}}, 0
            for name in group:
                end = at + 2 * int(np.prod(shapes[name]))
                header[name] = {"dtype": "BF16", "shape": list(shapes[name]), "data_offsets": [at, end]}
                weight_map[name], at = file, end
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            self.headers[file] = struct.pack("<Q", len(text)) + text
        if shards > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        self.weight_map, self.current, self.stream = weight_map, None, None

    def append(self, name, values):
        file = self.weight_map[name]
        if file != self.current:
            self.close()
            self.current, self.stream = file, open(self.folder / file, "wb")
            self.stream.write(self.headers[file])
        self.stream.write(values.tobytes())

    def close(self):
        if self.stream:
            self.stream.close()


def write_small_files(folder, shape):
    hidden, layers, heads, kv_heads, ffn, vocab = SHAPES[shape]
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": ffn,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "vocab_size": vocab, "hidden_act": "silu", "max_position_embeddings": 2048, "initializer_range": 0.02,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False, "bos_token_id": 1,
        "eos_token_id": 2, "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    special = ["<unk>", "<s>", "</s>"]
    words = special + [f"w{i}" for i in range(vocab - len(special))]
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True} for i, t in enumerate(special)],
        "normalizer": None, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": {w: i for i, w in enumerate(words)}, "unk_token": "<unk>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>",
        "model_max_length": 2048}, indent=2))


def make(out, shape, seed, distance):
    shapes = tensors(shape)
    writers = {name: Writer(out / name, shapes, shards=3 if name == "ft3" else 1) for name in ("base", *SIBLINGS)}
    zeros, count = dict.fromkeys(SIBLINGS, 0), 0
    for tensor, (name, dims) in enumerate(shapes.items()):
        columns = int(np.prod(dims[1:]))
        rows_at_once = max(1, BLOCK // columns)
        for block, first in enumerate(range(0, dims[0], rows_at_once)):
            rows = min(rows_at_once, dims[0] - first)
            rng = np.random.Generator(np.random.SFC64([seed, tensor, block]))
            if len(dims) == 1:
                values = 1 + 0.1 * rng.standard_normal((rows, columns), dtype=np.float32)
            else:
                scale = 0.02 * np.exp(0.3 * rng.standard_normal((rows, 1), dtype=np.float32))
                values = rng.standard_normal((rows, columns), dtype=np.float32)
                values *= scale
            base = to_bf16(values)
            writers["base"].append(name, base)
            values = from_bf16(base)
            for sibling, step in SIBLINGS.items():
                scale = distance * step * np.exp(0.5 * rng.standard_normal((rows, 1), dtype=np.float32))
                if name == "model.embed_tokens.weight":  # tokens that the fine-tuning data do not hold
                    scale *= rng.random((rows, 1), dtype=np.float32) < 0.6
                changed = rng.standard_normal((rows, columns), dtype=np.float32)
                changed *= scale
                changed += values
                changed = to_bf16(changed)
                zeros[sibling] += int((changed == base).sum())
                writers[sibling].append(name, changed)
            count += rows * columns
    for name, writer in writers.items():
        writer.close()
        write_small_files(out / name, shape)
    return count, {sibling: share / count for sibling, share in zeros.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--shape", choices=SHAPES, default="1.1b")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--distance", type=float, default=1, help="times the usual steps; 200: siblings as far apart as their weights are large")
    args = parser.parse_args()
    begin = time.monotonic()
    count, zeros = make(args.out, args.shape, args.seed, args.distance)
    report = {"shape": args.shape, "seed": args.seed, "distance": args.distance, "parameters": count,
              "zero_share_of_deltas": {name: round(share, 4) for name, share in zeros.items()}}
    (args.out / "models.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report), f"{time.monotonic() - begin:.1f} s")


if __name__ == "__main__":
    main()
