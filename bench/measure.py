"""What the benchmark scripts share: a measured child process, ratios of pairs, tables, result files."""
import contextlib
import datetime
import json
import os
import pathlib
import platform
import random
import shutil
import statistics
import subprocess
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
SAMPLE_SECONDS = 0.005


def add_common_arguments(parser):
    parser.add_argument("--bin", type=pathlib.Path, default=ROOT / "build/bin", help="folder of pewter and pewterd; default: %(default)s")
    parser.add_argument("--peer", type=pathlib.Path, default=os.environ.get("PEWTER_PEER_VENV"),
                        help="virtual environment that holds the program to compare with; default: $PEWTER_PEER_VENV")
    parser.add_argument("--results", type=pathlib.Path, default=ROOT / "bench/results", help="default: %(default)s")


def run(command, **popen):
    """Runs a command to its end. CPU seconds are the kernel's, of the process and the children it waited for; peak RSS and
    peak anonymous memory are read from /proc every 5 ms, of the process alone."""
    command = [str(word) for word in command]
    output = popen.pop("stdout", subprocess.PIPE)
    begin = time.monotonic()
    child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, text=True, **popen)
    peak = {"VmHWM": 0, "RssAnon": 0}
    stop = threading.Event()

    def sample():
        while not stop.wait(SAMPLE_SECONDS):
            with contextlib.suppress(OSError), open(f"/proc/{child.pid}/status") as status:
                for line in status:
                    key, _, value = line.partition(":")
                    if key in peak:
                        peak[key] = max(peak[key], int(value.split()[0]) * 1024)

    sampler = threading.Thread(target=sample)
    sampler.start()
    text = child.stdout.read() if child.stdout else ""
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.monotonic() - begin
    child.returncode = os.waitstatus_to_exitcode(status)
    stop.set()
    sampler.join()
    if child.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\nexited with {child.returncode}:\n{text[-4000:]}")
    return {"wall_s": wall, "cpu_s": usage.ru_utime + usage.ru_stime, "peak_rss_bytes": peak["VmHWM"],
            "peak_anonymous_bytes": peak["RssAnon"], "output": text}


def pairs(count, first, second):
    """Measures A B B A ..., so that a drift of the machine falls on both."""
    results = []
    for i in range(count):
        measured = [first(), second()] if i % 2 == 0 else [second(), first()][::-1]
        results.append(measured)
    return results


def ratio(measured, key):
    """Median of second / first over the pairs, with a bootstrap 95 % interval."""
    ratios = [second[key] / max(first[key], 1e-9) for first, second in measured]
    draws = random.Random(1)
    medians = sorted(statistics.median(draws.choices(ratios, k=len(ratios))) for _ in range(2000))
    return {"median": statistics.median(ratios), "low": medians[50], "high": medians[1949], "pairs": len(ratios)}


def median(runs, key):
    return statistics.median(run[key] for run in runs)


def without_output(measured):
    return [[{k: v for k, v in one.items() if k != "output"} for one in pair] for pair in measured]


def read_all(files):
    """Brings files into the page cache."""
    for file in files:
        with open(file, "rb", buffering=0) as stream:
            while stream.read(16 << 20):
                pass


def fsync_folder(folder):
    """Seconds to make a folder's files durable."""
    begin = time.monotonic()
    for file in sorted(pathlib.Path(folder).rglob("*")):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
    return time.monotonic() - begin


def remove(path):
    shutil.rmtree(path, ignore_errors=True)


def machine():
    info = pathlib.Path("/proc/cpuinfo").read_text()
    model = next((line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")), platform.machine())
    memory = pathlib.Path("/proc/meminfo").read_text().split()[1]
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "memory_gib": round(int(memory) / 2**20, 1),
            "kernel": platform.release(), "load_before": os.getloadavg()}


def output_of(command):
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True).stdout.strip()


def pewter_version(bin_folder):
    version = output_of([bin_folder / "pewter", "--version"])
    commit = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True)
    return f"{version} ({commit.stdout.strip()})" if commit.returncode == 0 else version


def package_versions(python, names):
    code = "import importlib.metadata as m, sys\nfor n in sys.argv[1:]: print(n, m.version(n))"
    lines = output_of([python, "-c", code, *names]).splitlines()
    return dict(line.split() for line in lines)


def table(header, rows):
    widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header))]
    def line(row):
        return "| " + " | ".join(str(cell).ljust(width) for cell, width in zip(row, widths)) + " |"
    return "\n".join([line(header), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, rows)])


def write_results(folder, name, report):
    """Writes NAME-DATE.json, or NAME-DATE-2.json when that is there; returns the path."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{name}-{datetime.date.today().isoformat()}"
    path, number = folder / f"{stem}.json", 1
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    return path
