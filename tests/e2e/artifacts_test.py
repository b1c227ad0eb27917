"""Models that travel over the server's address alone: uploads, merges of them, downloads, on connections that break.

Needs nothing but Python, pytest and the two binaries, in $PEWTER_BIN or build/bin.
"""

import contextlib
import json
import signal
import socket
import subprocess
import threading
import time

import pytest

from server_test import PATIENCE, PEWTER, SLOW_OPTIONS, Server, linear, ties, wait_for, weights, write_model


class Proxy:
    """Between clients and a server: counts, cuts, stops and damages what clients send."""

    def __init__(self, address):
        host, port = address.rsplit(":", 1)
        self.server = (host, int(port))
        self.sent = self.received = 0  # by clients
        self.connections = 0
        self.cut_sent = self.cut_received = None  # the connection ends after so many bytes more, once
        self.hold_sent = None  # nothing is passed on after so many bytes more
        self.damage = None  # (bytes, what stands for them)
        self.sockets = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = "127.0.0.1:%d" % self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                server = socket.create_connection(self.server)
                self.connections += 1
                self.sockets += [client, server]
                threading.Thread(target=self.pump, args=(client, server, True), daemon=True).start()
                threading.Thread(target=self.pump, args=(server, client, False), daemon=True).start()

    def pump(self, source, target, sent):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if sent:
                    self.sent += len(data)
                    if self.damage:
                        data = data.replace(*self.damage)
                    if self.hold_sent is not None:
                        self.hold_sent -= len(data)
                        while self.hold_sent is not None and self.hold_sent < 0:
                            time.sleep(0.01)
                    if self.cut_sent is not None:
                        self.cut_sent -= len(data)
                        if self.cut_sent < 0:
                            self.cut_sent = None
                            time.sleep(1)  # what was passed on has been read
                            break
                else:
                    self.received += len(data)
                    if self.cut_received is not None:
                        self.cut_received -= len(data)
                        if self.cut_received < 0:
                            self.cut_received = None
                            break
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self):
        self.listener.close()
        for end in self.sockets:
            end.close()


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path / "data")
    yield server
    server.kill()


@pytest.fixture
def proxy(server):
    proxy = Proxy(server.address)
    yield proxy
    proxy.close()


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Two models of 8 MB, and some files beside them."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(["a", "b"]):
        write_model(folder / name / "model.safetensors", tensors=8, elements=1 << 18, seed=seed)
        (folder / name / "notes.txt").write_text(f"of {name}\n")
        (folder / name / "optimizer.pt").write_bytes(b"never read")
        (folder / name / ".secret.json").write_text("{}")
    return folder


MODEL_BYTES = 8 << 20


def pewter(address, *arguments, code=0, cwd=None):
    done = subprocess.run(
        [PEWTER, *map(str, arguments), "--server", address, "-o", "json"],
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
        cwd=cwd,
    )
    assert done.returncode == code, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return json.loads(done.stdout or done.stderr)


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def partial_files(server):
    return list((server.data / "artifacts/partial").iterdir())


def test_what_the_server_has_is_not_sent_again(proxy, models, tmp_path):
    first = pewter(proxy.address, "upload", models / "a")
    assert MODEL_BYTES < proxy.sent < 1.1 * MODEL_BYTES
    assert first["sent_bytes"] == first["bytes"] > MODEL_BYTES
    proxy.sent = 0
    # Under another name, with one more file.
    other = tmp_path / "other"
    other.mkdir()
    for name in ("model.safetensors", "notes.txt"):
        (other / name).write_bytes((models / "a" / name).read_bytes())
    (other / "config.txt").write_text("new")
    second = pewter(proxy.address, "upload", other, models / "a")
    assert proxy.sent < 100_000
    assert second["sent_bytes"] == 3
    assert second["artifacts"][1]["uri"] == first["artifacts"][0]["uri"]
    assert second["artifacts"][0]["uri"] != first["artifacts"][0]["uri"]

    got = pewter(proxy.address, "download", first["artifacts"][0]["uri"], tmp_path / "back")
    # Neither other tools' files nor hidden ones.
    assert sorted(files_of(tmp_path / "back")) == ["model.safetensors", "notes.txt"]
    assert got["received_bytes"] == got["bytes"] == first["bytes"]
    assert weights(tmp_path / "back") == weights(models / "a")


