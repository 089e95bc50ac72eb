"""The trace holds what the timelines say: in order, without gaps, on the tracks of its processes."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from pathlib import Path

import pytest

from benchmarks.synthetic_run import STEP_S, write_run
from orz_async.cli import dispatch
from orz_async.observe.events import EventLog, Timeline
from orz_async.report.trace import write_trace


def read(path: Path) -> list[dict[str, object]]:
    with gzip.open(path) as file:
        events: list[dict[str, object]] = json.load(file)["traceEvents"]
    return events


def test_a_run_becomes_tracks(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run, steps=3, prompts=4, samples=2)
    assert dispatch(["trace", str(run)]) == 0
    events = read(run / "trace.json.gz")
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}  # type: ignore[index]
    assert set(names.values()) == {"broker", "learner-0", "generator-g0", "generator-g1"}
    seconds: dict[str, float] = defaultdict(float)
    for event in events:
        if event["ph"] == "X" and event["tid"] == 1 and names[event["pid"]] == "learner-0":
            seconds[str(event["name"])] += float(str(event["dur"])) / 1e6
    assert seconds == pytest.approx({"work": 0.9 * 3 * STEP_S, "wait_rollouts": 0.1 * 3 * STEP_S})
    assert [e["name"] for e in events if e["ph"] == "X" and e["tid"] == 2] == ["step 0", "step 1", "step 2"]
    assert {e["name"] for e in events if e["ph"] == "C"} >= {"reward", "tokens/s"}


def test_states_keep_their_order_and_a_long_one_is_one_slice(tmp_path: Path) -> None:
    now = [0.0]
    log = EventLog(tmp_path / "events" / "p.jsonl", "p")
    timeline = Timeline(log, "p", lambda: now[0])
    for state, spent in [("a", 0.25), ("wait_b", 0.5), ("a", 0.25), ("wait_b", 0.5)]:
        timeline.enter(state)
        now[0] += spent
    timeline.flush()
    log.close()
    lines = (tmp_path / "events" / "p.jsonl").read_text().splitlines()
    # The log's own clock runs on: put the event where its seconds end.
    event = json.loads(lines[1]) | {"t": 1001.5, "m": 1.5}
    later = event | {"t": 1002.5, "m": 2.5, "seconds": {"wait_b": 1.0}}
    del later["spans"]
    first = json.loads(lines[0]) | {"t": 1000.0, "m": 0.0, "boot": "x"}
    (tmp_path / "events" / "p.jsonl").write_text("".join(json.dumps(e) + "\n" for e in (first, event, later)))
    write_trace(tmp_path, tmp_path / "t.gz")
    slices = [(e["name"], e["ts"], e["dur"]) for e in read(tmp_path / "t.gz") if e["ph"] == "X"]
    ends = [("a", 0, 250_000), ("wait_b", 250_000, 500_000), ("a", 750_000, 250_000), ("wait_b", 1_000_000, 1_500_000)]
    assert slices == ends
