"""What the simulator assumes of the machines. Seconds and tokens; no randomness of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Literal

_NORMAL = NormalDist()


@dataclass(frozen=True, slots=True)
class EngineModel:
    """A decode step costs `step_s` and `row_s` for each running sequence, and yields a token for each."""

    slots: int = 64
    queue: int = 64
    """Leases held beyond the slots."""
    step_s: float = 0.02
    row_s: float = 0.0
    prefill_s: float = 0.0
    """Per prompt token, and per token whose KV is computed anew after a swap; nothing is decoded meanwhile."""
    swap_s: float = 0.0
    """Pause in which new weights replace the old ones."""
    fetch_s: float = 0.0
    """From the announcement of a version until it can be swapped in; decoding goes on."""
    keep_kv: bool = False

    def seconds_per_token(self, rows: int) -> float:
        """Of one sequence among `rows`."""
        return self.step_s + self.row_s * rows


@dataclass(frozen=True, slots=True)
class LearnerModel:
    """One learner step: `policy` runs before the weights are published, `critic` after. Tokens count prompts too."""

    fixed_s: float = 0.0
    policy_s: float = 0.0
    """Per token: values, advantages, policy update."""
    publish_s: float = 0.0
    critic_s: float = 0.0
    """Per token: critic update and audit."""
    checkpoint_s: float = 0.0
    checkpoint_every: int = 50


@dataclass(frozen=True, slots=True)
class LengthModel:
    """Response lengths: a log-normal law, cut at `longest`, or what was observed. Quantile in, length out.

    Lengths of reasoning models have a long right tail; their logarithm is close to normal. One rollout has one length,
    whatever generator samples it and however often.
    """

    mean: float = 100.0
    spread: float = 0.6
    """Standard deviation of the logarithm."""
    longest: int = 8000
    observed: tuple[int, ...] = ()
    """Sorted; takes the place of the law."""

    def length(self, quantile: float) -> int:
        """Of a quantile in (0, 1)."""
        if self.observed:
            return self.observed[int(quantile * len(self.observed))]
        middle = math.log(self.mean) - self.spread**2 / 2
        return min(self.longest, max(1, round(math.exp(middle + self.spread * _NORMAL.inv_cdf(quantile)))))

    @property
    def average(self) -> float:
        """What is really sampled: the cut takes some away."""
        points = 1000
        return sum(self.length((i + 0.5) / points) for i in range(points)) / points


@dataclass(frozen=True, slots=True)
class NetworkModel:
    delay_s: float = 0.0
    jitter_s: float = 0.0
    """Added to each message by itself, uniformly from 0: so messages overtake one another."""
    loss: float = 0.0
    repeat: float = 0.0
    """Fractions of messages that vanish, and that arrive twice. TCP does neither within a connection; reconnections
    do both, and the promises of the ledger do not rest on TCP."""


Fault = Literal[
    "kill_generator",
    "freeze_generator",
    "slow_generator",
    "garbage",
    "engine_failure",
    "drain",
    "join",
    "partition",
    "kill_learner",
    "cut_power",
    "freeze_learner",
]

WEIGHTS: dict[Fault, float] = {
    "kill_generator": 3,
    "freeze_generator": 3,
    "slow_generator": 1,
    "garbage": 3,
    "engine_failure": 2,
    "drain": 1,
    "join": 1,
    "partition": 3,
    "kill_learner": 1.5,
    "cut_power": 0.5,
    "freeze_learner": 1,
}


@dataclass(frozen=True, slots=True)
class FaultModel:
    every_s: float = 0.0
    """Mean virtual seconds from one fault to the next; 0: none."""
    until_s: float = math.inf
    """Afterwards all is well, and the run must finish."""
    weights: dict[Fault, float] = field(default_factory=lambda: dict(WEIGHTS))
    generator_back_s: tuple[float, float] = (0.2, 6.0)
    """From the death of a generator until another takes its place: uniform between these."""
    learner_back_s: tuple[float, float] = (0.2, 3.0)
    damaged: float = 0.2
    """Of the learner's restarts, the fraction that finds its newest checkpoint damaged."""
    poison: int = 0
    """Of so many prompts one makes every engine fail that samples it; 0: none."""
