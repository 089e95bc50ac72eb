"""What a run says of its machines: rates for the simulator, and the figures that a prediction is held against."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from orz_async.broker.segments import records
from orz_async.config import Config
from orz_async.config_toml import load
from orz_async.errors import ConfigError
from orz_async.observe.events import IDLE_PREFIX
from orz_async.observe.history import History
from orz_async.observe.summary import read_history
from orz_async.observe.tail import Event, Tail
from orz_async.records import Trajectory
from orz_async.sim.models import EngineModel, LearnerModel, LengthModel
from orz_async.sim.planner import Forecast, KnownLengths, Pools, forecast
from orz_async.sim.rates import Rates

SKIPPED = 2
"""First steps that are not counted: caches fill, pages are touched, the pipeline starts."""
_BEFORE, _AFTER = ("values", "policy"), ("critic", "audit")
"""States of the learner that grow with the tokens, before and after it publishes early."""
_BUSY = 0.5
"""Of a second: where the engine does not count its steps, one with less generation says little of its speed, for how
many sequences ran is known at its ends only."""


@dataclass(frozen=True, slots=True)
class Measured:
    config: Config
    rates: Rates
    lengths: dict[tuple[str, int], int]
    """Response tokens by kind and rollout, as the journal has them."""
    prompt_tokens: float
    """Mean."""
    num_generators: int
    num_heldout: int
    found: Forecast
    """The run's own figures, in the form of a prediction: measured, not simulated."""
    steps: int


def measure(run_dir: Path) -> Measured:
    if not (run_dir / "config.toml").exists():
        raise ConfigError(f"expected the folder of a run, found no {run_dir}/config.toml; check the path")
    config = load(run_dir / "config.toml")
    events = Tail(run_dir / "events").poll()
    history = read_history(run_dir)
    steps = [history.steps[step] for step in sorted(history.steps)]
    if len(steps) < SKIPPED + 2 or len(history.lives) != 1:
        raise ConfigError(
            f"expected a run of at least {SKIPPED + 2} steps that was never resumed in {run_dir}, found {len(steps)} "
            f"steps and {len(history.lives)} starts; measure another run"
        )
    lengths, prompt_tokens = _lengths(run_dir)
    generators = {str(e["process"]) for e in events if e["kind"] == "throughput"}
    if not generators:
        raise ConfigError(f"expected events of generators in {run_dir}/events, found none; was the run that short?")
    if not lengths:
        raise ConfigError(
            f"expected trajectories in {run_dir}/journal, found none; they were deleted, or never written"
        )
    learner = _learner(steps[SKIPPED:], prompt_tokens, config, history)
    engine = _engine(events, config)
    notes = (
        f"engine     measured in {run_dir}: {engine.step_s * 1e3:.2f} ms a decode step and "
        f"{engine.row_s * 1e6:.0f} us for each sequence in it, grading included",
        f"learner    measured in {run_dir}: {learner.policy_s * 1e6:.0f} us a token before the weights are published, "
        f"{learner.critic_s * 1e6:.0f} after",
        f"weights    measured in {run_dir}: fetch {engine.fetch_s * 1e3:.1f} ms, swap {engine.swap_s * 1e3:.1f} ms",
    )
    return Measured(
        config=config,
        rates=Rates(engine, learner, notes),
        lengths=lengths,
        prompt_tokens=prompt_tokens,
        num_generators=len(generators),
        num_heldout=int(config.eval.prompts if history.evals else 0),
        found=_found(steps, events, config),
        steps=len(steps),
    )


def predict(run: Measured, rates: Rates) -> Forecast:
    """The run simulated with `rates`, its own or another's: its settings, generators and lengths are known."""
    config = run.config
    observed = tuple(sorted(length for (kind, _), length in run.lengths.items() if kind == "train"))
    engine = replace(rates.engine, slots=config.generator.slots, queue=config.generator.queue)
    return forecast(
        config,
        Pools(run.num_generators, engine, rates.learner),
        KnownLengths(config.seed, LengthModel(observed=observed), run.lengths),
        prompt_tokens=run.prompt_tokens,
        max_lag=config.broker.max_lag,
        num_heldout=run.num_heldout,
        steps=run.steps,
    )


def _lengths(run_dir: Path) -> tuple[dict[tuple[str, int], int], float]:
    lengths: dict[tuple[str, int], int] = {}
    prompts = 0
    for _, record, _ in records(run_dir / "journal"):
        if isinstance(record, Trajectory):
            lengths[(record.kind, record.rollout)] = record.num_response_tokens
            prompts += record.num_prompt_tokens
    return lengths, prompts / max(1, len(lengths))


def _learner(steps: list[Event], prompt_tokens: float, config: Config, history: History) -> LearnerModel:
    tokens = sum(e["tokens_trained"] + e["rollouts"] * prompt_tokens for e in steps)
    spent: dict[str, float] = {}
    for event in steps:
        for state, seconds in event["seconds"].items():
            spent[state] = spent.get(state, 0.0) + seconds
    before, after = (sum(spent.get(state, 0.0) for state in states) for states in (_BEFORE, _AFTER))
    if not config.learner.publish_early:
        before, after = before + after, 0.0
    return LearnerModel(
        fixed_s=spent.get("other", 0.0) / len(steps),
        policy_s=before / tokens,
        publish_s=spent.get("publish", 0.0) / len(steps),
        critic_s=after / tokens,
        checkpoint_s=float(history.checkpoint.get("seconds") or 0.0),
        checkpoint_every=config.checkpoint.every,
    )


