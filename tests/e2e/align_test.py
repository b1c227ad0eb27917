"""pewter align, and recipes with `align`, as a user sees them: a model in another order is put in order again.

Needs what cli_test.py needs.
"""

import json

import numpy as np
import pytest

from cli_test import DONE, PEWTER, USAGE, read_safetensors, write_llama, write_safetensors
import subprocess

HEADS, SHARED, DIM = 4, 2, 8  # of cli_test's Llama: query heads, those that share keys and values, features


def run(*arguments):
    return subprocess.run([PEWTER, *map(str, arguments)], capture_output=True, text=True, timeout=120)


def shuffled(tensors, random):
    """The same function with its features in another order, by the definition and not by the program."""
    residual = random.permutation(tensors["model.norm.weight"].shape[0])
    result = {}
    orders = {}
    for layer in range(2):
        groups = random.permutation(HEADS // SHARED)
        queries = np.concatenate([group * SHARED + random.permutation(SHARED) for group in groups])
        inside = [random.permutation(DIM) for _ in groups]
        whole = lambda heads: np.concatenate([head * DIM + np.arange(DIM) for head in heads])
        orders[layer] = {
            "q_proj": whole(queries),
            "k_proj": whole(groups),
            "v_proj": np.concatenate([group * DIM + order for group, order in zip(groups, inside)]),
            "o_proj": np.concatenate([head * DIM + inside[slot // SHARED] for slot, head in enumerate(queries)]),
            "ffn": random.permutation(tensors["model.layers.0.mlp.up_proj.weight"].shape[0]),
        }
    for name, value in tensors.items():
        words = name.split(".")
        order = orders[int(words[2])] if words[1] == "layers" else None
        if value.ndim == 1:
            result[name] = value[residual]
        elif words[-2] in ("embed_tokens", "lm_head"):
            result[name] = value[:, residual]
        elif words[-2] in ("q_proj", "k_proj", "v_proj"):
            result[name] = value[order[words[-2]]][:, residual]
        elif words[-2] == "o_proj":
            result[name] = value[residual][:, order["o_proj"]]
        elif words[-2] == "down_proj":
            result[name] = value[residual][:, order["ffn"]]
        else:
            result[name] = value[order["ffn"]][:, residual]
        result[name] = np.ascontiguousarray(result[name])
    return result


@pytest.fixture
def models(tmp_path):
    tensors = write_llama(tmp_path / "a", 1)
    write_llama(tmp_path / "b", 2)
    write_safetensors(tmp_path / "b/model.safetensors", shuffled(tensors, np.random.default_rng(3)))
    return tensors


def test_a_model_is_put_in_order(models, tmp_path):
    done = run("align", tmp_path / "a", tmp_path / "b", tmp_path / "out", "-o", "json")
    assert done.returncode == DONE, done.stderr
    aligned = read_safetensors(tmp_path / "out/model.safetensors")
    assert aligned.keys() == models.keys()
    for name, want in models.items():
        np.testing.assert_array_equal(aligned[name], want, err_msg=name)
    manifest = json.loads((tmp_path / "out/pewter_manifest.json").read_text())
    (alignment,) = manifest["alignments"]
    assert alignment["file"] == "alignment.safetensors" and (tmp_path / "out/alignment.safetensors").exists()
    assert abs(alignment["report"]["squared_distance_after"]) < 1e-6 * alignment["report"]["squared_distance_before"]
    assert (tmp_path / "out/tokenizer_config.json").exists()
    # What else lies there is not of the model, for loaders that take every safetensors file.
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: "model.safetensors" for name in models}


def test_a_merge_is_one_of_aligned_models(models, tmp_path):
    recipe = tmp_path / "recipe.yml"
    text = f"merge_method: slerp\nbase_model: {tmp_path}/a\nmodels: [{{model: {tmp_path}/a}}, {{model: {tmp_path}/b}}]\nparameters: {{t: 0.3}}\n"
    recipe.write_text(f"{text}align: {{reference: {tmp_path}/a}}\n")
    planned = run("plan", recipe)
    assert planned.returncode == DONE, planned.stderr
    assert f"Aligned       {tmp_path}/b with {tmp_path}/a (permutation by weights" in planned.stdout
    done = run("merge", recipe, tmp_path / "out")
    assert done.returncode == DONE, done.stderr
    for name, merged in read_safetensors(tmp_path / "out/model.safetensors").items():
        np.testing.assert_allclose(merged, models[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_what_is_refused(models, tmp_path):
    done = run("align", tmp_path / "a", tmp_path / "b", tmp_path / "out", "--method", "cca")
    assert done.returncode == USAGE and "`method: cca` needs data" in done.stderr
    done = run("align", tmp_path / "a", tmp_path / "b", tmp_path / "out", "--groups", "ffn,tails")
    assert done.returncode == USAGE and "one of ffn, heads, residual" in done.stderr
    config = json.loads((tmp_path / "b/config.json").read_text())
    (tmp_path / "b/config.json").write_text(json.dumps({**config, "num_attention_heads": 8, "num_key_value_heads": 4}))
    done = run("align", tmp_path / "a", tmp_path / "b", tmp_path / "out")
    assert done.returncode != DONE and "attention heads differ" in done.stderr
    assert not (tmp_path / "out").exists()
