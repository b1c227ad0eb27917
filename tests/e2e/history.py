"""What clients of a service saw, and whether it keeps its promises: run as a program on a history, it prints what breaks them.

A history is JSON lines. Of an operation there are two, of the same process: {"type": "invoke", "op": ..., ...} and then "ok" with what was
answered, "fail" (it was refused: nothing has happened) or "info" (nobody knows). "time" is monotonic, in ns, of one clock. The rest are
observations of one moment, "observe". Operations:

  create    request_id, destination, expect (bytes of the model, by name of its set, or "refused", "failed")   -> job
  get       job                            -> state, sequence, attempt
  cancel    job                            -> state, sequence, attempt
  watch     job, after                     -> events: [{sequence, state, attempt}] (of events with a state; others have no state)
  list                                     -> jobs: {id: request_id}
  read      destination                    -> manifest (text or null), files: {name: [bytes, sha256]} as it was, manifest unchanged meanwhile
  expected  name, files: {name: sha256}    observation: what an undisturbed merge writes
  resources server, rss, fds, threads      observation
  final     jobs: {id: job}, models: {destination: {manifest, files}}     observation, when all is quiet
"""

import json
import pathlib
import sys
import threading
import time
from collections import defaultdict

FINAL = {"SUCCEEDED", "FAILED", "CANCELLED", "EXPIRED"}
FOLLOWING = {
    "QUEUED": {"PLANNING", "CANCELLED", "FAILED"},
    "PLANNING": {"RUNNING", "QUEUED", "FAILED", "CANCELLED"},
    "RUNNING": {"PUBLISHING", "QUEUED", "FAILED", "CANCELLED"},
    "PUBLISHING": {"SUCCEEDED", "QUEUED", "FAILED", "CANCELLED"},
}
MANIFEST, STATE = "pewter_manifest.json", ".pewter-state.json"
# What a server may take, whatever it does.
MOST = {"rss": 400 << 20, "fds": 400, "threads": 400}
SECONDS_TO_END = 90
MOST_ATTEMPTS = 5


class History:
    """Written by many threads."""

    def __init__(self, path):
        self.path, self.lock = pathlib.Path(path), threading.Lock()
        self.file = open(path, "w", buffering=1)
        self.next = 0

    def add(self, **entry):
        with self.lock:
            self.file.write(json.dumps({"time": time.monotonic_ns(), **entry}) + "\n")

    def observe(self, op, **what):
        self.add(type="observe", op=op, **what)

    def call(self, process, op, function, **what):
        """function() gives ("ok" | "fail" | "info", {what was answered})."""
        with self.lock:
            self.next += 1
            number = self.next
        self.add(type="invoke", op=op, process=process, number=number, **what)
        outcome, answer = function()
        self.add(type=outcome, op=op, process=process, number=number, **what, **answer)
        return outcome, answer


def load(path):
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


def operations(history):
    """Each invoke with its end: (invoked, ended, type, entry); one without an end has failed to be heard of."""
    began, done = {}, []
    for entry in history:
        if entry["type"] == "invoke":
            began[entry["number"]] = entry
        elif entry["type"] != "observe":
            invoke = began.pop(entry["number"])
            done.append((invoke["time"], entry["time"], entry["type"], entry))
    done += [(invoke["time"], float("inf"), "info", invoke) for invoke in began.values()]
    return sorted(done, key=lambda operation: operation[0])


