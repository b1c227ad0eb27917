"""Faults around a server: a database that loses replies or takes no changes, a disk that fills, a clock that jumps, few descriptors; and what
is collected afterwards.

The tests of PostgreSQL need Debian's postgresql-15 (or $PEWTER_POSTGRES), those of S3 a SeaweedFS ($PEWTER_WEED), those of small disks
privileges to mount one; without them they are skipped.
"""

import json
import os
import resource
import shutil
import subprocess
import time

import pytest

from crash_test import OPTIONS, SHARDS, check_output, failpoints, many, recipe  # noqa: F401 (fixtures)
from cutting_proxy import CuttingProxy
from failpoints import Failpoints
from replicas_test import LEASE, Replica, check_history, database, postgres  # noqa: F401 (fixtures)
from s3_test import s3  # noqa: F401 (fixture)
from server_test import PEWTER, PEWTERD, Server, linear, wait_for, write_model


@pytest.fixture
def start(tmp_path):
    servers = []

    def started(*options, kind=Server, name=None):
        servers.append(kind(tmp_path / (name or f"data{len(servers)}"), *options))
        return servers[-1]

    yield started
    for server in servers:
        server.kill()


def health(server, service=""):
    """Whether the server says that it serves."""
    command = [PEWTERD, "health", "--server", server.address, *(["--service", service] if service else [])]
    return subprocess.run(command, capture_output=True, text=True, timeout=60).returncode == 0


# PostgreSQL.


def proxied(postgres_, database_):
    proxy = CuttingProxy("127.0.0.1", postgres_.port)
    return proxy, database_.replace(f":{postgres_.port}/", f":{proxy.port}/")


# The transactions of a job's life, as its create, its claim and what its worker tells.
@pytest.mark.parametrize("nth", range(5))
def test_the_lost_reply_of_a_commit_makes_no_second_job(start, postgres, database, many, recipe, tmp_path, nth):  # noqa: F811
    proxy, url = proxied(postgres, database)
    server = start(url, kind=Replica)
    path, out = tmp_path / "recipe.yml", tmp_path / "out"
    path.write_text(recipe)
    proxy.skip, proxy.lose_after = nth, b"COMMIT"
    command = [PEWTER, "submit", path, out, "--device", "cpu", "--request-id", "r1", *OPTIONS, "--server", server.address, "-o", "json"]
    told = []
    while not told:
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60)
        if done.returncode == 0:
            told.append(json.loads(done.stdout)["id"])
        else:
            assert "UNAVAILABLE" in done.stderr
    done = server.wait(told[0], "SUCCEEDED", "FAILED")
    assert done["state"] == "JOB_STATE_SUCCEEDED", done["error"]
    check_output(many, out, done)
    assert [each["id"] for each in json.loads(server.pewter("jobs", "list").stdout)["jobs"]] == told
    check_history(server, told[0])
    assert proxy.lost == 1
    proxy.close()


