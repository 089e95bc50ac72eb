"""Events as numbers by name, at a learner step."""

from __future__ import annotations

import math
from typing import NamedTuple

from orz_async.observe.history import LEARNER
from orz_async.observe.tail import Event

_NOT_CURVES = frozenset(("v", "t", "m", "step", "version", "losses", "calibration"))


class Point(NamedTuple):
    step: int
    values: dict[str, float]


class Scalars:
    """Feed it events in order. Numbers that belong to no step are counted to the last one."""

    def __init__(self) -> None:
        self._step = 0

    def point(self, event: Event) -> Point | None:
        """The numbers of an event; None if it has none for a curve."""
        kind, name = event["kind"], str(event.get("process"))
        if kind == "step" and name == LEARNER:
            self._step = int(event["step"]) + 1
            return Point(self._step, _flat("train", event))
        if kind == "eval" and name == LEARNER:
            return Point(int(event["version"]), _flat("eval", event))
        if kind == "funnel":
            return Point(self._step, _flat("rollouts", event))
        if kind in ("throughput", "weights"):
            return Point(self._step, _flat(f"{name}/{kind}", event))
        return None


def _flat(prefix: str, fields: Event) -> dict[str, float]:
    """Finite numbers, those inside dictionaries by path."""
    found: dict[str, float] = {}
    for name, value in fields.items():
        if name in _NOT_CURVES or isinstance(value, bool):
            continue
        if isinstance(value, int | float) and math.isfinite(value):
            found[f"{prefix}/{name}"] = float(value)
        elif isinstance(value, dict):
            found |= _flat(f"{prefix}/{name}", value)
    return found
