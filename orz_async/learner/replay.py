"""Training from a journal: the batches that a run took, in their order, without generators.

consumes  RUN/journal   produces  what `loop.Learner` asks of its rollouts and weights
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from orz_async.broker.segments import Location, load, records
from orz_async.broker.server import ResumePoint
from orz_async.broker.transitions import Taken
from orz_async.config import Config
from orz_async.errors import DataError, Interrupted
from orz_async.learner.durable import Identity
from orz_async.learner.trainer import Trainer
from orz_async.observe.events import EventLog
from orz_async.records import Trajectory
from orz_async.weights.protocol import PublishReport


class EndOfJournalError(Interrupted):
    """Every batch of the journal is trained, and the run it belongs to had more steps to do."""


class JournalRollouts:
    """The decided batches of a journal; implements `services.Rollouts` and waits for nothing."""

    def __init__(self, folder: Path) -> None:
        self.batches: dict[int, tuple[int, ...]] = {}
        """Rollout numbers by step. A step taken again after a restart has the same ones."""
        self._places: dict[int, Location] = {}
        for _, record, place in records(folder):
            if isinstance(record, Taken):
                self.batches[record.step] = record.rollouts
            elif isinstance(record, Trajectory) and record.kind == "train":
                self._places[record.rollout] = place

    @property
    def num_steps(self) -> int:
        """Steps from 0 on whose batches are whole; DataError if the first one is not there any more."""
        if self.batches and (first := min(self.batches)) > 0:
            raise DataError(
                f"expected a journal from step 0 on, found that it begins with step {first}: older files were deleted "
                "by retention; a run that is to be replayed needs a larger journal.max_mb"
            )
        step = 0
        while step in self.batches and all(number in self._places for number in self.batches[step]):
            step += 1
        return step

    def take(self, step: int) -> list[Trajectory]:
        if step >= self.num_steps:
            raise EndOfJournalError(f"the journal ends with step {step - 1}; the state is saved")
        return [load(self._places[number]) for number in sorted(self.batches[step])]

    def published(self, version: int, digest: str) -> None: ...

    def evaluate(self, version: int) -> None:
        raise AssertionError("nobody can evaluate: eval.every is 0 in a replay")

    def evaluation_ready(self, version: int) -> bool:
        return False

    def evaluation(self, version: int, timeout_s: float) -> list[Trajectory]:
        return []

    def snapshot(self) -> bytes:
        """There is no ledger: `orz run` refuses such a checkpoint, `orz replay` continues from it."""
        return b""

    def checkpointed(self, oldest_version: int) -> None: ...


class NoWeights:
    """Nobody fetches."""

    def publish(self, version: int, named: Iterable[tuple[str, Tensor]]) -> PublishReport:
        for _ in named:  # sharded parameters are gathered by all ranks together
            pass
        return PublishReport(version=version, bytes=0, seconds=0.0, digest="")


class Replay:
    """The `outside` of a learner that replays."""

    def __init__(self, rollouts: JournalRollouts) -> None:
        self.rollouts = rollouts

    @contextmanager
    def __call__(
        self, config: Config, trainer: Trainer, identity: Identity, events: EventLog, start: ResumePoint | None
    ) -> Iterator[tuple[Any, Any]]:
        yield self.rollouts, NoWeights()
