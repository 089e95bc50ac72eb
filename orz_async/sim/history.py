"""The history of a simulation as one number: two runs with the same seed must agree in every event and decision."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec


class History:
    def __init__(self) -> None:
        self.events = 0
        self._digest = hashlib.blake2b(digest_size=8)
        self._encode = msgspec.msgpack.Encoder().encode

    def add(self, now: float, event: Any, actions: list[Any]) -> None:
        self.events += 1
        names = [type(action).__name__ for action in actions]
        self._digest.update(self._encode((now, type(event).__name__, event, names, actions)))

    def hash(self) -> str:
        return self._digest.hexdigest()
