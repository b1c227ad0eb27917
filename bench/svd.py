#!/usr/bin/env python3
"""Measures Decom-Renorm-Merge of one weight: Pewter against the way of the method's released code, a float32 torch.linalg.svd of the concatenated task vectors.

    bench/svd.py --peer VENV [--large] [--threads 2]

The peer is written from the method's definition (merge/methods/drm.cc states it). Its time is that of reading the files, merging and writing the result, without the start of Python; "alone" is that of its
merge with the task vectors in memory. Pewter's is that of the whole command: start, reading, merging, hashing, writing, fsync. Task vectors are a few directions, some of them shared, and noise of 2 %; weights are float32.
`error` is the norm of the difference from a float64 SVD's merge, as a share of that merge's norm: of Pewter with `dtype: float64` (the task vectors then are those of the peer to the last bit) and of the peer.
Prints a table and writes bench/results/svd-DATE.json. The peer's environment needs torch and safetensors.
"""
import argparse
import json
import os
import pathlib
import subprocess
import tempfile

import measure

CASES = [  # rows, columns, tasks, direction; whether a float64 reference is made
    (768, 3072, 3, "horizontal", True),
    (768, 3072, 8, "horizontal", True),
    (768, 3072, 3, "vertical", True),
    (768, 3072, 8, "vertical", False),
    (1024, 4096, 3, "horizontal", True),
    (1024, 4096, 8, "horizontal", False),
]
LARGE = [(4096, 4096, 8, "horizontal", False)]
DENSITY = 0.2

# Runs in the peer's Python.
COMMON = """
import json, sys, time, torch
from safetensors.torch import load_file, save_file
NAME = "layer.weight"

def merge(deltas, direction, density, dtype):
    deltas = [d.to(dtype) for d in deltas]
    count, vertical = len(deltas), direction == "vertical"
    u, s, vh = torch.linalg.svd(torch.cat(deltas, dim=0 if vertical else 1), full_matrices=False)
    kept = int((s > 0.01 * s[0]).sum())
    basis, vectors = (vh[:kept].T, u[:, :kept].T) if vertical else (u[:, :kept], vh[:kept])
    s, width = s[:kept], deltas[0].shape[0 if vertical else 1]
    blocks = torch.stack(vectors.split(width, dim=1))
    norms = blocks.norm(dim=2, keepdim=True)
    blocks = blocks / norms
    size = blocks.numel()
    threshold = blocks.abs().flatten().kthvalue(size - round(size * density)).values
    terms = torch.where(blocks.abs() >= threshold, blocks * norms * s[None, :, None], torch.zeros((), dtype=dtype))
    sign = terms.sum(dim=0).sign()
    sign = torch.where(sign == 0, sign.sum().sign(), sign)
    terms = torch.where(terms.sign() == sign, terms, torch.zeros((), dtype=dtype))
    merged = basis @ (terms.sum(dim=0) / terms.count_nonzero(dim=0).clamp(min=1))
    return merged.T if vertical else merged

def load(folder, tasks):
    base = load_file(f"{folder}/base.safetensors")[NAME]
    return base, [load_file(f"{folder}/task{t}.safetensors")[NAME] for t in range(tasks)]
"""
MAKE = COMMON + """
folder, rows, columns, tasks = sys.argv[1], *map(int, sys.argv[2:5])
torch.manual_seed(1)
rank = max(4, min(rows, columns) // 16)
base = 0.02 * torch.randn(rows, columns)
shared = torch.randn(rows, rank)
save_file({NAME: base}, f"{folder}/base.safetensors")
for t in range(tasks):
    strong = shared @ torch.randn(rank, columns) + torch.randn(rows, rank) @ torch.randn(rank, columns)
    delta = strong / strong.std() + 0.02 * rank**0.5 * torch.randn(rows, columns)
    save_file({NAME: base + 1e-3 * delta}, f"{folder}/task{t}.safetensors")
"""
PEER = COMMON + """
folder, tasks, direction, density, threads = sys.argv[1], int(sys.argv[2]), sys.argv[3], float(sys.argv[4]), int(sys.argv[5])
torch.set_num_threads(threads)
merge(list(torch.randn(tasks, 16, 16)), direction, density, torch.float32)  # starts the libraries' threads
start = time.perf_counter(), time.process_time()
base, models = load(folder, tasks)
deltas = [m - base for m in models]
alone = time.perf_counter(), time.process_time()
merged = merge(deltas, direction, density, torch.float32)
done = time.perf_counter(), time.process_time()
save_file({NAME: base + merged}, f"{folder}/peer.safetensors")
end = time.perf_counter(), time.process_time()
print(json.dumps({"wall_s": end[0] - start[0], "cpu_s": end[1] - start[1], "alone_wall_s": done[0] - alone[0], "alone_cpu_s": done[1] - alone[1]}))
save_file({NAME: merged.contiguous()}, f"{folder}/peer-delta.safetensors")
"""
COMPARE = COMMON + """
folder, tasks, direction, density, threads = sys.argv[1], int(sys.argv[2]), sys.argv[3], float(sys.argv[4]), int(sys.argv[5])
torch.set_num_threads(threads)
base, models = load(folder, tasks)
want = merge([m.double() - base.double() for m in models], direction, density, torch.float64)
ours = load_file(f"{folder}/exact/model.safetensors")[NAME] - base.double()
peer = load_file(f"{folder}/peer-delta.safetensors")[NAME].double()
print(json.dumps({"pewter": float((ours - want).norm() / want.norm()), "peer": float((peer - want).norm() / want.norm())}))
"""


