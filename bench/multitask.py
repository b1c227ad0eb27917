#!/usr/bin/env python3
"""Merges encoders that were fine-tuned for different tasks and prints each task's accuracy, as the papers of these methods do.

    python3 MODELS/tasks/unpack.py FOLDER
    bench/multitask.py --models FOLDER

FOLDER holds `base` and a folder for each task: a BERT encoder with `head.safetensors` (a linear classifier on the mean of the last hidden state over unmasked positions),
`calibration.safetensors` and `test.safetensors` (input_ids, attention_mask, labels). Each method is merged at every point of its grid; the point with the best mean accuracy on the
calibration rows is the one whose test accuracy is shown. Prints a table and writes bench/results/multitask-DATE.json. Needs torch, transformers and safetensors; where a venv has them:
VENV/bin/python bench/multitask.py.
"""
import argparse
import itertools
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile

import torch
import transformers
from safetensors.torch import load_file

import measure

# Rows a batch; they are sorted by length, so that little of it is padding.
BATCH = 128


def grid(**values):
    return [dict(zip(values, point)) for point in itertools.product(*values.values())]


# Row of the table: method, points of its parameters, `weight` and `density` meant for every model.
METHODS = {
    "average": ("linear", [{}]),
    "task arithmetic": ("task_arithmetic", grid(**{"lambda": [0.2, 0.3, 0.4, 0.5, 0.7]})),
    "TIES": ("ties", grid(density=[0.1, 0.2, 0.5], **{"lambda": [0.7, 1.0, 1.4]})),
    "DARE": ("dare_linear", grid(density=[0.5, 0.8], rescale=[False, True], **{"lambda": [0.3, 0.4, 0.5]})),
    "DRM-H": ("drm", grid(direction=["horizontal"], density=[0.1, 0.2, 0.5], weight=[0.7, 1.0, 1.4])),
    "DRM-V": ("drm", grid(direction=["vertical"], density=[0.1, 0.2, 0.5], weight=[0.7, 1.0, 1.4])),
    "TSV-M": ("tsv_m", grid(**{"lambda": [0.7, 1.0, 1.4]})),
    "Iso-C": ("iso_c", grid(**{"lambda": [0.5, 0.7, 1.0, 1.4, 2.0]})),
}


def recipe(method, parameters, models, tasks):
    text = {"merge_method": method, "models": [{"model": str(models / task)} for task in tasks], "dtype": "float32", "parameters": dict(parameters)}
    text["parameters"].setdefault("weight", 1.0)
    if method == "linear":
        return text
    if method in ("tsv_m", "iso_c"):
        del text["parameters"]["weight"]
    return text | {"base_model": str(models / "base")}


class Task:
    """The rows of one split of a task, in batches of similar length, and its classifier."""

    def __init__(self, folder, split):
        rows = load_file(folder / f"{split}.safetensors")
        head = load_file(folder / "head.safetensors")
        self.weight, self.bias = head["classifier.weight"].float(), head["classifier.bias"].float()
        lengths = rows["attention_mask"].sum(1)
        order = lengths.argsort()
        self.batches = []
        for at in order.split(BATCH):
            longest = int(lengths[at].max())
            self.batches.append((rows["input_ids"][at, :longest].long(), rows["attention_mask"][at, :longest].long(), rows["labels"][at]))

    def accuracy(self, encoder):
        right = count = 0
        with torch.inference_mode():
            for ids, mask, labels in self.batches:
                hidden = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
                pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
                right += int(((pooled @ self.weight.T + self.bias).argmax(1) == labels).sum())
                count += len(labels)
        return right / count


def encoder_of(folder):
    return transformers.BertModel.from_pretrained(folder, add_pooling_layer=False, dtype=torch.float32).eval()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_common_arguments(parser)
    parser.add_argument("--models", type=pathlib.Path, required=True, help="what unpack.py wrote")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    models = args.models.resolve()
    tasks = sorted(folder.parent.name for folder in models.glob("*/head.safetensors"))
    if not tasks:
        parser.error(f"--models {models}: no folder with a head.safetensors")
    test, calibration = ({task: Task(models / task, split) for task in tasks} for split in ("test", "calibration"))

    alone = {task: test[task].accuracy(encoder_of(models / task)) for task in tasks}
    base = encoder_of(models / "base")
    rows = {"fine-tuned alone": {"accuracy": alone}, "base encoder": {"accuracy": {task: test[task].accuracy(base) for task in tasks}}}
    with tempfile.TemporaryDirectory(prefix="multitask-") as scratch:
        scratch = pathlib.Path(scratch)
        for name in args.methods:
            method, points = METHODS[name]
            best = None
            for point in points:
                (scratch / "recipe.yml").write_text(json.dumps(recipe(method, point, models, tasks)))
                command = [args.bin / "pewter", "merge", scratch / "recipe.yml", scratch / "out", "--overwrite", "--quiet", "--seed", "1", "--device", "cpu"]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode != 0:
                    raise RuntimeError(f"{name} {point}: {done.stderr}")
                encoder = encoder_of(scratch / "out")
                score = statistics.mean(calibration[task].accuracy(encoder) for task in tasks)
                if best is None or score > best["calibration"]:
                    best = {"point": point, "calibration": score, "accuracy": {task: test[task].accuracy(encoder) for task in tasks}}
                print(f"  {name} {point}: {score:.3f}", file=sys.stderr)
            rows[name] = best

    def cells(row):
        mean = statistics.mean(row["accuracy"].values())
        share = statistics.mean(row["accuracy"][task] / alone[task] for task in tasks)
        return [*(f"{row['accuracy'][task]:.3f}" for task in tasks), f"{mean:.3f}", f"{share:.3f}", json.dumps(row.get("point", {})).strip("{}")]

    print("\nTest accuracy of each task with its own head\n" +
          measure.table(["encoder", *tasks, "mean", "share of alone", "searched"], [[name, *cells(row)] for name, row in rows.items()]))
    report = {"machine": measure.machine(), "versions": {"pewter": measure.pewter_version(args.bin), "torch": torch.__version__, "transformers": transformers.__version__},
              "tasks": tasks, "grids": {name: METHODS[name][1] for name in args.methods}, "rows": rows}
    print("\nwritten:", measure.write_results(args.results, "multitask", report))


if __name__ == "__main__":
    main()
