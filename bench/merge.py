#!/usr/bin/env python3
"""Measures whole merges: Pewter against mergekit, against plain I/O, with and without hashing, and its memory.

    bench/make_models.py M/1.1b; bench/make_models.py M/0.2b --shape 0.2b
    bench/merge.py --models M/1.1b --small M/0.2b --peer VENV

Runs of a pair alternate (A B B A) on the same files, brought into the page cache before each run. Memory is written back before each run, and mergekit's files are made durable
afterwards, as Pewter's are, which `wall + fsync` counts. A pair counts only when both programs agree on what the recipe means (see `agreement`).
Prints tables and writes bench/results/merge-DATE.json. Needs numpy.
"""
import argparse
import json
import os
import pathlib
import struct
import sys
import tempfile

import numpy as np

import measure

METHODS = {
    # method: models, parameters
    "linear": (["base", "ft1", "ft2", "ft3"], {"weight": 0.25}),
    "slerp": (["base", "ft1"], {"t": 0.4}),
    "task_arithmetic": (["base", "ft1", "ft2", "ft3"], {"weight": 0.4}),
    "ties": (["base", "ft1", "ft2", "ft3"], {"weight": 1.0, "density": 0.5}),
    "dare_ties": (["base", "ft1", "ft2", "ft3"], {"weight": 1.0, "density": 0.5}),
    "dare_linear": (["base", "ft1", "ft2", "ft3"], {"weight": 0.4, "density": 0.5}),
    "della": (["base", "ft1", "ft2", "ft3"], {"weight": 1.0, "density": 0.5, "epsilon": 0.1}),
    "della_linear": (["base", "ft1", "ft2", "ft3"], {"weight": 0.4, "density": 0.5, "epsilon": 0.1}),
    "breadcrumbs": (["base", "ft1", "ft2", "ft3"], {"weight": 0.4, "density": 0.5, "gamma": 0.01}),
    "breadcrumbs_ties": (["base", "ft1", "ft2", "ft3"], {"weight": 1.0, "density": 0.5, "gamma": 0.01}),
    "sce": (["base", "ft1", "ft2", "ft3"], {"select_topk": 0.5}),
    "karcher": (["base", "ft1", "ft2", "ft3"], {}),
    "model_stock": (["base", "ft1", "ft2", "ft3"], {}),
    "multislerp": (["ft1", "ft2", "ft3"], {"weight": 1.0}),
    "nuslerp": (["ft1", "ft2"], {"weight": 1.0}),
    "nearswap": (["base", "ft1"], {"t": 1e-3}),
    "ram": (["base", "ft1", "ft2", "ft3"], {}),
    "arcee_fusion": (["base", "ft1"], {}),
}
# Those in which base_model would be an input more, or none.
WITHOUT_BASE = ("linear", "karcher", "nuslerp", "multislerp")
SPHERICAL = ("karcher", "nuslerp", "multislerp")
MIB = 1 << 20


def recipe_text(method, models):
    names, parameters = METHODS[method]
    recipe = {"merge_method": method, "models": [{"model": str(models / name)} for name in names], "parameters": parameters, "dtype": "bfloat16"}
    if method not in WITHOUT_BASE:
        recipe["base_model"] = str(models / "base")
    return json.dumps(recipe, indent=1) + "\n"  # JSON is YAML


def input_files(method, models):
    return [file for name in METHODS[method][0] for file in sorted((models / name).glob("*.safetensors"))]


def read_tensors(folder):
    """Name -> memory-mapped numbers, bf16 as their bits. (mergekit's arcee_fusion writes f32 whatever dtype says.)"""
    tensors = {}
    for file in sorted(pathlib.Path(folder).glob("*.safetensors")):
        with open(file, "rb") as stream:
            size = struct.unpack("<Q", stream.read(8))[0]
            header = json.loads(stream.read(size))
        data = np.memmap(file, np.uint8, "r", 8 + size)
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                tensors[name] = data[begin:end].view({"BF16": np.uint16, "F32": np.float32}[entry["dtype"]])
    return tensors


