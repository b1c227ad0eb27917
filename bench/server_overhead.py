#!/usr/bin/env python3
"""Measures what the server adds to a merge: from submit to start, and the whole over the local run, on tiny models.

    bench/server_overhead.py [--runs 15]

`pewter submit --wait` and `pewter merge` alternate on the same models (make_models.py --shape tiny). Prints a table and writes bench/results/server_overhead-DATE.json. Needs numpy.
"""
import argparse
import datetime
import json
import os
import pathlib
import re
import statistics
import subprocess
import tempfile
import time

import make_models
import measure


class Server:
    """pewterd with its own data folder, on a free port of this machine."""

    def __init__(self, binary, data):
        self.address_file = data / "address"
        self.log = open(data.parent / "pewterd.log", "w+")
        self.process = subprocess.Popen([binary, "serve", "--listen", "127.0.0.1:0", "--data", data], stdout=self.log, stderr=self.log)

    def __enter__(self):
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and self.process.poll() is None:
            if self.address_file.exists():
                self.address = self.address_file.read_text().strip()
                return self
            time.sleep(0.01)
        raise RuntimeError("pewterd did not start:\n" + pathlib.Path(self.log.name).read_text())

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()
        self.log.close()


def seconds(timestamp):
    # Python 3.11 reads "Z" and at most microseconds.
    return datetime.datetime.fromisoformat(re.sub(r"(\.\d{6})\d*Z$", r"\1Z", timestamp)).timestamp()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_common_arguments(parser)
    parser.add_argument("--runs", type=int, default=15)
    args = parser.parse_args()
    pewter = args.bin / "pewter"
    report = {"machine": measure.machine(), "versions": {"pewter": measure.pewter_version(args.bin)}}
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        scratch = pathlib.Path(scratch)
        make_models.make(scratch / "models", "tiny", seed=1)
        recipe = scratch / "linear.yml"
        recipe.write_text(json.dumps({"merge_method": "linear", "dtype": "bfloat16", "models": [
            {"model": str(scratch / "models" / name), "parameters": {"weight": 0.5}} for name in ("base", "ft1")]}))
        (scratch / "data").mkdir()
        with Server(args.bin / "pewterd", scratch / "data") as server:
            starts = []

            def local():
                out = scratch / "local"
                measure.remove(out)
                return measure.run([pewter, "merge", recipe, out, "--device", "cpu", "--quiet"])

            def remote():
                out = scratch / "remote"
                measure.remove(out)
                result = measure.run([pewter, "submit", recipe, out, "--device", "cpu", "--quiet", "--wait", "--server", server.address,
                                      "--label", f"run={len(starts)}"])
                jobs = json.loads(measure.output_of([pewter, "jobs", "list", "--server", server.address, "-o", "json"]))
                newest = max(jobs["jobs"] if isinstance(jobs, dict) else jobs, key=lambda job: seconds(job["create_time"]))
                starts.append(seconds(newest["start_time"]) - seconds(newest["create_time"]))
                return result

            local(), remote()
            starts.clear()
            measured = measure.pairs(args.runs, local, remote)
    extra = [remote["wall_s"] - local["wall_s"] for local, remote in measured]
    rows = [["submit to start, ms", *(f"{1000 * f(starts):.1f}" for f in (statistics.median, max))],
            ["added to the local run, ms", *(f"{1000 * f(extra):.1f}" for f in (statistics.median, max))],
            ["local run, ms", *(f"{1000 * f(local['wall_s'] for local, _ in measured):.1f}" for f in (statistics.median, max))]]
    print(measure.table([f"{args.runs} runs", "median", "most"], rows))
    report |= {"submit_to_start_s": starts, "added_s": extra, "runs": measure.without_output(measured)}
    report["machine"]["load_after"] = os.getloadavg()
    print("\nwritten:", measure.write_results(args.results, "server_overhead", report))


if __name__ == "__main__":
    main()
