"""What `evaluate:` in a recipe tells of the merged model, and of the line between the models."""

import json

import numpy as np
import pytest

from cli_test import FAILED, NOT_FOUND, ROOT, USAGE, cli, write_safetensors  # noqa: F401

PAIR = ROOT.parent / "shared/models/bert-pair"
WIDTH, WORDS, LENGTH = 8, 11, 6


def write_gpt2(folder, seed):
    """A causal model of one layer that knows nothing."""
    folder.mkdir()
    config = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": WORDS, "n_positions": LENGTH,
        "n_embd": WIDTH, "n_layer": 1, "n_head": 2, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new",
    }
    (folder / "config.json").write_text(json.dumps(config))
    random = np.random.default_rng(seed)
    shapes = {"wte.weight": (WORDS, WIDTH), "wpe.weight": (LENGTH, WIDTH), "ln_f.weight": (WIDTH,), "ln_f.bias": (WIDTH,)}
    for norm in ("ln_1", "ln_2"):
        shapes |= {f"h.0.{norm}.weight": (WIDTH,), f"h.0.{norm}.bias": (WIDTH,)}
    for layer, wide in (("attn.c_attn", 3), ("attn.c_proj", 1), ("mlp.c_fc", 4)):
        shapes |= {f"h.0.{layer}.weight": (WIDTH, wide * WIDTH), f"h.0.{layer}.bias": (wide * WIDTH,)}
    shapes |= {"h.0.mlp.c_proj.weight": (4 * WIDTH, WIDTH), "h.0.mlp.c_proj.bias": (WIDTH,)}
    write_safetensors(folder / "model.safetensors", {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()})


def write_recipe(folder, evaluate, models=("a", "b")):
    path = folder / "recipe.yml"
    listed = [{"model": str(folder / name), "parameters": {"weight": 0.5}} for name in models]
    path.write_text(json.dumps({"merge_method": "linear", "models": listed, "dtype": "float32", "evaluate": evaluate}))
    return path


@pytest.fixture
def folder(tmp_path):
    write_gpt2(tmp_path / "a", 1)
    write_gpt2(tmp_path / "b", 2)
    ids = np.random.default_rng(3).integers(0, WORDS, size=(5, LENGTH))
    write_safetensors(tmp_path / "data.safetensors", {"input_ids": ids})
    return tmp_path


def test_curve_and_merged_model(cli, folder):
    data = str(folder / "data.safetensors")
    recipe = write_recipe(folder, {"data": data, "barrier_points": 5})
    result = cli("merge", recipe, folder / "out", "-o", "json")
    found = json.loads((folder / "out/evaluation.json").read_text())
    assert json.loads(result.out)["evaluation"] == found
    assert (found["metric"], found["predictions"]) == ("clm_loss", 25)
    (line,) = found["lines"]
    (curve,) = line["curves"]
    losses = [point["loss"] for point in curve["points"]]
    assert [point["lambda"] for point in curve["points"]] == [0, 0.25, 0.5, 0.75, 1]
    # The merged model is the line's middle.
    assert found["loss"] == pytest.approx(losses[2], rel=1e-6)
    assert found["perplexity"] == pytest.approx(np.exp(found["loss"]))
    assert curve["barrier"] == pytest.approx(max(losses) - (losses[0] + losses[-1]) / 2)
    # The ends are the models.
    for name, loss in (("b", losses[0]), ("a", losses[-1])):
        recipe = write_recipe(folder, {"data": data}, models=[name])
        cli("merge", recipe, folder / f"only-{name}")
        alone = json.loads((folder / f"only-{name}/evaluation.json").read_text())
        assert alone["loss"] == pytest.approx(loss, rel=1e-6)
        assert alone["lines"] == []
        assert not (folder / f"only-{name}/evaluation.svg").exists()
    for name in ("evaluation.svg", "evaluation.html"):
        text = (folder / "out" / name).read_text()
        assert "<svg" in text and f"barrier {curve['barrier']:.3f}" in text
    manifest = json.loads((folder / "out/pewter_manifest.json").read_text())
    assert "evaluation.json" in json.dumps(manifest)
    # Nothing of it is left when the model is merged again without.
    recipe.write_text(json.dumps({"merge_method": "linear", "models": [{"model": str(folder / "a"), "parameters": {"weight": 1}}]}))
    cli("merge", recipe, folder / "out", "--overwrite")
    assert not list((folder / "out").glob("evaluation*"))


