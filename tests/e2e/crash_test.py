"""Processes that are killed at each failpoint, raced and cancelled there: what remains is what an undisturbed run leaves.

The tests of PostgreSQL need Debian's postgresql-15 (or $PEWTER_POSTGRES), those of S3 a SeaweedFS ($PEWTER_WEED); without them they are
skipped.
"""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import time

import pytest

from failpoints import Failpoints
from replicas_test import Replica, check_history, database, holder, postgres, replicas  # noqa: F401 (fixtures)
from s3_test import s3  # noqa: F401 (fixture)
from server_test import PEWTER, PEWTERD, Server, linear, wait_for, weights, write_model

SHARDS = 6
OPTIONS = ["--threads", "1", "--shard-size", "8KB", "--memory", "256MiB"]

# Of a worker: the hit at which it is killed, how many attempts the job takes, and the most tensors that are merged again. What is merged and
# not recorded is merged again: the shards under way, of one tensor each.
UNDER_WAY = 4
WORKER = {
    "after_claim": (1, 2, 0),
    "after_begin": (1, 2, 0),
    "shard_read": (5, 2, UNDER_WAY),
    "tensor_done": (4, 2, UNDER_WAY),
    "part_sent": (9, 2, UNDER_WAY),
    "before_shard": (3, 2, UNDER_WAY),
    "object_synced": (5, 2, UNDER_WAY),
    "shard_done": (3, 2, UNDER_WAY),
    "shard_recorded": (3, 2, UNDER_WAY),
    "before_publish": (1, 2, 0),
    "aux_written": (1, 2, 0),
    "before_commit": (1, 2, 0),
    "after_commit": (1, 2, 0),
    "before_finish": (1, 2, 0),
    "after_finish": (1, 1, 0),
}
# Where the tests below kill or stop: of a server, and while a model is overwritten.
ELSEWHERE = {
    "unpublished": "test_a_late_worker_takes_nothing_away",
    "worker_launched": "test_killed_server_is_whole_after_its_restart",
    "before_database_commit": "test_killed_server_is_whole_after_its_restart",
    "after_database_commit": "test_killed_server_is_whole_after_its_restart",
    "blob_synced": "test_killed_while_an_upload_ends",
    "blob_published": "test_killed_while_an_upload_ends",
    "set_written": "test_killed_while_an_upload_ends",
}


@pytest.fixture(scope="session")
def many(tmp_path_factory):
    """Models whose merge has a shard for each tensor."""
    folder = tmp_path_factory.mktemp("many")
    for seed, name in enumerate(["a", "b"]):
        write_model(folder / name / "model.safetensors", tensors=SHARDS, elements=2000, seed=seed)
    (folder / "recipe.yml").write_text(linear(folder / "a", folder / "b"))
    command = [PEWTER, "merge", folder / "recipe.yml", folder / "out", "--device", "cpu", "--quiet", *OPTIONS]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PEWTER_FAILPOINTS")}
    subprocess.run(command, check=True, env=environment)
    assert len(weights(folder / "out")) == SHARDS
    return folder


@pytest.fixture
def recipe(many):
    return linear(many / "a", many / "b")


@pytest.fixture
def failpoints(tmp_path, monkeypatch):
    return Failpoints(tmp_path / "failpoints", monkeypatch)


@pytest.fixture
def server(failpoints, tmp_path):
    server = Server(tmp_path / "data")
    yield server
    server.kill()


def check_output(many, out, job, killed=None):
    """A whole model, the one of an undisturbed merge, and nothing beside it but what a process that was `killed` at last has left open:
    nobody can have removed it before."""
    assert weights(out) == weights(many / "out")
    found = {file.name for file in out.iterdir() if killed is None or f".{killed}-" not in file.name}
    assert found == {file.name for file in (many / "out").iterdir()}
    assert (out / "pewter_manifest.json").read_text() == job["output"]["manifest_json"]


def test_every_failpoint_is_in_this_file():
    listed = subprocess.run([PEWTERD, "failpoints"], check=True, capture_output=True, text=True).stdout
    assert {line.split("\t")[0] for line in listed.splitlines()} == WORKER.keys() | ELSEWHERE.keys()
    assert all(test in globals() for test in ELSEWHERE.values())


