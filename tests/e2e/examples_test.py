"""What the README and examples/ show works as shown."""

import json
import os
import pathlib
import re
import subprocess

import numpy
import pytest
from safetensors.numpy import load_file

ROOT = pathlib.Path(__file__).resolve().parents[2]
PEWTER = pathlib.Path(os.environ.get("PEWTER_BIN", ROOT / "build/bin")) / "pewter"
ENCODER = ROOT / "examples/cache/all-MiniLM-L6-v2"
RECIPES = sorted(file.name for file in (ROOT / "examples/recipes").glob("*.yml"))


def pewter(*arguments):
    return subprocess.run([PEWTER, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)


def merge(recipe, out):
    """Merges an example; skips when its model has not been fetched."""
    path = ROOT / "examples/recipes" / recipe
    if "examples/cache" in path.read_text() and not (ENCODER / "model.safetensors").exists():
        pytest.skip("run examples/fetch first")
    done = pewter("merge", path, out, "--quiet", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    manifest = json.loads((out / "pewter_manifest.json").read_text())
    return load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text()), manifest


def adapted(task):
    """The encoder with an adapter, computed apart from Pewter."""
    tensors = load_file(ENCODER / "model.safetensors")
    factors = load_file(ROOT / "examples/models" / task / "adapter_model.safetensors")
    for key, a in factors.items():
        if ".lora_A." in key:
            name = key.removeprefix("base_model.model.").replace(".lora_A.", ".")
            b = factors[key.replace(".lora_A.", ".lora_B.")]
            tensors[name] = tensors[name] + b.astype(numpy.float32) @ a.astype(numpy.float32)
    return tensors


def test_readme_commands(tmp_path):
    block = re.search(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    commands = block.strip().splitlines()
    assert len(commands) == 5 and commands[0].startswith("script/build")
    for command in commands[1:]:
        command = command.replace("build/bin/pewter", str(PEWTER)).replace("build/tiny", str(tmp_path / "tiny"))
        done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    assert (tmp_path / "tiny/model.safetensors").exists()


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_merges(recipe, tmp_path):
    tensors, config, manifest = merge(recipe, tmp_path / "out")
    assert all(numpy.isfinite(tensor).all() for tensor in tensors.values())
    assert manifest["tensors"] == len(tensors)
    method = re.search(r"merge_method: (\w+)", (ROOT / "examples/recipes" / recipe).read_text())[1]
    assert manifest["method"] == method
    assert config["num_hidden_layers"] == len({re.search(r"layers?\.(\d+)\.", name)[1] for name in tensors if "layer." in name or "layers." in name})


def test_linear_is_the_mean_of_the_adapted_encoders(tmp_path):
    tensors, _, _ = merge("linear.yml", tmp_path / "out")
    models = [adapted(task) for task in ("deb_section", "deb_role", "wn_noun")]
    for name, tensor in tensors.items():
        if tensor.dtype == numpy.float32:
            mean = sum(model[name].astype(numpy.float64) for model in models) / 3
            numpy.testing.assert_allclose(tensor, mean, rtol=1e-5, atol=1e-6, err_msg=name)


def test_task_arithmetic_adds_the_adapters(tmp_path):
    tensors, _, _ = merge("task_arithmetic.yml", tmp_path / "out")
    base = load_file(ENCODER / "model.safetensors")
    models = [adapted(task) for task in ("deb_section", "deb_role", "wn_noun", "wn_verb")]
    for name, tensor in tensors.items():
        if tensor.dtype == numpy.float32:
            wanted = base[name] + 0.3 * sum(model[name].astype(numpy.float64) - base[name] for model in models)
            numpy.testing.assert_allclose(tensor, wanted, rtol=1e-5, atol=2e-6, err_msg=name)


def test_frankenmerge_stacks_the_layers(tmp_path):
    tensors, config, _ = merge("frankenmerge.yml", tmp_path / "out")
    assert config["num_hidden_layers"] == 8
    query = "encoder.layer.{}.attention.self.query.weight"
    below, above = adapted("deb_section"), adapted("deb_role")
    for layer in range(8):
        wanted = below[query.format(layer)] if layer < 4 else above[query.format(layer - 2)]
        numpy.testing.assert_allclose(tensors[query.format(layer)], wanted, rtol=1e-5, atol=1e-6)
