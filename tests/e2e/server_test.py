"""pewterd from outside: real processes, driven by the pewter command line, killed in the middle of work.

Needs nothing but Python, pytest and the two binaries, in $PEWTER_BIN or build/bin.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import struct
import subprocess
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
BIN = pathlib.Path(os.environ.get("PEWTER_BIN", ROOT / "build/bin"))
PEWTER, PEWTERD = BIN / "pewter", BIN / "pewterd"
PATIENCE = 120  # seconds, for machines that have other work


def wait_for(what, condition, patience=PATIENCE):
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.005)
    raise AssertionError(f"no {what} within {patience} s")


def write_model(path, tensors, elements, seed):
    """A raw checkpoint of F32 tensors: one .safetensors file."""
    size = 4 * elements
    header = {
        f"layer.{i:03}.weight": {"dtype": "F32", "shape": [elements], "data_offsets": [i * size, (i + 1) * size]}
        for i in range(tensors)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    noise = random.Random(seed)
    # Finite numbers of both signs whose exponents differ.
    values = struct.pack("<65536f", *(noise.gauss(0, 1) for _ in range(65536)))
    block = (values * (size // len(values) + 1))[:size]
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for i in range(tensors):
            turn = 4 * 1009 * i % size
            file.write(block[turn:] + block[:turn])


def linear(*models):
    lines = [f"  - model: {model}\n    parameters: {{weight: {i + 1}}}" for i, model in enumerate(models)]
    return "merge_method: linear\nmodels:\n" + "\n".join(lines) + "\n"


def ties(base, *models):
    lines = [f"  - model: {model}\n    parameters: {{weight: 1, density: 0.4}}" for model in models]
    return f"merge_method: ties\nbase_model: {base}\nmodels:\n" + "\n".join(lines) + "\n"


def weights(folder):
    """The SHA-256 of each weight file of a model."""
    files = sorted(folder.glob("*.safetensors"))
    assert files, f"no weights in {folder}"
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


class Server:
    """A pewterd that can be killed and started again on the same data and a free port."""

    def __init__(self, data, *options):
        self.data, self.options, self.log = data, options, data.parent / f"{data.name}.log"
        self.process = None
        self.start()

    def start(self):
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [PEWTERD, "serve", "--listen", "127.0.0.1:0", "--data", self.data, *self.options],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        line = self.process.stdout.readline()
        match = re.fullmatch(r"listening on (127\.0\.0\.1:\d+)\n", line)
        assert match, f"pewterd said {line!r}: {self.log.read_text()}"
        self.address = match[1]

    def kill(self):
        self.process.kill()
        self.process.wait()

    def stop(self):
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(PATIENCE)

    def pewter(self, *arguments, code=0):
        done = subprocess.run(
            [PEWTER, *map(str, arguments), "--server", self.address, "-o", "json"],
            capture_output=True,
            text=True,
            timeout=2 * PATIENCE,
        )
        assert done.returncode == code, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def submit(self, recipe, out, *options):
        path = self.data.parent / "recipe.yml"
        path.write_text(recipe)
        return json.loads(self.pewter("submit", path, out, "--device", "cpu", *options).stdout)["id"]

    def job(self, job):
        return json.loads(self.pewter("jobs", "get", job).stdout)

    def wait(self, job, *states):
        states = [f"JOB_STATE_{state}" for state in states]
        return wait_for(f"{states} of {job}", lambda: (got := self.job(job))["state"] in states and got)

    def worker(self, job):
        """The process id of the job's worker; None when it has none."""
        for task in pathlib.Path(f"/proc/{self.process.pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                with contextlib.suppress(OSError):
                    arguments = pathlib.Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
                    if job.encode() in arguments:
                        return int(child)
        return None

    def wait_for_shards(self, job, out):
        """Waits until the job is in the middle: some shards are finished, and others are not."""
        wait_for("finished shards", lambda: len(list(out.glob("model-*.safetensors"))) >= 3)
        assert self.job(job)["state"] == "JOB_STATE_RUNNING"

    def events(self, job):
        lines = self.pewter("jobs", "watch", job).stdout.splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path / "data")
    yield server
    server.kill()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    for seed, name in enumerate(["a", "b"]):
        write_model(folder / name / "model.safetensors", tensors=3, elements=1000, seed=seed)
    return folder


