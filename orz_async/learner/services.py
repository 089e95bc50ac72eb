"""What the loop needs from outside, as small as it is used. A loop without a broker gives its own `Rollouts`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from orz_async.learner.durable import Identity
from orz_async.learner.signals import Stop
from orz_async.observe.events import EventLog, Timeline
from orz_async.observe.tokens import TokenLog
from orz_async.records import Trajectory
from orz_async.weights.protocol import PublishReport


class Rollouts(Protocol):
    """Where trajectories come from: `broker.server.Broker`, or a synchronous sampler in the tests."""

    def take(self, step: int) -> list[Trajectory]:
        """Block until the rollouts of this step are in; sorted by rollout number."""

    def published(self, version: int, digest: str) -> None:
        """Generators may fetch this version, which has this digest, and rollouts that need it may start."""

    def evaluate(self, version: int) -> None:
        """Queue the held-out prompts under this version."""

    def evaluation_ready(self, version: int) -> bool: ...

    def evaluation(self, version: int, timeout_s: float) -> list[Trajectory]: ...

    def snapshot(self) -> bytes:
        """The ledger as of now, for a checkpoint."""

    def tighten(self, by: int) -> None:
        """From now on grant rollouts as if max_lag were this much smaller; 0 takes it back."""

    def checkpointed(self, oldest_version: int) -> None:
        """A checkpoint is committed; the oldest one that is kept has weights of this version."""


class Weights(Protocol):
    """Where weights go: a `weights.protocol.Publisher`, or straight into the engine of a synchronous loop."""

    def publish(self, version: int, named: Iterable[tuple[str, Tensor]]) -> PublishReport: ...


@dataclass(frozen=True, slots=True)
class Services:
    """Opened by whoever starts the loop, and closed by it too: the loop closes nothing."""

    run_dir: Path
    identity: Identity
    rollouts: Rollouts
    weights: Weights
    events: EventLog
    timeline: Timeline
    stop: Stop
    tokens: TokenLog | None = None
    """Where the token sample goes, if anywhere."""
