"""Several pewterd on one PostgreSQL: servers that are killed, stopped, cut off and raced in the middle of work.

PostgreSQL is Debian's postgresql-15, or that of $PEWTER_POSTGRES (a folder of programs); without it these tests are skipped.
"""

import contextlib
import glob
import json
import os
import pathlib
import signal
import socket
import subprocess
import tempfile
import time

import pytest

from server_test import (  # noqa: F401 (fixtures)
    PEWTER,
    PEWTERD,
    SLOW_OPTIONS,
    Server,
    expected,
    large,
    slow,
    wait_for,
    weights,
)

LEASE = 2  # seconds


def find_postgres():
    folders = [os.environ.get("PEWTER_POSTGRES", ""), *sorted(glob.glob("/usr/lib/postgresql/*/bin"), reverse=True)]
    return next((pathlib.Path(folder) for folder in folders if os.path.exists(f"{folder}/initdb")), None)


class Postgres:
    def __init__(self, folder):
        self.programs, self.folder = find_postgres(), folder
        # It refuses to run as root.
        self.user = {"user": 65534, "group": 65534, "extra_groups": []} if os.getuid() == 0 else {}
        if self.user:
            os.chown(folder, 65534, 65534)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.run("initdb", "-D", folder / "data", "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
        self.process = None
        self.start()

    def run(self, program, *arguments):
        command = [self.programs / program, *map(str, arguments)]
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd=self.folder, **self.user).stdout

    def start(self):
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                [self.programs / "postgres", "-D", self.folder / "data", "-p", str(self.port)]
                + ["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", "fsync=off"],
                stdout=log,
                stderr=log,
                cwd=self.folder,
                **self.user,
            )
        ready = [self.programs / "pg_isready", "-h", "127.0.0.1", "-p", str(self.port)]
        wait_for("PostgreSQL", lambda: subprocess.run(ready, capture_output=True).returncode == 0)

    def stop(self):
        """As a crash does: no connection is ended in order."""
        self.process.send_signal(signal.SIGQUIT)
        self.process.wait()

    def sql(self, text, database="postgres"):
        url = f"postgresql://postgres@127.0.0.1:{self.port}/{database}"
        return self.run("psql", url, "-v", "ON_ERROR_STOP=1", "-qAt", "-c", text).strip()

    def url(self, database):
        self.sql(f"CREATE DATABASE {database}")
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"


@pytest.fixture(scope="module")
def postgres():
    if find_postgres() is None:
        pytest.skip("there is no PostgreSQL: install Debian's postgresql-15")
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="pewter-postgres-") as folder:
        postgres = Postgres(pathlib.Path(folder))
        yield postgres
        postgres.stop()


@pytest.fixture
def database(postgres, request):
    name = f"jobs{abs(hash(request.node.name)) % 10**12}"
    yield postgres.url(name)


class Replica(Server):
    """One of several; `stopped` ones are continued before they are killed."""

    def __init__(self, data, database, *options):
        super().__init__(data, "--database", database, "--lease", str(LEASE), *options)
        self.id = (data / "server-id").read_text().strip()

    def pids(self):
        pids = [self.process.pid]
        with contextlib.suppress(OSError):  # it may die meanwhile
            for task in pathlib.Path(f"/proc/{self.process.pid}/task").iterdir():
                with contextlib.suppress(OSError):
                    pids += map(int, (task / "children").read_text().split())
        return pids

    def signal(self, number):
        """To the server and its workers, as when a machine is suspended."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self):
        if self.process.poll() is None:
            self.signal(signal.SIGCONT)
        super().kill()


@pytest.fixture
def replicas(tmp_path, database):
    made = []

    def start(*options, count=2):
        made.extend(Replica(tmp_path / f"data{len(made) + i}", database, *options) for i in range(count))
        return made[-count:]

    yield start
    for replica in made:
        replica.kill()


def holder(replicas, job):
    """The replica that runs the job, and the others."""
    server = replicas[0].job(job)["server"]
    return next(r for r in replicas if r.id == server), [r for r in replicas if r.id != server]


def check_history(replica, job, attempts=None):
    """The promises about one job's events, and about its end."""
    got = replica.job(job)
    watched = replica.pewter("jobs", "watch", job, code=0 if got["state"] == "JOB_STATE_SUCCEEDED" else 1)
    events = [event for event in map(json.loads, watched.stdout.splitlines()) if "progress" not in event]
    assert [int(event["sequence"]) for event in events] == list(range(1, len(events) + 1))
    states = [event["state_change"]["state"].removeprefix("JOB_STATE_") for event in events if "state_change" in event]
    following = {
        "QUEUED": {"PLANNING", "CANCELLED"},
        "PLANNING": {"RUNNING", "QUEUED", "FAILED", "CANCELLED"},
        "RUNNING": {"PUBLISHING", "QUEUED", "FAILED", "CANCELLED"},
        "PUBLISHING": {"SUCCEEDED", "QUEUED", "FAILED", "CANCELLED"},
    }
    assert states[0] == "QUEUED"
    for before, after in zip(states, states[1:]):
        assert after in following[before], states
    assert got["state"] == f"JOB_STATE_{states[-1]}"
    if attempts is not None:
        assert got["attempt"] == attempts, states
    return got