def check(history):
    """The violations, as texts that begin with the number of the invariant (1 to 10)."""
    violations = []

    def violation(number, text):
        violations.append(f"{number}: {text}")

    done = operations(history)
    observed = defaultdict(list)
    for entry in history:
        if entry["type"] == "observe":
            observed[entry["op"]].append(entry)
    expected = {entry["name"]: entry["files"] for entry in observed["expected"]}
    final = observed["final"][-1] if observed["final"] else {"jobs": {}, "models": {}, "time": 0}
    creates = [(begin, end, kind, entry) for begin, end, kind, entry in done if entry["op"] == "create"]

    # Jobs and requests.
    job_of, request_of, destination_of, expect_of = {}, {}, {}, {}
    for _, _, kind, entry in creates:
        request = entry["request_id"]
        destination_of.setdefault(request, entry["destination"])
        expect_of.setdefault(request, entry["expect"])
        if kind != "ok":
            continue
        if job_of.setdefault(request, entry["job"]) != entry["job"]:
            violation(4, f"request {request} is both {job_of[request]} and {entry['job']}")
        if request_of.setdefault(entry["job"], request) != request:
            violation(4, f"job {entry['job']} is of requests {request_of[entry['job']]} and {request}")
        if entry["expect"] == "refused":
            violation(10, f"request {request} was to be refused and is job {entry['job']}")
    for job, request in request_of.items():
        if job not in final["jobs"]:
            violation(4, f"job {job} was acknowledged and is gone")
    for job, found in final["jobs"].items():
        request = found["request_id"]
        if request not in destination_of:
            violation(4, f"job {job} is of a request, {request}, that nobody has made")
        elif job_of.get(request, job) != job:
            violation(4, f"request {request} has made jobs {job_of[request]} and {job}")
        job_of.setdefault(request, job)
        request_of.setdefault(job, request)

    # What was seen of each job: (invoked, ended, state, sequence, attempt), and its events.
    seen, events = defaultdict(list), defaultdict(dict)
    for begin, end, kind, entry in done:
        if kind != "ok":
            continue
        if entry["op"] in ("get", "cancel"):
            seen[entry["job"]].append((begin, end, entry["state"], entry["sequence"], entry["attempt"]))
        if entry["op"] == "watch":
            sequence = entry["after"]
            for event in entry["events"]:
                sequence += 1
                if event["sequence"] != sequence:
                    violation(7, f"a watch of job {entry['job']} after {entry['after']} tells {event['sequence']} where {sequence} is due")
                    break
                if events[entry["job"]].setdefault(sequence, event) != event:
                    violation(7, f"event {sequence} of job {entry['job']} is told in two ways")
    for job, found in final["jobs"].items():
        seen[job].append((final["time"], final["time"], found["state"], found["sequence"], found["attempt"]))

    for job, looks in seen.items():
        by_end, newest, k = sorted(looks, key=lambda look: look[1]), None, 0
        for begin, end, state, sequence, attempt in sorted(looks):
            # Of all looks that had ended before this one began, the newest.
            while k < len(by_end) and by_end[k][1] < begin:
                if newest is None or by_end[k][3] >= newest[3]:
                    newest = by_end[k]
                k += 1
            if newest is None:
                continue
            if sequence < newest[3]:
                violation(6, f"job {job} goes back: event {newest[3]}, and later {sequence}")
            if newest[2] in FINAL and state != newest[2]:
                violation(6, f"job {job} was {newest[2]} and later {state}")
        for _, _, state, sequence, _ in looks:
            event = events[job].get(sequence)
            if event is not None and "state" in event and event["state"] != state:
                violation(6, f"job {job} is {state} where its event {sequence} says {event['state']}")
    for job, told in events.items():
        before, attempts = None, 0
        for sequence in sorted(told):
            event = told[sequence]
            if "state" not in event or (sequence > 1 and sequence - 1 not in told):
                continue
            if before is not None and event["state"] not in FOLLOWING.get(before, set()):
                violation(6, f"job {job} goes from {before} to {event['state']}")
            # An attempt that does not count is taken back when the job is queued again.
            if event["attempt"] != attempts and event["state"] != "QUEUED" and (event["state"], event["attempt"]) != ("PLANNING", attempts + 1):
                violation(5, f"job {job} is {event['state']} in attempt {event['attempt']} after {attempts}")
            if event["state"] == "PLANNING" and event["attempt"] == attempts:
                violation(5, f"job {job} has two claims of attempt {attempts}")
            before, attempts = event["state"], event["attempt"]

    # Models, whenever somebody looked, and in the end.
    def check_model(number, destination, manifest, files):
        try:
            listed = {file["name"]: [file["bytes"], file["sha256"]] for file in json.loads(manifest)["files"]}
        except (ValueError, KeyError):
            violation(1, f"{destination}: its manifest cannot be read")
            return
        for name, what in listed.items():
            if files.get(name) != what:
                violation(1, f"{destination}: {name} is {files.get(name)}, and {what} in the manifest")

    manifests = {}
    for _, _, kind, entry in done:
        if entry["op"] == "read" and kind == "ok" and entry["manifest"] is not None:
            check_model(1, entry["destination"], entry["manifest"], entry["files"])
            if manifests.setdefault(entry["destination"], entry["manifest"]) != entry["manifest"]:
                violation(2, f"{entry['destination']}: two manifests were committed")
    jobs_at = defaultdict(list)
    for job, found in final["jobs"].items():
        jobs_at[destination_of.get(found["request_id"])].append((job, found))
    for destination, model in final["models"].items():
        files, manifest = model["files"], model["manifest"]
        ended = [found["state"] for _, found in jobs_at[destination]]
        if manifest is not None:
            check_model(1, destination, manifest, files)
            if manifests.get(destination, manifest) != manifest:
                violation(2, f"{destination}: the manifest was another one before")
            if "SUCCEEDED" not in ended:
                violation(2, f"{destination} has a manifest, and no job there has succeeded: {ended}")
            if STATE in files:
                violation(9, f"{destination}: the state file is still there")
        elif destination in manifests:
            violation(1, f"{destination}: the manifest is gone")
        if ended.count("SUCCEEDED") > 1:
            violation(2, f"{destination}: {ended.count('SUCCEEDED')} jobs have succeeded there")
        for job, found in jobs_at[destination]:
            if found["state"] != "SUCCEEDED":
                continue
            if manifest != found["manifest"]:
                violation(2, f"{destination} does not hold the manifest that job {job} has told")
            want = expected.get(expect_of.get(found["request_id"]), {})
            for name, digest in want.items():
                if files.get(name, [0, None])[1] != digest:
                    violation(3, f"{destination}: {name} is not what an undisturbed merge writes")
            for name in files:
                if name not in want and name != MANIFEST:
                    violation(9, f"{destination}: {name} is nobody's")
        for name in files:
            if name.endswith(".pewter-tmp"):
                violation(9, f"{destination}: {name} was left")
        for upload in model.get("uploads", []):
            violation(9, f"{destination}: upload {upload} was left")

    # Ends.
    first_asked = {}
    for begin, _, _, entry in creates:
        first_asked.setdefault(entry["request_id"], begin)
    cancelled = {entry["job"] for _, _, _, entry in done if entry["op"] == "cancel"}
    for job, found in final["jobs"].items():
        expect = expect_of.get(found["request_id"])
        if found["state"] not in FINAL:
            violation(4, f"job {job} is {found['state']} and has had {SECONDS_TO_END} s to end")
        if found["state"] == "CANCELLED" and job not in cancelled:
            violation(4, f"job {job} was cancelled by nobody")
        if found["state"] == "FAILED":
            reason = found.get("reason", "")
            if not reason or reason in ("INTERNAL", "UNKNOWN"):
                violation(10, f"job {job} failed without a reason that has a name: {found.get('message')}")
            # What no fault explains: a client asked for it, or there is a model already.
            given_up = reason == "WORKER_LOST" and found["attempt"] >= MOST_ATTEMPTS
            if expect != "failed" and reason != "OUTPUT_EXISTS" and not given_up:
                violation(4, f"job {job} failed: {reason}: {found.get('message')}")
        if expect == "failed" and found["state"] == "SUCCEEDED":
            violation(10, f"job {job} was to fail")

    for entry in observed["resources"]:
        for what, most in MOST.items():
            if entry[what] > most:
                violation(8, f"{entry['server']} has {entry[what]} of {what}, more than {most}")
    return violations


def main():
    found = check(load(sys.argv[1]))
    print("\n".join(found) or "no violation")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
