"""The checker of histories finds what is planted in one that is whole."""

import copy
import json

import pytest

import history as checker

MANIFEST = json.dumps({"files": [{"name": "model.safetensors", "bytes": 3, "sha256": "abc"}]})
FILES = {"model.safetensors": [3, "abc"]}


def whole():
    """One job whose first attempt is lost, watched, read, asked for twice; and one that fails as it must."""
    entries, number = [], 0

    def call(op, outcome="ok", answer=None, **what):
        nonlocal number
        number += 1
        entries.append({"type": "invoke", "op": op, "process": "p", "number": number, **what})
        entries.append({"type": outcome, "op": op, "process": "p", "number": number, **what, **(answer or {})})

    states = ["QUEUED", "PLANNING", "RUNNING", "QUEUED", "PLANNING", "RUNNING", "PUBLISHING", "SUCCEEDED"]
    events = [{"sequence": i + 1, "state": state, "attempt": (i > 0) + (i > 3)} for i, state in enumerate(states)]
    model = {"destination": "/out"}
    first = {"request_id": "r1", "destination": "/out", "expect": "linear"}
    entries.append({"type": "observe", "op": "expected", "name": "linear", "files": {"model.safetensors": "abc"}})
    call("create", "info", **first)
    call("create", "ok", {"job": "j1"}, **first)
    call("create", "ok", {"job": "j2"}, request_id="r2", destination="/bad", expect="failed")
    call("create", "fail", request_id="r3", destination="/worse", expect="refused")
    call("get", "ok", {"state": "RUNNING", "sequence": 3, "attempt": 1}, job="j1")
    call("read", "ok", {"manifest": None, "files": {}}, **model)
    call("watch", "ok", {"events": events}, job="j1", after=0)
    call("watch", "ok", {"events": copy.deepcopy(events[4:])}, job="j1", after=4)
    call("read", "ok", {"manifest": MANIFEST, "files": FILES}, **model)
    call("get", "ok", {"state": "SUCCEEDED", "sequence": 8, "attempt": 2}, job="j1")
    entries.append({"type": "observe", "op": "resources", "server": "s", "rss": 1, "fds": 1, "threads": 1})
    ended = {"request_id": "r1", "state": "SUCCEEDED", "sequence": 8, "attempt": 2, "manifest": MANIFEST, "reason": "", "message": ""}
    failed = {**ended, "request_id": "r2", "state": "FAILED", "sequence": 3, "attempt": 1, "manifest": None, "reason": "SOURCE_NOT_FOUND"}
    models = {
        "/out": {"manifest": MANIFEST, "files": {**FILES, checker.MANIFEST: [1, "m"]}},
        "/bad": {"manifest": None, "files": {}},
    }
    entries.append({"type": "observe", "op": "final", "jobs": {"j1": ended, "j2": failed}, "models": models})
    for i, entry in enumerate(entries):
        entry["time"] = i
    return entries


def ends(entries, op, outcome="ok"):
    return [entry for entry in entries if entry["op"] == op and entry["type"] == outcome]


def other_bytes_in_the_manifest(entries):
    ends(entries, "read")[1]["files"] = {"model.safetensors": [3, "abd"]}


def missing_file(entries):
    entries[-1]["models"]["/out"]["files"].pop("model.safetensors")


def manifest_goes(entries):
    entries[-1]["models"]["/out"]["manifest"] = None


def second_manifest(entries):
    other = json.dumps({**json.loads(MANIFEST), "seconds": 2})
    entries[-1]["models"]["/out"]["manifest"] = entries[-1]["jobs"]["j1"]["manifest"] = other


def success_without_manifest(entries):
    ends(entries, "read")[1]["manifest"] = None
    entries[-1]["models"]["/out"]["manifest"] = None


def manifest_without_success(entries):
    job = entries[-1]["jobs"]["j1"]
    job["state"], job["reason"] = "FAILED", "OUTPUT_EXISTS"


def job_tells_another_manifest(entries):
    entries[-1]["jobs"]["j1"]["manifest"] = "{}"


def other_bytes(entries):
    entries[0]["files"]["model.safetensors"] = "abd"


def lost_job(entries):
    del entries[-1]["jobs"]["j1"]


def two_jobs_of_a_request(entries):
    again = copy.deepcopy(ends(entries, "create"))[0]
    again.update(number=99, job="j9")
    entries.insert(3, {**again, "type": "invoke"})
    entries.insert(4, again)


def job_of_nobody(entries):
    entries[-1]["jobs"]["j7"] = {**entries[-1]["jobs"]["j2"], "request_id": "r7"}


def never_ends(entries):
    entries[-1]["jobs"]["j2"]["state"] = "RUNNING"


