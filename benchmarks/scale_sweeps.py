"""Simulated: pools of 8 to 1,024 GPUs, lags 0 to 4, lengths of published runs, failures. No figure here is measured.

The rates come from the caller: a data sheet with stated efficiencies (`assumed`), or a run (`measured_rates`). What is
real is the ledger: every simulation runs `orz_async.broker.ledger`. Learner GPUs are assumed to scale linearly.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import msgspec

from benchmarks.protocol import Row, row
from orz_async.broker.leases import ledger_config
from orz_async.config import Config
from orz_async.recipes import RECIPES
from orz_async.sim.measured import Measured
from orz_async.sim.models import Fault, FaultModel, LengthModel, NetworkModel
from orz_async.sim.planner import Forecast, Pools, coarse_forecast, coarsened
from orz_async.sim.rates import Rates, assumed, find_device
from orz_async.sim.shape import KNOWN
from orz_async.sim.tasks import Lengths
from orz_async.sim.world import Scenario, World

SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
LAGS = (0, 1, 2, 4)
WEAK_SIZES = (8, 32, 128, 1024)
SHARES = (1 / 4, 3 / 8, 1 / 2)
"""Of the GPUs, those that generate. The fastest share is shown: S = 0 has its own, S = 1 decides for all others."""
ROLLOUTS_A_GPU = 128
"""Weak scaling: 64 GPUs have the published 8,192 a step."""

LENGTHS_7B = {0: 478, 120: 757, 240: 1211, 360: 1420, 480: 1827, 600: 2391, 726: 2552}
"""Learner step -> mean response length in Open-Reasoner-Zero's 7B run (arXiv:2503.24290, its curve of response length
against training step, digitised)."""
MIDDLE = 360
SPREAD = 0.7
"""Of the logarithm of the lengths: assumed, only means were published. 3 in 1,000 then reach the limit of 8,000."""
PROMPT_TOKENS = 150.0

FAILURES: dict[str, tuple[float, bool]] = {
    "no failure": (0.0, False),
    "10 generators an hour": (10.0, False),
    "1 GPU an hour": (1.0, True),
    "10 GPUs an hour": (10.0, True),
}
"""Failures an hour, and whether they hit the learner's GPUs too, which all stop when one does."""
FAILURE_STEPS = 30
FAILURE_SEEDS = (0, 1)
FAILURE_ROLLOUTS = 1024
"""Simulated a step, each for 8: the whole run is simulated here, not a few steps of it."""
BACK_S = {"generator": (60.0, 120.0), "learner": (120.0, 300.0)}
"""Assumed: until a daemon or the learner is started again, with its model loaded."""
LIMIT_S = 48 * 3600.0
"""A simulated run that takes longer gets nowhere."""

