"""One sink: a bounded queue, a thread that empties it, and counts of what it lost."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Protocol

from orz_async.observe.sinks.scalars import Point


class Writer(Protocol):
    """A service that keeps curves. Every call may block, and may raise anything."""

    def write(self, point: Point) -> None: ...

    def close(self) -> None: ...


class Feed:
    """`offer` and `close` never block longer than they say, whatever the service does.

    consumes  points from `offer`             waits for  them, or the end
    produces  calls of the writer             waits for  the service, without bound: it is in a thread of its own
    ends      when `close` is called, or when the service raises: then every later point is counted as dropped
    """

    def __init__(self, name: str, make: Callable[[], Writer], capacity: int) -> None:
        self.name = name
        self.delivered = 0
        self.dropped = 0
        self.failure = ""
        """Why the service gets no more points, if it does not."""
        self._make = make
        self._queue: queue.Queue[Point] = queue.Queue(capacity)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"sink-{name}", daemon=True)
        self._thread.start()

    def offer(self, point: Point) -> None:
        """Take the point, or drop and count it where the service is broken or too slow."""
        if not self.failure:
            try:
                self._queue.put_nowait(point)
                return
            except queue.Full:
                pass
        self.dropped += 1

    def close(self, patience_s: float) -> None:
        """Let the service have what is queued, for so long; what is left is dropped, and a call under way abandoned."""
        self._closing.set()
        self._thread.join(patience_s)
        self.dropped += self._queue.qsize()

    def _run(self) -> None:
        try:
            writer = self._make()
            while (point := self._next()) is not None:
                writer.write(point)
                self.delivered += 1
            writer.close()
        except Exception as error:  # the edge of the thread: whatever a service raises ends that sink alone
            self.failure = f"{type(error).__name__}: {error}"

    def _next(self) -> Point | None:
        while True:
            try:
                return self._queue.get(timeout=0.1)
            except queue.Empty:
                if self._closing.is_set():
                    return None


def close_all(feeds: list[Feed], patience_s: float) -> None:
    """Close them together: the slowest of them costs `patience_s`, not all of them one after the other."""
    until = time.monotonic() + patience_s
    for feed in feeds:
        feed.close(max(0.0, until - time.monotonic()))
