"""All events of a run in order of time. One line of each file is in memory, however long the run was."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from pathlib import Path

import msgspec

from orz_async.observe.clocks import Clocks
from orz_async.observe.events import SCHEMA
from orz_async.observe.tail import Event

_CLOCK_KINDS = tuple(f'"kind":"{kind}"'.encode() for kind in ("process", "joined", "welcomed"))


class Stream:
    """Read it once. `clocks` and `unreadable` are complete when it is at its end."""

    def __init__(self, folder: Path) -> None:
        self.clocks = Clocks()
        self.unreadable = 0
        """Lines that were no event of this schema."""
        self._paths = sorted(folder.glob("*.jsonl"))
        self._decoder = msgspec.json.Decoder(Event)

    def __iter__(self) -> Iterator[Event]:
        self._set_clocks()
        return heapq.merge(*(self._events(path) for path in self._paths), key=lambda event: event["t"])

    def _set_clocks(self) -> None:
        found = []
        for path in self._paths:
            with path.open("rb") as file:
                lines = (line for line in file if any(kind in line[:256] for kind in _CLOCK_KINDS))
                found += [event for line in lines if (event := self._parse(line)) is not None]
        self.clocks.learn(sorted(found, key=lambda event: event["t"]))
        self.unreadable = 0  # they are read again

    def _events(self, path: Path) -> Iterator[Event]:
        with path.open("rb") as file:
            for line in file:
                event = self._parse(line)
                if event is not None:
                    event["t"] = self.clocks.time(event)
                    yield event

    def _parse(self, line: bytes) -> Event | None:
        try:
            event = self._decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError):
            self.unreadable += line != b"\n"
            return None
        if event.get("v") == SCHEMA and isinstance(event.get("t"), float) and isinstance(event.get("kind"), str):
            return event
        self.unreadable += 1
        return None
