"""Where the time of each process went, in bins that grow with the run."""

from __future__ import annotations

from typing import Any

from orz_async.observe.tail import Event

MOST_BINS = 720
FINEST_S = 0.125
MOST_PROCESSES = 24


def stretches(event: Event) -> list[tuple[str, float, float]]:
    """(state, seconds, share of the event's time at which it begins) of a "timeline" event, in order.

    Without `spans` the states are only known to lie within the event's time: they are laid one after the other.
    """
    spans = event.get("spans") or [[state, spent or 0.0] for state, spent in event["seconds"].items()]
    found, start = [], 0.0
    for state, spent in spans:
        found.append((str(state), float(spent), start))
        start += float(spent)
    return found


class Timelines:
    """Feed it every "timeline" event; memory is bounded by processes times bins."""

    def __init__(self) -> None:
        self.width_s = FINEST_S
        self._start: float | None = None
        self._bins: dict[str, dict[str, dict[int, float]]] = {}
        """By process and state: seconds by bin."""
        self._end = 0.0

    def feed(self, event: Event) -> None:
        total = sum(float(spent or 0.0) for spent in event["seconds"].values())
        began = event["t"] - total
        if self._start is None:
            self._start = began
        self._end = max(self._end, event["t"])
        states = self._bins.setdefault(str(event["process"]), {})
        for state, spent, start in stretches(event):
            self._add(states.setdefault(state, {}), max(0.0, began + start - self._start), spent)
        while self._end - self._start > MOST_BINS * self.width_s:
            self._coarsen()

    def _add(self, bins: dict[int, float], at: float, spent: float) -> None:
        while spent > 0:
            index = int(at / self.width_s)
            part = min(spent, (index + 1) * self.width_s - at)
            if part <= 1e-9:  # on the edge, in the last bit
                index, part = index + 1, min(spent, self.width_s)
            bins[index] = bins.get(index, 0.0) + part
            at, spent = at + part, spent - part

    def _coarsen(self) -> None:
        self.width_s *= 2
        for states in self._bins.values():
            for state, bins in states.items():
                merged: dict[int, float] = {}
                for index, spent in bins.items():
                    merged[index // 2] = merged.get(index // 2, 0.0) + spent
                states[state] = merged

    def result(self) -> dict[str, Any]:
        """`start` in unix time, `width_s`, `bins`, and milliseconds by process, state and bin."""
        names = sorted(self._bins, key=lambda name: (not name.startswith("learner"), name))
        stride = -(-len(names) // MOST_PROCESSES) if names else 1
        count = int((self._end - (self._start or 0.0)) / self.width_s) + 1 if names else 0
        shown = {
            name: {
                state: [round(bins.get(index, 0.0) * 1e3) for index in range(count)]
                for state, bins in sorted(self._bins[name].items())
            }
            for name in names[::stride]
        }
        return {
            "start": self._start or 0.0,
            "width_s": self.width_s,
            "bins": count,
            "processes": shown,
            "num_processes": len(names),
        }