@pytest.fixture(scope="session")
def large(tmp_path_factory):
    """Models whose merge takes seconds, in many shards."""
    folder = tmp_path_factory.mktemp("large")
    for seed, name in enumerate(["base", "a", "b"]):
        write_model(folder / name / "model.safetensors", tensors=48, elements=1 << 20, seed=seed)
    return folder


@pytest.fixture(scope="session")
def slow(large):
    return ties(large / "base", large / "a", large / "b")


SLOW_OPTIONS = ["--threads", "1", "--shard-size", "4MiB", "--memory", "256MiB"]


@pytest.fixture(scope="session")
def expected(large, slow, tmp_path_factory):
    """What the slow merge gives when nobody disturbs it."""
    folder = tmp_path_factory.mktemp("expected")
    (folder / "recipe.yml").write_text(slow)
    command = [PEWTER, "merge", folder / "recipe.yml", folder / "out", "--device", "cpu", "--quiet", *SLOW_OPTIONS]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return weights(folder / "out")


def test_version():
    done = subprocess.run([PEWTERD, "--version"], capture_output=True, text=True)
    assert done.returncode == 0
    assert re.fullmatch(r"pewterd \d+\.\d+\.\d+\n", done.stdout)


def test_other_machines_are_refused(tmp_path):
    done = subprocess.run(
        [PEWTERD, "serve", "--listen", "0.0.0.0:0", "--data", tmp_path], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "--insecure" in done.stderr
    server = Server(tmp_path / "data2")
    assert (server.data / "address").read_text() == f"{server.address}\n"
    assert server.stop() == 0
    assert not (server.data / "address").exists()


def test_one_server_a_folder(server):
    done = subprocess.run(
        [PEWTERD, "serve", "--listen", "127.0.0.1:0", "--data", server.data], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "another pewterd" in done.stderr


def test_create_watch_success(server, tiny, tmp_path):
    recipe = linear(tiny / "a", tiny / "b")
    job = server.submit(recipe, tmp_path / "out", "--label", "team=nlp")
    events = server.events(job)
    changes = [event for event in events if "state_change" in event]
    assert [change["state_change"]["state"].removeprefix("JOB_STATE_") for change in changes] == [
        "QUEUED",
        "PLANNING",
        "RUNNING",
        "PUBLISHING",
        "SUCCEEDED",
    ]
    numbered = [int(event["sequence"]) for event in events if "progress" not in event]
    assert numbered == list(range(1, len(numbered) + 1))
    got = server.job(job)
    assert got["labels"] == {"team": "nlp"}
    assert got["attempt"] == 1
    manifest = (tmp_path / "out/pewter_manifest.json").read_text()
    assert got["output"]["manifest_json"] == manifest

    # The same as without a server.
    (tmp_path / "recipe.yml").write_text(recipe)
    subprocess.run([PEWTER, "merge", tmp_path / "recipe.yml", tmp_path / "local", "--device", "cpu"], check=True)
    assert weights(tmp_path / "out") == weights(tmp_path / "local")


def test_same_request_is_one_job(server, tiny, tmp_path):
    recipe = linear(tiny / "a", tiny / "b")
    first = server.submit(recipe, tmp_path / "out", "--request-id", "r1")
    assert server.submit(recipe, tmp_path / "out", "--request-id", "r1") == first
    server.wait(first, "SUCCEEDED")
    assert server.submit(recipe, tmp_path / "out", "--request-id", "r1") == first
    path = tmp_path / "recipe.yml"
    refused = server.pewter("submit", path, tmp_path / "other", "--request-id", "r1", code=2)
    assert first in refused.stderr + refused.stdout


def test_bad_recipe_is_refused_with_its_place(server, tmp_path):
    path = tmp_path / "bad.yml"
    path.write_text("merge_method: linear\nmodels:\n  - model: /a\n    parameters: [\n")
    refused = server.pewter("submit", path, tmp_path / "out", code=2)
    assert re.search(r":\d+:\d+", refused.stderr + refused.stdout)
    assert json.loads(server.pewter("jobs", "list").stdout)["jobs"] == []


def test_what_planning_finds_is_the_jobs_error(server, tmp_path):
    job = server.submit(linear("/nowhere/a", "/nowhere/b"), tmp_path / "out")
    failed = server.wait(job, "FAILED")
    assert failed["error"]["reason"] == "SOURCE_NOT_FOUND"
    assert "/nowhere/a" in failed["error"]["message"]
    assert failed["attempt"] == 1


def test_destination_that_exists_is_not_touched_unless_asked(server, tiny, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    recipe = linear(tiny / "a", tiny / "b")
    failed = server.wait(server.submit(recipe, out), "FAILED", "SUCCEEDED")
    assert failed["error"]["reason"] == "OUTPUT_EXISTS"
    assert [file.name for file in out.iterdir()] == ["mine.txt"]
    server.wait(server.submit(recipe, out, "--overwrite"), "SUCCEEDED")
    assert (out / "mine.txt").read_text() == "precious"
    server.wait(server.submit(recipe, out, "--overwrite"), "SUCCEEDED")


def test_killed_worker_is_replaced(server, slow, expected, tmp_path):
    out = tmp_path / "out"
    job = server.submit(slow, out, *SLOW_OPTIONS)
    server.wait_for_shards(job, out)
    os.kill(server.worker(job), signal.SIGKILL)
    done = server.wait(job, "SUCCEEDED", "FAILED")
    assert done["state"] == "JOB_STATE_SUCCEEDED", done["error"]
    assert done["attempt"] == 2
    assert int(done["output"]["shards_reused"]) >= 2
    assert weights(out) == expected


def test_killed_server_goes_on_after_its_restart(server, slow, expected, tmp_path):
    out = tmp_path / "out"
    job = server.submit(slow, out, *SLOW_OPTIONS)
    queued = server.submit(slow, tmp_path / "second", *SLOW_OPTIONS)
    server.wait_for_shards(job, out)
    worker = server.worker(job)
    server.kill()
    # The worker does not outlive it.
    wait_for("end of the worker", lambda: not os.path.exists(f"/proc/{worker}"), patience=10)
    server.start()
    done = server.wait(job, "SUCCEEDED", "FAILED")
    assert done["state"] == "JOB_STATE_SUCCEEDED", done["error"]
    assert done["attempt"] == 2
    assert int(done["output"]["shards_reused"]) >= 2
    assert weights(out) == expected
    assert server.wait(queued, "SUCCEEDED", "FAILED")["attempt"] == 1
    assert weights(tmp_path / "second") == expected


def test_stopped_server_leaves_work_for_the_next(server, slow, expected, tmp_path):
    out = tmp_path / "out"
    job = server.submit(slow, out, *SLOW_OPTIONS)
    server.wait_for_shards(job, out)
    begin = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - begin < 30
    server.start()
    done = server.wait(job, "SUCCEEDED", "FAILED")
    assert done["state"] == "JOB_STATE_SUCCEEDED", done["error"]
    assert done["attempt"] == 1
    assert int(done["output"]["shards_reused"]) >= 2
    assert weights(out) == expected


def test_cancel(server, slow, tmp_path):
    out = tmp_path / "out"
    job = server.submit(slow, out, *SLOW_OPTIONS)
    queued = server.submit(slow, tmp_path / "second", *SLOW_OPTIONS)
    server.pewter("jobs", "cancel", queued)
    assert server.job(queued)["state"] == "JOB_STATE_CANCELLED"
    server.wait_for_shards(job, out)
    server.pewter("jobs", "delete", job, code=1)
    server.pewter("jobs", "cancel", job)
    done = server.wait(job, "CANCELLED", "SUCCEEDED")
    assert done["state"] == "JOB_STATE_CANCELLED"
    assert not (out / "pewter_manifest.json").exists()
    server.pewter("jobs", "cancel", job)
    wait_for("end of the worker", lambda: server.worker(job) is None)
    # Its finished shards serve the same merge again.
    again = server.wait(server.submit(slow, out, *SLOW_OPTIONS), "SUCCEEDED", "FAILED")
    assert int(again["output"]["shards_reused"]) >= 2
    server.pewter("jobs", "delete", job)
    server.pewter("jobs", "get", job, code=3)


def test_a_full_disk_is_named_and_its_shards_are_used_when_there_is_room(server, slow, expected, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"mounting a small disk needs privileges: {mounted.stderr}")
    try:
        out = disk / "out"
        job = server.submit(slow, out, *SLOW_OPTIONS)
        server.wait_for_shards(job, out)
        # There is less room than there was when the merge began.
        size = shutil.disk_usage(disk).used + (24 << 20)
        subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)
        failed = server.wait(job, "FAILED", "SUCCEEDED")
        assert failed["error"]["reason"] == "DISK_FULL"
        assert "disk is full" in failed["error"]["message"]
        assert not (out / "pewter_manifest.json").exists()
        assert not [file.name for file in out.iterdir() if file.name.endswith(".pewter-tmp")]
        assert server.job(failed["id"])["attempt"] == 1
        subprocess.run(["mount", "-o", "remount,size=400m", disk], check=True)
        done = server.wait(server.submit(slow, out, *SLOW_OPTIONS), "FAILED", "SUCCEEDED")
        assert done["state"] == "JOB_STATE_SUCCEEDED", done["error"]
        assert int(done["output"]["shards_reused"]) >= 2
        assert weights(out) == expected
    finally:
        subprocess.run(["umount", disk], check=True)


def test_two_jobs_do_not_write_one_place(server, slow, tmp_path):
    out = tmp_path / "out"
    job = server.submit(slow, out, *SLOW_OPTIONS)
    path = tmp_path / "recipe.yml"
    refused = server.pewter("submit", path, f"{out}/../out", *SLOW_OPTIONS, code=1)
    assert job in refused.stderr + refused.stdout
    server.pewter("jobs", "cancel", job)


def test_history_survives_a_restart(server, tiny, tmp_path):
    jobs = [server.submit(linear(tiny / "a", tiny / "b"), tmp_path / f"out{i}") for i in range(3)]
    for job in jobs:
        server.wait(job, "SUCCEEDED")
    before = [server.job(job) for job in jobs]
    events = server.events(jobs[0])
    assert server.stop() == 0
    server.start()
    assert [server.job(job) for job in jobs] == before
    listed = json.loads(server.pewter("jobs", "list").stdout)["jobs"]
    assert [job["id"] for job in listed] == jobs[::-1]
    numbered = [event for event in events if "progress" not in event]
    assert server.events(jobs[0]) == numbered


def test_a_retry_goes_on_with_what_is_there(server, slow, expected, tmp_path):
    out = tmp_path / "out"
    job = server.submit(slow, out, *SLOW_OPTIONS)
    server.pewter("jobs", "retry", job, code=1)
    server.wait_for_shards(job, out)
    server.pewter("jobs", "cancel", job)
    server.wait(job, "CANCELLED")
    retry = json.loads(server.pewter("jobs", "retry", job).stdout)
    assert retry["retry_of"] == job and retry["id"] != job
    done = server.wait(retry["id"], "SUCCEEDED", "FAILED")
    assert done["state"] == "JOB_STATE_SUCCEEDED", done["error"]
    assert int(done["output"]["shards_reused"]) >= 2
    assert weights(out) == expected


def test_all_problems_of_a_recipe_are_told_as_a_compiler_does(server, tmp_path):
    path = tmp_path / "bad.yml"
    path.write_text("merge_method: linear\ndtype: float99\nmodels:\n  - weight: 1\n  - model: a@b@c\n")
    for command in (["merge", path, tmp_path / "out"], ["submit", path, tmp_path / "out", "--server", server.address]):
        done = subprocess.run([PEWTER, *command], capture_output=True, text=True)
        assert done.returncode == 2
        places = [line.split(" error: ")[0] for line in done.stderr.splitlines() if " error: " in line]
        assert places == [f"{path}:2:8:", f"{path}:4:5:", f"{path}:5:12:"], done.stderr


def test_projects_have_limits(tmp_path, slow, tiny):
    server = Server(tmp_path / "data", "--workers", "2", "--project", "small:running=1,queued=1")
    try:
        first = server.submit(slow, tmp_path / "first", "--project", "small", *SLOW_OPTIONS)
        server.wait(first, "PLANNING", "RUNNING")
        second = server.submit(slow, tmp_path / "second", "--project", "small", *SLOW_OPTIONS)
        path = tmp_path / "recipe.yml"
        refused = server.pewter("submit", path, tmp_path / "third", "--project", "small", code=1)
        assert "small" in refused.stderr + refused.stdout
        # Others are not held up.
        other = server.submit(linear(tiny / "a", tiny / "b"), tmp_path / "other")
        server.wait(other, "SUCCEEDED")
        assert server.job(second)["state"] == "JOB_STATE_QUEUED"
        assert server.job(other)["project"] == "default"
        listed = json.loads(server.pewter("jobs", "list", "--project", "small").stdout)["jobs"]
        assert [job["id"] for job in listed] == [second, first]
        server.pewter("jobs", "delete", second, first, "--force")
        assert len(json.loads(server.pewter("jobs", "list").stdout)["jobs"]) == 1
    finally:
        server.kill()


def test_deadlines_end_jobs(server, slow, tmp_path):
    running = server.submit(slow, tmp_path / "out", "--run-deadline", "1s", *SLOW_OPTIONS)
    waiting = server.submit(slow, tmp_path / "second", "--queue-deadline", "100ms", *SLOW_OPTIONS)
    failed = server.wait(waiting, "FAILED", "SUCCEEDED")
    assert failed["error"]["reason"] == "QUEUE_DEADLINE" and failed["error"]["code"] == 4
    stopped = server.wait(running, "FAILED", "SUCCEEDED")
    assert stopped["error"]["reason"] == "RUN_DEADLINE", stopped
    assert stopped["attempt"] == 1
    assert not (tmp_path / "out/pewter_manifest.json").exists()
    bad = subprocess.run(
        [PEWTER, "submit", tmp_path / "recipe.yml", "/x", "--run-deadline", "soon", "-s", server.address],
        capture_output=True,
    )
    assert bad.returncode == 2


def test_what_is_there_is_used_again_or_gets_a_new_version(server, tiny, tmp_path):
    out = tmp_path / "out"
    recipe = linear(tiny / "a", tiny / "b")
    first = server.wait(server.submit(recipe, out, "--on-existing", "reuse_if_identical"), "SUCCEEDED")
    assert not first["output"]["reused"]
    before = (out / "pewter_manifest.json").stat().st_mtime_ns
    again = server.wait(server.submit(recipe, out, "--on-existing", "reuse_if_identical"), "SUCCEEDED")
    assert again["output"]["reused"] and again["output"]["fingerprint"] == first["output"]["fingerprint"]
    assert (out / "pewter_manifest.json").stat().st_mtime_ns == before
    other = linear(tiny / "b", tiny / "a")
    refused = server.wait(server.submit(other, out, "--on-existing", "reuse_if_identical"), "FAILED", "SUCCEEDED")
    assert refused["error"]["reason"] == "OUTPUT_EXISTS"

    versions = tmp_path / "versions"
    uris = []
    for text in (recipe, recipe, other):
        done = server.wait(server.submit(text, versions, "--on-existing", "new_version"), "SUCCEEDED")
        uris.append(done["output"]["uri"])
    assert uris == [f"{versions}/v{i}" for i in (1, 2, 3)]
    assert weights(versions / "v1") == weights(versions / "v2") == weights(out)

    # The same on this machine, which goes on counting.
    path = tmp_path / "local.yml"
    path.write_text(recipe)
    for mode, expected_out in (("new_version", f"{versions}/v4"), ("reuse_if_identical", f"{out}")):
        target = versions if mode == "new_version" else out
        done = subprocess.run(
            [PEWTER, "merge", path, target, "--on-existing", mode, "-o", "json", "--device", "cpu"],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert result["output"] == expected_out
        assert result["reused"] == (mode == "reuse_if_identical")


def test_outputs_go_with_their_job(server, tiny, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    job = server.submit(linear(tiny / "a", tiny / "b"), out, "--overwrite")
    server.wait(job, "SUCCEEDED")
    server.pewter("jobs", "delete", job, "--outputs")
    assert [file.name for file in out.iterdir()] == ["mine.txt"]
    server.pewter("jobs", "get", job, code=3)


def test_a_wrapper_of_the_workers(tmp_path, tiny):
    wrapper = tmp_path / "worker"
    wrapper.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/started\nulimit -c 0\nexec {PEWTERD} "$@"\n')
    wrapper.chmod(0o755)
    server = Server(tmp_path / "data", "--worker-program", wrapper)
    try:
        job = server.submit(linear(tiny / "a", tiny / "b"), tmp_path / "out")
        server.wait(job, "SUCCEEDED")
        assert f"--job {job}" in (tmp_path / "started").read_text()
    finally:
        server.kill()
