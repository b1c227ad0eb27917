"""Merging LoRA adapters into an adapter, as a user sees it. Numbers against numpy, by PEFT's definitions.

Needs what cli_test.py needs.
"""

import json
import subprocess

import numpy as np
import pytest

from cli_test import DONE, NOT_FOUND, PEWTER, USAGE, read_safetensors, write_safetensors

Q = "model.layers.0.self_attn.q_proj"
V = "model.layers.1.self_attn.v_proj"
PREFIX = "base_model.model."
WEIGHTS = {"a": 0.75, "b": -0.5}
DENSITY = 0.4


def run(*arguments):
    return subprocess.run([PEWTER, *map(str, arguments)], capture_output=True, text=True, timeout=120)


def write_adapter(folder, rank, alpha, seed, **config):
    random = np.random.default_rng(seed)
    tensors = {}
    for module, out, fan_in in [(Q, 40, 24), (V, 16, 30)]:
        for factor, shape in [("A", (rank, fan_in)), ("B", (out, rank))]:
            tensors[f"{PREFIX}{module}.lora_{factor}.weight"] = random.standard_normal(shape).astype(np.float32)
    folder.mkdir()
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": ["q_proj", "v_proj"]} | config
    (folder / "adapter_config.json").write_text(json.dumps(config))
    write_safetensors(folder / "adapter_model.safetensors", tensors)


@pytest.fixture
def adapters(tmp_path):
    write_adapter(tmp_path / "a", 4, 6, 1)
    write_adapter(tmp_path / "b", 4, 2, 2, use_rslora=True, base_model_name_or_path="org/base")
    return tmp_path


SCALES = {"a": 6 / 4, "b": 2 / 2}


def recipe(folder, method, parameters="{}", more=""):
    models = "".join(
        f"  - {{model: {folder}/{name}, parameters: {{weight: {weight}}}}}\n" for name, weight in WEIGHTS.items()
    )
    path = folder / f"{method}.yml"
    path.write_text(
        f"merge_method: {method}\noutput: {{format: lora}}\nmodels:\n{models}parameters: {parameters}\n{more}"
    )
    return path


# --- PEFT's definitions -------------------------------------------------------------------------


def prune(x):
    kept = np.argsort(-np.abs(x).ravel(), kind="stable")[: int(DENSITY * x.size)]
    mask = np.zeros(x.size, dtype=bool)
    mask[kept] = True
    return x * mask.reshape(x.shape)


def total(tensors, weights):
    return sum(weight * x for weight, x in zip(weights, tensors))


def elementwise(kind, tensors, weights):
    if kind == "linear":
        return total(tensors, weights)
    tensors = [prune(x) for x in tensors]
    if kind == "magnitude_prune":
        return total(tensors, weights)
    majority = np.where(sum(tensors) >= 0, 1, -1)
    masks = [np.sign(x) == majority for x in tensors]
    return total([x * mask for x, mask in zip(tensors, masks)], weights) / np.maximum(sum(masks), 1)


def expected(folder, method, module):
    factors = {
        name: [
            read_safetensors(folder / name / "adapter_model.safetensors")[f"{PREFIX}{module}.lora_{f}.weight"].astype(float)
            for f in "AB"
        ]
        for name in WEIGHTS
    }
    coefficients = [WEIGHTS[name] * SCALES[name] for name in WEIGHTS]
    if method == "cat":
        return total([b @ a for a, b in factors.values()], coefficients)
    if method.endswith("svd"):
        deltas = [SCALES[name] * (b @ a) for name, (a, b) in factors.items()]
        delta = elementwise(method.removesuffix("_svd").replace("svd", "linear"), deltas, WEIGHTS.values())
        u, s, vt = np.linalg.svd(delta, full_matrices=False)
        return (u[:, :4] * s[:4]) @ vt[:4]
    roots = np.sqrt(np.abs(coefficients))
    a = elementwise(method, [a for a, _ in factors.values()], roots * np.sign(coefficients))
    return elementwise(method, [b for _, b in factors.values()], roots) @ a


@pytest.mark.parametrize(
    "method", ["cat", "linear", "svd", "ties", "magnitude_prune", "ties_svd", "magnitude_prune_svd"]
)
def test_the_merge_is_what_peft_defines(adapters, method):
    parameters = f"{{density: {DENSITY}}}" if method not in ("cat", "linear", "svd") else "{}"
    done = run("merge", recipe(adapters, method, parameters), adapters / "out")
    assert done.returncode == DONE, done.stderr
    config = json.loads((adapters / "out/adapter_config.json").read_text())
    rank = 8 if method == "cat" else 4
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (rank, rank, False)
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert config["base_model_name_or_path"] == "org/base"
    factors = read_safetensors(adapters / "out/adapter_model.safetensors")
    for module in (Q, V):
        a, b = (factors[f"{PREFIX}{module}.lora_{f}.weight"].astype(float) for f in "AB")
        assert a.shape[0] == b.shape[1] == rank
        np.testing.assert_allclose(b @ a, expected(adapters, method, module), atol=2e-5)
    names = {path.name for path in (adapters / "out").iterdir()}
    assert {"README.md", "mergekit_config.yml", "pewter_manifest.json"} <= names and "config.json" not in names
    manifest = json.loads((adapters / "out/pewter_manifest.json").read_text())
    inputs = [file["file"] for model in manifest["inputs"] for file in model["files"]]
    assert [name.rsplit("/", 1)[1] for name in inputs] == ["adapter_config.json", "adapter_model.safetensors"] * 2


