"""Models in an S3 store: merged from there, to there, interrupted and resumed; what users are told.

Needs Python, pytest, numpy, the binaries, in $PEWTER_BIN or build/bin, and the servers of s3_servers.py, as far as they are there.
"""

import json
import os
import pathlib
import socket
import struct
import subprocess
import time

import numpy as np
import pytest

import s3_servers

ROOT = pathlib.Path(__file__).resolve().parents[2]
BIN = pathlib.Path(os.environ.get("PEWTER_BIN", ROOT / "build/bin")).resolve()
PEWTER, PEWTERD = BIN / "pewter", BIN / "pewterd"
PATIENCE = 120  # seconds, for machines that have other work
KEY, SECRET = "testkey", "canary-of-the-secret-key"


@pytest.fixture(scope="module", params=[s3_servers.seaweedfs, s3_servers.ceph], ids=["seaweedfs", "ceph"])
def s3(request, tmp_path_factory):
    yield from serve(request.param, tmp_path_factory)


@pytest.fixture(scope="module")
def seaweedfs(tmp_path_factory):
    yield from serve(s3_servers.seaweedfs, tmp_path_factory)


def serve(start, tmp_path_factory):
    """The environment of a user of the store, with a bucket "models"."""
    try:
        with start(tmp_path_factory.mktemp("s3"), KEY, SECRET) as port:
            environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
            environment |= {
                "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{port}",
                "AWS_ACCESS_KEY_ID": KEY,
                "AWS_SECRET_ACCESS_KEY": SECRET,
                "AWS_REGION": "us-east-1",
            }
            # The gateway may read its users later than it listens.
            deadline = time.monotonic() + PATIENCE
            while "is not a checkpoint" not in (probe := inspect(environment)):
                assert time.monotonic() < deadline, probe
                time.sleep(0.2)
            yield environment
    except s3_servers.Missing as missing:
        pytest.skip(str(missing))


def inspect(environment):
    return subprocess.run([PEWTER, "inspect", "s3://models/none"], env=environment, capture_output=True, text=True).stderr


