"""Every lease a generator holds, and how far it is. What is here is what its Status tells the broker."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum, auto

from orz_async.broker.messages import LeaseRef, Progress
from orz_async.generator.engine import Sample, ref_of
from orz_async.records import Lease, Trajectory, float32_bytes, int32_bytes
from orz_async.reward.grade import Verdict


class Stage(Enum):
    """Moves: EARLY -> ENGINE -> GRADING -> DONE; from each of them a lease can also be dropped."""

    EARLY = auto()  # the weights served are older than its floor
    ENGINE = auto()  # queued or running in the engine
    GRADING = auto()  # sampled, its reward is being decided
    DONE = auto()  # its result was sent and is kept until Ack or Nack


@dataclass(slots=True)
class Held:
    """One lease. `sample` is there from GRADING on, `result` and `sent_at` once it is DONE."""

    lease: Lease
    stage: Stage
    sample: Sample | None = None
    result: Trajectory | None = None
    sent_at: float = float("-inf")


class HeldLeases:
    """Leases by name, in the order of arrival."""

    def __init__(self) -> None:
        self._held: dict[LeaseRef, Held] = {}

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, lease: LeaseRef) -> bool:
        return lease in self._held

    def __iter__(self) -> Iterator[tuple[LeaseRef, Held]]:
        return iter(list(self._held.items()))

    def add(self, lease: Lease) -> None:
        self._held[ref_of(lease)] = Held(lease, Stage.EARLY)

    def get(self, lease: LeaseRef) -> Held | None:
        return self._held.get(lease)

    def __getitem__(self, lease: LeaseRef) -> Held:
        return self._held[lease]

    def drop(self, lease: LeaseRef) -> Held | None:
        return self._held.pop(lease, None)

    def at(self, stage: Stage) -> list[LeaseRef]:
        return [lease for lease, held in self._held.items() if held.stage is stage]

    @property
    def is_evaluating(self) -> bool:
        """A rollout of an evaluation is queued or running."""
        return any(held.lease.kind == "eval" and held.stage is Stage.ENGINE for held in self._held.values())

    def progress(self, engine: Iterable[Progress]) -> tuple[Progress, ...]:
        """Of every lease, those in the engine as it says itself."""
        running = {progress.lease: progress for progress in engine}
        return tuple(running.get(lease) or _at_rest(lease, held) for lease, held in self._held.items())


def _at_rest(lease: LeaseRef, held: Held) -> Progress:
    if held.sample is None:
        return Progress(lease, 0, queued=True)
    return Progress(lease, len(held.lease.prompt) // 4 + len(held.sample.response), queued=False)


def trajectory(sample: Sample, verdict: Verdict, generator: str) -> Trajectory:
    lease = sample.lease
    return Trajectory(
        kind=lease.kind,
        rollout=lease.rollout,
        attempt=lease.attempt,
        prompt_id=lease.prompt_id,
        sample=lease.sample,
        prompt=lease.prompt,
        response=int32_bytes(sample.response),
        logprobs=float32_bytes(sample.logprobs),
        spans=sample.spans,
        reward=verdict.reward,
        finish=sample.finish,
        verdict=verdict.verdict,
        generator=generator,
        generate_s=sample.generate_s,
    )
