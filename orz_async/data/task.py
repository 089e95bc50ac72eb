"""What the base-maker asks of a procedural task; `digit_sum` and `arithmetic` are modules that answer it."""

from __future__ import annotations

import random
from collections.abc import Hashable, Mapping
from typing import Protocol, TypeVar

from orz_async.data.digit_sum import Style

P = TypeVar("P", bound=Hashable)
"""A problem, as the task keeps it."""


class Task(Protocol[P]):
    """Problems with one right answer each, and texts about them of every quality."""

    @property
    def NAME(self) -> str: ...

    @property
    def CLEAN_MIX(self) -> Mapping[Style, float]: ...

    @property
    def WEB_MIX(self) -> Mapping[Style, float]: ...

    def problem(self, digits: P, /) -> str:
        """Its text, which tells everything."""

    def solution(self, digits: P, /) -> str: ...

    def draw_corpus(self, rng: random.Random, /) -> P: ...

    def draw_heldout(self, count: int, seed: int, /) -> list[P]: ...

    def draw_train(self, count: int, seed: int, heldout: frozenset[P], /) -> list[P]: ...

    def respond(self, digits: P, style: Style, rng: random.Random, /) -> str:
        """What follows ``<think>``."""

    def style_of(self, response: str, digits: P, /) -> str: ...
