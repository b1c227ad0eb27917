#!/usr/bin/env python3
"""Makes the adapters of this folder: LoRA of all-MiniLM-L6-v2 from encoders that were fine-tuned from it.

TASKS holds one folder a task with `delta.safetensors`: for every tensor of the encoder the difference of the
fine-tuned model from the pretrained one, a matrix W as int8 `W.q` and row scales `W.scale`, a vector as `W.delta`.
Each linear layer's difference is replaced by its best approximation of the given rank (SVD), B A = U sqrt(S) sqrt(S) V^T.
Embeddings, biases and layer norms are left out. Prints what share of the differences' energy (sum of squares) stays.

Needs numpy and safetensors.  Usage: make_adapters.py TASKS OUT [--rank 16]
"""
import argparse
import json
import pathlib
import re

import numpy as np
from safetensors.numpy import load_file, save_file

LINEAR = re.compile(r"(encoder\.layer\.\d+\.(?:attention\.self\.(?:query|key|value)|attention\.output\.dense"
                    r"|intermediate\.dense|output\.dense))\.weight\.q")


def make_adapter(task, out, rank):
    """Writes one adapter; returns its bytes, the linear layers' kept and whole energy, and everything's energy."""
    delta = load_file(task / "delta.safetensors")
    factors, kept, linear, everything = {}, 0.0, 0.0, 0.0
    for name, values in sorted(delta.items()):
        if name.endswith(".scale"):
            continue
        matrix = values.astype(np.float64)
        if name.endswith(".q"):
            matrix *= delta[name[:-2] + ".scale"].astype(np.float64)[:, None]
        everything += float((matrix**2).sum())
        layer = LINEAR.fullmatch(name)
        if not layer:
            continue
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
        # The sign of a pair of singular vectors is free: the largest entry of u is made positive.
        signs = np.sign(u[np.abs(u).argmax(axis=0), np.arange(len(s))])
        root = np.sqrt(s[:rank]) * signs[:rank]
        b, a = (u[:, :rank] * root).astype(np.float16), (root[:, None] * vt[:rank]).astype(np.float16)
        prefix = f"base_model.model.{layer[1]}"
        factors[f"{prefix}.lora_A.weight"], factors[f"{prefix}.lora_B.weight"] = a, b
        energy = float((matrix**2).sum())
        linear += energy
        kept += energy - float(((matrix - b.astype(np.float64) @ a.astype(np.float64))**2).sum())
    out.mkdir(parents=True, exist_ok=True)
    save_file(factors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    (out / "adapter_config.json").write_text(json.dumps({
        "base_model_name_or_path": "sentence-transformers/all-MiniLM-L6-v2",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": ["intermediate.dense", "key", "output.dense", "query", "value"],
        "task_type": "FEATURE_EXTRACTION",
        "use_rslora": False,
    }, indent=2) + "\n")
    size = sum(file.stat().st_size for file in out.iterdir())
    return size, kept, linear, everything


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    print(f"| adapter | MB | of the linear layers' energy | of the whole difference's energy |\n|---|---|---|---|")
    for task in sorted(file.parent for file in args.tasks.glob("*/delta.safetensors")):
        size, kept, linear, everything = make_adapter(task, args.out / task.name, args.rank)
        print(f"| {task.name} | {size / 1e6:.2f} | {kept / linear:.3f} | {kept / everything:.3f} |")


if __name__ == "__main__":
    main()