Make = Callable[[int], Rates]
"""Rates of one engine, and of a learner of so many GPUs."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What is trained, with whose rates; `label` names both in every row."""

    label: str
    config: Config
    lengths: LengthModel
    prompt_tokens: float
    rates: Make

    def at(self, gpus: int, share: float, lag: int) -> Point:
        """Simulate `gpus`, about `share` of which generate, one an engine."""
        generators = min(gpus - 1, max(1, round(share * gpus)))
        rates = self.rates(gpus - generators)
        pools = Pools(generators, rates.engine, rates.learner)
        lengths = Lengths(self.config.seed, self.lengths)
        found = coarse_forecast(self.config, pools, lengths, prompt_tokens=self.prompt_tokens, max_lag=lag)
        return Point(gpus, generators / gpus, generators, lag, found)

    def best(self, gpus: int, lag: int, shares: Iterable[float] = SHARES) -> Point:
        return max((self.at(gpus, share, lag) for share in shares), key=lambda point: point.found.samples_s)

    def best_of_each(self, gpus: int, lags: Sequence[int]) -> list[Point]:
        """For every lag; pools are sized for a lag of none or one."""
        best = {lag: self.best(gpus, lag) for lag in {min(lag, 1) for lag in lags}}
        return [best[lag] if lag in best else self.at(gpus, best[1].share, lag) for lag in lags]

    def with_rollouts(self, rollouts: int) -> Workload:
        samples = self.config.broker.samples_per_prompt
        broker = replace(self.config.broker, prompts_per_step=rollouts // samples)
        return replace(self, config=replace(self.config, broker=broker))


@dataclass(frozen=True, slots=True)
class Point:
    """One simulated pair of pools."""

    gpus: int
    share: float
    generators: int
    lag: int
    found: Forecast

    def row(self, name: str, variant: str, **notes: float) -> Row:
        found = self.found
        return row(
            name,
            variant,
            "simulated samples/s",
            [found.samples_s],
            gpus=self.gpus,
            lag=self.lag,
            generator_gpus=self.generators,
            step_s=found.step_s,
            learner_idle=found.learner_idle,
            generator_idle=found.generator_idle,
            **notes,
        )


def orz_7b(mean: float = LENGTHS_7B[MIDDLE], device: str = "h100") -> Workload:
    """The published 7B settings on GPUs of a data sheet; nobody has measured these rates."""
    config = RECIPES["orz_7b_64gpu"]()
    lengths = LengthModel(mean, SPREAD, config.sampling.max_new_tokens)
    context = PROMPT_TOKENS + lengths.average / 2

    def rates(learner_gpus: int) -> Rates:
        return assumed(
            KNOWN["7b"], find_device(device), config, engine_gpus=1, learner_gpus=learner_gpus, context=context
        )

    return Workload(f"7b, assumed {device.upper()} rates", config, lengths, PROMPT_TOKENS, rates)


def measured_rates(run: Measured) -> Workload:
    """The settings, lengths and rates of a run, one process of it in the place of a GPU."""

    def rates(learner_gpus: int) -> Rates:
        learner = run.rates.learner
        scaled = replace(learner, policy_s=learner.policy_s / learner_gpus, critic_s=learner.critic_s / learner_gpus)
        return Rates(run.rates.engine, scaled, run.rates.notes)

    observed = tuple(sorted(length for (kind, _), length in run.lengths.items() if kind == "train"))
    lengths = LengthModel(longest=run.config.sampling.max_new_tokens, observed=observed)
    return Workload("tiny_cpu, measured CPU rates", run.config, lengths, run.prompt_tokens, rates)


def strong(work: Workload, sizes: Sequence[int] = SIZES, lags: Sequence[int] = LAGS) -> list[Row]:
    """The same rollouts a step on more and more GPUs."""
    points = [point for gpus in sizes for point in work.best_of_each(gpus, lags)]
    return _scaling(f"strong scaling, {work.label}", points)


def weak(
    work: Workload, a_gpu: int = ROLLOUTS_A_GPU, sizes: Sequence[int] = WEAK_SIZES, lags: Sequence[int] = LAGS
) -> list[Row]:
    """As many rollouts a GPU and step on more and more GPUs, divided as is best for the smallest pools of that lag."""
    points = []
    for first in work.with_rollouts(a_gpu * sizes[0]).best_of_each(sizes[0], lags):
        points += [
            first,
            *(work.with_rollouts(a_gpu * gpus).at(gpus, first.share, first.lag) for gpus in sizes[1:]),
        ]
    return _scaling(f"weak scaling, {work.label}", sorted(points, key=lambda p: (p.gpus, p.lag)))


def _scaling(name: str, points: list[Point]) -> list[Row]:
    """`efficiency`: samples/s a GPU, as a fraction of those of the smallest pools at the same lag."""
    rate = {(p.gpus, p.lag): p.found.samples_s for p in points}
    first, least = points[0].gpus, points[0].lag
    return [
        p.row(
            name,
            f"{p.gpus:,} GPUs, S = {p.lag}",
            over_least_lag=p.found.samples_s / rate[p.gpus, least],
            efficiency=p.found.samples_s / p.gpus / (rate[first, p.lag] / first),
        )
        for p in points
    ]


def by_length(gpus: int = 64, lags: Sequence[int] = (0, 1)) -> list[Row]:
    """What a lag of one gives while responses grow as in the published run."""
    rows = []
    for step, mean in LENGTHS_7B.items():
        work = orz_7b(mean)
        points = work.best_of_each(gpus, lags)
        rows += [
            p.row(
                f"as lengths grow, {work.label}",
                f"step {step}, {mean:,} tokens, S = {p.lag}",
                over_least_lag=p.found.samples_s / points[0].found.samples_s,
            )
            for p in points
        ]
    return rows


def failures(
    work: Workload,
    gpus: int = 64,
    lags: Sequence[int] = (0, 1),
    kinds: Sequence[str] = tuple(FAILURES),
    seeds: Sequence[int] = FAILURE_SEEDS,
    steps: int = FAILURE_STEPS,
) -> list[Row]:
    """Rollouts trained a second, from the start to the last step, when GPUs fail: a generator's is replaced and its
    leases are lent again; one of the learner's takes it back to its last checkpoint, ten steps apart, and the journal
    gives it the same batches again."""
    rows: list[Row] = []
    for lag in lags:
        share = work.best(gpus, lag).share
        calm = 0.0
        for kind in kinds:
            runs = [_with_failures(work, round(share * gpus), gpus, lag, kind, seed, steps) for seed in seeds]
            values = [run.samples_s for run in runs]
            calm = calm or statistics.median(values)
            rows.append(
                row(
                    f"failures, {work.label}",
                    f"{gpus} GPUs, S = {lag}, {kind}",
                    "simulated samples/s",
                    values,
                    of_first=statistics.median(values) / calm,
                    failures=[run.failures for run in runs],
                    learner_restarts=[run.restarts for run in runs],
                    virtual_hours=[run.seconds / 3600 for run in runs],
                )
            )
    return rows


@dataclass(frozen=True, slots=True)
class Survived:
    """A simulated run with failures, from its start to its last step."""

    samples_s: float
    seconds: float
    failures: int
    restarts: int


def _with_failures(work: Workload, generators: int, gpus: int, lag: int, kind: str, seed: int, steps: int) -> Survived:
    rates = work.rates(gpus - generators)
    config, pools, k = coarsened(work.config, Pools(generators, rates.engine, rates.learner), FAILURE_ROLLOUTS)
    scenario = Scenario(
        seed=seed,
        ledger=msgspec.structs.replace(ledger_config(config, 0), max_lag=lag, total_steps=steps, heartbeat_s=2.0),
        generators=generators,
        engine=pools.engine,
        learner=pools.learner,
        # Messages take time: only then do generators look whether the learner is still the one they knew.
        network=NetworkModel(delay_s=0.001),
        faults=_fault_model(generators, gpus, kind),
        prompt_tokens=work.prompt_tokens,
        fsync_s=1.0,
        limit_s=LIMIT_S,
        hashed=False,
    )
    outcome = World(scenario, Lengths(seed, work.lengths)).run()
    if outcome.violation:
        raise RuntimeError(f"expected a run that ends, S = {lag}, {kind}, seed {seed}; found: {outcome.violation}")
    trained = k * steps * config.broker.rollouts_per_step
    return Survived(trained / outcome.seconds, outcome.seconds, sum(outcome.faults.values()), outcome.restarts)


def _fault_model(generators: int, gpus: int, kind: str) -> FaultModel:
    an_hour, learner_too = FAILURES[kind]
    weights: dict[Fault, float] = {"kill_generator": generators}
    if learner_too:
        weights["kill_learner"] = gpus - generators
    return FaultModel(
        every_s=3600 / an_hour if an_hour else 0.0,
        weights=weights,
        generator_back_s=BACK_S["generator"],
        learner_back_s=BACK_S["learner"],
        damaged=0.0,
    )
