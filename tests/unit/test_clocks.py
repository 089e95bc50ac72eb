"""Events of several machines are read on one clock."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orz_async.observe.events import EventLog
from orz_async.observe.tail import Tail


def write(folder: Path, process: str, *events: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"v": 1, "process": process} | event) for event in events]
    (folder / f"{process}.jsonl").write_text("\n".join(lines) + "\n")


def times(folder: Path, *kinds: str) -> dict[str, float]:
    return {event["kind"]: event["t"] for event in Tail(folder).poll() if event["kind"] in kinds}


def test_a_stepped_clock_of_one_machine_does_not_reorder_events(tmp_path: Path) -> None:
    write(tmp_path, "broker", {"t": 1000.0, "m": 10.0, "kind": "process", "boot": "A"})
    write(
        tmp_path,
        "learner-0",
        {"t": 1000.5, "m": 10.5, "kind": "process", "boot": "A"},
        {"t": 700.0, "m": 12.0, "kind": "after"},  # a time server has set the clock back meanwhile
    )
    assert times(tmp_path, "after") == {"after": 1002.0}


@pytest.mark.parametrize("wrong_by", [-300.0, -0.2, 0.0, 40.0])
def test_another_machine_is_set_by_its_handshake(tmp_path: Path, wrong_by: float) -> None:
    write(
        tmp_path,
        "broker",
        {"t": 1000.0, "m": 10.0, "kind": "process", "boot": "A"},
        {"t": 1005.1, "m": 15.1, "kind": "joined", "generator": "g0"},
    )
    write(
        tmp_path,
        "generator-g0",
        {"t": 1001.0 + wrong_by, "m": 501.0, "kind": "process", "boot": "B"},
        {"t": 1005.2 + wrong_by, "m": 505.2, "kind": "welcomed", "round_trip_s": 0.2},
        {"t": 1009.0 + wrong_by, "m": 509.0, "kind": "later"},
    )
    assert times(tmp_path, "joined", "welcomed", "later") == pytest.approx(
        {"joined": 1005.1, "welcomed": 1005.2, "later": 1009.0}
    )
    tail = Tail(tmp_path)
    tail.poll()
    assert tail.clocks.uncertainty_s == {"generator-g0": 0.1}


def test_what_a_log_says_of_its_clock_is_what_is_read(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "x.jsonl", "x")
    log.emit("hello")
    log.close()
    started, hello = (json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines())
    assert isinstance(started["boot"], str)
    expected = started["t"] + hello["m"] - started["m"]
    assert times(tmp_path, "hello") == {"hello": pytest.approx(expected)}
