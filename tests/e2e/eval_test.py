"""pewter eval: numbers, formats and messages."""

import json
import math
import subprocess

import numpy as np
import pytest
from cli_test import DONE, FAILED, NOT_FOUND, PEWTER, ROOT, USAGE, read_safetensors, write_safetensors

MODELS = ROOT / "tests/merge/forward"


def evaluate(*arguments):
    return subprocess.run([PEWTER, "eval", *map(str, arguments)], capture_output=True, text=True, timeout=120)


@pytest.fixture
def causal(tmp_path):
    """Data of a causal model, and what its logits say."""
    folder = MODELS / "llama3"
    tensors = read_safetensors(folder / "io.safetensors")
    ids, mask, logits = (tensors[name] for name in ("input_ids", "attention_mask", "outputs"))
    write_safetensors(tmp_path / "data.safetensors", {"input_ids": ids, "attention_mask": mask})
    losses, right = [], []
    for row, column in np.argwhere((mask[:, 1:] == 1) & (mask[:, :-1] == 1)):
        scores = logits[row, column].astype(np.float64)
        label = ids[row, column + 1]
        losses.append(np.log(np.exp(scores).sum()) - scores[label])
        right.append(scores.argmax() == label)
    return folder, tmp_path / "data.safetensors", np.mean(losses), np.mean(right), len(losses)


def test_json_has_loss_perplexity_and_accuracy(causal):
    model, data, loss, accuracy, tokens = causal
    result = evaluate(model, "--data", data, "-o", "json", "--device", "cpu")
    assert result.returncode == DONE, result.stderr
    report = json.loads(result.stdout)
    assert report["metric"] == "clm_loss"
    assert report["tokens"] == tokens
    assert report["loss"] == report["value"] == pytest.approx(loss, rel=1e-5)
    assert report["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert report["accuracy"] == pytest.approx(accuracy)
    again = evaluate(model, "--data", data, "-o", "json", "--device", "cpu", "-j", "3", "--memory", "1MiB")
    assert json.loads(again.stdout)["loss"] == report["loss"]


def test_text_and_quiet(causal):
    model, data, loss, accuracy, _ = causal
    text = evaluate(model, "--data", data)
    assert text.returncode == DONE, text.stderr
    rows = dict(line.split(maxsplit=1) for line in text.stdout.splitlines())
    assert float(rows["Loss"]) == pytest.approx(loss, rel=1e-5)
    assert float(rows["Accuracy"]) == pytest.approx(accuracy, abs=1e-4)
    quiet = evaluate(model, "--data", data, "-q", "--metric", "accuracy")
    assert float(quiet.stdout) == pytest.approx(accuracy)


def test_mistakes_are_named(causal, tmp_path):
    model, data, *_ = causal
    wrong = evaluate(model, "--data", data, "--metric", "mlm_loss")
    assert wrong.returncode == FAILED and "clm_loss is" in wrong.stderr
    assert evaluate(model, "--data", data, "--metric", "bleu").returncode == USAGE
    missing = evaluate(model, "--data", tmp_path / "none.safetensors")
    assert missing.returncode == NOT_FOUND and "none.safetensors" in missing.stderr
    assert evaluate(tmp_path / "no-model", "--data", data).returncode == NOT_FOUND
    write_safetensors(tmp_path / "ids.safetensors", {"input_ids": np.full((2, 3), 24, np.int64)})
    ids = evaluate(model, "--data", tmp_path / "ids.safetensors")
    assert ids.returncode == FAILED and "its vocabulary has 24 tokens" in ids.stderr
    small = evaluate(model, "--data", data, "--memory", "10KiB")
    assert small.returncode == FAILED and "the memory is 10.0 KiB" in small.stderr
