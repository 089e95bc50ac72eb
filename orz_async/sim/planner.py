"""What a split of the machines would give: simulated with the real ledger, for every lag that is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import msgspec

from orz_async.broker.leases import ledger_config
from orz_async.config import Config
from orz_async.errors import ConfigError
from orz_async.sim.engine import Work
from orz_async.sim.models import EngineModel, LearnerModel, LengthModel
from orz_async.sim.tasks import Lengths
from orz_async.sim.world import Outcome, Scenario, World

_MEASURED_STEPS = 5
"""Learner steps that count at least, after those that fill the pipeline."""
MOST_ROLLOUTS = 2048
"""Of a simulated step; where there are more, one stands for several."""
_LEAST_SLOTS = 16
_WORTH = 0.97
"""A smaller lag or pool is preferred when it gives this much of the best."""


@dataclass(frozen=True, slots=True)
class Pools:
    generators: int
    engine: EngineModel
    learner: LearnerModel


def coarsened(config: Config, pools: Pools, most: int | None = None) -> tuple[Config, Pools, int]:
    """The same pipeline with k rollouts in one, and k, so that a step has about `most`; k = 1 where it is small anyway.

    A row then costs as much as k rows, a token as much as k tokens, and an engine has 1/k of the slots: times stay, but
    queues are coarser, and a length rarer than one in B / k is met in fewer steps. Leases live long, for nobody
    fails here and heartbeats would only cost time.
    """
    rollouts, slots = config.broker.rollouts_per_step, pools.engine.slots
    k = next(
        k
        for k in range(max(1, rollouts // (most or MOST_ROLLOUTS)), 0, -1)
        if (rollouts % k == 0 and k * _LEAST_SLOTS <= slots) or k == 1
    )
    lease_s = max(config.broker.lease_s, 120.0)
    broker = replace(
        config.broker,
        prompts_per_step=rollouts // k,
        samples_per_prompt=1,
        lease_s=lease_s,
        heartbeat_s=lease_s / 16,
    )
    engine = replace(
        pools.engine,
        slots=slots // k,
        queue=pools.engine.queue // k,
        row_s=pools.engine.row_s * k,
        prefill_s=pools.engine.prefill_s * k,
    )
    learner = replace(pools.learner, policy_s=pools.learner.policy_s * k, critic_s=pools.learner.critic_s * k)
    return replace(config, broker=broker), Pools(pools.generators, engine, learner), k


@dataclass(frozen=True, slots=True)
class Forecast:
    """Steady state; simulated."""

    max_lag: int
    step_s: float
    samples_s: float
    tokens_s: float
    """Sampled, by all engines."""
    learner_idle: float
    generator_idle: dict[str, float]
    """By cause."""
    lag: dict[int, float]
    """Share of the trained tokens by lag."""


class KnownLengths(Lengths):
    """Lengths of rollouts that were observed; the law for the others."""

    def __init__(self, seed: int, model: LengthModel, known: Mapping[tuple[str, int], int]) -> None:
        super().__init__(seed, model)
        self._known = known

    def length_of(self, work: Work) -> int:
        return self._known.get((work.kind, work.rollout)) or super().length_of(work)


def forecast(
    config: Config,
    pools: Pools,
    lengths: Lengths,
    *,
    prompt_tokens: float,
    max_lag: int,
    num_heldout: int = 0,
    steps: int = 0,
) -> Forecast:
    """Simulate `steps` steps (default: enough to fill the pipeline and a few more) and count the last ones."""
    window = min(config.broker.window, max_lag)
    warm = max_lag + 2 if not steps else min(2, steps - 1)
    # Where generators wait, lag + 1 steps come in one burst: only whole bursts give their rate.
    burst = max_lag + 1
    steps = steps or warm + -(-_MEASURED_STEPS // burst) * burst
    ledger = msgspec.structs.replace(
        ledger_config(config, num_heldout), max_lag=max_lag, window=window, total_steps=steps + max_lag + 1
    )
    scenario = Scenario(
        seed=config.seed,
        ledger=ledger,
        generators=pools.generators,
        engine=pools.engine,
        learner=pools.learner,
        prompt_tokens=prompt_tokens,
        eval_every=config.eval.every if num_heldout else 0,
        status_s=config.broker.lease_s / 4,
        stop_after=steps,
        hashed=False,
    )
    outcome = World(scenario, lengths).run()
    if outcome.violation:
        raise ConfigError(f"these pools cannot run this recipe: {outcome.violation}")
    return _steady(outcome, warm, ledger.rollouts_per_step, max_lag)


def coarse_forecast(config: Config, pools: Pools, lengths: Lengths, *, prompt_tokens: float, max_lag: int) -> Forecast:
    """`forecast` of the coarsened pipeline: seconds instead of minutes for thousands of rollouts a step."""
    small, fewer, k = coarsened(config, pools)
    found = forecast(small, fewer, lengths, prompt_tokens=prompt_tokens, max_lag=max_lag)
    return replace(found, samples_s=found.samples_s * k, tokens_s=found.tokens_s * k)


def _steady(outcome: Outcome, warm: int, rollouts: int, max_lag: int) -> Forecast:
    ends, waits = outcome.step_ends, outcome.step_waits
    seconds, steps = ends[-1] - ends[warm - 1], len(ends) - warm
    first, last = outcome.marks[warm - 1], outcome.marks[-1]
    lives = (last.generator_s - first.generator_s) or 1.0
    tokens = sum(outcome.lag_tokens.values())
    return Forecast(
        max_lag=max_lag,
        step_s=seconds / steps,
        samples_s=rollouts * steps / seconds,
        tokens_s=(last.tokens - first.tokens) / seconds,
        learner_idle=sum(waits[warm : len(ends)]) / seconds,
        generator_idle={cause: (last.waits[cause] - first.waits[cause]) / lives for cause in last.waits},
        lag={lag: count / tokens for lag, count in sorted(outcome.lag_tokens.items())},
    )


@dataclass(frozen=True, slots=True)
class Candidate:
    generator_gpus: int
    learner_gpus: int
    forecast: Forecast


def splits(gpus: int, engine_gpus: int, generator_s: float, learner_s: float, most: int = 4) -> list[int]:
    """GPUs for generation worth simulating: around where both sides take the same time.

    `generator_s` and `learner_s`: seconds a step takes on one GPU of that side alone.
    """
    possible = range(engine_gpus, gpus, engine_gpus)
    if not possible:
        raise ConfigError(
            f"expected at least {engine_gpus + 1} GPUs, {engine_gpus} for an engine and one to learn, found {gpus}"
        )
    by_balance = sorted(possible, key=lambda g: max(generator_s / g, learner_s / (gpus - g)))
    return sorted(by_balance[:most])


def recommend(candidates: list[Candidate]) -> Candidate:
    """The fastest; among those nearly as fast the least stale, then the one that leaves the learner most."""
    best = max(c.forecast.samples_s for c in candidates)
    good = [c for c in candidates if c.forecast.samples_s >= _WORTH * best]
    return min(good, key=lambda c: (c.forecast.max_lag, -c.forecast.samples_s))
