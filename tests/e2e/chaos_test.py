"""Clients at work while servers, workers, the database and connections fail by a seed; what the clients saw is checked afterwards (history.py).

PEWTER_CHAOS_SEEDS: how many seeds (5); PEWTER_CHAOS_FIRST: the first one (0). A seed is replayed by its name: -k "chaos and 17-". The faults
are the same then, though not to the microsecond. Each history is kept in the test's folder.
"""

import contextlib
import hashlib
import http.client
import json
import os
import pathlib
import random
import signal
import subprocess
import threading
import time

import pytest

import history as checker
from crash_test import OPTIONS, many  # noqa: F401 (fixture)
from cutting_proxy import CuttingProxy
from failpoints import Failpoints
from replicas_test import Replica, postgres  # noqa: F401 (fixture)
from s3_test import seaweedfs  # noqa: F401 (fixture)
from server_test import PEWTER, linear, wait_for

FIRST, SEEDS = int(os.environ.get("PEWTER_CHAOS_FIRST", "0")), int(os.environ.get("PEWTER_CHAOS_SEEDS", "5"))
SERVERS, CLIENTS, REQUESTS = 2, 3, 6
CALLS, STRIKES = 14, 7  # of each client; of faults
POINTS = "after_claim after_begin shard_read tensor_done part_sent before_shard object_synced shard_done shard_recorded before_publish"
POINTS += " aux_written before_commit after_commit before_finish after_finish worker_launched before_database_commit after_database_commit"
# Nobody knows whether it was done.
UNKNOWN = {"UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "UNKNOWN", "ABORTED"}


def digests(files):
    return {name: [len(data), hashlib.sha256(data).hexdigest()] for name, data in files.items()}


class Folder:
    """Where models go: a folder."""

    def __init__(self, path):
        self.path = path
        path.mkdir()

    def uri(self, name):
        return str(self.path / name)

    def files(self, name):
        found = {}
        with contextlib.suppress(FileNotFoundError):
            for file in (self.path / name).iterdir():
                with contextlib.suppress(FileNotFoundError):
                    found[file.name] = file.read_bytes()
        return found

    def manifest(self, name):
        with contextlib.suppress(FileNotFoundError):
            return (self.path / name / checker.MANIFEST).read_text()
        return None

    def uploads(self, name):
        return []


class Bucket:
    """Where models go: a prefix in an S3 store, read past the proxy that the servers go through."""

    def __init__(self, filer, prefix):
        self.filer, self.prefix = filer, prefix

    def uri(self, name):
        return f"s3://models/{self.prefix}/{name}"

    def get(self, path, accept="*/*"):
        connection = http.client.HTTPConnection("127.0.0.1", self.filer, timeout=30)
        try:
            connection.request("GET", f"/buckets/models/{path}", headers={"Accept": accept})
            answer = connection.getresponse()
            data = answer.read()
            return data if answer.status == 200 else None
        finally:
            connection.close()

    def list(self, path):
        listed = self.get(f"{path}/?limit=1000", "application/json")
        entries = json.loads(listed)["Entries"] if listed else None
        return [entry["FullPath"].rsplit("/", 1)[1] for entry in entries or []]

    def files(self, name):
        found = {file: self.get(f"{self.prefix}/{name}/{file}") for file in self.list(f"{self.prefix}/{name}")}
        return {file: data for file, data in found.items() if data is not None}

    def manifest(self, name):
        data = self.get(f"{self.prefix}/{name}/{checker.MANIFEST}")
        return None if data is None else data.decode()

    def uploads(self, name):
        return []


class Cluster:
    """Servers that are started again when they die, each behind proxies to the database and to its clients."""

    def __init__(self, folder, postgres_, database, history):
        self.database = [CuttingProxy("127.0.0.1", postgres_.port) for _ in range(SERVERS)]
        self.clients = [CuttingProxy("127.0.0.1", 1) for _ in range(SERVERS)]
        self.history, self.postgres = history, postgres_
        self.servers = [
            Replica(folder / f"data{i}", f"postgresql://postgres@127.0.0.1:{self.database[i].port}/{database}", "--workers", "2", "--retention", "1h")
            for i in range(SERVERS)
        ]
        self.down_until, self.ending = [0.0] * SERVERS, False
        self.keeper = threading.Thread(target=self.keep)
        self.keeper.start()

    def keep(self):
        sampled = 0.0
        while not self.ending:
            for i, server in enumerate(self.servers):
                self.clients[i].server = ("127.0.0.1", int(server.address.rsplit(":", 1)[1]))
                if server.process.poll() is not None and time.monotonic() >= self.down_until[i]:
                    # The database may be down, too.
                    with contextlib.suppress(AssertionError):
                        server.start()
            if time.monotonic() > sampled + 0.5:
                sampled = time.monotonic()
                self.sample()
            time.sleep(0.02)

    def sample(self):
        for i, server in enumerate(self.servers):
            with contextlib.suppress(OSError, IndexError):
                process = pathlib.Path(f"/proc/{server.process.pid}")
                rss = int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
                count = {what: len(list((process / folder).iterdir())) for what, folder in [("fds", "fd"), ("threads", "task")]}
                self.history.observe("resources", server=f"server {i}", rss=rss, **count)

    def settle(self):
        for server in self.servers:
            server.signal(signal.SIGCONT)
        self.down_until = [0.0] * SERVERS
        wait_for("all servers", lambda: all(server.process.poll() is None for server in self.servers))

    def end(self):
        self.ending = True
        self.keeper.join()
        for server in self.servers:
            server.kill()
        for proxy in self.database + self.clients:
            proxy.close()


class Client:
    """One user: asks for what its chance says, and writes down what it is told."""

    def __init__(self, name, cluster, history, requests, place, folder):
        self.name, self.cluster, self.history, self.requests, self.place, self.folder = name, cluster, history, requests, place, folder
        self.jobs = {}  # known ids, by request

    def run(self, chance, *arguments, patience=4.0):
        """(outcome, printed)"""
        proxy = chance.choice(self.cluster.clients)
        command = [PEWTER, *map(str, arguments), "--server", proxy.address, "-o", "json"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            try:
                out, error = process.communicate(timeout=patience)
            except subprocess.TimeoutExpired:
                process.kill()
                return "info", process.communicate()[0]
        if process.returncode == 0:
            return "ok", out
        code = "UNKNOWN"
        with contextlib.suppress(ValueError, KeyError):
            code = json.loads(error)["error"]["code"]
        return "info" if code in UNKNOWN else "fail", out

    def create(self, chance, request):
        what = self.requests[request]

        def ask():
            path = self.folder / f"{request}.yml"
            outcome, out = self.run(chance, "submit", path, what["destination"], "--device", "cpu", "--request-id", request, *OPTIONS)
            if outcome != "ok":
                return outcome, {}
            self.jobs[request] = json.loads(out)["id"]
            return outcome, {"job": self.jobs[request]}

        self.history.call(self.name, "create", ask, request_id=request, destination=what["destination"], expect=what["expect"])

    @staticmethod
    def told(job):
        return {"state": job["state"].removeprefix("JOB_STATE_"), "sequence": int(job["sequence"]), "attempt": job["attempt"]}

    def look(self, chance, op, job):
        def ask():
            outcome, out = self.run(chance, "jobs", op, job)
            if outcome != "ok":
                return outcome, {}
            answer = json.loads(out)
            return outcome, self.told(answer if isinstance(answer, dict) else answer[0])

        return self.history.call(self.name, op, ask, job=job)

    def watch(self, chance, job, patience):
        def ask():
            _, out = self.run(chance, "jobs", "watch", job, patience=patience)
            events = []
            for line in out.splitlines():
                with contextlib.suppress(ValueError):  # the last one may be cut
                    event = json.loads(line)
                    if "progress" in event:
                        continue
                    told = {"sequence": int(event["sequence"])}
                    if "state_change" in event:
                        change = event["state_change"]
                        told |= {"state": change["state"].removeprefix("JOB_STATE_"), "attempt": change.get("attempt", 0)}
                    events.append(told)
            return "ok", {"events": events}

        self.history.call(self.name, "watch", ask, job=job, after=0)

    def read(self, request):
        destination = self.requests[request]["destination"]
        name = destination.rsplit("/", 1)[1]

        def ask():
            before = self.place.manifest(name)
            files = self.place.files(name) if before is not None else {}
            files.pop(checker.MANIFEST, None)
            # One that is replaced meanwhile is told as it will be seen next.
            return ("ok" if self.place.manifest(name) == before else "info"), {"manifest": before, "files": digests(files)}

        self.history.call(self.name, "read", ask, destination=destination)

    def work(self, chance):
        for _ in range(CALLS):
            request = chance.choice(list(self.requests))
            job = self.jobs.get(request)
            what = chance.random()
            if job is None or what < 0.25:
                self.create(chance, request)
            elif what < 0.5:
                self.look(chance, "get", job)
            elif what < 0.58:
                self.look(chance, "cancel", job)
            elif what < 0.8:
                self.watch(chance, job, patience=chance.uniform(0.2, 1.5))
            else:
                self.read(request)
            time.sleep(chance.uniform(0, 0.1))


class Nemesis:
    """Breaks things, one after the other."""

    def __init__(self, chance, cluster, failpoints, store):
        self.chance, self.cluster, self.failpoints, self.store = chance, cluster, failpoints, store
        self.armed, self.did = {}, []

    def arm(self, point, action):
        self.armed[point] = action
        self.failpoints.arm(*(f"{name}={what}" for name, what in self.armed.items()))

    def disarm(self):
        self.failpoints.arm()
        for point in POINTS.split():
            self.failpoints.release(point)

    def strike(self):
        chance, cluster = self.chance, self.cluster
        i = chance.randrange(SERVERS)
        server = cluster.servers[i]
        # What is not drawn is drawn all the same, so that a seed's faults do not hang on what is there.
        point, nth, seconds, lot = chance.choice(POINTS.split()), chance.randint(1, 4), chance.uniform(0.05, 1), chance.random()
        faults = ["point", "point", "point", "kill", "stop", "worker", "database", "cut", "lose", "client", "late"]
        fault = chance.choice(faults + ["store", "store"] if self.store else faults)
        self.did.append(f"{fault} {point if fault == 'point' else ''} {i}")
        if fault == "point":
            action = "kill" if lot < 0.6 else "pause" if lot < 0.8 else f"sleep({int(300 * seconds)})"
            self.arm(point, f"{action}@{self.failpoints.hits(point) + nth}")
        elif fault == "kill":
            cluster.down_until[i] = time.monotonic() + seconds
            server.process.kill()
        elif fault == "stop":
            server.signal(signal.SIGSTOP)
            threading.Timer(2 * seconds, server.signal, [signal.SIGCONT]).start()
        elif fault == "late":  # beyond the lease
            server.signal(signal.SIGSTOP)
            threading.Timer(2.2 + seconds, server.signal, [signal.SIGCONT]).start()
        elif fault == "worker":
            with contextlib.suppress(OSError):
                for pid in server.pids()[1:]:
                    os.kill(pid, signal.SIGKILL if lot < 0.6 else signal.SIGSTOP)
        elif fault == "database":
            cluster.postgres.stop()
            time.sleep(0.3 * seconds)
            cluster.postgres.start()
        elif fault == "cut":
            cluster.database[i].cut()
        elif fault == "lose":
            cluster.database[i].lose_after = b"COMMIT"
        elif fault == "client":
            cluster.clients[i].cut()
        elif lot < 0.5:
            self.store.cut()
        else:
            self.store.lose_after = b"PUT /"
        if lot > 0.7:  # what has paused goes on
            for paused, action in list(self.armed.items()):
                if action.startswith("pause"):
                    self.failpoints.release(paused)


@pytest.fixture(scope="session")
def undisturbed(many):  # noqa: F811
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (many / "out").iterdir() if file.name != checker.MANIFEST}


@pytest.fixture
def store_environment(request, seed, monkeypatch):
    """Of every third seed: a proxy to the S3 store that its models go to, and the port at which the store is read."""
    if seed % 3 != 2:
        return None
    environment = request.getfixturevalue("seaweedfs")
    port = int(environment["AWS_ENDPOINT_URL_S3"].rsplit(":", 1)[1])
    proxy = CuttingProxy("127.0.0.1", port)
    for name, value in environment.items():
        if name.startswith("AWS_"):
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{proxy.port}")
    request.addfinalizer(proxy.close)
    return proxy, port - 1


@pytest.mark.parametrize("seed", range(FIRST, FIRST + SEEDS), ids=lambda seed: f"{seed}-")
def test_chaos(seed, postgres, many, undisturbed, store_environment, tmp_path, monkeypatch):  # noqa: F811
    begin = time.monotonic()
    chance = random.Random(seed)
    # Over its own process only: what the environment says of other servers is not theirs.
    database = f"chaos_{seed}_{time.monotonic_ns()}"
    postgres.url(database)
    history = checker.History(tmp_path / "history.jsonl")
    history.observe("expected", name="linear", files=undisturbed)
    place = Bucket(store_environment[1], f"{database}") if store_environment else Folder(tmp_path / "models")
    requests = {}
    for i in range(REQUESTS):
        # Two want the same place; one names a model that is not there; one cannot be read.
        destination = place.uri(f"out{0 if i == 1 else i}")
        expect = {REQUESTS - 2: "failed", REQUESTS - 1: "refused"}.get(i, "linear")
        recipe = {"failed": linear(many / "a", "/nowhere/b"), "refused": "merge_method: linear\nmodels: [\n"}
        (tmp_path / f"request-{i}.yml").write_text(recipe.get(expect, linear(many / "a", many / "b")))
        requests[f"request-{i}"] = {"destination": destination, "expect": expect}
    failpoints = Failpoints(tmp_path / "failpoints", monkeypatch)
    cluster = Cluster(tmp_path, postgres, database, history)
    try:
        clients = [Client(f"client-{i}", cluster, history, requests, place, tmp_path) for i in range(CLIENTS)]
        threads = [
            threading.Thread(target=client.work, args=[random.Random(f"{seed}-{client.name}")]) for client in clients
        ]
        for thread in threads:
            thread.start()
        nemesis = Nemesis(chance, cluster, failpoints, store_environment and store_environment[0])
        for _ in range(STRIKES):
            time.sleep(chance.uniform(0, 0.5))
            nemesis.strike()
        nemesis.disarm()
        for thread in threads + [each for each in threading.enumerate() if isinstance(each, threading.Timer)]:
            thread.join()
        cluster.settle()

        # All is well again: everything ends.
        closing = Client("closing", cluster, history, requests, place, tmp_path)

        def listed():
            outcome, out = closing.run(chance, "jobs", "list")
            return [json.loads(out)["jobs"]] if outcome == "ok" else None

        deadline = time.monotonic() + checker.SECONDS_TO_END
        while True:
            (jobs,) = wait_for("a list of jobs", listed)
            if all(job["state"].removeprefix("JOB_STATE_") in checker.FINAL for job in jobs) or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        # The workers of those that were late, too.
        wait_for("the end of all workers", lambda: all(len(server.pids()) == 1 for server in cluster.servers))
        ends, models = {}, {}
        for job in jobs:
            closing.look(chance, "get", job["id"])
            if job["state"].removeprefix("JOB_STATE_") in checker.FINAL:
                closing.watch(chance, job["id"], patience=20)
            got = json.loads(wait_for("a job", lambda: (answer := closing.run(chance, "jobs", "get", job["id"]))[0] == "ok" and answer[1]))
            error = got.get("error", {})
            ends[job["id"]] = {
                "request_id": got["request_id"],
                **closing.told(got),
                "manifest": got.get("output", {}).get("manifest_json"),
                "reason": error.get("reason", ""),
                "message": error.get("message", ""),
            }
        for destination in {request["destination"] for request in requests.values()}:
            subprocess.run([PEWTER, "store", "clean", destination, "--older-than", "0", "-q"], check=True, capture_output=True, timeout=60)
            name = destination.rsplit("/", 1)[1]
            files, manifest = place.files(name), place.manifest(name)
            models[destination] = {"manifest": manifest, "files": digests(files), "uploads": place.uploads(name)}
        history.observe("final", jobs=ends, models=models)
    finally:
        failpoints.arm()
        cluster.end()
        history.file.close()
    violations = checker.check(checker.load(history.path))
    print(f"seed {seed}: {time.monotonic() - begin:.1f} s; {', '.join(nemesis.did)}; jobs {[end['state'] for end in ends.values()]}")
    assert not violations, f"seed {seed}: {violations}; the history is {history.path}"