def test_the_output_is_an_adapter_for_every_command(adapters):
    assert run("merge", recipe(adapters, "cat"), adapters / "out").returncode == DONE
    facts = json.loads(run("inspect", adapters / "out", "-o", "json").stdout)
    assert facts["kind"] == "adapter" and facts["config"]["r"] == 8
    base = {f"{Q}.weight": np.zeros((40, 24), np.float32), f"{V}.weight": np.ones((16, 30), np.float32)}
    (adapters / "base").mkdir()
    (adapters / "base/config.json").write_text('{"architectures": ["OddForCausalLM"]}')
    write_safetensors(adapters / "base/model.safetensors", base)
    applied = adapters / "applied"
    passthrough = adapters / "passthrough.yml"
    passthrough.write_text(f"merge_method: passthrough\nmodels: [{{model: {adapters}/base+{adapters}/out}}]\n")
    assert run("merge", passthrough, applied).returncode == DONE
    tensors = read_safetensors(applied / "model.safetensors")
    for module, weight in base.items():
        want = weight + expected(adapters, "cat", module.removesuffix(".weight"))
        np.testing.assert_allclose(tensors[module], want, atol=2e-5)


def test_the_plan_explains_modules(adapters):
    path = recipe(adapters, "ties_svd", "{density: 0.5, svd_rank: 100}")
    plan = json.loads(run("plan", path, "-o", "json").stdout)
    assert plan["method"] == "ties_svd" and len(plan["tensors"]) == 2
    tensor = next(t for t in plan["tensors"] if t["name"] == PREFIX + V)
    assert [part["shape"] for part in tensor["parts"]] == [[16, 30], [16, 16]]
    assert tensor["parameters"]["rank"] == 16
    text = run("plan", path, "--tensor", f"*{V}").stdout
    for fact in ("rank 16 instead of 100: there is no more in it", "scale 1.5", "weight=0.75", "density=0.5 (recipe, recipe:6:23)"):
        assert fact in text, text
    small = run("plan", path, "--memory", "100KiB")
    assert small.returncode != DONE and "raise --memory" in small.stderr


@pytest.mark.parametrize(
    "method",
    json.loads(subprocess.run([PEWTER, "methods", "--adapters", "-o", "json"], capture_output=True, check=True).stdout),
    ids=lambda method: method["name"],
)
def test_the_example_of_every_method_runs(tmp_path, method):
    for name in ("lora-a", "lora-b"):
        write_adapter(tmp_path / name, 4, 8, 3)
    (tmp_path / "recipe.yml").write_text(method["example"])
    done = subprocess.run([PEWTER, "merge", "recipe.yml", "out", "--strict", "-o", "json"],
                          cwd=tmp_path, capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.returncode == DONE, done.stderr
    result = json.loads(done.stdout)
    assert (result["method"], result["tensors"], result["warnings"]) == (method["name"], 2, [])


def test_the_schema_knows_the_methods_of_adapters():
    jsonschema = pytest.importorskip("jsonschema")
    yaml = pytest.importorskip("yaml")
    validator = jsonschema.Draft7Validator(json.loads(run("methods", "--schema").stdout))
    for method in json.loads(run("methods", "--adapters", "-o", "json").stdout):
        example = yaml.safe_load(method["example"])
        validator.validate(example)
        assert not validator.is_valid({**example, "parameters": {"lambda": 1}})
    assert not validator.is_valid({**example, "output": {"format": "gguf"}})
    assert not validator.is_valid({**example, "merge_method": "slerp"})
    del example["output"]
    assert example["merge_method"] == "ties_svd" and not validator.is_valid(example)


def test_messages(adapters):
    unknown = run("plan", recipe(adapters, "slerp"))
    assert unknown.returncode == USAGE and "merges models, not adapters" in unknown.stderr
    path = recipe(adapters, "cat")
    path.write_text(path.read_text().replace("output: {format: lora}\n", ""))
    forgotten = run("plan", path)
    assert forgotten.returncode == USAGE and "output: {format: lora}" in forgotten.stderr
    (adapters / "b/adapter_config.json").unlink()
    missing = run("plan", recipe(adapters, "cat"))
    assert missing.returncode == NOT_FOUND and "adapter_config.json" in missing.stderr
    assert "--adapters" in run("methods").stdout
    names = run("methods", "--adapters", "-q").stdout.split()
    assert len(names) == 12 and {"magnitude_prune_svd", "drm"} <= set(names)
    assert [method["name"] for method in json.loads(run("methods", "--adapters", "-o", "json").stdout)] == names
    both = json.loads(run("methods", "ties", "-o", "json").stdout)
    assert both["base_model"] == "required" and both["adapters"]["output_format"] == "lora"
    assert json.loads(run("methods", "cat", "-o", "json").stdout)["output_format"] == "lora"
