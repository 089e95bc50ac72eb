"""The event log: one JSON object a line, one file a process, the only source of the live view, summary and report."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from orz_async.errors import DiskError
from orz_async.observe.versions import boot, versions

SCHEMA = 1
"""Of a line. A reader skips lines with another one."""

IDLE_PREFIX = "wait_"
"""A timeline state that starts so is idle; the rest of the word is the cause."""

MAX_SPANS = 24
"""Changes of state that one "timeline" event tells in order: what a fast loop writes a second stays small."""


def _plain(value: Any) -> Any:
    """JSON for what msgspec does not know: NumPy and torch scalars, and paths."""
    if hasattr(value, "item"):
        return value.item()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"an event field must be JSON, a scalar or a path, got {type(value).__name__}")


class EventLog:
    """Appends events of one process to its file. Safe to call from several threads.

    A line is {"v":1,"t":<unix s>,"m":<monotonic s>,"process":...,"kind":...} and the caller's fields; not-a-number and
    infinity become null. Each line is one write(2) to a file opened for appending, so a kill -9 tears at most the last
    line, and a restarted process continues in the same file: its first line has kind "process".
    """

    def __init__(self, path: Path | None, process: str) -> None:
        self.process = process
        self.dropped = 0
        """Events lost because the disk refused them, since the last line that was written."""
        self._lock = threading.Lock()
        self._encoder = msgspec.json.Encoder(enc_hook=_plain)
        self._file: int | None = None
        self._torn = False
        if path is not None:
            self._open(path)
            self.emit("process", pid=os.getpid(), boot=boot(), versions=versions())

    @classmethod
    def disabled(cls) -> EventLog:
        """A sink to nothing."""
        return cls(None, "disabled")

    def _open(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            size = os.lseek(self._file, 0, os.SEEK_END)
            # The previous process of this name may have died inside a line.
            self._torn = size > 0 and os.pread(self._file, 1, size - 1) != b"\n"
        except OSError as error:
            raise DiskError(
                f"expected a writable event log {path}, found {error.strerror}; free space or choose another run_dir"
            ) from error

    def emit(self, kind: str, **fields: object) -> None:
        """Write one line now. A full disk drops and counts it; the next line that fits reports the loss."""
        with self._lock:
            if self._file is None:
                return
            head = {"v": SCHEMA, "t": time.time(), "m": time.monotonic(), "process": self.process, "kind": kind}
            if self.dropped:
                head["dropped"] = self.dropped
            self._write(self._encoder.encode(head | fields) + b"\n")

    def _write(self, line: bytes) -> None:
        assert self._file is not None
        data = b"\n" + line if self._torn else line
        try:
            written = os.write(self._file, data)
        except OSError:
            self.dropped += 1  # ENOSPC, EDQUOT, EIO: observing must never end training
            return
        self._torn = 0 < written < len(data)
        self.dropped = self.dropped + 1 if written < len(data) else 0

    def close(self) -> None:
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None


class Timeline:
    """What a process spends its time on: at each moment it is in exactly one state.

    The seconds by state therefore sum to the wall time. `flush` emits kind "timeline" with the seconds since the last
    flush, the present state and how long that has lasted; `start` flushes periodically from a thread of its own, so
    that a process that blocks is seen blocking. States beginning with "wait_" are idle. `spans`, the order in which
    the states came as [state, seconds], is left out where a process changed state more often than MAX_SPANS.
    """

    def __init__(self, events: EventLog, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = name
        self._events = events
        self._clock = clock
        self._lock = threading.Lock()
        self._state = "start"
        self._since = self._mark = clock()
        self._flushed: dict[str, float] = {}
        self._pending: dict[str, float] = {}
        self._spans: list[tuple[str, float]] = []
        """Since the last flush; one more than MAX_SPANS stands for more."""
        self._stop = threading.Event()
        self._ticker: threading.Thread | None = None

    def _account(self) -> None:
        now = self._clock()
        spent = now - self._mark
        self._pending[self._state] = self._pending.get(self._state, 0.0) + spent
        if spent > 0 and len(self._spans) <= MAX_SPANS:
            self._spans.append((self._state, round(spent, 6)))
        self._mark = now

    def enter(self, state: str) -> str:
        """Leave the present state for this one; returns the state left."""
        with self._lock:
            previous = self._state
            if state != previous:
                self._account()
                self._state, self._since = state, self._mark
            return previous

    @contextmanager
    def state(self, state: str) -> Iterator[None]:
        """In `state` inside the block, afterwards back in the state before it."""
        previous = self.enter(state)
        try:
            yield
        finally:
            self.enter(previous)

    def totals(self) -> dict[str, float]:
        """Seconds by state since the construction."""
        with self._lock:
            self._account()
            states = sorted(self._flushed.keys() | self._pending.keys())
            return {state: self._flushed.get(state, 0.0) + self._pending.get(state, 0.0) for state in states}

    def flush(self) -> None:
        with self._lock:
            self._account()
            seconds, self._pending = self._pending, {}
            spans, self._spans = self._spans, []
            for state, spent in seconds.items():
                self._flushed[state] = self._flushed.get(state, 0.0) + spent
            state, state_s = self._state, self._mark - self._since
        order = {"spans": spans} if 1 < len(spans) <= MAX_SPANS else {}
        self._events.emit("timeline", name=self.name, seconds=seconds, state=state, state_s=state_s, **order)

    def start(self, period_s: float = 1.0) -> None:
        """Flush every period until `close`."""
        assert self._ticker is None, "the timeline is already ticking"
        self._ticker = threading.Thread(target=self._tick, args=(period_s,), name=f"timeline-{self.name}", daemon=True)
        self._ticker.start()

    def _tick(self, period_s: float) -> None:
        while not self._stop.wait(period_s):
            self.flush()

    def close(self) -> None:
        """Stop ticking and write the rest."""
        if not self._stop.is_set():
            self._stop.set()
            if self._ticker is not None:
                self._ticker.join()
            self.flush()
