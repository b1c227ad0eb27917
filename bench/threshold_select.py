#!/usr/bin/env python3
"""Compares the exact k-th magnitude (what trimming needs) with torch.argsort and torch.kthvalue, on values that are hard in different ways.

    bench/threshold_select.py --peer VENV

The 20 % largest of 4096 x 14336 float32 magnitudes. Ours is `seconds` of pewter_kernel_bench's select/*, measured before and after torch's operations; the
better of the two counts, as torch's best run does. With one thread both clocks are CPU time, else wall time. Prints a table
and writes bench/results/threshold_select-DATE.json.
"""
import argparse
import json
import os
import subprocess

import measure

ELEMENTS = 4096 * 14336  # of pewter_kernel_bench

# Runs in the peer's Python: seconds of each operation on the magnitudes of each distribution, as pewter_kernel_bench names and draws them.
TORCH = """
import json, os, sys, time, torch
elements, runs, threads = map(int, sys.argv[1:])
torch.manual_seed(1)
torch.set_num_threads(threads)
clock = time.process_time if threads == 1 else time.perf_counter
normal = torch.randn(elements)
values = {
    "normal": lambda: normal,
    "zeros_60_percent": lambda: torch.where(torch.rand(elements) < 0.6, torch.zeros(()), normal),
    "all_equal": lambda: torch.full((elements,), 0.75),
    "bf16_quantised": lambda: normal.bfloat16().float(),
    "two_values": lambda: torch.where(torch.rand(elements) < 0.5, torch.tensor(0.5), torch.tensor(0.25)),
    "one_bin": lambda: 1 + torch.randint(0, 60000, (elements,)).float() * 2.0**-23,
    "exponents": lambda: torch.randint(0, 0x7F800000, (elements,), dtype=torch.int32).view(torch.float32),
}
k = elements // 5
times = {}
for name, make in values.items():
    magnitudes = make().abs()
    operations = {"argsort": lambda: torch.argsort(magnitudes, descending=True), "kthvalue": lambda: torch.kthvalue(magnitudes, elements - k + 1)}
    times[name] = {}
    for operation, call in operations.items():
        best = float("inf")
        for _ in range(runs):
            begin = clock()
            call()
            best = min(best, clock() - begin)
        times[name][operation] = best
print(json.dumps(times))
"""


def ours(command):
    """Distribution -> seconds."""
    entries = json.loads(measure.output_of(command))["benchmarks"]
    return {entry["name"].split("/")[1]: entry["seconds"] for entry in entries}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_common_arguments(parser)
    parser.add_argument("--runs", type=int, default=3, help="of each torch operation; default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="of both; default: %(default)s")
    args = parser.parse_args()
    if not args.peer:
        parser.error("give --peer or PEWTER_PEER_VENV")
    python = args.peer / "bin/python"
    command = [args.bin / "pewter_kernel_bench", f"--threads={args.threads}", "--benchmark_filter=^select/", "--benchmark_format=json"]
    report = {"machine": measure.machine(), "versions": measure.package_versions(python, ["torch"]), "threads": args.threads, "elements": ELEMENTS}
    before = ours(command)
    torch = json.loads(subprocess.run([python, "-c", TORCH, str(ELEMENTS), str(args.runs), str(args.threads)],
                                      stdout=subprocess.PIPE, text=True, check=True).stdout)
    after = ours(command)
    report["distributions"], rows = {}, []
    for name, times in torch.items():
        mine = min(before[name], after[name])
        ratios = {operation: seconds / mine for operation, seconds in times.items()}
        report["distributions"][name] = {"pewter_s": mine, **{f"{operation}_s": seconds for operation, seconds in times.items()},
                                         **{f"{operation}_ratio": ratio for operation, ratio in ratios.items()}}
        rows.append([name, f"{mine:.3f}", f"{times['argsort']:.2f}", f"{ratios['argsort']:.0f}", f"{times['kthvalue']:.2f}", f"{ratios['kthvalue']:.1f}"])
    print(measure.table(["values", "Pewter s", "argsort s", "ratio", "kthvalue s", "ratio"], rows))
    report["machine"]["load_after"] = os.getloadavg()
    print("\nwritten:", measure.write_results(args.results, "threshold_select", report))


if __name__ == "__main__":
    main()