def pewter(environment, *words, code=0):
    run = subprocess.run([PEWTER, *map(str, words)], env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert run.returncode == code, (run.returncode, run.stdout, run.stderr)
    assert SECRET not in run.stdout + run.stderr
    return run


def write_model(folder, seed, tensors=24, rows=64, columns=128):
    """A raw checkpoint of F32 tensors, some of them large enough for several tiles."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    arrays = {f"layer.{i:02}.weight": random.standard_normal((rows * (1 + 40 * (i % 6 == 0)), columns), np.float32) for i in range(tensors)}
    header, offset = {}, 0
    for name, array in arrays.items():
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in arrays.values():
            file.write(array.tobytes())


def recipe(folder, *models, method="linear", extra=""):
    lines = [f"  - model: {model}\n    parameters: {{weight: {i + 1}}}" for i, model in enumerate(models)]
    path = folder / "recipe.yaml"
    path.write_text(f"merge_method: {method}\nmodels:\n" + "\n".join(lines) + f"\n{extra}")
    return path


def digests(environment, model, folder):
    """Of the weights of a model in the store, by merging it with nothing else into a local folder."""
    pewter(environment, "merge", recipe(folder, model, method="passthrough"), folder / "copy", "--overwrite")
    manifest = json.loads((folder / "copy/pewter_manifest.json").read_text())
    return {file["name"]: file["sha256"] for file in manifest["files"] if file["name"].endswith(".safetensors")}


@pytest.fixture(scope="module")
def models(s3, tmp_path_factory):
    """Two models, here and in the store."""
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("a", 1), ("b", 2)):
        write_model(folder / name, seed)
        single = folder / f"{name}.yaml"
        single.write_text(f"merge_method: passthrough\nmodels:\n  - model: {folder / name}\n")
        pewter(s3, "merge", single, f"s3://models/{name}")
    return folder


def test_from_store_to_store_is_the_same_as_local(s3, models, tmp_path):
    shards = ["--shard-size", "2MB"]
    pewter(s3, "merge", recipe(tmp_path, models / "a", models / "b"), tmp_path / "local", *shards)
    done = pewter(s3, "merge", recipe(tmp_path, "s3://models/a", "s3://models/b"), "s3://models/merged", *shards, "-o", "json")
    assert json.loads(done.stdout)["shards"] > 2
    inspected = json.loads(pewter(s3, "inspect", "s3://models/merged", "-o", "json").stdout)
    assert inspected
    assert digests(s3, "s3://models/merged", tmp_path) == digests(s3, tmp_path / "local", tmp_path)


def test_killed_and_resumed_it_is_the_same(s3, models, tmp_path):
    words = ["merge", recipe(tmp_path, "s3://models/a", "s3://models/b"), "s3://models/resumed", "--threads", "1"]
    words += ["--shard-size", "1MB", "-o", "json", "--resume"]
    for attempt in range(60):
        run = subprocess.Popen([PEWTER, *map(str, words)], env=s3, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            out, err = run.communicate(timeout=0.1 + 0.1 * attempt)
        except subprocess.TimeoutExpired:
            run.kill()
            run.communicate()
            continue
        break
    assert run.returncode == 0, err
    assert attempt > 0
    assert json.loads(out)["shards_reused"] > 0
    pewter(s3, "merge", recipe(tmp_path, models / "a", models / "b"), tmp_path / "local")
    assert digests(s3, "s3://models/resumed", tmp_path) == digests(s3, tmp_path / "local", tmp_path)
    # Nothing of what was killed is left.
    assert json.loads(pewter(s3, "store", "clean", "s3://models/resumed", "--older-than", "0s", "-o", "json").stdout)["aborted"] == 0


def test_what_is_there_is_not_overwritten(s3, models, tmp_path):
    path = recipe(tmp_path, "s3://models/a", "s3://models/b")
    pewter(s3, "merge", path, "s3://models/twice")
    refused = pewter(s3, "merge", path, "s3://models/twice", code=1)
    assert "already holds a finished model" in refused.stderr
    pewter(s3, "merge", path, "s3://models/twice", "--overwrite")


def test_a_single_file_in_the_store_is_a_model(s3, models, tmp_path):
    found = json.loads(pewter(s3, "inspect", "s3://models/a/model.safetensors", "-o", "json").stdout)
    assert "s3://models/a/model.safetensors" in json.dumps(found)
    missing = pewter(s3, "inspect", "s3://models/none/model.safetensors", code=3)
    assert "s3://models/none/model.safetensors" in missing.stderr


def test_stages_lie_beside_the_output_and_go(s3, models, tmp_path):
    path = tmp_path / "stages.yaml"
    path.write_text(
        "name: first\nmerge_method: linear\nmodels:\n  - {model: s3://models/a, parameters: {weight: 1}}\n"
        "---\nmerge_method: linear\nmodels:\n  - {model: first, parameters: {weight: 1}}\n"
        "  - {model: s3://models/b, parameters: {weight: 1}}\n"
    )
    pewter(s3, "merge", path, "s3://models/staged")
    assert json.loads(pewter(s3, "inspect", "s3://models/staged", "-o", "json").stdout)
    assert "is not a checkpoint" in pewter(s3, "inspect", "s3://models/staged.stages/first", code=3).stderr
    refused = pewter(s3, "merge", path, "s3://models", code=2)
    assert "--intermediate-dir" in refused.stderr


def test_wrong_keys_and_places_are_named_and_not_shown(s3, models, tmp_path):
    wrong = s3 | {"AWS_SECRET_ACCESS_KEY": SECRET + "-wrong"}
    assert "s3://models" in pewter(wrong, "inspect", "s3://models/a", code=3).stderr
    nothing = {name: value for name, value in s3.items() if "KEY" not in name} | {"HOME": str(tmp_path)}
    assert "AWS_ACCESS_KEY_ID" in pewter(nothing, "inspect", "s3://models/a", code=3).stderr
    pewter(s3, "inspect", "s3://no-such-bucket/a", code=3)
    assert "is not s3://bucket/prefix" in pewter(s3, "inspect", "s3://models/../x", code=2).stderr
    endpoint = pewter(s3 | {"AWS_ENDPOINT_URL_S3": "localhost:9000"}, "inspect", "s3://models/a", code=2)
    assert "AWS_ENDPOINT_URL_S3" in endpoint.stderr


def test_no_secret_is_in_what_is_written(s3, models, tmp_path):
    pewter(s3, "merge", recipe(tmp_path, "s3://models/a", "s3://models/b"), tmp_path / "out")
    text = (tmp_path / "out/pewter_manifest.json").read_text()
    assert "s3://models/a" in text
    assert SECRET not in text and KEY not in text


def test_check_tells_what_the_store_does(s3, request):
    lacks = {"CRC32C of writes"} if "ceph" in request.node.callspec.id else set()
    report = json.loads(pewter(s3, "store", "check", "s3://models/check", "-o", "json").stdout)
    assert report["good"]
    found = {finding["feature"]: finding["supported"] for finding in report["findings"]}
    assert {feature for feature, supported in found.items() if not supported} == lacks, report
    assert {"conditional create", "ranged read", "multipart upload", "CRC32C of writes", "consistent listing"} <= set(found)
    assert "is not a checkpoint" in pewter(s3, "inspect", "s3://models/check", code=3).stderr
    assert "has all that pewter needs" in pewter(s3, "store", "check", "s3://models").stdout
    pewter(s3, "store", "check", "/tmp", code=2)


def test_a_server_merges_from_store_to_store(s3, models, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    with open(tmp_path / "log", "wb") as log:
        server = subprocess.Popen([PEWTERD, "serve", "--listen", address, "--data", tmp_path / "data"], env=s3, stdout=log, stderr=log)
    try:
        path = recipe(tmp_path, "s3://models/a", "s3://models/b")
        words = ["submit", path, "s3://models/served", "--server", address, "--wait"]
        deadline = time.monotonic() + PATIENCE
        while True:
            run = subprocess.run([PEWTER, *map(str, words)], env=s3, capture_output=True, text=True)
            if run.returncode == 0 or time.monotonic() > deadline:
                break
            time.sleep(0.5)
        assert run.returncode == 0, (run.stderr, (tmp_path / "log").read_text()[-3000:])
        refused = subprocess.run([PEWTER, "submit", str(path), "s3://models/a/", "--server", address], env=s3, capture_output=True, text=True)
        assert refused.returncode != 0 and "is an input of the recipe" in refused.stderr
        assert digests(s3, "s3://models/served", tmp_path)
    finally:
        server.terminate()
        server.wait(PATIENCE)
    assert SECRET not in (tmp_path / "log").read_text()


def test_a_server_keeps_models_of_its_clients_in_the_store(s3, tmp_path):
    write_model(tmp_path / "a", 1)
    write_model(tmp_path / "b", 2)
    places = ["--artifacts", "s3://models/artifacts", "--allow-read", "s3://models/public", "--allow-write", "s3://models/results"]
    with open(tmp_path / "log", "wb") as log:
        command = [PEWTERD, "serve", "--listen", "127.0.0.1:0", "--data", tmp_path / "data", *places]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=s3, text=True)
    try:
        address = server.stdout.readline().rpartition(" ")[2].strip()
        # The client has no key of the store.
        client = {name: value for name, value in s3.items() if not name.startswith("AWS_")} | {"PEWTER_SERVER": address}
        merge = recipe(tmp_path, tmp_path / "a", tmp_path / "b")
        pewter(client, "submit", merge, "artifact://merged", "--upload", "always", "--wait", "--device", "cpu")
        pewter(client, "download", "artifact://merged", tmp_path / "merged")
        pewter(client, "merge", merge, tmp_path / "local", "--device", "cpu")
        for file in sorted(tmp_path.glob("local/*.safetensors")):
            assert (tmp_path / "merged" / file.name).read_bytes() == file.read_bytes()
        again = json.loads(pewter(client, "upload", tmp_path / "a", "-o", "json").stdout)
        assert again["sent_bytes"] == 0
        assert not list((tmp_path / "data/partial").iterdir())
        uri = again["artifacts"][0]["uri"]
        refused = pewter(client, "submit", recipe(tmp_path, uri, "s3://models/private/x"), "s3://models/results/x", code=3)
        assert "s3://models/private/x" in refused.stderr and "s3://models/public" in refused.stderr
        refused = pewter(client, "submit", recipe(tmp_path, uri), "s3://models/results-old/x", code=3)
        assert "s3://models/results-old/x" in refused.stderr
    finally:
        server.terminate()
        server.wait(PATIENCE)
    assert SECRET not in (tmp_path / "log").read_text()
