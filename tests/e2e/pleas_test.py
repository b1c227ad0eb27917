"""`merge_method: pleas` and the aligners of the paper's tables, from recipes alone, on two encoders from different seeds.

Needs what cli_test.py needs, and ../shared/models/bert-pair.
"""

import json
import pathlib
import subprocess

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cli_test import DONE, NOT_FOUND, PEWTER, USAGE, read_safetensors

PAIR = pathlib.Path(__file__).resolve().parents[3] / "shared/models/bert-pair"
pytestmark = pytest.mark.skipif(not (PAIR / "eval.safetensors").exists(), reason="no pair of encoders")

MASK, FIRST_WORD, NO_LABEL = 4, 5, -100


@pytest.fixture
def masked(tmp_path):
    """Some of the calibration tokens, every seventh word to be predicted: what stages are compared by."""
    ids = load_file(PAIR / "align_tokens.safetensors")["input_ids"][:500].astype(np.int32)
    labels = np.full(ids.shape, NO_LABEL, np.int32)
    places = np.arange(3, ids.size, 7)
    places = places[ids.reshape(-1)[places] >= FIRST_WORD]
    labels.reshape(-1)[places] = ids.reshape(-1)[places]
    ids.reshape(-1)[places] = MASK
    path = tmp_path / "masked.safetensors"
    save_file({"input_ids": ids, "labels": labels}, path)
    return path


def merge(tmp_path, align, method="pleas", parameters="", points=3, expect=DONE):
    """What the recipe's evaluation says, with the folder of the merged model."""
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        f"merge_method: {method}\nmodels: [{{model: {PAIR}/a}}, {{model: {PAIR}/b}}]\nparameters: {{{parameters}}}\n"
        f"align: {{reference: {PAIR}/a, {align}}}\n"
        f"evaluate: {{data: {PAIR}/eval.safetensors, metric: mlm_loss, barrier_points: {points}}}\n"
    )
    out = tmp_path / "out"
    done = subprocess.run([PEWTER, "merge", recipe, out, "--device", "cpu", "--overwrite"], capture_output=True, text=True, timeout=500)
    assert done.returncode == expect, done.stderr
    return done.stderr if expect != DONE else (json.loads((out / "evaluation.json").read_text()), out)


def above_ends(evaluation):
    """The merged model's loss over the mean of the two models'."""
    points = evaluation["lines"][0]["curves"][1]["points"]
    return evaluation["loss"] - (points[0]["loss"] + points[-1]["loss"]) / 2


CALIBRATION = f"calibration: {PAIR}/align_tokens.safetensors"


def test_least_squares_on_the_best_alignment(tmp_path, masked):
    evaluation, out = merge(tmp_path, f"method: staged, heads: orthogonal, {CALIBRATION}, objective: {masked}")
    loss = above_ends(evaluation)
    print(f"staged, orthogonal, least squares: {loss:.4f}")
    assert loss <= 0.93
    manifest = json.loads((out / "pewter_manifest.json").read_text())
    report = manifest["alignments"][0]["report"]
    assert report["objective"] == "loss half way, layers fitted" and manifest["tensors"] == len(read_safetensors(out / "model.safetensors"))
    assert [stage["stage"] for stage in report["stages"]][-1] == "orthogonal"


def test_least_squares_on_the_models_as_they_are(tmp_path):
    evaluation, _ = merge(tmp_path, f"groups: [], {CALIBRATION}", parameters="ridge: 0.001")
    loss = above_ends(evaluation)
    print(f"not aligned, least squares: {loss:.4f}")
    assert abs(loss - 2.568) < 0.02  # as computed elsewhere


def test_units_stay_apart_for_a_budget(tmp_path):
    wide, out = merge(tmp_path, f"groups: [ffn, heads], {CALIBRATION}", parameters="budget: 1.2")
    assert above_ends(wide) < 1.6  # 1.523; 1.454 without units apart
    config = json.loads((out / "config.json").read_text())
    width = config["intermediate_size"]
    tensors = read_safetensors(out / "model.safetensors")
    for layer in range(3):
        prefix = f"bert.encoder.layer.{layer}."
        assert tensors[prefix + "intermediate.dense.weight"].shape == (width, 128)
        assert tensors[prefix + "intermediate.dense.bias"].shape == (width,)
        assert tensors[prefix + "output.dense.weight"].shape == (128, width)
        assert tensors[prefix + "attention.self.query.weight"].shape == (128, 128)
    # Work of the layers: four of each attention and the transform; and for each unit a row and a column.
    fixed, each = 3 * 4 * 128 * 128 + 128 * 128, 3 * 2 * 128
    assert width == 512 + int(0.2 * (fixed + 512 * each) / each)
    assert fixed + width * each <= 1.2 * (fixed + 512 * each)
    # It is a model like others.
    done = subprocess.run([PEWTER, "eval", out, "--data", PAIR / "eval.safetensors", "-o", "json"], capture_output=True, text=True)
    assert done.returncode == DONE, done.stderr
    assert abs(json.loads(done.stdout)["loss"] - wide["loss"]) < 1e-5


def test_the_published_default(tmp_path):
    evaluation, _ = merge(tmp_path, f"groups: [ffn, heads], query_key: shared, {CALIBRATION}", "linear", "weight: 0.5", points=21)
    plain, aligned = (curve["barrier"] for curve in evaluation["lines"][0]["curves"])
    assert abs(plain - 2.443) < 0.02 and abs(aligned - 2.059) < 0.02
    assert len(evaluation["lines"][0]["curves"][1]["points"]) == 21


def test_what_is_refused(tmp_path):
    for align, method, message in [
        ("groups: [ffn]", "pleas", "needs `calibration: FILE`"),
        (f"{CALIBRATION}, query_key: shared, method: staged", "pleas", "`query_key` is for `method: permutation`"),
        (f"{CALIBRATION}, objective: x", "linear", "x"),
    ]:
        assert message in merge(tmp_path, align, method, "weight: 1" if method == "linear" else "", expect=USAGE if message != "x" else NOT_FOUND)