def to_bf16(numbers):
    """Bits, rounded to nearest even."""
    if numbers.dtype == np.uint16:
        return numbers
    bits = numbers.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def to_f32(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def agreement(method, ours, theirs, base):
    """Compares two outputs, counting elements that differ by at most a unit in the last place.

    linear and slerp compute in f32 and round once on both sides, and model_stock steps so little from the base here that its rounding is all there is to see: all but one element in a
    million (near-cancelled sums). The others: mergekit rounds to bf16 after every step and draws other random masks, so the step from the base must be as long, within 5 %
    (arcee_fusion: 10 %, as mergekit's divergences are below the resolution of its bf16). Spherical means of near models may step otherwise, where that noise is as large as the step: then 95 %
    of the elements."""
    a, b, origin = read_tensors(ours), read_tensors(theirs), read_tensors(base)
    if sorted(a) != sorted(b):
        raise RuntimeError(f"{method}: the outputs hold different tensors: {sorted(set(a) ^ set(b))[:5]}")
    count = equal = near = 0
    step_a = step_b = 0.0
    for name in a:
        for at in range(0, a[name].size, 8 << 20):
            x, y, o = (to_bf16(tensors[name][at:at + (8 << 20)]) for tensors in (a, b, origin))
            # Bits as integers in the order of the numbers, so that neighbours differ by one.
            ordered = [np.where(bits & 0x8000, 0x8000 - bits.astype(np.int32), bits.astype(np.int32)) for bits in (x, y)]
            distance = np.abs(ordered[0] - ordered[1])
            count += x.size
            equal += int((distance == 0).sum())
            near += int((distance <= 1).sum())
            x, y, o = to_f32(x), to_f32(y), to_f32(o)
            step_a += float(np.square(x - o, dtype=np.float64).sum())
            step_b += float(np.square(y - o, dtype=np.float64).sum())
    result = {"equal": equal / count, "within_1_ulp": near / count, "step_ratio": (step_a / step_b) ** 0.5}
    same_step = abs(result["step_ratio"] - 1) < (0.1 if method == "arcee_fusion" else 0.05)
    allowed = {"linear": 1e-6, "slerp": 1e-6, "model_stock": 1e-6, **dict.fromkeys(SPHERICAL, 0.05)}.get(method)
    result["pass"] = same_step if allowed is None else count - near <= allowed * count or (method in SPHERICAL and same_step)
    return result


class Bench:
    def __init__(self, args, scratch):
        self.args, self.scratch = args, scratch
        self.commands = {}

    def recipe(self, method, models):
        path = self.scratch / f"{method}-{models.name}.yml"
        path.write_text(recipe_text(method, models))
        return path

    @staticmethod
    def prepare(method, models):
        """Each run finds nothing left to write and its inputs in the page cache, whatever ran before it."""
        os.sync()
        measure.read_all(input_files(method, models))

    def pewter(self, method, models, *flags):
        out = self.scratch / "pewter-out"
        measure.remove(out)
        self.prepare(method, models)
        command = [self.args.bin / "pewter", "merge", self.recipe(method, models), out, "--device", "cpu", "--quiet", "--seed", "1", *flags]
        self.commands[" ".join(["pewter", *map(str, flags)])] = " ".join(map(str, command))
        return measure.run(command)

    def mergekit(self, method, models):
        out = self.scratch / "mergekit-out"
        measure.remove(out)
        self.prepare(method, models)
        command = [self.args.peer / "bin/mergekit-yaml", self.recipe(method, models), out, *self.args.peer_flags.split()]
        self.commands["mergekit"] = " ".join(map(str, command))
        result = measure.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"})
        result["wall_fsync_s"] = result["wall_s"] + measure.fsync_folder(out)
        return result

    def plain_io(self, method, models):
        out = self.scratch / "plain-out"
        out.unlink(missing_ok=True)
        self.prepare(method, models)
        size = sum(file.stat().st_size for file in (models / "base").glob("*.safetensors"))
        command = [self.args.bin / "pewter_plain_io", out, size, 2, *input_files(method, models)]
        self.commands["plain_io"] = " ".join(map(str, command))
        result = measure.run(command)
        out.unlink()
        return result

    def against_mergekit(self):
        report, rows = {}, []
        for method in self.args.methods:
            measured = measure.pairs(self.args.pairs, lambda: self.pewter(method, self.args.models), lambda: self.mergekit(method, self.args.models))
            check = agreement(method, self.scratch / "pewter-out", self.scratch / "mergekit-out", self.args.models / "base")
            if not check["pass"]:
                raise RuntimeError(f"{method}: the outputs do not agree, so their times do not compare: {check}")
            for ours, _ in measured:
                ours["wall_fsync_s"] = ours["wall_s"]  # pewter has done it
            ours, theirs = [pair[0] for pair in measured], [pair[1] for pair in measured]
            ratios = {key: measure.ratio(measured, key) for key in ("cpu_s", "wall_s", "wall_fsync_s", "peak_rss_bytes", "peak_anonymous_bytes")}
            report[method] = {"agreement": check, "ratios": ratios, "runs": measure.without_output(measured)}
            rows.append([method,
                         f"{measure.median(ours, 'cpu_s'):.2f} / {measure.median(theirs, 'cpu_s'):.1f}", f"{ratios['cpu_s']['median']:.1f}",
                         f"{measure.median(ours, 'wall_s'):.2f} / {measure.median(theirs, 'wall_s'):.1f}", f"{ratios['wall_s']['median']:.1f}",
                         f"{ratios['wall_fsync_s']['median']:.1f}",
                         f"{measure.median(ours, 'peak_anonymous_bytes') / MIB:.0f} / {measure.median(theirs, 'peak_anonymous_bytes') / MIB:.0f}",
                         f"{measure.median(ours, 'peak_rss_bytes') / MIB:.0f} / {measure.median(theirs, 'peak_rss_bytes') / MIB:.0f}",
                         f"{check['equal']:.4f}"])
            print(f"  {method} done", file=sys.stderr)
        print("\nPewter / mergekit, medians\n" + measure.table(
            ["method", "CPU s", "ratio", "wall s", "ratio", "ratio with fsync", "anonymous MiB", "RSS MiB", "equal elements"], rows))
        return report

    def against_plain_io(self):
        measured = measure.pairs(max(3, self.args.pairs), lambda: self.plain_io("linear", self.args.models), lambda: self.pewter("linear", self.args.models))
        ratio = measure.ratio(measured, "wall_s")
        io, ours = [pair[0] for pair in measured], [pair[1] for pair in measured]
        print("\nlinear against plain I/O of the same bytes\n" + measure.table(
            ["plain I/O wall s", "linear wall s", "ratio", "plain I/O CPU s", "linear CPU s"],
            [[f"{measure.median(io, 'wall_s'):.2f}", f"{measure.median(ours, 'wall_s'):.2f}",
              f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})",
              f"{measure.median(io, 'cpu_s'):.2f}", f"{measure.median(ours, 'cpu_s'):.2f}"]]))
        return {"ratio": ratio, "runs": measure.without_output(measured)}

    def hashing(self):
        measured = measure.pairs(max(3, self.args.pairs), lambda: self.pewter("linear", self.args.models), lambda: self.pewter("linear", self.args.models, "--no-hash"))
        share = {key: 1 - measure.ratio(measured, key)["median"] for key in ("wall_s", "cpu_s")}
        print(f"\nSHA-256 of the output, linear: {share['wall_s']:.1%} of wall time, {share['cpu_s']:.1%} of CPU time")
        return {"share": share, "runs": measure.without_output(measured)}

    def memory(self):
        report, rows = {}, []
        for method in self.args.methods:
            row = [method]
            for models in filter(None, (self.args.small, self.args.models)):
                result = self.pewter(method, models, "--memory", self.args.memory)
                report.setdefault(method, {})[models.name] = result["peak_anonymous_bytes"]
                row.append(f"{result['peak_anonymous_bytes'] / MIB:.0f}")
            rows.append(row)
        shapes = [models.name for models in filter(None, (self.args.small, self.args.models))]
        print(f"\nPeak anonymous MiB with --memory {self.args.memory}\n" + measure.table(["method", *shapes], rows))
        return {"memory": self.args.memory, "peak_anonymous_bytes": report}


