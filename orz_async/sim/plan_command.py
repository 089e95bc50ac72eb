"""`orz plan`: sizes the pools before a run, and holds a prediction against a finished one."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from orz_async.config import Config
from orz_async.errors import ConfigError
from orz_async.observe.progress import Progress
from orz_async.sim.measured import Measured, measure, predict
from orz_async.sim.memory import Memory, generator_memory, learner_memory
from orz_async.sim.models import LengthModel
from orz_async.sim.planner import (
    Candidate,
    Forecast,
    Pools,
    coarse_forecast,
    coarsened,
    recommend,
    splits,
)
from orz_async.sim.rates import Device, Rates, assumed, find_device
from orz_async.sim.shape import LENGTHS, Shape, find_shape
from orz_async.sim.tasks import Lengths

DESCRIPTION = """\
Which split of N GPUs into generators and learner, and which lag S? Predicted by simulating the pipeline with the real
ledger; every figure is labelled as simulated, assumed or measured.

  orz plan RECIPE --gpus 8 --shape 7b               rates assumed from the data sheet of an H100
  orz plan RECIPE --gpus 4 --rates-from runs/mine   rates measured in a run; a GPU is then one process of that run
  orz plan --run runs/mine                          the prediction for a finished run, beside what was measured
  orz plan --run runs/b --rates-from runs/a         the same with rates that were measured in another run

Settings of `orz run` may follow: --sampling.max-new-tokens 8000 --generator.slots 256.
"""
EPILOG = """\
exit codes: 0 done; 2 a bad option, or a plan that cannot run; 4 a model that cannot be read
"""
SPREAD = 0.7
MARGIN = 0.9
"""Of a GPU's memory that a plan may use."""


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        "orz plan",
        usage="orz plan RECIPE_OR_TOML --gpus N [options] [--setting value]... | orz plan --run RUN",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    options.add_argument("--gpus", type=int, metavar="N", help="GPUs of both pools together")
    options.add_argument("--gpu", default="h100", metavar="NAME", help="a100, h100 or h200 (%(default)s)")
    options.add_argument("--shape", metavar="NAME", help="0.5b, 1.5b, 7b or 32b instead of the model's config.json")
    options.add_argument("--lags", default="0,1,2,4", metavar="S,S", help="lags to simulate (%(default)s)")
    options.add_argument("--length-mean", type=float, metavar="T", help="mean response length, in tokens")
    options.add_argument(
        "--length-spread", type=float, default=SPREAD, metavar="X", help="of its logarithm: its deviation (%(default)s)"
    )
    options.add_argument("--prompt-tokens", type=float, default=150, metavar="T", help="mean (%(default)g)")
    options.add_argument("--run", type=Path, metavar="RUN", help="folder of a finished run to compare with")
    options.add_argument("--rates-from", type=Path, metavar="RUN", help="folder of a run that was measured")
    return options


def plan(argv: list[str], parse_config: Callable[[list[str]], Config]) -> int:
    """`parse_config` makes a configuration of a recipe and settings, as `orz run` does."""
    options, rest = parser().parse_known_args(argv)
    if options.run is not None:
        if rest or options.gpus:
            raise ConfigError(f"expected `orz plan --run RUN` alone, found also {' '.join(rest) or '--gpus'}")
        print_comparison(options.run, options.rates_from)
        return 0
    if options.gpus is None or options.gpus < 2:
        raise ConfigError(f"expected --gpus N of at least 2, found {options.gpus}; one generates, one learns")
    print_plan(parse_config(rest), options)
    return 0


# A plan.