@pytest.mark.parametrize("evaluate, code, part", [
    ({"data": "nowhere.safetensors"}, NOT_FOUND, "nowhere.safetensors"),
    ({"data": "data.safetensors", "metric": "bleu"}, USAGE, "bleu"),
    ({"data": "data.safetensors", "metric": "mlm_loss"}, FAILED, "mlm_loss"),
    ({"data": "strange.safetensors"}, FAILED, "strange.safetensors"),
    ({"data": "long.safetensors"}, FAILED, "long.safetensors"),
    ({"data": "data.safetensors", "barrier_points": 1}, USAGE, "barrier_points"),
])
def test_bad_input_is_told_before_any_work(cli, folder, evaluate, code, part):
    write_safetensors(folder / "strange.safetensors", {"input_ids": np.full((1, 3), WORDS)})
    write_safetensors(folder / "long.safetensors", {"input_ids": np.zeros((1, LENGTH + 1), np.int64)})
    evaluate = {**evaluate, "data": str(folder / evaluate["data"])}
    result = cli("merge", write_recipe(folder, evaluate), folder / "out", expect=code)
    assert part in result.err
    assert not (folder / "out").exists()


def test_a_line_needs_two_models(cli, folder):
    recipe = write_recipe(folder, {"data": str(folder / "data.safetensors"), "barrier_points": 5}, models=["a"])
    result = cli("plan", recipe, expect=USAGE)
    assert "two models" in result.err


@pytest.mark.skipif(not PAIR.exists(), reason=f"{PAIR} is not there")
def test_barrier_of_the_real_pair(cli, tmp_path):
    (tmp_path / "a").symlink_to(PAIR / "a")
    (tmp_path / "b").symlink_to(PAIR / "b")
    recipe = write_recipe(tmp_path, {"data": str(PAIR / "eval.safetensors"), "barrier_points": 3})
    cli("merge", recipe, tmp_path / "out")
    curve = json.loads((tmp_path / "out/evaluation.json").read_text())["lines"][0]["curves"][0]
    assert curve["barrier"] == pytest.approx(2.443, abs=0.002)
    assert [point["loss"] for point in curve["points"]] == pytest.approx([3.609, 6.059, 3.624], abs=0.001)


@pytest.mark.skipif(not PAIR.exists(), reason=f"{PAIR} is not there")
@pytest.mark.parametrize("align, barrier", [
    ({"groups": ["ffn", "heads"]}, 1.953),
    ({"groups": ["ffn", "heads"], "heads": "orthogonal"}, 1.80),
    ({"method": "staged", "heads": "orthogonal"}, 1.541),
])
def test_barrier_after_alignment(cli, tmp_path, align, barrier):
    """At most what an independent implementation reached on the same data; the ends stay the models."""
    (tmp_path / "a").symlink_to(PAIR / "a")
    (tmp_path / "b").symlink_to(PAIR / "b")
    evaluate = {"data": str(PAIR / "eval.safetensors"), "barrier_points": 3}
    recipe = json.loads(write_recipe(tmp_path, evaluate).read_text())
    recipe["align"] = {"reference": str(tmp_path / "a"), "calibration": str(PAIR / "align_tokens.safetensors"), **align}
    (tmp_path / "recipe.yml").write_text(json.dumps(recipe))
    cli("merge", "recipe.yml", "out")
    plain, aligned = json.loads((tmp_path / "out/evaluation.json").read_text())["lines"][0]["curves"]
    assert (plain["label"], aligned["label"]) == ("not aligned", "aligned")
    assert aligned["barrier"] < barrier + 0.02 < plain["barrier"]
    for end in (0, -1):
        assert aligned["points"][end]["loss"] == pytest.approx(plain["points"][end]["loss"], abs=1e-4)
