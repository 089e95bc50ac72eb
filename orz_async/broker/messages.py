"""Everything that may travel between a generator and the broker, one struct a message.

A lease is outstanding at a generator from its Grant until the broker has accepted, refused or re-leased it. The broker
keeps the outstanding leases of a generator at or below the `slots` it last declared: that number is the credit, and
because it is absolute, a lost or repeated message cannot make it drift.
"""

from __future__ import annotations

import msgspec

from orz_async.records import Kind, Lease, Trajectory


class _Message(msgspec.Struct, frozen=True, gc=False, array_like=True, tag=True):
    pass


class LeaseRef(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Names one attempt at one rollout."""

    kind: Kind
    rollout: int
    attempt: int


class Progress(msgspec.Struct, frozen=True, gc=False, array_like=True):
    lease: LeaseRef
    tokens: int
    """Work done for this lease so far, in tokens, queue waiting included as 0: a renewal needs this to grow, or
    `queued` to be true while others of the same generator grow."""
    queued: bool


# Generator to broker.


class Hello(_Message, frozen=True, gc=False):
    """First message after every (re)connection. The broker answers Welcome or Bye."""

    name: str
    engine: str
    slots: int
    vocab_size: int
    """0 while the model is not known yet."""
    pid: int
    relay: str = ""
    """Where it offers the weights it has to other generators, with keys as ADDRESS|PUBLIC_KEY; empty if it does not."""
    host: str = ""
    """Name of its machine: a relay on loopback is for the others there."""


class Status(_Message, frozen=True, gc=False):
    """Sent every heartbeat, and at once when the serving version changes."""

    slots: int
    """Leases this generator wants to hold at once, queue included. 0 while it drains."""
    version: int
    """Policy version being served; -1 before the first weights of this learner epoch."""
    progress: tuple[Progress, ...]
    """Every lease held. A lease the broker believes held and that is absent here was lost, and is sent again."""


class Result(_Message, frozen=True, gc=False):
    """A finished rollout; repeated until Ack or Nack arrives."""

    trajectory: Trajectory


class Failure(_Message, frozen=True, gc=False):
    """The generator could not finish a lease."""

    lease: LeaseRef
    reason: str
    returned: bool
    """True: handed back without fault (drain, shutdown); it does not count towards quarantine."""


class Observe(_Message, frozen=True, gc=False):
    """Asks for a Report. It needs no Hello and changes nothing."""


class Leave(_Message, frozen=True, gc=False):
    """Last message of a generator that goes on purpose; all its leases are returned."""

    reason: str


# Broker to generator.


class Welcome(_Message, frozen=True, gc=False):
    """What a generator needs to serve this run. A changed learner epoch (in the frame header) voids earlier leases."""

    run_id: str
    model_path: str
    stop: tuple[str, ...]
    weights_address: str
    """Where the weights of this epoch are fetched; several, comma separated, are relays and at last the learner."""
    version: int
    """Newest published version."""
    heartbeat_s: float
    max_model_tokens: int
    """Longest prompt plus response any lease will ask for."""
    digest: str = ""
    """Of the newest published version: whoever hands out its weights is held to it."""
    readers: tuple[str, ...] = ()
    """With keys: public keys of the generators that may fetch from this one, and no others."""
    deadline_s: float = 15.0
    """nccl: the learner's patience with one operation of a transfer, and so the generator's (weights.deadline_s)."""


class Grant(_Message, frozen=True, gc=False):
    leases: tuple[Lease, ...]


class Ack(_Message, frozen=True, gc=False):
    """The result is stored; the generator may forget it."""

    lease: LeaseRef


class Nack(_Message, frozen=True, gc=False):
    """The result is refused and must not be sent again."""

    lease: LeaseRef
    reason: str


class Cancel(_Message, frozen=True, gc=False):
    """These leases are void (re-leased or obsolete): stop working on them."""

    leases: tuple[LeaseRef, ...]


class Published(_Message, frozen=True, gc=False):
    """New weights can be fetched."""

    version: int
    digest: str = ""
    """Of this version; empty if it is not known."""
    sources: tuple[str, ...] = ()
    """Where to fetch from now on, best first, the learner last; empty: no change, of the readers neither."""
    readers: tuple[str, ...] = ()
    """As in Welcome."""


class Bye(_Message, frozen=True, gc=False):
    """The broker ends the conversation."""

    reason: str
    finished: bool
    """True: the run is complete, exit 0. False: refused, exit with the reason."""


class GeneratorState(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """One line of a Report."""

    name: str
    engine: str
    slots: int
    version: int
    outstanding: int
    tokens_s: float
    silent_s: float


class Report(_Message, frozen=True, gc=False):
    """How the run stands, for an observer."""

    run_id: str
    version: int
    """Newest published one."""
    waiting_for: str
    """What the learner waits for, from whom, since when; it may be in the middle of a step."""
    granted: int
    trained: int
    quarantined: int
    in_flight: int
    expired: dict[str, int]
    """Attempts by cause."""
    generators: tuple[GeneratorState, ...]


ToBroker = Hello | Status | Result | Failure | Leave | Observe
ToGenerator = Welcome | Grant | Ack | Nack | Cancel | Published | Bye | Report