def test_upload_that_is_cut_goes_on(server, proxy, models, tmp_path):
    proxy.cut_sent = MODEL_BYTES * 7 // 8
    uploaded = pewter(proxy.address, "upload", models / "a")
    assert proxy.cut_sent is None and proxy.connections >= 2
    # What was under way is sent twice, not all of it.
    assert proxy.sent < 1.6 * MODEL_BYTES
    assert partial_files(server) == []
    pewter(proxy.address, "download", uploaded["artifacts"][0]["uri"], tmp_path / "back")
    assert weights(tmp_path / "back") == weights(models / "a")


def test_upload_of_a_killed_client_goes_on_after_a_restart_of_the_server(server, proxy, models, tmp_path):
    proxy.hold_sent = MODEL_BYTES // 2
    client = subprocess.Popen([PEWTER, "upload", models / "a", "--server", proxy.address, "-q"])
    wait_for("half of the model", lambda: sum(file.stat().st_size for file in partial_files(server)) > MODEL_BYTES // 4)
    client.send_signal(signal.SIGKILL)
    client.wait()
    server.kill()
    server.start()
    came = sum(file.stat().st_size for file in partial_files(server))
    assert came > MODEL_BYTES // 4
    uploaded = pewter(server.address, "upload", models / "a")
    # The small file may have come before.
    assert uploaded["bytes"] - came - 100 < uploaded["sent_bytes"] <= uploaded["bytes"] - came
    assert partial_files(server) == []
    pewter(server.address, "download", uploaded["artifacts"][0]["uri"], tmp_path / "back")
    assert weights(tmp_path / "back") == weights(models / "a")


def test_wrong_bytes_are_refused(server, proxy, models):
    content = (models / "a/model.safetensors").read_bytes()
    middle = content[1_000_000:1_000_032]
    proxy.damage = (middle, bytes(reversed(middle)))
    refused = pewter(proxy.address, "upload", models / "a", code=1)
    assert refused["error"]["code"] == "DATA_LOSS"
    assert "model.safetensors" in refused["error"]["message"]
    assert partial_files(server) == []
    proxy.damage = None
    pewter(proxy.address, "upload", models / "a")


def test_a_laptop_merges_its_own_models(server, proxy, models, tmp_path):
    recipe = tmp_path / "recipe.yml"
    recipe.write_text("# mine\n" + linear("./a", "./b"))
    arguments = ["submit", recipe, "artifact://merged", "--upload", "always", "--device", "cpu"]
    job = pewter(proxy.address, *arguments, cwd=models)
    assert "# mine" in job["recipe"] and str(models) not in job["recipe"]
    assert job["recipe"].count("artifact://sha256/") == 2
    done = server.wait(job["id"], "SUCCEEDED", "FAILED")
    assert done["state"] == "JOB_STATE_SUCCEEDED", done["error"]

    # In the middle of it the connection goes.
    proxy.cut_received = MODEL_BYTES * 7 // 8
    proxy.received = 0
    got = pewter(proxy.address, "download", job["id"], tmp_path / "merged")
    assert proxy.cut_received is None
    assert proxy.received < 1.6 * MODEL_BYTES
    assert got["files"] == len(files_of(tmp_path / "merged"))
    (models / "recipe.yml").write_text(linear("./a", "./b"))
    subprocess.run([PEWTER, "merge", "recipe.yml", tmp_path / "local", "--device", "cpu", "-q"], cwd=models, check=True)
    assert weights(tmp_path / "merged") == weights(tmp_path / "local")

    # Nothing comes twice.
    again = pewter(proxy.address, "download", "artifact://merged", tmp_path / "merged")
    assert again["received_bytes"] == 0
    # What is damaged or another's is not taken for what was asked for.
    model = next((tmp_path / "merged").glob("*.safetensors"))
    good = model.read_bytes()
    model.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    refused = pewter(proxy.address, "download", "artifact://merged", tmp_path / "merged", code=1)
    assert refused["error"]["code"] == "ALREADY_EXISTS"
    (model.parent / f".{model.name}.pewter-part").write_bytes(b"of another model")
    pewter(proxy.address, "download", "artifact://merged", tmp_path / "merged", "--overwrite")
    assert model.read_bytes() == good

    # The result is a model of the next recipe.
    recipe.write_text("merge_method: passthrough\nmodels: [{model: artifact://merged}]\n")
    second = pewter(proxy.address, *arguments[:2], "artifact://again", *arguments[3:])
    done = server.wait(second["id"], "SUCCEEDED", "FAILED")
    assert done["state"] == "JOB_STATE_SUCCEEDED", done["error"]
    listed = [item["uri"] for item in pewter(proxy.address, "artifacts", "list")["artifacts"]]
    assert listed[:2] == ["artifact://again", "artifact://merged"] and len(listed) == 4
    for uri in listed:
        pewter(proxy.address, "artifacts", "delete", uri)
    assert pewter(proxy.address, "artifacts", "list")["artifacts"] == []
    pewter(proxy.address, "download", second["id"], tmp_path / "gone", code=3)
    third = pewter(proxy.address, *arguments[:2], "artifact://third", *arguments[3:])["id"]
    failed = server.wait(third, "FAILED", "SUCCEEDED")
    assert "artifact://merged" in failed["error"]["message"] or "outputs/merged" in failed["error"]["message"]


def test_download_that_is_damaged_on_the_way_is_refused(server, models, tmp_path):
    uploaded = pewter(server.address, "upload", models / "a/model.safetensors")
    uri = uploaded["artifacts"][0]["uri"]
    assert uri.endswith("/model.safetensors")
    artifact = uri.rsplit("/", 1)[0]
    blobs = server.data / "artifacts/blobs/sha256"
    blob = next(path for path in blobs.rglob("*") if path.is_file())
    content = bytearray(blob.read_bytes())
    content[5_000_000] ^= 4
    blob.write_bytes(content)
    refused = pewter(server.address, "download", artifact, tmp_path / "back", code=1)
    assert refused["error"]["code"] == "DATA_LOSS"
    assert files_of(tmp_path / "back") == {}


def test_where_the_result_goes_is_said(server, models, tmp_path):
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(linear(models / "a", models / "b"))
    refused = pewter(server.address, "submit", recipe, "./merged", "--upload", "always", code=2)
    assert "artifact://" in refused["error"]["message"]
    for out in ("artifact://sha256/" + "0" * 64, "artifact://a/b", "artifact://", "artifact://.x"):
        pewter(server.address, "submit", recipe, out, code=2)
    # Without uploads, of a server on this machine, as ever; and what a job has left anywhere comes back.
    job = pewter(server.address, "submit", recipe, tmp_path / "out", "--device", "cpu")["id"]
    assert json.loads(server.pewter("artifacts", "list").stdout)["artifacts"] == []
    server.wait(job, "SUCCEEDED")
    (tmp_path / "out/mine.txt").write_text("not the job's")
    pewter(server.address, "download", job, cwd=tmp_path / "data")
    assert weights(tmp_path / "data/out") == weights(tmp_path / "out")
    assert not (tmp_path / "data/out/mine.txt").exists()
    pewter(server.address, "download", "j00", code=3)
    pewter(server.address, "download", "s3://bucket/model", code=2)


def test_what_a_job_writes_is_not_deleted(server, models, tmp_path):
    large = tmp_path / "large"
    for seed, name in enumerate(["base", "a"]):
        write_model(large / name / "model.safetensors", tensors=48, elements=1 << 20, seed=seed)
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(ties(large / "base", large / "a"))
    job = pewter(server.address, "submit", recipe, "artifact://slow", "--device", "cpu", *SLOW_OPTIONS)["id"]
    refused = pewter(server.address, "artifacts", "delete", "artifact://slow", code=1)
    assert job in refused["error"]["message"]
    pewter(server.address, "jobs", "cancel", job)
    server.wait(job, "CANCELLED")


def test_uploads_have_a_limit(tmp_path, models):
    server = Server(tmp_path / "data", "--artifact-quota", "4MB")
    try:
        refused = pewter(server.address, "upload", models / "a", code=1)
        assert refused["error"]["code"] == "RESOURCE_EXHAUSTED"
        assert "MiB" in refused["error"]["message"]
    finally:
        server.kill()
