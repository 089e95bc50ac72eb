"""The history of a run, folded from its events: the one reading that live view, summary and picture share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

from orz_async.observe.account import Account, Stretch, Window, idle_fractions
from orz_async.observe.tail import Event

RECENT_S = 30.0
"""Seconds that the present idle fractions look back."""

LEARNER = "learner-0"
"""Rank 0 speaks for the run; the other ranks report their time only."""


@dataclass(slots=True)
class Life:
    """The learner from its event "run" until it stopped. A resumed run has several."""

    start: float
    before_s: float
    """Training seconds of the lives before: the time between lives is nobody's training time."""
    end: float
    """Of its last finished step, or the start."""

    @property
    def window(self) -> Window:
        return (self.start, self.end)


@dataclass(slots=True)
class Process:
    """What one process last said, and the sum of what it said about its time and speed."""

    name: str
    started: float
    seen: float
    state: str = "start"
    state_s: float = 0.0
    status: Event = field(default_factory=dict)
    """A generator's last "throughput"."""
    weights: Event = field(default_factory=dict)
    """Its last "weights"."""
    time: Account = field(default_factory=Account)
    """Seconds by state while the run trained."""
    recent: Account = field(default_factory=Account)
    """The same of the last seconds."""
    tokens: Account = field(default_factory=Account)

    def idle_now(self) -> dict[str, float]:
        return idle_fractions([self.recent.read(None)])

    def add_time(self, event: Event) -> None:
        seconds = {str(state): float(spent or 0.0) for state, spent in event["seconds"].items()}
        self.state, self.state_s = str(event.get("state", "")), float(event.get("state_s") or 0.0)
        stretch = Stretch(event["t"] - sum(seconds.values()), event["t"], seconds)
        self.time.add(stretch)
        self.recent.add(stretch)
        self.recent.forget(event["t"] - RECENT_S)

    def add_tokens(self, event: Event) -> None:
        sampled, before = int(event.get("tokens") or 0), int(self.status.get("tokens") or 0)
        # The count is since the start of the engine, which may have been made anew.
        fresh = sampled - before if sampled >= before else sampled
        self.tokens.add(Stretch(self.status.get("t", self.started), event["t"], {"tokens": float(fresh)}))
        self.status = event


class History:
    """Feed it every event in order of time; read it at any moment.

    A learner that resumes at step n repeats the steps from n on: the event "run" voids what an earlier life reported of
    them, so that each step and each evaluation counts once.
    """

    def __init__(self) -> None:
        self.lives: list[Life] = []
        self.steps: dict[int, Event] = {}
        """By step; each with `wall_s`, training seconds until its end."""
        self.evals: dict[int, Event] = {}
        """By version, which is the number of steps it has learned from; each with `wall_s`."""
        self.processes: dict[str, Process] = {}
        self.funnel: Event = {}
        self.waiting: Event = {}
        """The broker's last word on what it waits for."""
        self.checkpoint: Event = {}
        self.max_lag_observed = 0
        self.versions: dict[str, str] = {}
        self.run_id = ""

    def feed_all(self, events: Iterable[Event]) -> None:
        for event in events:
            self.feed(event)

    def feed(self, event: Event) -> None:
        name, kind, t = str(event.get("process", "")), event["kind"], event["t"]
        process = self.processes.setdefault(name, Process(name, t, t))
        process.seen = t
        if kind == "process":
            process.started, process.state, process.state_s, process.status = t, "start", 0.0, {}
            if name == LEARNER:
                self.versions = event.get("versions", {})
        elif kind == "timeline":
            process.add_time(event)
        elif kind == "throughput":
            process.add_tokens(event)
        elif kind == "weights":
            process.weights = event
        elif kind == "funnel":
            self.funnel = event
        elif kind == "waiting":
            self.waiting = event
        elif name == LEARNER:
            self._feed_learner(kind, event)

    def _feed_learner(self, kind: str, event: Event) -> None:
        t = event["t"]
        if kind == "run":
            self._begin_life(event)
        elif kind == "step":
            if self.lives:
                self.lives[-1].end = t
                self._settle()
            self.steps[int(event["step"])] = event | {"wall_s": self.trained_s(t)}
            self.max_lag_observed = max(self.max_lag_observed, int(event.get("lag_max") or 0))
        elif kind == "eval":
            self.evals[int(event["version"])] = event | {"wall_s": self.trained_s(t)}
        elif kind == "checkpoint":
            self.checkpoint = event

    def _begin_life(self, event: Event) -> None:
        t, first = event["t"], int(event.get("resumed_step") or 0)
        self.run_id = str(event.get("run_id", ""))
        self._settle(close=True)
        self.lives.append(Life(t, self.trained_s(self.lives[-1].end) if self.lives else 0.0, t))
        self.steps = {step: e for step, e in self.steps.items() if step < first}
        # Version n is published by step n - 1: a resumed run evaluates later versions anew.
        self.evals = {version: e for version, e in self.evals.items() if version <= first}

    def _settle(self, *, close: bool = False) -> None:
        window = self.lives[-1].window if self.lives else (0.0, 0.0)
        for process in self.processes.values():
            process.time.settle(window, close=close)
            process.tokens.settle(window, close=close)

    def trained_s(self, t: float) -> float:
        """Training seconds of all lives at wall time t of the present one."""
        return self.lives[-1].before_s + max(0.0, t - self.lives[-1].start) if self.lives else 0.0

    @property
    def train_wall_s(self) -> float:
        return self.trained_s(self.lives[-1].end) if self.lives else 0.0

    @property
    def steps_done(self) -> int:
        return max(self.steps, default=-1) + 1

    def step_s(self, last: int = 20) -> float | None:
        """Median wall seconds from one step to the next in this life; None before two of them."""
        start = self.lives[-1].start if self.lives else 0.0
        times = [e["t"] for e in list(self.steps.values())[-last - 1 :] if e["t"] >= start]
        gaps = sorted(after - before for before, after in pairwise(times))
        return gaps[len(gaps) // 2] if gaps else None

    def those(self, prefix: str) -> list[Process]:
        return [process for name, process in sorted(self.processes.items()) if name.startswith(prefix)]

    def idle(self, prefix: str) -> dict[str, float]:
        """Cause -> fraction of the wall time of training that these processes were idle, on average."""
        window = self.lives[-1].window if self.lives else None
        return idle_fractions([process.time.read(window) for process in self.those(prefix)])

    def generated_tokens(self) -> float:
        window = self.lives[-1].window if self.lives else None
        return sum(p.tokens.read(window)[1].get("tokens", 0.0) for p in self.those("generator-"))