def cancelled_by_nobody(entries):
    entries[-1]["jobs"]["j2"]["state"] = "CANCELLED"


def fails_without_cause(entries):
    job = entries[-1]["jobs"]["j2"]
    ends(entries, "create")[1]["expect"] = "linear"
    [e for e in entries if e["type"] == "invoke" and e["op"] == "create"][2]["expect"] = "linear"
    job["reason"] = "WORKER_LOST"


def two_claims_of_an_attempt(entries):
    for watch in ends(entries, "watch"):
        for event in watch["events"]:
            if event["sequence"] == 5:
                event["attempt"] = 1


def leaves_its_end(entries):
    ends(entries, "get")[0].update(state="SUCCEEDED", sequence=8, attempt=2)
    ends(entries, "get")[1].update(state="RUNNING", sequence=9, attempt=2)


def goes_back(entries):
    ends(entries, "get")[0].update(sequence=9)


def forbidden_change(entries):
    for watch in ends(entries, "watch"):
        for event in watch["events"]:
            if event["sequence"] == 7:
                event["state"] = "PLANNING"
                event["attempt"] = 3


def gap_in_a_watch(entries):
    del ends(entries, "watch")[0]["events"][2]


def watch_begins_late(entries):
    ends(entries, "watch")[1]["events"].pop(0)


def two_tales_of_an_event(entries):
    ends(entries, "watch")[1]["events"][-1]["state"] = "FAILED"


def too_much_memory(entries):
    ends(entries, "resources", "observe")[0]["rss"] = 1 << 40


def left_file(entries):
    entries[-1]["models"]["/bad"]["files"][".model.safetensors.12-3.pewter-tmp"] = [1, "x"]


def left_state(entries):
    entries[-1]["models"]["/out"]["files"][checker.STATE] = [1, "x"]


def left_upload(entries):
    entries[-1]["models"]["/bad"]["uploads"] = ["u1"]


def error_without_a_name(entries):
    entries[-1]["jobs"]["j2"]["reason"] = "INTERNAL"


def bad_input_is_taken(entries):
    refused = ends(entries, "create", "fail")[0]
    refused.update(type="ok", job="j3")
    entries[-1]["jobs"]["j3"] = {**entries[-1]["jobs"]["j2"], "request_id": "r3"}


PLANTED = [
    (1, other_bytes_in_the_manifest),
    (1, missing_file),
    (1, manifest_goes),
    (2, second_manifest),
    (2, success_without_manifest),
    (2, manifest_without_success),
    (2, job_tells_another_manifest),
    (3, other_bytes),
    (4, lost_job),
    (4, two_jobs_of_a_request),
    (4, job_of_nobody),
    (4, never_ends),
    (4, cancelled_by_nobody),
    (4, fails_without_cause),
    (5, two_claims_of_an_attempt),
    (6, leaves_its_end),
    (6, goes_back),
    (6, forbidden_change),
    (7, gap_in_a_watch),
    (7, watch_begins_late),
    (7, two_tales_of_an_event),
    (8, too_much_memory),
    (9, left_file),
    (9, left_state),
    (9, left_upload),
    (10, error_without_a_name),
    (10, bad_input_is_taken),
]


def test_a_whole_history_has_no_violation():
    assert checker.check(whole()) == []


@pytest.mark.parametrize("number, plant", PLANTED, ids=lambda value: getattr(value, "__name__", value))
def test_what_is_planted_is_found(number, plant):
    entries = whole()
    plant(entries)
    for i, entry in enumerate(entries):
        entry["time"] = i
    found = checker.check(entries)
    assert any(violation.startswith(f"{number}:") for violation in found), found


def test_calls_that_overlap_may_tell_either():
    entries = whole()
    first, second = ends(entries, "get")
    # The earlier call ends last, and tells what was true at its beginning.
    first["time"] = 10_000
    assert not [found for found in checker.check(entries) if found.startswith("6")]
    assert second["state"] == "SUCCEEDED"


def test_a_history_is_written_and_read(tmp_path):
    history = checker.History(tmp_path / "h.jsonl")
    history.observe("resources", server="s", rss=1, fds=1, threads=1)
    assert history.call("p", "get", lambda: ("info", {}), job="j") == ("info", {})
    history.add(type="invoke", op="create", process="p", number=7, request_id="r", destination="/d", expect="linear")
    loaded = checker.load(tmp_path / "h.jsonl")
    assert [entry["type"] for entry in loaded] == ["observe", "invoke", "info", "invoke"]
    assert [kind for _, _, kind, _ in checker.operations(loaded)] == ["info", "info"]
    assert checker.check(loaded) == []
