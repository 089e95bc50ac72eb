"""The "throughput" event: how fast this generator samples, about once a second."""

from __future__ import annotations

from collections.abc import Callable

from orz_async.generator.engine import Engine
from orz_async.observe.events import EventLog

PERIOD_S = 1.0


class Meter:
    def __init__(self, events: EventLog, clock: Callable[[], float]) -> None:
        self._events = events
        self._clock = clock
        self._since = clock()
        self._sampled = 0

    def report(self, version: int, engine: Engine, rollouts: int) -> None:
        """Write the event if it is due. `rollouts`: scored since the start."""
        now = self._clock()
        if now - self._since < PERIOD_S:
            return
        tokens = engine.tokens_sampled
        progress = engine.progress()
        queued = sum(lease.queued for lease in progress)
        self._events.emit(
            "throughput",
            version=version,
            tokens=tokens,
            steps=engine.steps_sampled,
            # An engine made anew for another run starts from 0.
            tokens_s=max(0, tokens - self._sampled) / (now - self._since),
            running=len(progress) - queued,
            queued=queued,
            rollouts=rollouts,
        )
        self._since, self._sampled = now, tokens
