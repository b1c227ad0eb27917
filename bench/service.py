#!/usr/bin/env python3
"""Loads pewterd: many queued jobs, watchers and workers, with SQLite and with PostgreSQL.

    bench/service.py [--jobs 10000] [--watchers 200] [--workers 50] [--seconds 60]

A real pewterd serves; pewter_service_load plays its clients and its workers with the RPCs of real ones. For each job pewterd starts a process, but
it only hands the job to the load client (pewter_service_worker), and no merge takes the cores. See the headers of bench/service_load.cc,
service_worker.cc and job_store_claims.cc. What is measured:
  claim      a worker's ClaimJob, its connection included; and, apart from the server, JobStore::Claim from as many threads as there are workers
  lag        from an event's time to its receipt by a watcher
  memory     peak RSS of pewterd from its start
All programs share the machine's cores (--cores: as many of them as are used). PostgreSQL is Debian's postgresql-15 or that of $PEWTER_POSTGRES, with
its defaults: commits are durable, as SQLite's are. Prints a table and writes bench/results/service-DATE.json.
"""
import argparse
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

import measure


def find_postgres():
    folders = [os.environ.get("PEWTER_POSTGRES", ""), *sorted(glob.glob("/usr/lib/postgresql/*/bin"), reverse=True)]
    return next((pathlib.Path(folder) for folder in folders if os.path.exists(f"{folder}/initdb")), None)


@contextlib.contextmanager
def postgres(folder):
    """A PostgreSQL of its own; yields the URL of a database by its name."""
    programs = find_postgres()
    folder.mkdir(mode=0o755)
    # It refuses to run as root.
    user = {"user": 65534, "group": 65534, "extra_groups": []} if os.getuid() == 0 else {}
    if user:
        os.chown(folder, 65534, 65534)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run = {"check": True, "capture_output": True, "cwd": folder, **user}
    subprocess.run([programs / "initdb", "-D", folder / "data", "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C"], **run)
    with open(folder / "log", "wb") as log:
        server = subprocess.Popen([programs / "postgres", "-D", folder / "data", "-p", str(port), "-c", "listen_addresses=127.0.0.1",
                                   "-c", "unix_socket_directories="], stdout=log, stderr=log, cwd=folder, **user)
    url = f"postgresql://postgres@127.0.0.1:{port}/"
    try:
        ready = [programs / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)]
        while subprocess.run(ready).returncode != 0:
            if server.poll() is not None:
                raise RuntimeError((folder / "log").read_text()[-3000:])
            time.sleep(0.1)

        def make(name):
            subprocess.run([programs / "psql", url + "postgres", "-qc", f"CREATE DATABASE {name}"], **run)
            return url + name
        yield make
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()


def process_numbers(pid):
    status = dict(line.split(":", 1) for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines())
    stat = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return {"peak_rss_bytes": int(status["VmHWM"].split()[0]) * 1024, "threads": int(status["Threads"]),
            "cpu_s": (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")}


def serve(arguments, folder, database):
    """One run against a server of its own; what the load client has printed, and the server's memory."""
    folder.mkdir()
    address_file, load_socket = folder / "data/address", folder / "load"
    command = [arguments.bin / "pewterd", "serve", "--listen", "127.0.0.1:0", "--data", folder / "data", "--database", database,
               "--workers", arguments.workers, "--max-watches", arguments.watchers + 56, "--worker-program", arguments.bin / "pewter_service_worker",
               "--log-level", "warning"]
    with open(folder / "log", "w+") as log:
        server = subprocess.Popen([str(word) for word in command], stdout=log, stderr=log, env=os.environ | {"PEWTER_LOAD_SOCKET": str(load_socket)})
        try:
            load = None
            deadline = time.monotonic() + 10
            while not address_file.exists():
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("pewterd did not start:\n" + (folder / "log").read_text())
                time.sleep(0.01)
            load = measure.run([arguments.bin / "pewter_service_load", address_file.read_text().strip(), load_socket, arguments.jobs,
                                arguments.watchers, arguments.workers, arguments.job_seconds, arguments.seconds])
            return json.loads(load["output"]) | {"server": process_numbers(server.pid)}
        except RuntimeError as error:
            raise RuntimeError(f"{error}\nand the server:\n{(folder / 'log').read_text()[-3000:]}") from None
        finally:
            server.kill()
            server.wait()


def claims(arguments, database):
    return json.loads(measure.output_of([arguments.bin / "pewter_job_store_claims", database, arguments.jobs, arguments.workers, 20]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_common_arguments(parser)
    parser.add_argument("--jobs", type=int, default=10000)
    parser.add_argument("--watchers", type=int, default=200)
    parser.add_argument("--workers", type=int, default=50)
    parser.add_argument("--job-seconds", type=float, default=2, help="that a job takes, half of it more or less; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=60, help="measured; default: %(default)s")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--work", type=pathlib.Path, default=tempfile.gettempdir(), help="where the databases are; default: %(default)s")
    parser.add_argument("--database", choices=["sqlite", "postgresql"], action="append", help="default: both")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:arguments.cores])
    databases = arguments.database or ["sqlite", "postgresql"]
    if "postgresql" in databases and find_postgres() is None:
        parser.error("there is no PostgreSQL: install Debian's postgresql-15, or give --database sqlite")
    report = {"machine": measure.machine(), "versions": {"pewter": measure.pewter_version(arguments.bin)},
              "load": {name: getattr(arguments, name) for name in ("jobs", "watchers", "workers", "job_seconds", "seconds")}}
    with contextlib.ExitStack() as stack:
        scratch = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-", dir=arguments.work)))
        os.chmod(scratch, 0o755)
        make = {"sqlite": lambda name: f"sqlite:{scratch}/{name}.db"}
        if "postgresql" in databases:
            make["postgresql"] = stack.enter_context(postgres(scratch / "postgres"))
        for database in databases:
            report[database] = {"store_claims": claims(arguments, make[database]("claims"))}
            report[database] |= serve(arguments, scratch / database, make[database]("served"))
            print(f"{database}: {json.dumps(report[database])}\n", flush=True)
    report["machine"]["load_after"] = os.getloadavg()

    def milliseconds(samples):
        return " / ".join(f"{1000 * samples[key]:.1f}" for key in ("p50_s", "p99_s", "max_s"))

    quantiles = {"claim by a worker": "claim", "claim from the store": "store_claims", "lag of events": "event_lag", "lag of progress": "progress_lag",
                 "create, queue filling": "fill_create", "create, queue full": "create", "heartbeat": "heartbeat", "finish": "finish"}
    rows = [[f"{name}, ms: p50 / p99 / max", *(milliseconds(report[database][key]) for database in databases)] for name, key in quantiles.items()]
    rows += [["jobs done a second", *(f"{report[database]['jobs_per_second']:.1f}" for database in databases)],
             ["creates a second", *(f"{report[database]['creates_per_second']:.0f}" for database in databases)],
             ["pewterd's peak RSS, MiB", *(f"{report[database]['server']['peak_rss_bytes'] / 2**20:.0f}" for database in databases)]]
    print(measure.table(["", *databases], rows))
    print("\nwritten:", measure.write_results(arguments.results, "service", report))


if __name__ == "__main__":
    main()