def test_a_database_that_takes_no_changes_is_not_served(start, postgres, database, many, recipe, tmp_path):  # noqa: F811
    server = start(database, kind=Replica)
    wait_for("health", lambda: health(server) and health(server, "jobs"))
    name = database.rsplit("/", 1)[1]
    postgres.sql(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    postgres.sql(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
    wait_for("not serving", lambda: not health(server))
    assert not health(server, "jobs")
    path = tmp_path / "recipe.yml"
    path.write_text(recipe)
    refused = server.pewter("submit", path, tmp_path / "out", "--device", "cpu", *OPTIONS, code=1)
    assert json.loads(refused.stderr)["error"]["code"] == "UNAVAILABLE"
    assert server.process.poll() is None
    postgres.sql(f"ALTER DATABASE {name} SET default_transaction_read_only = off")
    postgres.sql(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
    wait_for("serving again", lambda: health(server) and health(server, "jobs"))
    assert server.wait(server.submit(recipe, tmp_path / "out", *OPTIONS), "SUCCEEDED", "FAILED")["state"] == "JOB_STATE_SUCCEEDED"


def test_a_database_that_is_gone_for_longer_than_a_lease(start, postgres, database, failpoints, many, recipe, tmp_path):  # noqa: F811
    """The worker stops writing before its lease ends; its shards are used when the database is back."""
    server = start(database, kind=Replica)
    failpoints.arm("shard_recorded=pause@2")
    out = tmp_path / "out"
    job = server.submit(recipe, out, *OPTIONS)
    wait_for("two shards", lambda: failpoints.hits("shard_recorded") >= 2)
    worker = server.worker(job)
    postgres.stop()
    try:
        wait_for("not serving", lambda: not health(server))
        time.sleep(LEASE)
        failpoints.release("shard_recorded")
        wait_for("end of the worker", lambda: not os.path.exists(f"/proc/{worker}"))
        assert not (out / "pewter_manifest.json").exists()
    finally:
        postgres.start()
    done = server.wait(job, "SUCCEEDED", "FAILED")
    assert done["state"] == "JOB_STATE_SUCCEEDED", done["error"]
    assert int(done["output"]["shards_reused"]) >= 2
    check_output(many, out, done)
    wait_for("serving again", lambda: health(server))


# Disks.


@pytest.fixture
def disk(tmp_path):
    """A small disk; resize(MiB) changes it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"mounting a small disk needs privileges: {mounted.stderr}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_no_jobs_are_taken_while_the_disk_is_nearly_full(start, disk, many, recipe, tmp_path):  # noqa: F811
    server = start("--min-free-disk", "30MB", "--lease", "2", name="disk/data")
    wait_for("health", lambda: health(server, "jobs"))
    (disk / "filler").write_bytes(bytes(20 << 20))
    wait_for("no jobs", lambda: not health(server, "jobs"))
    assert health(server)  # it still answers
    job = server.submit(recipe, tmp_path / "out", *OPTIONS)
    time.sleep(1.5)
    assert server.job(job)["state"] == "JOB_STATE_QUEUED"
    log = server.log.read_text()
    assert "no jobs are taken" in log and "--min-free-disk" in log
    (disk / "filler").unlink()
    done = server.wait(job, "SUCCEEDED", "FAILED")
    assert done["state"] == "JOB_STATE_SUCCEEDED", done["error"]
    assert "jobs are taken again" in server.log.read_text()
    wait_for("jobs", lambda: health(server, "jobs"))


def test_an_output_that_cannot_fit_is_refused_before_work(disk, tmp_path):
    for seed, name in enumerate("ab"):
        write_model(tmp_path / name / "model.safetensors", tensors=6, elements=1 << 21, seed=seed)
    path = tmp_path / "recipe.yml"
    path.write_text(linear(tmp_path / "a", tmp_path / "b"))
    out = disk / "out"
    command = [PEWTER, "merge", path, out, "--device", "cpu", "-q", "--shard-size", "8MiB"]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 1
    assert "disk is too full" in refused.stderr and "50" in refused.stderr  # MB
    assert not out.exists()
    subprocess.run(["mount", "-o", "remount,size=80m", disk], check=True)
    subprocess.run(command, check=True)
    # What is replaced makes room.
    subprocess.run([*command, "--overwrite"], check=True)


def test_a_disk_that_fills_in_the_middle_leaves_no_part_of_a_file(start, disk, failpoints, many, recipe, tmp_path):  # noqa: F811
    server = start()
    failpoints.arm("shard_recorded=pause@2")
    out = disk / "out"
    job = server.submit(recipe, out, *OPTIONS)
    wait_for("two shards", lambda: failpoints.hits("shard_recorded") >= 2)
    with open(disk / "filler", "wb") as filler:
        filler.truncate(0)
        with pytest.raises(OSError):
            while True:
                filler.write(bytes(1 << 16))
                filler.flush()
    failpoints.release("shard_recorded")
    failed = server.wait(job, "FAILED", "SUCCEEDED")
    assert failed["error"]["reason"] == "DISK_FULL"
    assert not list(out.glob(".*.pewter-tmp"))
    assert not (out / "pewter_manifest.json").exists()
    (disk / "filler").unlink()
    done = server.wait(server.submit(recipe, out, *OPTIONS), "FAILED", "SUCCEEDED")
    assert done["state"] == "JOB_STATE_SUCCEEDED", done["error"]
    assert int(done["output"]["shards_reused"]) >= 2
    check_output(many, out, done)


# What is left.


def test_what_a_killed_worker_left_is_collected(start, failpoints, many, recipe, tmp_path):  # noqa: F811
    server = start("--retention", "1s")
    failpoints.arm("object_synced=kill@4")
    out, busy = tmp_path / "out", tmp_path / "busy"
    job = server.submit(recipe, out, *OPTIONS)
    wait_for("the kill", lambda: failpoints.hits("object_synced") >= 4)
    server.pewter("jobs", "cancel", job)
    server.wait(job, "CANCELLED", "SUCCEEDED")
    # Another user's file, and one that a living process writes elsewhere, are none of ours.
    (out / "mine.txt").write_text("precious")
    failpoints.arm("object_synced=pause")
    other = server.submit(recipe, busy, *OPTIONS)
    wait_for("a temporary file", lambda: list(busy.glob(".*.pewter-tmp")))
    wait_for("the collection", lambda: not list(out.glob(".*.pewter-tmp")))
    time.sleep(1.5)
    assert list(busy.glob(".*.pewter-tmp"))
    assert (out / "mine.txt").exists()
    failpoints.release("object_synced")
    check_output(many, busy, server.wait(other, "SUCCEEDED", "FAILED"))


def test_uploads_that_killed_workers_left_in_s3_are_collected(start, s3, failpoints, tmp_path, monkeypatch):  # noqa: F811
    for name, value in s3.items():
        if name.startswith("AWS_"):
            monkeypatch.setenv(name, value)
    # Parts have 16 MiB.
    for seed, name in enumerate("ab"):
        write_model(tmp_path / name / "model.safetensors", tensors=5, elements=1 << 21, seed=seed)
    recipe = linear(tmp_path / "a", tmp_path / "b")  # noqa: F811
    server = start("--retention", "1s")
    failpoints.arm("part_sent=kill@1")
    job = server.submit(recipe, "s3://models/collected", "--memory", "256MiB")
    wait_for("the kill", lambda: failpoints.hits("part_sent") >= 1)
    server.pewter("jobs", "cancel", job)
    server.wait(job, "CANCELLED", "SUCCEEDED")

    def left():
        cleaned = subprocess.run(
            [PEWTER, "store", "clean", "s3://models/collected", "--older-than", "1h", "-o", "json"], check=True, capture_output=True, text=True
        )
        assert json.loads(cleaned.stdout)["aborted"] == 0  # none is so old
        return "what a job has left is removed" not in server.log.read_text()

    wait_for("the collection", lambda: not left())
    # And a job that is killed there goes on, and leaves nothing.
    failpoints.arm(f"part_sent=kill@{failpoints.hits('part_sent') + 1}")
    done = server.wait(server.submit(recipe, "s3://models/whole", "--memory", "256MiB"), "SUCCEEDED", "FAILED")
    assert done["state"] == "JOB_STATE_SUCCEEDED", done["error"]
    assert done["attempt"] == 2
    cleaned = subprocess.run(
        [PEWTER, "store", "clean", "s3://models/whole", "--older-than", "0", "-o", "json"], check=True, capture_output=True, text=True
    )
    assert json.loads(cleaned.stdout)["aborted"] == 0


# Limits of the process.


def test_few_descriptors_are_enough(tmp_path, many, recipe):  # noqa: F811
    """64, of a server with clients that come all at once: some may be refused, and it serves on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    try:
        server = Server(tmp_path / "data")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    try:
        command = [PEWTER, "jobs", "list", "--server", server.address, "-o", "json"]
        clients = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(80)]
        for client in clients:
            client.wait(120)
        assert server.process.poll() is None
        done = server.wait(server.submit(recipe, tmp_path / "out", *OPTIONS), "SUCCEEDED", "FAILED")
        assert done["state"] == "JOB_STATE_SUCCEEDED", done["error"]
        check_output(many, tmp_path / "out", done)
    finally:
        server.kill()


FAULTY_SYNC = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* fsync fails as on a dying disk, once, for a file whose path has $FAIL_SYNC in it. */
int fsync(int fd) {
  static int done;
  char link[64], path[4096] = "";
  const char* part = getenv("FAIL_SYNC");
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  if (readlink(link, path, sizeof path - 1) > 0 && part != NULL && !done && strstr(path, part) != NULL) {
    done = 1;
    errno = EIO;
    return -1;
  }
  return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(fd);
}
"""


@pytest.fixture(scope="session")
def faulty_sync(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preload")
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("there is no C compiler")
    (folder / "sync.c").write_text("#include <stdlib.h>\n" + FAULTY_SYNC)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "sync.so", folder / "sync.c", "-ldl"], check=True)
    return folder / "sync.so"


@pytest.mark.parametrize("file", ["model-00003", "pewter_manifest", "pewter-state"])
def test_bytes_that_the_disk_did_not_take_are_never_told_as_written(faulty_sync, many, recipe, tmp_path, file):  # noqa: F811
    path, out = tmp_path / "recipe.yml", tmp_path / "out"
    path.write_text(recipe)
    command = list(map(str, [PEWTER, "merge", path, out, "--device", "cpu", "-q", *OPTIONS]))
    environment = {**os.environ, "LD_PRELOAD": str(faulty_sync), "FAIL_SYNC": file}
    failed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert failed.returncode == 1
    assert "Input/output error" in failed.stderr
    assert not (out / "pewter_manifest.json").exists()
    assert not list(out.glob(".*.pewter-tmp"))
    # The file is written anew, never synced again.
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert {each.name for each in out.iterdir()} == {each.name for each in (many / "out").iterdir()}
