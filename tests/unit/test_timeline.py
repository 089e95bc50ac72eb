"""The timeline: a process is in exactly one state, so the seconds by state are the wall time."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orz_async.observe.events import EventLog, Timeline
from orz_async.observe.tail import Tail


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@given(st.lists(st.tuples(st.sampled_from(["policy", "critic", "wait_rollouts", "flush"]), st.floats(0, 10))))
def test_seconds_by_state_sum_to_the_wall_time(moves: list[tuple[str, float]]) -> None:
    clock = Clock()
    timeline = Timeline(EventLog.disabled(), "main", clock)
    expected: dict[str, float] = {}
    state = "start"
    for move, seconds in moves:
        if move == "flush":
            timeline.flush()
        else:
            assert timeline.enter(move) == state
            state = move
        clock.now += seconds
        expected[state] = expected.get(state, 0.0) + seconds
    assert sum(timeline.totals().values()) == pytest.approx(clock.now - 100.0)
    for name, total in timeline.totals().items():
        assert total == pytest.approx(expected.get(name, 0.0))


def test_a_block_returns_to_the_state_around_it_also_after_an_error() -> None:
    clock = Clock()
    timeline = Timeline(EventLog.disabled(), "main", clock)
    timeline.enter("step")
    with pytest.raises(KeyError), timeline.state("wait_weights"):
        clock.now += 2.0
        with timeline.state("swap"):
            clock.now += 1.0
        raise KeyError
    clock.now += 4.0
    assert timeline.enter("done") == "step"
    assert timeline.totals() == {"done": 0.0, "start": 0.0, "step": 4.0, "swap": 1.0, "wait_weights": 2.0}


def test_flushes_tell_the_seconds_since_the_last_one_and_the_state(tmp_path: Path) -> None:
    clock = Clock()
    log = EventLog(tmp_path / "g.jsonl", "generator-g0")
    timeline = Timeline(log, "main", clock)
    timeline.enter("decode")
    clock.now += 3.0
    timeline.flush()
    clock.now += 0.5
    timeline.enter("wait_leases")
    clock.now += 1.5
    timeline.close()
    timeline.close()
    log.close()
    first, second = (e for e in Tail(tmp_path).poll() if e["kind"] == "timeline")
    assert first["seconds"] == {"start": 0.0, "decode": 3.0}
    assert (first["name"], first["state"], first["state_s"]) == ("main", "decode", 3.0)
    assert second["seconds"] == {"decode": 0.5, "wait_leases": 1.5}
    assert (second["state"], second["state_s"]) == ("wait_leases", 1.5)


def test_a_ticking_timeline_shows_a_process_that_blocks(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "l.jsonl", "learner-0")
    timeline = Timeline(log, "main")
    timeline.start(0.01)
    timeline.enter("wait_rollouts")
    tail, seen, until = Tail(tmp_path), 0.0, time.monotonic() + 10
    while seen < 0.05 and time.monotonic() < until:
        for event in tail.poll():
            if event["kind"] == "timeline" and event["state"] == "wait_rollouts":
                seen = event["state_s"]
    timeline.close()
    log.close()
    assert seen >= 0.05
