"""What the daemon is connected to. The objects are made by `__main__` and by tests; the daemon only calls them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from orz_async.broker.messages import Hello, LeaseRef, ToBroker, ToGenerator, Welcome
from orz_async.generator.engine import Engine
from orz_async.records import Finish
from orz_async.reward.grade import Verdict
from orz_async.weights.protocol import Fetcher


class Client(Protocol):
    """The part of `broker.client.BrokerClient` that is used."""

    hello: Hello
    epoch: int
    waiting_since: float
    """When the broker was last heard."""

    def poll(self, timeout_s: float) -> list[ToGenerator]: ...

    def send(self, message: ToBroker) -> bool:
        """False if it did not leave."""

    def close(self) -> None: ...


GradeKey = tuple[int, LeaseRef]
"""Learner epoch and lease: a lease of a new epoch can have the name of an old one."""


class Grader(Protocol):
    """The part of `reward.pool.GraderPool` that is used."""

    @property
    def pending(self) -> int: ...

    def submit(self, key: GradeKey, response: str, answer: str, finish: Finish) -> None: ...

    def poll(self) -> Iterable[tuple[GradeKey, Verdict]]: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Serving:
    """An engine for one run, and the text of what it samples."""

    engine: Engine
    decode: Callable[[NDArray[np.int32]], str]
    """Response tokens to the text that is graded."""


MakeServing = Callable[[Welcome], Serving]
MakeFetcher = Callable[[Welcome, int], Fetcher]
"""From what the learner says of its weights, where they are and how long a transfer may stand still, and its epoch."""
