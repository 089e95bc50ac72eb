"""What is in leases and results: nothing but lengths, or real leases and trajectories that are validated."""

from __future__ import annotations

from functools import lru_cache
from random import Random

import msgspec
import numpy as np

from orz_async.broker.leases import LeaseMaker, seed_of
from orz_async.broker.messages import LeaseRef
from orz_async.broker.transitions import Terms
from orz_async.broker.validate import problem_of
from orz_async.config import Config
from orz_async.records import Lease, Prompt, Span, Trajectory, float32_bytes, int32_bytes
from orz_async.sim.engine import Work
from orz_async.sim.hub import Result
from orz_async.sim.models import LengthModel

VOCABULARY = 128
NUM_PROMPTS = 50


class Lengths:
    """Rollouts that are only as long as they are: for thousands of generators, and for planning."""

    def __init__(self, seed: int, model: LengthModel) -> None:
        self.seed = seed
        # One table of quantiles, so that drawing a length is a look-up.
        self._table = tuple(model.length((i + 0.5) / 4096) for i in range(4096))

    def prompt_id(self, index: int) -> str:
        return f"p{index}"

    def leases(self, terms: tuple[Terms, ...]) -> tuple[Work, ...]:
        return terms

    def length_of(self, work: Work) -> int:
        return self._table[seed_of(self.seed, work.kind, work.rollout) >> 51]

    def fails(self, work: Work) -> str:
        return ""

    def result(self, name: str, work: Work, length: int, spans: tuple[Span, ...], seconds: float) -> Result:
        return Result(LeaseRef(work.kind, work.rollout, work.attempt), length, spans)

    def problem(self, name: str, result: Result, terms: Terms, published: int) -> str | None:
        return None if result.spans[0].version >= terms.version_floor else "sampled by a version below the floor"


class _Prompts:
    def __init__(self) -> None:
        tokens = [int32_bytes([1 + i % 7] * (4 + i % 9)) for i in range(NUM_PROMPTS)]
        self._prompts = [Prompt(prompt_id=f"p{i}", tokens=tokens[i], answer=str(i)) for i in range(NUM_PROMPTS)]

    def prompt(self, index: int) -> Prompt:
        return self._prompts[index % NUM_PROMPTS]


class Contents(Lengths):
    """Real leases out, real trajectories back, through the real validation."""

    def __init__(self, config: Config, model: LengthModel, poison: int) -> None:
        super().__init__(config.seed, model)
        prompts = _Prompts()
        self.maker = LeaseMaker(config, prompts, [prompts.prompt(i) for i in range(config.eval.prompts)])
        self._poison = poison

    def prompt_id(self, index: int) -> str:
        return self.maker.prompt_id(index)

    def leases(self, terms: tuple[Terms, ...]) -> tuple[Work, ...]:
        return tuple(self.maker.lease(one) for one in terms)

    def fails(self, work: Work) -> str:
        assert isinstance(work, Lease)
        poisoned = self._poison and int(work.prompt_id[1:]) % self._poison == self.seed % self._poison
        return "it crashes the engine" if poisoned else ""

    def result(self, name: str, work: Work, length: int, spans: tuple[Span, ...], seconds: float) -> Result:
        assert isinstance(work, Lease)
        length = min(length, work.sampling.max_new_tokens)
        response, logprobs = _arrays(length)
        trajectory = Trajectory(
            kind=work.kind,
            rollout=work.rollout,
            attempt=work.attempt,
            prompt_id=work.prompt_id,
            sample=work.sample,
            prompt=work.prompt,
            response=response,
            logprobs=logprobs,
            spans=spans,
            reward=float(work.seed % 2),
            finish="length" if length == work.sampling.max_new_tokens else "stop",
            verdict="correct" if work.seed % 2 else "wrong",
            generator=name,
            generate_s=seconds,
        )
        return result_of(trajectory)

    def problem(self, name: str, result: Result, terms: Terms, published: int) -> str | None:
        return problem_of(
            result.content,
            self.maker.lease(terms),
            generator=name,
            vocab_size=VOCABULARY,
            published=published,
        )


def result_of(trajectory: Trajectory) -> Result:
    ref = LeaseRef(trajectory.kind, trajectory.rollout, trajectory.attempt)
    return Result(ref, trajectory.num_response_tokens, trajectory.spans, trajectory)


def made_up(ref: LeaseRef, generator: str) -> Result:
    """A result for a lease that its sender was never given."""
    return result_of(
        Trajectory(
            kind=ref.kind,
            rollout=ref.rollout,
            attempt=ref.attempt,
            prompt_id="p0",
            sample=0,
            prompt=int32_bytes([1]),
            response=int32_bytes([1]),
            logprobs=float32_bytes([0.0]),
            spans=(Span(0, 0),),
            reward=1.0,
            finish="stop",
            verdict="correct",
            generator=generator,
            generate_s=0.0,
        )
    )


@lru_cache(maxsize=1024)
def _arrays(length: int) -> tuple[bytes, bytes]:
    return int32_bytes(np.arange(length) % VOCABULARY), float32_bytes(np.full(length, -1.0))


def corrupted(result: Result, random: Random) -> Result:
    """A result as a broken or hostile generator might send it."""
    good: Trajectory = result.content
    far = (Span(1_000_000, 0),)
    changes: list[dict[str, object]] = [
        {"response": int32_bytes([VOCABULARY + 7] * result.length)},
        {"response": good.response[:-1]},
        {"response": b""},
        {"logprobs": float32_bytes([float("nan")] * result.length)},
        {"logprobs": float32_bytes([0.5] * result.length)},
        {"logprobs": good.logprobs[4:]},
        {"reward": float("nan")},
        {"reward": 7.0},
        {"spans": far},
        {"spans": ()},
        {"spans": (Span(-1, 0),)},
        {"spans": (Span(good.spans[0].version, 1),)},
        {"attempt": good.attempt + 1},
        {"rollout": good.rollout + 1_000_000},
        {"rollout": -1},
        {"kind": "eval" if good.kind == "train" else "train"},
        {"prompt": b"\0\0\0\0"},
        {"generator": "somebody else"},
        {"verdict": ""},
        {"generate_s": float("inf")},
    ]
    return result_of(msgspec.structs.replace(good, **random.choice(changes)))
