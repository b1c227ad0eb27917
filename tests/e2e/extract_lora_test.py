"""pewter extract-lora as a user sees it: the adapter in PEFT's layout, applied to its base again.

Needs what cli_test.py needs.
"""

import json

import numpy as np

from cli_test import DONE, NOT_FOUND, PEWTER, USAGE, read_safetensors, write_safetensors
import subprocess

Q = "model.layers.0.self_attn.q_proj"


def run(*arguments):
    return subprocess.run([PEWTER, *map(str, arguments)], capture_output=True, text=True, timeout=120)


def make_models(folder):
    """A base and a fine-tune whose q_proj differs by a matrix of rank 2."""
    random = np.random.default_rng(0)
    base = {
        f"{Q}.weight": random.standard_normal((24, 16)).astype(np.float32),
        "model.norm.weight": random.standard_normal(16).astype(np.float32),
    }
    tuned = dict(base)
    change = random.standard_normal((24, 2)) @ random.standard_normal((2, 16))
    tuned[f"{Q}.weight"] = (base[f"{Q}.weight"] + change).astype(np.float32)
    for name, tensors in [("base", base), ("tuned", tuned)]:
        (folder / name).mkdir()
        (folder / name / "config.json").write_text('{"architectures": ["OddForCausalLM"]}')
        write_safetensors(folder / name / "model.safetensors", tensors)
    return base, tuned


def test_an_adapter_applied_to_its_base_is_the_model(tmp_path):
    _, tuned = make_models(tmp_path)
    done = run("extract-lora", "--model", tmp_path / "tuned", "--base-model", tmp_path / "base",
               "--out-path", tmp_path / "lora", "--energy", "0.999999")  # fmt: skip
    assert done.returncode == DONE, done.stderr
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (2, 2, "LORA")
    assert config["target_modules"] == ["q_proj"]
    assert (tmp_path / "lora/README.md").exists()
    factors = read_safetensors(tmp_path / "lora/adapter_model.safetensors")
    assert factors[f"base_model.model.{Q}.lora_A.weight"].shape == (2, 16)

    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        f"merge_method: passthrough\nmodels: [{{model: {tmp_path}/base+{tmp_path}/lora}}]\n")
    done = run("merge", recipe, tmp_path / "applied")
    assert done.returncode == DONE, done.stderr
    applied = read_safetensors(tmp_path / "applied/model.safetensors")
    for name, want in tuned.items():
        np.testing.assert_allclose(applied[name], want, atol=2e-5)


def test_the_plan_and_the_messages(tmp_path):
    make_models(tmp_path)
    models = ["extract-lora", "--model", tmp_path / "tuned", "--base-model", tmp_path / "base",
              "--out-path", tmp_path / "lora"]  # fmt: skip
    plan = json.loads(run(*models, "--dry-run", "--max-rank", "3", "-o", "json").stdout)
    (module,) = [tensor for tensor in plan["tensors"] if tensor["method"] == "extract_lora"]
    assert [part["shape"] for part in module["parts"]] == [[3, 16], [24, 3]]
    assert module["parameters"] == {"rank": 3}
    assert not (tmp_path / "lora").exists()

    assert run(*models, "--rank-of", "q_proj").returncode == USAGE
    wrong = run(*models, "--energy", "1.5")
    assert wrong.returncode == USAGE and "--energy" in wrong.stderr
    missing = run(*models[:2], tmp_path / "absent", *models[3:])
    assert missing.returncode == NOT_FOUND and "absent" in missing.stderr
    small = run(*models, "--memory", "100KiB")
    assert small.returncode != DONE and "raise --memory" in small.stderr
