"""What goes into the ledger (events) and what comes out (actions).

Some actions are *entries*: decisions that the server writes to the journal before it acts on them. A snapshot of the
ledger plus the entries made since is the ledger again (`frontier.py`), which is how a run survives kill -9.
"""

from __future__ import annotations

import msgspec

from orz_async.broker.messages import Ack, Cancel, LeaseRef, Nack, Progress
from orz_async.records import Kind


class LedgerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers the ledger's arithmetic is made of; `BrokerConfig` documents them."""

    rollouts_per_step: int
    """B."""
    samples_per_prompt: int
    max_lag: int
    """S."""
    window: int = 0
    """W."""
    total_steps: int
    lease_s: float = 30.0
    heartbeat_s: float = 0.5
    max_attempts: int = 5
    overtime: float = 4.0
    eval_rollouts: int = 0
    """Rollouts of one evaluation: prompts times samples."""
    eval_samples: int = 1
    """Samples of each held-out prompt."""

    @property
    def head_start(self) -> int:
        """S - W: steps by which a rollout may be granted before the version that its nominal step trains."""
        return self.max_lag - self.window


class Terms(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """A lease as the ledger knows it: prompts are indices into the seeded order (or into the held-out set)."""

    kind: Kind
    rollout: int
    attempt: int
    prompt: int
    sample: int
    version_floor: int

    @property
    def ref(self) -> LeaseRef:
        return LeaseRef(self.kind, self.rollout, self.attempt)


# Events. Those with a `generator` also prove that it is alive.


class Joined(msgspec.Struct, frozen=True, gc=False):
    """A generator said Hello, for the first time or again after a reconnection."""

    generator: str
    slots: int


class Heartbeat(msgspec.Struct, frozen=True, gc=False):
    """A generator's Status."""

    generator: str
    slots: int
    version: int
    progress: tuple[Progress, ...]


class Finished(msgspec.Struct, frozen=True, gc=False):
    """A result arrived. The server has validated it if `Ledger.terms` said it was due."""

    generator: str
    lease: LeaseRef
    version_first: int
    problem: str | None = None
    """Why validation refused it."""


class Failed(msgspec.Struct, frozen=True, gc=False):
    generator: str
    lease: LeaseRef
    reason: str
    returned: bool


class Left(msgspec.Struct, frozen=True, gc=False):
    """A generator said goodbye, or the server refuses to hear it any longer."""

    generator: str
    reason: str


class Unreachable(msgspec.Struct, frozen=True, gc=False):
    """The connection to a generator broke. It has a short while to come back before its leases are lent again."""

    generator: str


class Take(msgspec.Struct, frozen=True, gc=False):
    """The learner wants the batch of this step; Taken follows when it is complete."""

    step: int


class Publish(msgspec.Struct, frozen=True, gc=False):
    """The learner's weights of this version can be fetched. The current version again is an announcement only."""

    version: int


class Evaluate(msgspec.Struct, frozen=True, gc=False):
    """Lend the evaluation rollouts of this version; Evaluated follows when all have ended."""

    version: int


class Tick(msgspec.Struct, frozen=True, gc=False):
    """Time passed: look at deadlines."""


Event = Joined | Heartbeat | Finished | Failed | Left | Unreachable | Take | Publish | Evaluate | Tick


# Entries: decisions to be written down before they take effect outside.


class Granted(msgspec.Struct, frozen=True, gc=False, array_like=True, tag=True):
    """New attempts. Send these leases."""

    generator: str
    terms: tuple[Terms, ...]


class Accepted(msgspec.Struct, frozen=True, gc=False, array_like=True, tag=True):
    """The trajectory of this attempt counts. Store it."""

    generator: str
    lease: LeaseRef
    version_first: int


class Ended(msgspec.Struct, frozen=True, gc=False, array_like=True, tag=True):
    """An attempt ended without being trained on; its rollout will be lent again."""

    generator: str
    lease: LeaseRef
    cause: str
    """deadline, overtime, silent, lost, failed, rejected, returned, left; at restart learner_restart, journal_lost."""
    blamed: bool
    """Whether it counts against the prompt."""
    quarantined: str
    """Empty, or why the prompt is given up: this attempt was the last straw."""


class Taken(msgspec.Struct, frozen=True, gc=False, array_like=True, tag=True):
    """The batch of a step, oldest rollout first. Deliver it."""

    step: int
    rollouts: tuple[int, ...]


class Restarted(msgspec.Struct, frozen=True, gc=False, array_like=True, tag=True):
    """A learner came back to life under this epoch: everything held before is void."""

    epoch: int
    lost: tuple[int, ...]
    """Accepted rollouts whose trajectories are gone."""


Entry = Granted | Accepted | Ended | Taken | Restarted


# Actions that need no memory: a lost one is repeated by the protocol.


class Resend(msgspec.Struct, frozen=True, gc=False):
    """The generator does not know these leases although it should: send them again."""

    generator: str
    terms: tuple[Terms, ...]


class Send(msgspec.Struct, frozen=True, gc=False):
    generator: str
    message: Ack | Nack | Cancel


class Evaluated(msgspec.Struct, frozen=True, gc=False):
    """All rollouts of this evaluation have ended."""

    version: int


class PeerGone(msgspec.Struct, frozen=True, gc=False):
    """The ledger no longer counts on this generator. If it speaks again it joins anew."""

    generator: str
    reason: str


Action = Entry | Resend | Send | Evaluated | PeerGone