SECTIONS = {"mergekit": Bench.against_mergekit, "plain_io": Bench.against_plain_io, "hashing": Bench.hashing, "memory": Bench.memory}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_common_arguments(parser)
    parser.add_argument("--models", type=pathlib.Path, required=True, help="what make_models.py wrote")
    parser.add_argument("--small", type=pathlib.Path, help="a smaller shape, for the memory section")
    parser.add_argument("--scratch", type=pathlib.Path, help="folder for outputs, on the models' disk; default: beside the models")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--memory", default="256MiB", help="of the memory section")
    parser.add_argument("--peer-flags", default="--quiet --random-seed 1", help="of mergekit-yaml; default: %(default)s")
    args = parser.parse_args()
    if "mergekit" in args.sections and not args.peer:
        parser.error("the mergekit section needs --peer or PEWTER_PEER_VENV")
    args.models = args.models.resolve()
    args.small = args.small.resolve() if args.small else None
    report = {"machine": measure.machine(), "versions": {"pewter": measure.pewter_version(args.bin)}, "cache": "warm",
              "models": json.loads((args.models / "models.json").read_text())}
    if "mergekit" in args.sections:
        report["versions"] |= measure.package_versions(args.peer / "bin/python", ["mergekit", "torch", "transformers", "safetensors"])
    with tempfile.TemporaryDirectory(dir=args.scratch or args.models.parent, prefix="bench-") as scratch:
        bench = Bench(args, pathlib.Path(scratch))
        for section in args.sections:
            report[section] = SECTIONS[section](bench)
        report["commands"] = {name: command.replace(scratch, "SCRATCH").replace(str(args.models.parent), "MODELS")
                              .replace(str(args.bin), "BIN").replace(str(args.peer), "VENV") for name, command in bench.commands.items()}
        report["recipes"] = {method: recipe_text(method, pathlib.Path("MODELS")) for method in args.methods}
    report["machine"]["load_after"] = os.getloadavg()
    print("\nwritten:", measure.write_results(args.results, "merge", report))


if __name__ == "__main__":
    main()
