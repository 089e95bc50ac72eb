"""One clock for the events of all processes.

On one machine all processes share the monotonic clock, which no time server steps: an event's time there is its
monotonic time plus one constant a machine. Another machine's constant is measured where its generator greets the
broker, as NTP does it: the broker heard the Hello ("joined") somewhere between the generator's sending it and the
Welcome it got back ("welcomed", `round_trip_s` later), so its clock is set as if in the middle, and is wrong by half of
that at most.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

SUSPECT_S = 2.0
"""Processes of one machine whose clocks differ by more: one sees another monotonic clock, as in a time namespace."""


class Clocks:
    """Learns from events, then answers what to add to an event's monotonic time."""

    def __init__(self) -> None:
        self._machine: dict[str, str] = {}
        """By process: its machine, or its own name if it shares no clock."""
        self._offset: dict[str, float] = {}
        """By machine: unix time minus monotonic time."""
        self._reference: str | None = None
        """The machine of the broker: the others are set by it."""
        self._joined: dict[str, list[float]] = {}
        """By generator: when the broker heard its Hellos, in unix time of the broker's machine."""
        self._welcomed: list[dict[str, Any]] = []
        self.uncertainty_s: dict[str, float] = {}
        """By process: of the alignment of its machine."""

    def learn(self, events: Iterable[dict[str, Any]]) -> None:
        """Takes every event; those that say nothing about clocks cost a look at their kind."""
        for event in events:
            match event.get("kind"):
                case "process":
                    self._started(event)
                case "joined" if event.get("process") == "broker":
                    self._joined.setdefault(f"generator-{event.get('generator')}", []).append(self.time(event))
                case "welcomed":
                    self._welcomed.append(event)
        # By a wrong clock a Welcome may have come before its Hello: last of all, and again until both are there.
        self._welcomed = [event for event in self._welcomed if not self._greeted(event)]

    def _greeted(self, event: dict[str, Any]) -> bool:
        """Set the clock of a generator's machine, unless that is the broker's own; False if the other half lacks."""
        name, trip_s = str(event.get("process")), event.get("round_trip_s")
        machine = self._machine.get(name)
        if machine is None or machine == self._reference or not isinstance(trip_s, float):
            return True
        if name not in self._joined:
            return False
        sent_in_the_middle = self.time(event) - trip_s / 2
        offset = min((heard - sent_in_the_middle for heard in self._joined[name]), key=abs)
        if name not in self.uncertainty_s or trip_s / 2 < self.uncertainty_s[name]:
            self._offset[machine] += offset
            self.uncertainty_s[name] = trip_s / 2
        return True

    def _started(self, event: dict[str, Any]) -> None:
        name, boot = str(event.get("process")), event.get("boot")
        if not isinstance(boot, str) or not isinstance(event.get("m"), float):
            self._machine.pop(name, None)
            return
        offset = event["t"] - event["m"]
        known = self._offset.setdefault(boot, offset)
        machine = boot if abs(offset - known) < SUSPECT_S else f"{boot}/{name}"
        self._offset.setdefault(machine, offset)
        self._machine[name] = machine
        if name == "broker":
            self._reference = machine

    def time(self, event: dict[str, Any]) -> float:
        """Unix time of an event on the common clock; its own where nothing is known of its machine."""
        machine = self._machine.get(str(event.get("process")))
        t: float = event["t"]
        if machine is None or not isinstance(event.get("m"), float):
            return t
        return float(self._offset[machine] + event["m"])