def _engine(events: list[Event], config: Config) -> EngineModel:
    weights = [e for e in events if e["kind"] == "weights"][1:] or [{"fetch_s": 0.0, "swap_s": 0.0}]
    step_s, row_s = _decode(events)
    return EngineModel(
        slots=config.generator.slots,
        queue=config.generator.queue,
        step_s=step_s,
        row_s=row_s,
        swap_s=_mean([float(e["swap_s"]) for e in weights]),
        fetch_s=_mean([float(e["fetch_s"]) for e in weights]),
        keep_kv=config.generator.keep_kv,
    )


def _decode(events: list[Event]) -> tuple[float, float]:
    """Seconds of a decode step = step_s + row_s * rows: least squares over the seconds in which an engine was busy.

    Prefill, and KV computed anew, are in these seconds, so they are in the rates.
    """
    samples = [sample for name in sorted({e["process"] for e in events}) for sample in _seconds_of(events, name)]
    if not samples:
        raise ConfigError("expected seconds in which a generator was busy, found none; measure a longer run")
    tokens = sum(weight for _, _, weight in samples)
    rows = sum(rows * weight for rows, _, weight in samples) / tokens
    step_s = sum(step * weight for _, step, weight in samples) / tokens
    spread = sum(weight * (r - rows) ** 2 for r, _, weight in samples)
    slope = sum(weight * (r - rows) * (s - step_s) for r, s, weight in samples) / spread if spread else 0.0
    # Neither part can be negative; noise can make it look so.
    slope = min(max(slope, 0.0), step_s / rows)
    return step_s - slope * rows, slope


def _seconds_of(events: list[Event], name: str) -> list[tuple[float, float, float]]:
    """(rows, seconds of a decode step, tokens) of each busy stretch between two reports of one generator."""
    own = [e for e in events if e["process"] == name]
    busy = [(e["t"] - sum(e["seconds"].values()), e["t"], e["seconds"]) for e in own if e["kind"] == "timeline"]
    samples = []
    for before, after in pairwise(e for e in own if e["kind"] == "throughput"):
        tokens = after["tokens"] - before["tokens"]
        spent = sum(_share(stretch, before["t"], after["t"]) for stretch in busy)
        steps = (after.get("steps") or 0) - (before.get("steps") or 0)
        if steps > 0:
            samples.append((tokens / steps, spent / steps, float(tokens)))
            continue
        rows = (before["running"] + after["running"]) / 2
        if tokens > 0 and rows >= 1 and spent > _BUSY * (after["t"] - before["t"]):
            samples.append((rows, spent * rows / tokens, float(tokens)))
    return samples


def _share(stretch: tuple[float, float, dict[str, Any]], start: float, end: float) -> float:
    """Seconds of generating and grading that fall into [start, end]."""
    begin, until, seconds = stretch
    inside = min(until, end) - max(begin, start)
    if inside <= 0 or until <= begin:
        return 0.0
    return float(sum(seconds.get(state, 0.0) for state in ("generate", "grade"))) * inside / (until - begin)


def _found(steps: list[Event], events: list[Event], config: Config) -> Forecast:
    counted = steps[SKIPPED:]
    start, end = steps[SKIPPED - 1]["t"], counted[-1]["t"]
    seconds = end - start
    histogram: dict[int, float] = {}
    for event in steps:
        for lag, count in event["lag_histogram"].items():
            histogram[int(lag)] = histogram.get(int(lag), 0.0) + float(count)
    total = sum(histogram.values())
    return Forecast(
        max_lag=config.broker.max_lag,
        step_s=seconds / len(counted),
        samples_s=sum(e["rollouts"] for e in counted) / seconds,
        tokens_s=_sampled(events, start, end) / seconds,
        learner_idle=sum(e["seconds"].get("wait_rollouts", 0.0) for e in counted) / seconds,
        generator_idle=_idle(events, start, end),
        lag={lag: count / total for lag, count in sorted(histogram.items())},
    )


def _sampled(events: list[Event], start: float, end: float) -> float:
    """Tokens of all generators between two moments."""
    tokens = 0.0
    for name in {e["process"] for e in events if e["kind"] == "throughput"}:
        own = [e for e in events if e["process"] == name and e["kind"] == "throughput"]
        for before, after in pairwise(own):
            inside = min(after["t"], end) - max(before["t"], start)
            if inside > 0:
                tokens += (after["tokens"] - before["tokens"]) * inside / (after["t"] - before["t"])
    return tokens


def _idle(events: list[Event], start: float, end: float) -> dict[str, float]:
    """Cause -> share of the time between two moments that the generators were idle, on average."""
    total, idle = 0.0, {"leases": 0.0, "weights": 0.0}
    for event in events:
        if event["kind"] != "timeline" or not str(event["process"]).startswith("generator-"):
            continue
        spent = sum(event["seconds"].values())
        inside = min(event["t"], end) - max(event["t"] - spent, start)
        if inside <= 0:
            continue
        total += inside
        for state, seconds in event["seconds"].items():
            if state.startswith(IDLE_PREFIX):
                cause = state.removeprefix(IDLE_PREFIX)
                idle[cause] = idle.get(cause, 0.0) + seconds * inside / spent
    return {cause: seconds / total for cause, seconds in idle.items()} if total else {}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
