"""The timeline of a run as a trace that ui.perfetto.dev and chrome://tracing open.

Format: Trace Event Format of Chromium (complete events "X", counters "C", instants "i", names "M"), times in
microseconds from the first event, gzipped JSON.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from orz_async.errors import ConfigError, DiskError
from orz_async.observe.history import LEARNER
from orz_async.observe.tail import Event
from orz_async.report.stream import Stream
from orz_async.report.timeline import stretches

_STATES, _STEPS, _WEIGHTS = 1, 2, 3
_TRACKS = {_STATES: "what it does", _STEPS: "steps", _WEIGHTS: "weights"}
_INSTANTS = frozenset(
    ("joined", "left", "expired", "quarantined", "nack", "refused", "disconnected", "mismatch", "run")
)
_JOIN_S = 2e-3
"""A state that goes on within this long is one slice: a process reports it every second."""

Line = dict[str, Any]


class Tracer:
    """Turns events in order of time into lines of a trace."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._zero: float | None = None
        self._open: dict[str, tuple[str, float, float]] = {}
        """By process: the state, from, until, of the slice that may go on."""

    def lines(self, events: Stream) -> Iterator[Line]:
        for event in events:
            if self._zero is None:
                self._zero = event["t"]
            name = str(event["process"])
            if name not in self._numbers:
                yield from self._introduce(name)
            yield from self._event(name, event)
        for name in list(self._open):
            yield self._close(name)

    def _introduce(self, name: str) -> Iterator[Line]:
        number = self._numbers[name] = len(self._numbers) + 1
        yield {"ph": "M", "name": "process_name", "pid": number, "args": {"name": name}}
        for track, label in _TRACKS.items():
            yield {"ph": "M", "name": "thread_name", "pid": number, "tid": track, "args": {"name": label}}

    def _event(self, name: str, event: Event) -> Iterator[Line]:
        kind, t = event["kind"], event["t"]
        if kind == "timeline":
            yield from self._states(name, event)
        elif kind == "step" and name == LEARNER:
            spent = float(event.get("step_s") or 0.0)
            told = {k: event.get(k) for k in ("reward_mean", "length_mean", "lag_max", "tokens_trained", "rollouts")}
            yield self._slice(name, _STEPS, f"step {event['step']}", t - spent, spent, told)
            yield self._counter(name, "reward", t, event.get("reward_mean"))
            yield self._counter(name, "response length", t, event.get("length_mean"))
        elif kind == "weights":
            fetch, swap = float(event.get("fetch_s") or 0.0), float(event.get("swap_s") or 0.0)
            told = {"version": event.get("version"), "bytes": event.get("bytes")}
            yield self._slice(name, _WEIGHTS, f"fetch v{event.get('version')}", t - swap - fetch, fetch, told)
            yield self._slice(name, _WEIGHTS, f"swap v{event.get('version')}", t - swap, swap, told)
        elif kind == "published":
            spent = float(event.get("seconds") or 0.0)
            yield self._slice(name, _WEIGHTS, f"publish v{event.get('version')}", t - spent, spent, {})
        elif kind == "throughput":
            yield self._counter(name, "tokens/s", t, event.get("tokens_s"))
            yield self._counter(name, "running", t, event.get("running"))
        elif kind in _INSTANTS:
            told = {k: v for k, v in event.items() if k not in ("v", "t", "m", "process", "kind")}
            yield {"ph": "i", "s": "p", "name": kind, "ts": self._us(t), "args": told} | self._place(name, _STATES)

    def _states(self, name: str, event: Event) -> Iterator[Line]:
        spans = stretches(event)
        began = event["t"] - sum(spent for _, spent, _ in spans)
        for state, spent, start in spans:
            begin, end = began + start, began + start + spent
            held = self._open.get(name)
            if held is not None and held[0] == state and begin - held[2] < _JOIN_S:
                self._open[name] = (state, held[1], end)
                continue
            if held is not None:
                yield self._close(name)
            self._open[name] = (state, begin, end)

    def _close(self, name: str) -> Line:
        state, begin, end = self._open.pop(name)
        return self._slice(name, _STATES, state, begin, end - begin, {})

    def _slice(self, name: str, track: int, label: str, begin: float, spent: float, told: Line) -> Line:
        line = {"ph": "X", "name": label, "ts": self._us(begin), "dur": round(spent * 1e6), "args": told}
        return line | self._place(name, track)

    def _counter(self, name: str, label: str, t: float, value: object) -> Line:
        return {"ph": "C", "name": label, "ts": self._us(t), "args": {label: value or 0}} | self._place(name, 0)

    def _place(self, name: str, track: int) -> Line:
        return {"pid": self._numbers[name], "tid": track}

    def _us(self, t: float) -> int:
        assert self._zero is not None
        return round((t - self._zero) * 1e6)


def write_trace(run_dir: Path, out: Path) -> int:
    """Write the trace of a run; returns how many lines it has."""
    if not (run_dir / "events").is_dir():
        raise ConfigError(f"expected the folder of a run, found no {run_dir}/events; check the path")
    count, encode = 0, msgspec.json.Encoder().encode
    try:
        with gzip.open(out, "wb", compresslevel=5) as file:
            file.write(b'{"displayTimeUnit":"ms","traceEvents":[')
            for line in Tracer().lines(Stream(run_dir / "events")):
                file.write(b",\n" * bool(count) + encode(line))
                count += 1
            file.write(b"]}\n")
    except OSError as error:
        raise DiskError(f"expected to write {out}, found {error.strerror}; choose another place with --out") from error
    return count
