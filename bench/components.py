#!/usr/bin/env python3
"""The component table of merging two encoders from different initialisations: what each step of an alignment takes off the loss barrier.

    bench/components.py [--models FOLDER] [--points 21]

Every row is one recipe that `pewter merge` runs by itself: models and calibration tokens in, evaluation.json out. A barrier is the highest loss on the straight line between the models, of so many points, less the mean of the
two ends, in nats; `half` is the loss of the merged model, half way, less that mean. Rows with least squares have no line: the merged model is not on it, so `half` alone is told. `kept`: the aligned model alone has the loss that
it had, to 1e-4. Stages and residual orders are compared on some of the calibration tokens, every seventh word masked; the evaluation's data is read for the table alone.
Prints the table and writes bench/results/components-DATE.json.
"""
import argparse
import json
import pathlib
import tempfile

import numpy as np
from safetensors.numpy import load_file, save_file

import measure

MASK, FIRST_WORD, NO_LABEL = 4, 5, -100  # of the models' vocabulary; what evaluations leave out
STAGED = {"method": "staged", "objective": "masked.safetensors"}
ROWS = [  # name, what is aligned how, parameters of least squares
    ("not aligned", {"groups": []}, None),
    ("feed-forward and heads, one order of q, k, v (published default)", {"groups": ["ffn", "heads"], "query_key": "shared"}, None),
    ("queries and keys in their own order", {"groups": ["ffn", "heads"]}, None),
    ("weight matching from there, residual stream too", {**STAGED, "last_stage": "weights"}, None),
    ("that residual order, activations again", STAGED, None),
    ("orthogonal maps of heads", {**STAGED, "heads": "orthogonal"}, None),
    ("CCA maps of heads", {"groups": ["ffn", "heads"], "method": "cca", "gamma": 0.01}, None),
    ("CCA maps of heads and feed-forward units (no symmetry)", {"groups": ["ffn", "heads"], "method": "cca", "gamma": 0.01, "mapped": ["heads", "ffn"]}, None),
    ("least squares, not aligned", {"groups": []}, {"ridge": 1e-3}),
    ("least squares on the published default", {"groups": ["ffn", "heads"], "query_key": "shared"}, {"ridge": 1e-3}),
    ("least squares on orthogonal maps", {**STAGED, "heads": "orthogonal"}, {}),
    ("least squares on orthogonal maps, budget 1.2", {**STAGED, "heads": "orthogonal"}, {"budget": 1.2}),
]


def write_masked(tokens, path):
    """Some of the tokens, every seventh word to be predicted."""
    ids = load_file(tokens)["input_ids"][:500].astype(np.int32)
    labels = np.full(ids.shape, NO_LABEL, np.int32)
    places = np.arange(3, ids.size, 7)
    places = places[ids.reshape(-1)[places] >= FIRST_WORD]
    labels.reshape(-1)[places] = ids.reshape(-1)[places]
    ids.reshape(-1)[places] = MASK
    save_file({"input_ids": ids, "labels": labels}, path)


def evaluate(binary, models, folder, align, fit, points):
    align = {"reference": str(models / "a"), "calibration": str(models / "align_tokens.safetensors"), **align}
    if "objective" in align:
        align["objective"] = str(folder / align["objective"])
    recipe = {
        "merge_method": "linear" if fit is None else "pleas",
        "models": [{"model": str(models / name)} for name in ("a", "b")],
        "parameters": {"weight": 0.5} if fit is None else fit,
        "align": align,
        "evaluate": {"data": str(models / "eval.safetensors"), "metric": "mlm_loss", "barrier_points": points},
    }
    (folder / "recipe.yml").write_text(json.dumps(recipe))
    run = measure.run([binary, "merge", folder / "recipe.yml", folder / "out", "--overwrite", "--quiet", "--device", "cpu"])
    evaluation = json.loads((folder / "out/evaluation.json").read_text())
    plain, aligned = evaluation["lines"][0]["curves"]
    losses = [point["loss"] for point in aligned["points"]]
    mean = (losses[0] + losses[-1]) / 2
    end = abs(losses[0] - plain["points"][0]["loss"])
    return {
        "barrier": None if fit is not None else aligned["barrier"],
        "half": evaluation["loss"] - mean,
        "function_kept": end <= 1e-4 * plain["points"][0]["loss"],
        "aligned_model_alone": losses[0] - plain["points"][0]["loss"],
        "wall_s": run["wall_s"],
        "cpu_s": run["cpu_s"],
        "peak_rss_bytes": run["peak_rss_bytes"],
        "losses": losses,
        "align": {key: value for key, value in align.items() if key not in ("reference", "calibration", "objective")},
        "least_squares": fit,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_common_arguments(parser)
    parser.add_argument("--models", type=pathlib.Path, default=measure.ROOT / "../shared/models/bert-pair", help="folder of a, b, eval.safetensors and align_tokens.safetensors; default: %(default)s")
    parser.add_argument("--points", type=int, default=21, help="of the line between the models; default: %(default)s")
    args = parser.parse_args()
    models = args.models.resolve()
    report = {"machine": measure.machine(), "pewter": measure.pewter_version(args.bin), "models": models.name, "points": args.points, "rows": []}
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_masked(models / "align_tokens.safetensors", folder / "masked.safetensors")
        for row, align, fit in ROWS:
            result = evaluate(args.bin / "pewter", models, folder, align, fit, args.points)
            report["rows"].append({"row": row, **result})
            barrier = "" if result["barrier"] is None else f"{result['barrier']:.3f}"
            rows.append([row, barrier, f"{result['half']:.3f}", "yes" if result["function_kept"] else "no", f"{result['cpu_s']:.0f}"])
            print(*rows[-1], sep=" | ", flush=True)
    print(measure.table(["row", "barrier", "half", "kept", "CPU s"], rows))
    measure.write_results(args.results, "components", report)


if __name__ == "__main__":
    main()