def test_killed_server_is_replaced(replicas, slow, expected, tmp_path):  # noqa: F811
    both = replicas()
    out = tmp_path / "out"
    job = both[0].submit(slow, out, *SLOW_OPTIONS)
    both[0].wait_for_shards(job, out)
    dead, (other,) = holder(both, job)
    dead.kill()
    done = other.wait(job, "SUCCEEDED", "FAILED")
    assert done["state"] == "JOB_STATE_SUCCEEDED", done["error"]
    assert done["server"] == other.id
    assert int(done["output"]["shards_reused"]) >= 2
    assert weights(out) == expected
    check_history(other, job, attempts=2)


def test_suspended_server_loses_its_job(replicas, slow, expected, tmp_path):  # noqa: F811
    both = replicas()
    out = tmp_path / "out"
    job = both[0].submit(slow, out, *SLOW_OPTIONS)
    both[0].wait_for_shards(job, out)
    late, (other,) = holder(both, job)
    worker = late.worker(job)
    late.signal(signal.SIGSTOP)
    done = other.wait(job, "SUCCEEDED", "FAILED")
    assert done["state"] == "JOB_STATE_SUCCEEDED", done["error"]
    assert done["server"] == other.id
    before = weights(out)
    assert before == expected

    def published():
        # What its worker was writing when it was stopped has a name that nobody reads.
        return {file.name: file.stat().st_mtime_ns for file in out.iterdir() if not file.name.endswith(".pewter-tmp")}

    files = published()
    late.signal(signal.SIGCONT)
    # Its worker goes without a trace, and it serves on.
    wait_for("end of the late worker", lambda: not os.path.exists(f"/proc/{worker}"))
    assert late.job(job) == other.job(job)
    assert published() == files
    check_history(late, job, attempts=2)
    again = late.submit(slow, tmp_path / "again", *SLOW_OPTIONS)
    assert late.wait(again, "SUCCEEDED", "FAILED")["state"] == "JOB_STATE_SUCCEEDED"


def test_any_server_watches_and_cancels(replicas, slow, tmp_path):  # noqa: F811
    both = replicas()
    out = tmp_path / "out"
    job = both[0].submit(slow, out, *SLOW_OPTIONS)
    both[0].wait_for_shards(job, out)
    _, (other,) = holder(both, job)
    with subprocess.Popen(
        [PEWTER, "jobs", "watch", job, "--server", other.address, "-o", "json"], stdout=subprocess.PIPE, text=True
    ) as watch:
        seen = [json.loads(watch.stdout.readline())]
        other.pewter("jobs", "cancel", job)
        seen += [json.loads(line) for line in watch.stdout]
    assert seen[-1]["state_change"]["state"] == "JOB_STATE_CANCELLED"
    check_history(both[0], job, attempts=1)


def test_stopped_server_hands_its_job_over(replicas, slow, expected, tmp_path):  # noqa: F811
    both = replicas()
    out = tmp_path / "out"
    job = both[0].submit(slow, out, *SLOW_OPTIONS)
    both[0].wait_for_shards(job, out)
    stopping, (other,) = holder(both, job)
    assert stopping.stop() == 0
    done = other.wait(job, "SUCCEEDED", "FAILED")
    assert done["server"] == other.id
    assert int(done["output"]["shards_reused"]) >= 2
    assert weights(out) == expected
    check_history(other, job, attempts=1)


def test_database_restarts_in_the_middle(replicas, postgres, slow, expected, tmp_path):  # noqa: F811
    both = replicas()
    out = tmp_path / "out"
    job = both[0].submit(slow, out, *SLOW_OPTIONS)
    both[0].wait_for_shards(job, out)
    postgres.stop()
    postgres.start()
    done = both[1].wait(job, "SUCCEEDED", "FAILED")
    assert done["state"] == "JOB_STATE_SUCCEEDED", done["error"]
    assert weights(out) == expected
    check_history(both[0], job)


def test_no_password_is_shown(tmp_path):
    canary = "canary-password"
    command = [PEWTERD, "serve", "--listen", "127.0.0.1:0", "--data", tmp_path]
    url = f"postgresql://me:{canary}@127.0.0.1:1/jobs"
    refused = subprocess.run([*command, "--database", url], capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2
    assert "PEWTER_DATABASE" in refused.stderr
    environment = {**os.environ, "PEWTER_DATABASE": url}
    failed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert failed.returncode == 1
    assert "job database" in failed.stderr
    assert canary not in refused.stderr + failed.stderr + failed.stdout
