"""The thread behind every transport: woken through a pipe, ended by its owner, its failure kept for its owner."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable

from orz_async.errors import OrzError
from orz_async.weights.protocol import EventSink


class Worker:
    """Runs `body` in a thread, then `release` in the same thread, whatever happened.

    `body` polls `wake_fd`, calls `drain` when it is readable, and returns soon after `closing` is set.
    """

    def __init__(self, name: str, body: Callable[[], None], release: Callable[[], None], events: EventSink) -> None:
        self.closing = False
        self._failure: BaseException | None = None
        self._name, self._body, self._release, self._events = name, body, release, events
        self._lock = threading.Lock()
        self.wake_fd, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        with self._lock, contextlib.suppress(BlockingIOError):  # a full pipe wakes as well as one byte more
            if not self.closing:
                os.write(self._wake_write, b"w")

    def drain(self) -> None:
        os.read(self.wake_fd, 4096)

    def check(self) -> None:
        """Raise what ended the thread before its time."""
        if isinstance(self._failure, OrzError):
            raise self._failure
        if self._failure is not None:
            raise RuntimeError(f"thread {self._name} has ended") from self._failure

    def close(self) -> None:
        with self._lock, contextlib.suppress(BlockingIOError):
            if self.closing:
                return
            self.closing = True
            os.write(self._wake_write, b"w")
        self._thread.join()
        os.close(self.wake_fd)
        os.close(self._wake_write)

    def _run(self) -> None:
        try:
            self._body()
        except BaseException as failure:  # the edge of the thread: its owner's next call raises it
            self._failure = failure
            self._events.emit("thread_failed", thread=self._name, error=f"{type(failure).__name__}: {failure}")
        finally:
            self._release()
