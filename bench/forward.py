"""Forward and statistics passes against PyTorch: a masked language model of BERT-base's shape on the CPU.

    bench/forward.py --peer VENV [--tokens 32768] [--threads 2]

VENV has torch, transformers and safetensors. Two random models of 110 M parameters are made in a temporary folder.
Compared are the forward pass alone, and the pass that sums the cross moments of two models at every feature site that
alignment uses; PyTorch does the latter with hooks, products of 4096 tokens in float32 and sums in float64. Its time is
that of the pass alone, without start and loading, as is ours here. Last, `pewter align` of the pair, from start to end.
Prints tables and writes bench/results/forward-DATE.json.
"""
import argparse
import os
import pathlib
import subprocess
import tempfile

import measure

SCRIPT = r'''
import sys, time, json
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM
data, threads, grams, folders = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4:]
torch.set_num_threads(threads)
ids = load_file(data)["input_ids"]
models = [AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in folders]
features, sums = [{} for _ in models], {}
def hook(i, name, output):
    def keep(module, inputs, result):
        features[i][name] = (result if output else inputs[0]).flatten(0, 1)
    return keep
if grams == "cross":
    for i, model in enumerate(models):
        base = model.bert
        base.embeddings.LayerNorm.register_forward_hook(hook(i, "residual.0", True))
        for l, layer in enumerate(base.encoder.layer):
            s = layer.attention.self
            for name, module, output in (
                (f"query.{l}", s.query, True), (f"key.{l}", s.key, True), (f"value.{l}", s.value, True),
                (f"attention.{l}", layer.attention.output.dense, False),
                (f"residual.{2*l+1}", layer.attention.output.LayerNorm, True),
                (f"ffn.{l}", layer.output.dense, False), (f"residual.{2*l+2}", layer.output.LayerNorm, True)):
                module.register_forward_hook(hook(i, name, output))
begin = time.perf_counter()
with torch.inference_mode():
    for batch in ids.split(4096 // ids.shape[1]):
        for model in models:
            model.bert(batch)
        if grams == "cross":
            for name, a in features[0].items():
                b = features[1][name]
                if name not in sums:
                    sums[name] = [torch.zeros(a.shape[1], b.shape[1], dtype=torch.float64)] + [
                        torch.zeros(n, dtype=torch.float64) for n in (a.shape[1], b.shape[1]) * 2]
                total, sa, sb, qa, qb = sums[name]
                total += a.T @ b
                for x, s, q in ((a, sa, qa), (b, sb, qb)):
                    x = x.double()
                    s += x.sum(0)
                    q += (x * x).sum(0)
print("%.3f" % (time.perf_counter() - begin))
'''

MAKE = r'''
import sys, torch
from safetensors.torch import save_file
from transformers import BertConfig, BertForMaskedLM
folder, tokens = sys.argv[1], int(sys.argv[2])
for i in range(2):
    torch.manual_seed(i)
    BertForMaskedLM(BertConfig()).save_pretrained(f"{folder}/{i}")
save_file({"input_ids": torch.randint(1000, 30000, (tokens // 128, 128))}, f"{folder}/data.safetensors")
'''


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_common_arguments(parser)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3, help="pairs of runs; default: %(default)s")
    parser.add_argument("--memory", default="1GiB", help="of pewter align; default: %(default)s")
    arguments = parser.parse_args()
    if not arguments.peer:
        parser.error("give --peer or PEWTER_PEER_VENV")
    python = pathlib.Path(arguments.peer) / "bin/python"
    report = {"machine": measure.machine(), "pewter": measure.pewter_version(arguments.bin), "versions": measure.package_versions(python, ["torch", "transformers"]),
              "tokens": arguments.tokens, "threads": arguments.threads, "passes": [], "alignments": []}

    def timed(command):
        run = measure.run(command)
        return run | {"pass_s": float(run["output"].split()[-1])}

    passes, alignments = [], []
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([python, "-c", MAKE, folder, str(arguments.tokens)], check=True, stderr=subprocess.DEVNULL)
        data, models = f"{folder}/data.safetensors", [f"{folder}/0", f"{folder}/1"]
        for grams, used in (("none", models[:1]), ("cross", models)):
            ours = [arguments.bin / "pewter_statistics_pass", data, arguments.threads, grams, f"{folder}/out.safetensors", *used]
            theirs = [python, "-c", SCRIPT, data, arguments.threads, grams, *used]
            measured = measure.pairs(arguments.repeat, lambda: timed(ours), lambda: timed(theirs))
            ratio = measure.ratio(measured, "pass_s")
            report["passes"].append({"grams": grams, "runs": measure.without_output(measured), "ratio": ratio})
            first, second = ([pair[i] for pair in measured] for i in (0, 1))
            passes.append([{"none": "forward", "cross": "statistics of two"}[grams], f"{measure.median(first, 'pass_s'):.1f}", f"{measure.median(second, 'pass_s'):.1f}", f"{ratio['median']:.2f}",
                           *(f"{max(run['peak_rss_bytes'] for run in runs) >> 20}" for runs in (first, second))])
        for method in ("permutation", "staged"):
            run = measure.run([arguments.bin / "pewter", "align", *models, f"{folder}/{method}", "--method", method, "--evidence", "activations", "--calibration", data,
                               "--device", "cpu", "--threads", arguments.threads, "--memory", arguments.memory, "--quiet"])
            del run["output"]
            report["alignments"].append(run | {"method": method, "memory": arguments.memory})
            alignments.append([method, f"{run['wall_s']:.1f}", f"{run['cpu_s']:.1f}", f"{run['peak_rss_bytes'] >> 20}", f"{run['peak_anonymous_bytes'] >> 20}"])
    print(measure.table(["pass", "Pewter s", "PyTorch s", "times less", "Pewter MiB", "PyTorch MiB"], passes))
    print(measure.table(["pewter align", "wall s", "CPU s", "peak MiB", "of it anonymous"], alignments))
    report["machine"]["load_after"] = os.getloadavg()
    print("\nwritten:", measure.write_results(arguments.results, "forward", report))


if __name__ == "__main__":
    main()
