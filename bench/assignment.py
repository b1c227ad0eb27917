#!/usr/bin/env python3
"""Compares exact linear assignment with scipy.optimize.linear_sum_assignment, on the costs that aligning models gives.

    bench/assignment.py --peer VENV [--sizes 768,1024,3072,4096] [--large]

Costs: `uniform` random numbers; correlations of the features of two models over 2000 samples that share signals, where every feature has its partner (`planted`), a faint one (`weak`), or none to speak of,
as between models of different seeds (`hard`: two bases of one subspace). Both solve the same float32 values (scipy gets them as float64, its own type) on one thread, measured in CPU seconds, best of the runs, in turns: ours, scipy's, ours.
`warm`: `hard` again after features moved a little, from the prices of before, against the same from nothing. --large adds 11008 features, hard and uniform, one run each. Prints a table and writes bench/results/assignment-DATE.json.
"""
import argparse
import json
import os
import pathlib
import subprocess
import tempfile

import measure

# Runs in the peer's Python: writes the costs, then times scipy on them when told to.
PEER = """
import json, sys, time
import numpy as np
from scipy.optimize import linear_sum_assignment
task, kind, n, path = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
samples, shared = 2000, 64

def correlation(a, b):
    a = (a - a.mean(0)) / a.std(0)
    b = (b - b.mean(0)) / b.std(0)
    return (a.T @ b / samples).astype(np.float32)

def features(rng):
    normal = lambda *shape: rng.standard_normal(shape, dtype=np.float32)
    signals = normal(samples, shared)
    if kind == "hard":
        return signals @ normal(shared, n) + 0.5 * normal(samples, n), signals @ normal(shared, n) + 0.5 * normal(samples, n)
    private, loadings = normal(samples, n), normal(shared, n)
    noise = {"planted": 0.3, "weak": 1.0}[kind]
    strength = {"planted": 4.0, "weak": 4.0}[kind]
    make = lambda: signals @ loadings * 0.3 + private * strength + normal(samples, n) * noise * strength
    order = rng.permutation(n)
    return make(), make()[:, order]

if task == "make":
    rng = np.random.default_rng(1)
    if kind == "uniform":
        costs = rng.random((n, n), dtype=np.float32)
    else:
        a, b = features(rng)
        costs = correlation(a, b)
    costs.tofile(path)
    if len(sys.argv) > 5:  # a sweep later: every feature of one model has moved by a twentieth of itself
        b = b + 0.05 * b.std() * rng.standard_normal(b.shape, dtype=np.float32)
        correlation(a, b).tofile(sys.argv[5])
else:
    costs = np.fromfile(path, dtype=np.float32).reshape(n, n).astype(np.float64)
    best = float("inf")
    for _ in range(int(sys.argv[5])):
        begin = time.process_time()
        rows, columns = linear_sum_assignment(costs, maximize=True)
        best = min(best, time.process_time() - begin)
    print(json.dumps({"seconds": best, "total": float(costs[rows, columns].sum())}))
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_common_arguments(parser)
    parser.add_argument("--sizes", default="64,768,1024,3072,4096", help="features, comma separated; default: %(default)s")
    parser.add_argument("--kinds", default="uniform,planted,weak,hard", help="default: %(default)s")
    parser.add_argument("--runs", type=int, default=3, help="of each; default: %(default)s")
    parser.add_argument("--large", action="store_true", help="11008 features, too")
    args = parser.parse_args()
    if not args.peer:
        parser.error("give --peer or PEWTER_PEER_VENV")
    python = args.peer / "bin/python"
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "2", "OMP_NUM_THREADS": "2"}

    def peer(*words):
        return subprocess.run([python, "-c", PEER, *map(str, words)], stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout

    report = {"machine": measure.machine(), "versions": measure.package_versions(python, ["scipy", "numpy"]), "runs": args.runs, "problems": []}
    rows = []
    # Tens of microseconds are measured often.
    problems = [(int(size), kind, max(args.runs, 200 if int(size) < 512 else 0)) for size in args.sizes.split(",") for kind in args.kinds.split(",")]
    if args.large:
        problems += [(11008, kind, 1) for kind in ("uniform", "hard")]
    with tempfile.TemporaryDirectory() as folder:
        costs, moved = pathlib.Path(folder) / "costs", pathlib.Path(folder) / "moved"
        for size, kind, runs in problems:
            files = [costs, moved] if kind == "hard" else [costs]
            peer("make", kind, size, *files)
            command = [args.bin / "pewter_assignment_bench", runs, costs, size]
            first = json.loads(measure.output_of([*command, *files[1:]]))
            theirs = json.loads(peer("time", kind, size, costs, runs))
            second = json.loads(measure.output_of(command))
            mine = min(first["seconds"], second["seconds"])
            error = abs(first["total"] - theirs["total"]) / abs(theirs["total"])
            if error > 1e-9:
                raise SystemExit(f"{kind} {size}: the optimum is {first['total']}, scipy's {theirs['total']}")
            problem = {"features": size, "costs": kind, "pewter_s": mine, "scipy_s": theirs["seconds"], "ratio": mine / theirs["seconds"],
                       "mean_of_pairs": theirs["total"] / size, "load": os.getloadavg()}
            warm = ""
            if "warm" in first:
                problem.update(cold_s=first["cold"], warm_s=first["warm"], warm_ratio=first["warm"] / first["cold"])
                warm = f"{problem['warm_ratio']:.2f}"
            report["problems"].append(problem)
            rows.append([size, kind, f"{mine:.4f}", f"{theirs['seconds']:.4f}", f"{problem['ratio']:.2f}", warm])
            print(rows[-1], flush=True)
    print(measure.table(["features", "costs", "Pewter s", "scipy s", "ratio", "warm / cold"], rows))
    report["machine"]["load_after"] = os.getloadavg()
    print("\nwritten:", measure.write_results(args.results, "assignment", report))


if __name__ == "__main__":
    main()