def print_plan(config: Config, options: argparse.Namespace) -> None:
    lags = _lags(options.lags)
    shape = find_shape(options.shape, config.model.path)
    device = find_device(options.gpu)
    measured = measure(options.rates_from) if options.rates_from else None
    lengths, law = _lengths(config, options, measured)
    prompt_tokens = measured.prompt_tokens if measured else options.prompt_tokens
    context = prompt_tokens + lengths.average / 2
    longest = config.data.max_prompt_tokens + config.sampling.max_new_tokens
    engine_gpus = 1 if measured else _engine_gpus(shape, config, device, prompt_tokens + lengths.average, options.gpus)

    def rates(learner_gpus: int) -> Rates:
        if measured is None:
            return assumed(shape, device, config, engine_gpus=engine_gpus, learner_gpus=learner_gpus, context=context)
        learner = measured.rates.learner
        scaled = replace(learner, policy_s=learner.policy_s / learner_gpus, critic_s=learner.critic_s / learner_gpus)
        return Rates(measured.rates.engine, scaled, measured.rates.notes)

    candidates = _simulate(config, options.gpus, engine_gpus, rates, lengths, prompt_tokens, lags)
    print(f"{shape.name}, {options.gpus} GPUs, {config.broker.rollouts_per_step:,} rollouts a step")
    print("\nassumptions")
    for note in rates(1).notes:
        print(f"  {note}")
    print(f"  lengths    {law}, cut at {config.sampling.max_new_tokens:,}: {lengths.average:,.0f} tokens on average")
    print(f"  prompts    {'measured' if measured else 'assumed'}: {prompt_tokens:,.0f} tokens on average")
    print(f"  slots      {config.generator.slots} sequences an engine, {config.generator.queue} leases queued")
    _, _, k = coarsened(config, Pools(1, rates(1).engine, rates(1).learner))
    if k > 1:
        print(f"  simulation one rollout stands for {k}, an engine's slots and queue are counted so too")
    print("\nsimulated  generators : learner")
    best = recommend(candidates)
    for candidate in candidates:
        split = f"{candidate.generator_gpus:>3} : {candidate.learner_gpus:<3}"
        print(f"  {split} {_line(candidate.forecast)}{'  <--' if candidate is best else ''}")
    if measured is None:
        _print_memory(shape, config, device, best, engine_gpus, longest, prompt_tokens + lengths.average)
    chosen = best.forecast
    print(
        f"\nrecommended (simulated): {best.generator_gpus} of {options.gpus} GPUs generate, {best.learner_gpus} learn, "
        f"--broker.max-lag {chosen.max_lag}: {chosen.step_s:.1f} s a step, {chosen.samples_s:,.0f} samples/s"
    )


def _lags(text: str) -> list[int]:
    try:
        lags = sorted({int(word) for word in text.split(",")})
    except ValueError:
        lags = []
    if not lags or lags[0] < 0:
        raise ConfigError(f"expected --lags such as 0,1,2, found {text!r}")
    return lags


def _lengths(config: Config, options: argparse.Namespace, measured: Measured | None) -> tuple[LengthModel, str]:
    """The law of response lengths, and where it is from."""
    longest = config.sampling.max_new_tokens
    if measured is not None and options.length_mean is None:
        observed = tuple(sorted(length for (kind, _), length in measured.lengths.items() if kind == "train"))
        return LengthModel(longest=longest, observed=observed), "measured"
    if options.length_mean is not None:
        return LengthModel(options.length_mean, options.length_spread, longest), "given: log-normal"
    mean = LENGTHS.get((options.shape or "").lower())
    if mean is None:
        return LengthModel(longest / 3, options.length_spread, longest), "assumed: log-normal, a third of the longest"
    note = f"assumed: log-normal around {mean:,}, half-way through Open-Reasoner-Zero's run (arXiv 2503.24290)"
    return LengthModel(mean, options.length_spread, longest), note


def _engine_gpus(shape: Shape, config: Config, device: Device, context: float, gpus: int) -> int:
    """The least GPUs, a power of two, that hold an engine."""
    number = 1
    while number < gpus and generator_memory(shape, config, number, context).total > MARGIN * device.memory:
        number *= 2
    return number


