"""The ledger's records: a rollout that holds a slot, and a generator that holds leases."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum, auto

import msgspec

from orz_async.broker.messages import LeaseRef
from orz_async.broker.transitions import Terms
from orz_async.records import Kind


class State(Enum):
    """Where a rollout with a slot stands. Only the ledger moves it.

    (none)  first grant                                   -> HELD
    HELD    result accepted                               -> READY
    HELD    expired, failed, rejected, returned, restart  -> LOST
    LOST    granted again, attempt + 1                    -> HELD
    READY   taken into the batch of a step                -> TAKEN
    TAKEN   the step published its weights                -> (none): trained
    TAKEN   learner restart                               -> READY, bound to the same step
    """

    LOST = auto()
    HELD = auto()
    READY = auto()
    TAKEN = auto()


@dataclass(slots=True, eq=False)
class Rollout:
    kind: Kind
    number: int
    floor: int
    """Oldest version that may sample it."""
    prompt: int
    sample: int
    attempt: int = 0
    state: State = State.LOST
    failures: int = 0
    """Blamed on the current prompt."""
    generator: str = ""
    """Holder of the current attempt; of the last one if LOST."""
    lost_at: float = 0.0
    sent_at: float = 0.0
    granted_at: float = 0.0
    overtimes: int = 0
    """Attempts that ended because they held up a step."""
    blamed_on: str = ""
    """Whose attempt was last held against the prompt."""
    resends: int = 0
    deadline: float = 0.0
    """Of a running lease; a queued one also lives on its generator's progress."""
    tokens: int = 0
    queued: bool = True
    version_first: int = -1

    @property
    def ref(self) -> LeaseRef:
        return LeaseRef(self.kind, self.number, self.attempt)

    @property
    def terms(self) -> Terms:
        return Terms(self.kind, self.number, self.attempt, self.prompt, self.sample, self.floor)


@dataclass(slots=True, eq=False)
class Peer:
    """A generator the ledger counts on."""

    name: str
    slots: int
    seen: float
    patience: float
    """Seconds of silence after which its leases are lent to others."""
    grew: float
    """When any of its leases last made progress."""
    alarm: float = 0.0
    """When to look whether it is silent."""
    version: int = -1
    longest: float = 0.0
    """Seconds from grant to result, the longest of late."""
    held: dict[tuple[Kind, int], Rollout] = field(default_factory=dict)


class Counts(msgspec.Struct):
    """Attempts at training rollouts. granted = trained + expired + quarantined + in flight."""

    granted: int = 0
    trained: int = 0
    quarantined: int = 0
    expired: dict[str, int] = msgspec.field(default_factory=Counter)
    """By cause."""

    @property
    def in_flight(self) -> int:
        return self.granted - self.trained - self.quarantined - sum(self.expired.values())

    def funnel(self) -> dict[str, object]:
        return {
            "granted": self.granted,
            "trained": self.trained,
            "expired": dict(self.expired),
            "quarantined": self.quarantined,
            "in_flight": self.in_flight,
        }
