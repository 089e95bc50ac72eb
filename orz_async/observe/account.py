"""Amounts spent over stretches of time, counted as far as they lie inside the windows that matter."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from orz_async.observe.events import IDLE_PREFIX

Window = tuple[float, float]
"""Wall time from, until."""


class Stretch(NamedTuple):
    """Amounts (seconds by state, tokens) that belong evenly to a stretch of wall time."""

    start: float
    end: float
    amounts: dict[str, float]


class Account:
    """Sums stretches inside a window that grows at its end; memory stays small however long the run is.

    A stretch that reaches over an edge of the window counts with the part inside, all its amounts alike. The window is
    only known once the learner reports a step, after the others have reported the same seconds, so stretches wait in
    `_open` until the window has passed them.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._amounts: dict[str, float] = {}
        self._open: deque[Stretch] = deque()

    def add(self, stretch: Stretch) -> None:
        if stretch.end > stretch.start:
            self._open.append(stretch)

    def settle(self, window: Window, *, close: bool = False) -> None:
        """Count what the window has passed. `close`: it will not grow any more, what lies behind it never counts."""
        while self._open and (close or self._open[0].end <= window[1]):
            stretch = self._open.popleft()
            self._seconds += _count(stretch, window, self._amounts)

    def read(self, window: Window | None) -> tuple[float, dict[str, float]]:
        """Seconds counted and amounts by name; without a window everything that is open counts too."""
        seconds, amounts = self._seconds, dict(self._amounts)
        for stretch in self._open:
            seconds += _count(stretch, window or (stretch.start, stretch.end), amounts)
        return seconds, amounts

    def forget(self, before: float) -> None:
        """Drop open stretches that ended before; makes this an account of the last seconds."""
        while self._open and self._open[0].end < before:
            self._open.popleft()


def _count(stretch: Stretch, window: Window, amounts: dict[str, float]) -> float:
    inside = min(stretch.end, window[1]) - max(stretch.start, window[0])
    if inside <= 0:
        return 0.0
    share = inside / (stretch.end - stretch.start)
    for name, amount in stretch.amounts.items():
        amounts[name] = amounts.get(name, 0.0) + amount * share
    return inside


def idle_fractions(readings: list[tuple[float, dict[str, float]]]) -> dict[str, float]:
    """Cause -> idle seconds over all seconds, of one or several processes."""
    total = sum(seconds for seconds, _ in readings)
    idle: dict[str, float] = {}
    for _, amounts in readings:
        for state, spent in amounts.items():
            if state.startswith(IDLE_PREFIX):
                cause = state.removeprefix(IDLE_PREFIX)
                idle[cause] = idle.get(cause, 0.0) + spent
    return {cause: spent / total for cause, spent in sorted(idle.items())} if total else {}