def recipe(folder, tasks, direction, dtype):
    models = [{"model": str(folder / f"task{t}.safetensors")} for t in range(tasks)]
    return json.dumps({"merge_method": "drm", "base_model": str(folder / "base.safetensors"), "models": models,
                       "parameters": {"direction": direction, "density": DENSITY}, "dtype": dtype})  # JSON is YAML


def python(args, code, *words):
    # Threads that wait do not spin: the CPU seconds are those of work.
    environment = dict(os.environ, OMP_WAIT_POLICY="PASSIVE")
    command = [str(args.peer / "bin/python"), "-c", code, *map(str, words)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout


def pewter(args, folder, tasks, direction, dtype, out):
    text = folder / "recipe.yml"
    text.write_text(recipe(folder, tasks, direction, dtype))
    command = [args.bin / "pewter", "merge", text, out, "--device", "cpu", "--threads", args.threads, "--memory", args.memory, "--overwrite"]
    return measure.run(command)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_common_arguments(parser)
    parser.add_argument("--pairs", type=int, default=3, help="of runs; default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="of both; default: %(default)s")
    parser.add_argument("--memory", default="8GiB", help="of Pewter; default: %(default)s")
    parser.add_argument("--large", action="store_true", help="also 4096 x 4096 of eight tasks, once: the peer takes minutes")
    args = parser.parse_args()
    if not args.peer:
        parser.error("give --peer or PEWTER_PEER_VENV")
    report = {"machine": measure.machine(), "pewter": measure.pewter_version(args.bin), "versions": measure.package_versions(args.peer / "bin/python", ["torch"]),
              "threads": args.threads, "density": DENSITY, "cases": []}
    rows = []
    for n, m, tasks, direction, exact in CASES + (LARGE if args.large else []):
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            python(args, MAKE, folder, n, m, tasks)
            measured = measure.pairs(
                1 if n * m * tasks > 1 << 26 else args.pairs,
                lambda: pewter(args, folder, tasks, direction, "float32", folder / "out"),
                lambda: json.loads(python(args, PEER, folder, tasks, direction, DENSITY, args.threads)))
            case = {"rows": n, "columns": m, "tasks": tasks, "direction": direction, "runs": measure.without_output(measured),
                    "cpu_ratio": measure.ratio(measured, "cpu_s"), "wall_ratio": measure.ratio(measured, "wall_s")}
            if exact:
                pewter(args, folder, tasks, direction, "float64", folder / "exact")
                case["error"] = json.loads(python(args, COMPARE, folder, tasks, direction, DENSITY, args.threads))
            report["cases"].append(case)
            ours, theirs = ([pair[i] for pair in measured] for i in (0, 1))
            errors = [f"{case['error'][who]:.1e}" for who in ("pewter", "peer")] if exact else ["", ""]
            rows.append([f"{n} x {m}", tasks, direction, f"{measure.median(ours, 'cpu_s'):.2f}", f"{measure.median(theirs, 'cpu_s'):.2f}",
                         f"{case['cpu_ratio']['median']:.1f}", f"{measure.median(theirs, 'alone_cpu_s') / measure.median(ours, 'cpu_s'):.1f}", f"{measure.median(ours, 'wall_s'):.2f}", f"{measure.median(theirs, 'wall_s'):.2f}",
                         f"{max(run['peak_anonymous_bytes'] for run in ours) >> 20}", *errors])
    print(measure.table(["weight", "tasks", "direction", "Pewter CPU s", "SVD CPU s", "times less", "alone", "Pewter wall s", "SVD wall s", "MiB", "error", "SVD's error"], rows))
    report["machine"]["load_after"] = os.getloadavg()
    print("\nwritten:", measure.write_results(args.results, "svd", report))


if __name__ == "__main__":
    main()