def _simulate(
    config: Config,
    gpus: int,
    engine_gpus: int,
    rates: Callable[[int], Rates],
    lengths: LengthModel,
    prompt_tokens: float,
    lags: list[int],
) -> list[Candidate]:
    """Every lag for the splits in which neither side is much slower than the other."""
    one = rates(1)
    rollouts = config.broker.rollouts_per_step
    rows = one.engine.slots
    decode_s = rollouts * lengths.average * one.engine.seconds_per_token(rows) / rows
    decode_s += rollouts * prompt_tokens * one.engine.prefill_s
    train_s = rollouts * (lengths.average + prompt_tokens) * (one.learner.policy_s + one.learner.critic_s)
    tasks = Lengths(config.seed, lengths)
    chosen = splits(gpus, engine_gpus, decode_s * engine_gpus, train_s)
    work = [(g, lag) for g in chosen for lag in lags]
    candidates = []
    with Progress() as progress:
        for index, (g, lag) in enumerate(work):
            progress(f"simulating {g} : {gpus - g}, lag {lag}", index / len(work))
            now = rates(gpus - g)
            pools = Pools(g // engine_gpus, now.engine, now.learner)
            found = coarse_forecast(config, pools, tasks, prompt_tokens=prompt_tokens, max_lag=lag)
            candidates.append(Candidate(g, gpus - g, found))
    return candidates


def _print_memory(
    shape: Shape, config: Config, device: Device, best: Candidate, engine_gpus: int, longest: float, context: float
) -> None:
    print(f"\nmemory a GPU, GiB of {device.memory:g} (estimated from the shape)")
    learner = learner_memory(shape, config, best.learner_gpus)
    print(f"  learner    {_parts(learner, device)}")
    if learner.total > MARGIN * device.memory:
        print("             lower --learner.max-tokens (not below one sequence), or give the learner more GPUs")
    print(f"  generator  {_parts(generator_memory(shape, config, engine_gpus, context), device)} at mean length")
    full = generator_memory(shape, config, engine_gpus, longest)
    print(f"  generator  {_parts(full, device)} if every slot is full")


def _parts(memory: Memory, device: Device) -> str:
    parts = ", ".join(f"{name} {size:.1f}" for name, size in memory.parts.items() if size >= 0.05)
    warning = "  DOES NOT FIT" if memory.total > MARGIN * device.memory else ""
    return f"{memory.total:.1f} = {parts}{warning}"


def _line(found: Forecast) -> str:
    idle = ", ".join(f"{cause} {share:.0%}" for cause, share in found.generator_idle.items() if share >= 0.005)
    lag = " ".join(f"{lag}:{share:.0%}" for lag, share in found.lag.items() if share >= 0.005)
    return (
        f"S={found.max_lag}  {found.step_s:8.2f} s a step {found.samples_s:8.1f} samples/s  learner idle "
        f"{found.learner_idle:4.0%}  generators idle {sum(found.generator_idle.values()):4.0%}"
        f"{f' ({idle})' if idle else ''}  lag {lag}"
    )


# A finished run.


def print_comparison(run_dir: Path, rates_from: Path | None) -> None:
    run = measure(run_dir)
    source = measure(rates_from) if rates_from else run
    config = run.config
    predicted = predict(run, source.rates)
    print(f"{run_dir}: {run.num_generators} generators, 1 learner, S = {config.broker.max_lag}, {run.steps} steps")
    print("\nassumptions")
    for note in source.rates.notes:
        print(f"  {note}")
    print(f"  lengths    measured: each rollout is as long as it was in {run_dir}")
    print("  cores      not modelled: what processes take from one another is in the rates, on average")
    if rates_from is None:
        print("  The rates are those of this very run: what is tested is the model of the pipeline, not the rates.")
    print(f"\n{'':24}{'simulated':>12}{'measured':>12}{'ratio':>8}")
    found = run.found
    for name, ours, theirs in (
        ("step, s", predicted.step_s, found.step_s),
        ("samples/s", predicted.samples_s, found.samples_s),
        ("sampled tokens/s", predicted.tokens_s, found.tokens_s),
    ):
        print(f"{name:24}{ours:>12.2f}{theirs:>12.2f}{ours / theirs:>8.2f}")
    _print_shares("learner idle", {"rollouts": predicted.learner_idle}, {"rollouts": found.learner_idle})
    _print_shares("generators idle", predicted.generator_idle, found.generator_idle)
    _print_shares("lag", predicted.lag, found.lag)


def _print_shares(title: str, ours: Mapping[Any, float], theirs: Mapping[Any, float]) -> None:
    left = {str(name): share for name, share in ours.items()}
    right = {str(name): share for name, share in theirs.items()}
    for name in sorted({*left, *right}):
        print(f"{f'{title}, {name}':24}{left.get(name, 0.0):>12.1%}{right.get(name, 0.0):>12.1%}")
