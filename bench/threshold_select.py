#!/usr/bin/env python3
"""Compares the exact k-th magnitude (what trimming needs) with torch.argsort and torch.kthvalue, on values that are hard in different ways.

    bench/threshold_select.py --peer VENV

Ours is pewter_kernel_bench's figure; per element, as both sides state their sizes. torch has all cores. Each figure is the best of several runs: of an
operation without I/O the least disturbed run is the truest. Prints a table and writes bench/results/threshold_select-DATE.json.
"""
import argparse
import json
import os
import re
import subprocess

import measure

DISTRIBUTIONS = {  # as pewter_kernel_bench names them, in its benchmarks' names
    "normal": "normal",
    "zeros": "60 % zeros",
    "equal": "all equal",
    "bf16": "bf16-quantised",
}

# Runs in the peer's Python: seconds of each operation on the magnitudes of each distribution.
TORCH = """
import json, sys, time, torch
elements, runs, keep = int(sys.argv[1]), int(sys.argv[2]), 0.5
torch.manual_seed(1)
torch.set_num_threads(len(__import__("os").sched_getaffinity(0)))
normal = torch.randn(elements)
values = {
    "normal": lambda: normal,
    "zeros": lambda: torch.where(torch.rand(elements) < 0.6, torch.zeros(()), normal),
    "equal": lambda: torch.full((elements,), 0.25),
    "bf16": lambda: (1 + 0.01 * normal).bfloat16().float() - 1,
}
k = max(1, int(keep * elements))
times = {}
for name, make in values.items():
    magnitudes = make().abs()
    operations = {"argsort": lambda: torch.argsort(magnitudes, descending=True), "kthvalue": lambda: torch.kthvalue(magnitudes, elements - k + 1)}
    times[name] = {}
    for operation, call in operations.items():
        best = float("inf")
        for _ in range(runs):
            begin = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - begin)
        times[name][operation] = best
print(json.dumps(times))
"""


def ours(binary, runs):
    """Distribution -> best seconds per element."""
    text = measure.output_of([binary, "--benchmark_filter=[Ss]elect", "--benchmark_format=json", f"--benchmark_repetitions={runs}"])
    best = {}
    for entry in json.loads(text)["benchmarks"]:
        if entry.get("run_type") == "aggregate":
            continue
        names = [name for name in DISTRIBUTIONS if re.search(name, entry["name"])]
        if len(names) == 1:
            best[names[0]] = min(best.get(names[0], float("inf")), 1 / entry["items_per_second"])
    missing = set(DISTRIBUTIONS) - set(best)
    if missing:
        raise RuntimeError(f"{binary} has no select benchmark of {', '.join(sorted(missing))}")
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_common_arguments(parser)
    parser.add_argument("--elements", type=int, default=4096 * 14336, help="of torch's tensors; default: %(default)s")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    if not args.peer:
        parser.error("give --peer or PEWTER_PEER_VENV")
    python = args.peer / "bin/python"
    report = {"machine": measure.machine(), "versions": measure.package_versions(python, ["torch"]), "elements": args.elements}
    before = ours(args.bin / "pewter_kernel_bench", args.runs)
    torch = json.loads(subprocess.run([python, "-c", TORCH, str(args.elements), str(args.runs)], capture_output=True, text=True, check=True).stdout)
    after = ours(args.bin / "pewter_kernel_bench", args.runs)
    rows = []
    for name, title in DISTRIBUTIONS.items():
        mine = min(before[name], after[name])
        argsort, kthvalue = (torch[name][operation] / args.elements for operation in ("argsort", "kthvalue"))
        report[name] = {"pewter_ns_per_element": 1e9 * mine, "argsort_ns_per_element": 1e9 * argsort, "kthvalue_ns_per_element": 1e9 * kthvalue,
                        "argsort_ratio": argsort / mine, "kthvalue_ratio": kthvalue / mine}
        rows.append([title, f"{1e9 * mine:.2f}", f"{1e9 * argsort:.1f}", f"{argsort / mine:.0f}", f"{1e9 * kthvalue:.1f}", f"{kthvalue / mine:.1f}"])
    print(measure.table(["values", "Pewter ns/element", "argsort", "ratio", "kthvalue", "ratio"], rows))
    report["machine"]["load_after"] = os.getloadavg()
    print("\nwritten:", measure.write_results(args.results, "threshold_select", report))


if __name__ == "__main__":
    main()