@pytest.mark.parametrize("listing", ["after_claim=explode", "nowhere=kill", "after_claim", "after_claim=kill@0", "after_claim=error(WHAT)"])
def test_a_list_that_cannot_be_read_is_refused(tmp_path, listing):
    command = [PEWTERD, "serve", "--listen", "127.0.0.1:0", "--data", tmp_path]
    refused = subprocess.run(command, env={**os.environ, "PEWTER_FAILPOINTS": listing}, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2
    assert listing in refused.stderr


@pytest.mark.parametrize("point", WORKER)
def test_killed_worker_is_whole_in_the_next(server, failpoints, many, recipe, tmp_path, point):
    hit, attempts, again = WORKER[point]
    failpoints.arm(f"{point}=kill@{hit}")
    out = tmp_path / "out"
    done = server.wait(server.submit(recipe, out, *OPTIONS), "SUCCEEDED", "FAILED")
    assert done["state"] == "JOB_STATE_SUCCEEDED", done["error"]
    assert failpoints.hits(point) >= hit
    assert done["attempt"] == attempts
    check_output(many, out, done)
    assert failpoints.hits("tensor_done") <= SHARDS + again
    if attempts > 1:
        lost = [event["state_change"] for event in server.events(done["id"]) if "error" in event.get("state_change", {})]
        assert [change["error"]["reason"] for change in lost] == ["WORKER_LOST"]
        assert lost[0]["error"]["metadata"]["signal"] == str(signal.SIGKILL.value)


@pytest.mark.parametrize("point", ["part_sent", "object_synced", "shard_done", "aux_written", "before_commit", "after_commit"])
def test_an_error_there_fails_the_job_and_what_is_whole_is_used_again(server, failpoints, many, recipe, tmp_path, point):
    """As kill, but in order: a full disk, a refusal."""
    failpoints.arm(f"{point}=error(RESOURCE_EXHAUSTED)@{WORKER[point][0]}")
    out = tmp_path / "out"
    job = server.wait(server.submit(recipe, out, *OPTIONS), "SUCCEEDED", "FAILED")
    assert failpoints.hits(point) >= WORKER[point][0]
    assert not list(out.glob(".*.pewter-tmp"))
    if job["state"] == "JOB_STATE_FAILED":
        assert f"failpoint {point}" in job["error"]["message"]
        assert not (out / "pewter_manifest.json").exists()
        again = server.submit(recipe, out, *OPTIONS)
        job = server.wait(again, "SUCCEEDED", "FAILED")
    assert job["state"] == "JOB_STATE_SUCCEEDED", job["error"]
    check_output(many, out, job)


def submit_until_acknowledged(server, recipe, out, request):
    """As a client that does not give up: the server is started again whenever it is dead."""
    path = server.data.parent / "recipe.yml"
    path.write_text(recipe)
    for _ in range(20):
        if server.process.poll() is not None:
            server.start()
        command = [PEWTER, "submit", path, out, "--device", "cpu", "--request-id", request, *OPTIONS]
        done = subprocess.run([*map(str, command), "--server", server.address, "-o", "json"], capture_output=True, text=True, timeout=60)
        if done.returncode == 0:
            return json.loads(done.stdout)["id"]
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.process.wait(0.1)
    raise AssertionError(done.stderr)


def wait_through_deaths(server, job):
    """The job's end, with the server started again whenever it is dead."""

    def ended():
        if server.process.poll() is not None:
            server.start()
        with contextlib.suppress(AssertionError):
            got = server.job(job)
            return got["state"] in ("JOB_STATE_SUCCEEDED", "JOB_STATE_FAILED") and got
        return None

    return wait_for(f"end of {job}", ended)


# The transactions of a job's life: created, claimed, running, publishing, succeeded.
@pytest.mark.parametrize("nth", range(1, 6))
@pytest.mark.parametrize("point", ["before_database_commit", "after_database_commit", "worker_launched"])
def test_killed_server_is_whole_after_its_restart(server, failpoints, many, recipe, tmp_path, point, nth):
    if point == "worker_launched" and nth > 1:
        pytest.skip("a job without a loss has one worker")
    hit = failpoints.hits(point) + nth
    failpoints.arm(f"{point}=kill@{hit}")
    out = tmp_path / "out"
    first = server.process
    job = submit_until_acknowledged(server, recipe, out, "request-1")
    done = wait_through_deaths(server, job)
    first.wait(10)
    assert first.returncode == -signal.SIGKILL
    assert done["state"] == "JOB_STATE_SUCCEEDED", done["error"]
    assert done["attempt"] <= 2
    check_output(many, out, done)
    assert [each["id"] for each in json.loads(server.pewter("jobs", "list").stdout)["jobs"]] == [job]
    check_history(server, job)
    # A client that has heard nothing asks again.
    assert submit_until_acknowledged(server, recipe, out, "request-1") == job


@pytest.mark.parametrize("nth", [1, 2, 5])
@pytest.mark.parametrize("point", ["before_database_commit", "after_database_commit"])
def test_killed_replica_leaves_a_whole_job_to_the_others(failpoints, replicas, many, recipe, tmp_path, point, nth):  # noqa: F811
    (one,) = replicas(count=1)
    hit = failpoints.hits(point) + nth
    failpoints.arm(f"{point}=kill@{hit}")
    out = tmp_path / "out"
    first = one.process
    path = tmp_path / "recipe.yml"
    path.write_text(recipe)
    command = [PEWTER, "submit", path, out, "--device", "cpu", "--request-id", "request-1", *OPTIONS]
    subprocess.run([*map(str, command), "--server", one.address, "-o", "json"], capture_output=True, timeout=60)
    first.wait(30)
    (other,) = replicas(count=1)
    job = other.submit(recipe, out, "--request-id", "request-1", *OPTIONS)
    done = other.wait(job, "SUCCEEDED", "FAILED")
    assert done["state"] == "JOB_STATE_SUCCEEDED", done["error"]
    check_output(many, out, done)
    assert [each["id"] for each in json.loads(other.pewter("jobs", "list").stdout)["jobs"]] == [job]
    check_history(other, job)


def stop_at(replicas_, failpoints, point, job):
    """The replica whose worker waits at the point, stopped with it for longer than its lease, and the other one."""
    wait_for(f"{point} of {job}", lambda: failpoints.hits(point) >= 1)
    late, (other,) = holder(replicas_, job)
    late.signal(signal.SIGSTOP)
    return late, other


@pytest.mark.parametrize("point", ["shard_read", "shard_done", "before_commit", "after_commit"])
def test_a_late_worker_changes_nothing(failpoints, replicas, many, recipe, tmp_path, point):  # noqa: F811
    both = replicas()
    failpoints.arm(f"{point}=pause@1")
    out = tmp_path / "out"
    job = both[0].submit(recipe, out, *OPTIONS)
    late, other = stop_at(both, failpoints, point, job)
    worker = late.worker(job)
    done = other.wait(job, "SUCCEEDED", "FAILED")
    assert done["state"] == "JOB_STATE_SUCCEEDED", done["error"]
    assert done["attempt"] == 2
    failpoints.release(point)
    late.signal(signal.SIGCONT)
    wait_for("end of the late worker", lambda: not os.path.exists(f"/proc/{worker}"))
    check_output(many, out, other.job(job), killed=worker)
    # Which goes when somebody cleans up.
    subprocess.run([PEWTER, "store", "clean", out, "--older-than", "0"], check=True)
    check_output(many, out, other.job(job))
    assert other.job(job) == done
    check_history(late, job, attempts=2)
    # The late server knows that it was late, and serves on.
    again = late.wait(late.submit(recipe, tmp_path / "again", *OPTIONS), "SUCCEEDED", "FAILED")
    assert again["state"] == "JOB_STATE_SUCCEEDED", again["error"]


@pytest.mark.parametrize("winner", ["late", "other"])
def test_of_two_that_commit_one_does(failpoints, replicas, many, recipe, tmp_path, winner):  # noqa: F811
    """Both hold that the lease is theirs, and are about to write the manifest."""
    both = replicas()
    failpoints.arm("before_commit=pause")
    out = tmp_path / "out"
    job = both[0].submit(recipe, out, *OPTIONS)
    late, other = stop_at(both, failpoints, "before_commit", job)
    worker = late.worker(job)
    wait_for("the second one", lambda: failpoints.hits("before_commit") >= 2)
    if winner == "late":
        # The worker alone: it creates the manifest before its server tells it that the lease is lost.
        successor = other.worker(job)
        os.kill(successor, signal.SIGSTOP)
        failpoints.release("before_commit")
        os.kill(worker, signal.SIGCONT)
        wait_for("a manifest", lambda: (out / "pewter_manifest.json").exists())
        manifest = (out / "pewter_manifest.json").read_text()
        os.kill(successor, signal.SIGCONT)
    else:
        failpoints.release("before_commit")
        other.wait(job, "SUCCEEDED", "FAILED")
        manifest = (out / "pewter_manifest.json").read_text()
    late.signal(signal.SIGCONT)
    done = other.wait(job, "SUCCEEDED", "FAILED")
    assert done["state"] == "JOB_STATE_SUCCEEDED", done["error"]
    wait_for("end of the late worker", lambda: not os.path.exists(f"/proc/{worker}"))
    assert (out / "pewter_manifest.json").read_text() == manifest
    check_output(many, out, done)
    check_history(late, job)


def test_a_late_worker_takes_nothing_away(failpoints, replicas, many, recipe, tmp_path):  # noqa: F811
    """One that was removing the model which it was to overwrite."""
    both = replicas()
    out = tmp_path / "out"
    first = both[0].submit(recipe, out, *OPTIONS)
    both[0].wait(first, "SUCCEEDED")
    failpoints.arm("unpublished=pause@1")
    job = both[0].submit(recipe, out, "--overwrite", *OPTIONS)
    late, other = stop_at(both, failpoints, "unpublished", job)
    worker = late.worker(job)
    done = other.wait(job, "SUCCEEDED", "FAILED")
    assert done["state"] == "JOB_STATE_SUCCEEDED", done["error"]
    failpoints.release("unpublished")
    late.signal(signal.SIGCONT)
    wait_for("end of the late worker", lambda: not os.path.exists(f"/proc/{worker}"))
    check_output(many, out, done)


CANCELLED_AT = ["after_claim", "after_begin", "shard_read", "before_shard", "shard_done", "before_publish", "before_commit", "after_commit", "before_finish"]


@pytest.mark.parametrize("point", CANCELLED_AT)
def test_cancelled_at_each_phase(server, failpoints, many, recipe, tmp_path, point):
    failpoints.arm(f"{point}=pause")
    out = tmp_path / "out"
    job = server.submit(recipe, out, *OPTIONS)
    wait_for(point, lambda: failpoints.hits(point) >= 1)
    server.pewter("jobs", "delete", job, code=1)
    server.pewter("jobs", "cancel", job)
    server.pewter("jobs", "cancel", job)
    failpoints.release(point)
    begin = time.monotonic()
    done = server.wait(job, "CANCELLED", "SUCCEEDED", "FAILED")
    assert time.monotonic() - begin < 10
    # Once the server has said that the lease is this worker's, the model is as good as published.
    committed = point in ("before_commit", "after_commit", "before_finish")
    assert done["state"] == ("JOB_STATE_SUCCEEDED" if committed else "JOB_STATE_CANCELLED"), done["error"]
    assert (out / "pewter_manifest.json").exists() == committed
    server.pewter("jobs", "cancel", job)  # after the end: nothing
    assert server.job(job) == done
    check_history(server, job)
    wait_for("end of the worker", lambda: server.worker(job) is None)
    assert not list(out.glob(".*.pewter-tmp"))
    server.pewter("jobs", "delete", job)
    server.pewter("jobs", "get", job, code=3)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("point", ["before_commit", "after_commit", "before_finish"])
def test_a_cancelled_job_has_no_model(server, failpoints, many, recipe, tmp_path, point, when):
    """Cancelled before or after its worker dies in the middle of publishing."""
    failpoints.arm(f"{point}=pause@1", "worker_launched=sleep(300)@2")
    out = tmp_path / "out"
    job = server.submit(recipe, out, *OPTIONS)
    wait_for(point, lambda: failpoints.hits(point) >= 1)
    if when == "before":
        server.pewter("jobs", "cancel", job)
    os.kill(server.worker(job), signal.SIGKILL)
    if when == "after":
        wait_for("the loss", lambda: server.job(job)["state"] != "JOB_STATE_PUBLISHING")
        server.pewter("jobs", "cancel", job)
    done = server.wait(job, "CANCELLED", "SUCCEEDED", "FAILED")
    wait_for("end of the worker", lambda: server.worker(job) is None)
    assert (out / "pewter_manifest.json").exists() == (done["state"] == "JOB_STATE_SUCCEEDED")
    assert done["state"] != "JOB_STATE_FAILED"
    check_history(server, job)


@pytest.mark.parametrize("point", ["blob_synced", "blob_published", "set_written"])
def test_killed_while_an_upload_ends(server, failpoints, many, tmp_path, point):
    """The client goes on with another server of the same folder, and what has come is not sent again."""
    failpoints.arm(f"{point}=kill@1")
    upload = subprocess.Popen(
        [PEWTER, "upload", many / "a", "--server", server.address, "-o", "json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    server.process.wait(60)
    assert server.process.returncode == -signal.SIGKILL
    upload.kill()
    upload.communicate()
    server.start()
    uri = json.loads(server.pewter("upload", many / "a").stdout)["artifacts"][0]["uri"]
    server.pewter("download", uri, tmp_path / "back")
    assert weights(tmp_path / "back") == weights(many / "a")
    # One set, whose blobs are all there; nothing unfinished.
    assert [each["uri"] for each in json.loads(server.pewter("artifacts", "list").stdout)["artifacts"]] == [uri]
    assert not list((server.data / "artifacts/partial").iterdir())
