"""Reading event logs while they are written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from orz_async.observe.clocks import Clocks
from orz_async.observe.events import SCHEMA

Event = dict[str, Any]
"""One line: v, t, m, process, kind and the fields of that kind."""

CHUNK = 1 << 24
"""Bytes read of one file at once: a poll of a huge log stays bounded in memory."""


class Tail:
    """Follows every file of RUN/events: complete lines only, each once; never blocks, never talks to a process."""

    def __init__(self, folder: Path) -> None:
        self.unreadable = 0
        """Lines that were no event of this schema: torn by a kill -9, or written by another version."""
        self.clocks = Clocks()
        """Every event's `t` is on their common clock."""
        self._folder = folder
        self._offsets: dict[str, int] = {}
        self._decoder = msgspec.json.Decoder(Event)

    def poll(self) -> list[Event]:
        """The events that appeared since the last call, in order of time."""
        events: list[Event] = []
        for path in sorted(self._folder.glob("*.jsonl")):
            while chunk := self._read(path):
                events.extend(self._parse(chunk))
        return in_order(events, self.clocks)

    def _read(self, path: Path) -> bytes:
        offset = self._offsets.get(path.name, 0)
        with path.open("rb") as file:
            if file.seek(0, os.SEEK_END) < offset:
                offset = 0  # the run was started anew with --overwrite
            file.seek(offset)
            data = file.read(CHUNK)
        end = data.rfind(b"\n") + 1
        if not end and len(data) == CHUNK:
            end = CHUNK  # no event is this long: skip the rubbish
        self._offsets[path.name] = offset + end
        return data[:end]

    def _parse(self, data: bytes) -> list[Event]:
        events = []
        for line in data.splitlines():
            try:
                event = self._decoder.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError):
                self.unreadable += bool(line)
                continue
            if event.get("v") == SCHEMA and isinstance(event.get("t"), float) and isinstance(event.get("kind"), str):
                events.append(event)
            else:
                self.unreadable += 1
        return events


def in_order(events: list[Event], clocks: Clocks) -> list[Event]:
    """Set to the common clock and sorted by it; events of one process keep the order of their lines."""
    events.sort(key=lambda event: event["t"])
    clocks.learn(events)
    for event in events:
        event["t"] = clocks.time(event)
    events.sort(key=lambda event: event["t"])
    return events
