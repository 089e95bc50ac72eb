"""`orz sim`: deterministic simulation of the ledger under faults, and of many generators."""

from __future__ import annotations

import argparse
import gc
import hashlib
import time
from collections import Counter

from orz_async.errors import ConfigError
from orz_async.observe.progress import Progress
from orz_async.sim.scenarios import large, run_faulty
from orz_async.sim.world import Outcome, World

DESCRIPTION = """\
Run the real ledger in a simulated world: virtual time, modelled engines, learner and network, every fault from a seed.
The same seed is the same history, event by event; its hash is printed.

  orz sim                     200 small runs with a fault every two virtual seconds on average
  orz sim --seeds 1000        more of them
  orz sim --seed 68           one of them, with what happened in it
  orz sim --scale             no faults: 10,000 generators, 100 steps of 8,192 rollouts

An independent oracle checks every decision: each attempt ends once, each rollout is trained once in the history of the
living weights, no token is older than the bound allows, no slot is lost, the run ends. All figures are simulated.
"""
EPILOG = """\
faults: generators killed, frozen (for ever too), slowed, drained, joined, sending garbage; engines that fail; prompts
that crash every engine; partitions; messages delayed, overtaken, lost and repeated; the learner killed, frozen, or
without power, and restored from its newest checkpoint or the one before, and the journal.

exit codes: 0 no violation; 1 a violation (a bug of ours); 2 a bad option
"""


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        "orz sim", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    faulty = options.add_argument_group("runs with faults")
    faulty.add_argument("--seeds", type=int, default=200, metavar="N", help="so many histories (%(default)s)")
    faulty.add_argument("--first", type=int, default=0, metavar="SEED", help="the first of them (%(default)s)")
    faulty.add_argument("--seed", type=int, metavar="SEED", help="this one only, in detail")
    faulty.add_argument(
        "--every", type=float, default=2.0, metavar="S", help="mean virtual seconds between faults (%(default)s)"
    )
    scale = options.add_argument_group("many generators, no faults")
    scale.add_argument("--scale", action="store_true", help="simulate one large run instead")
    scale.add_argument("--generators", type=int, default=10_000, metavar="N", help="(%(default)s)")
    scale.add_argument("--steps", type=int, default=100, metavar="N", help="(%(default)s)")
    scale.add_argument("--rollouts", type=int, default=8192, metavar="B", help="per step (%(default)s)")
    scale.add_argument("--max-lag", type=int, default=1, metavar="S", help="(%(default)s)")
    return options


def sim(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    for name in ("seeds", "generators", "steps", "rollouts"):
        if getattr(options, name) < 1:
            raise ConfigError(f"expected --{name} of at least 1, found {getattr(options, name)}")
    if options.every < 0 or options.max_lag < 0:
        raise ConfigError("expected --every and --max-lag of at least 0")
    if options.scale:
        return run_large(options)
    if options.seed is not None:
        return run_one(options.seed, options.every)
    return run_many(range(options.first, options.first + options.seeds), options.every)


def run_one(seed: int, every_s: float) -> int:
    outcome = run_faulty(seed, every_s=every_s)
    print(f"seed {seed} (simulated): {outcome.seconds:.1f} virtual seconds, {outcome.events:,} events")
    print(f"faults     {_counts(outcome.faults)}; the learner restarted {outcome.restarts} times")
    print(f"attempts   ended early: {_counts(outcome.ended)}")
    print(f"lag        tokens by lag: {_counts(outcome.lag_tokens)}")
    print(f"history    {outcome.hash}")
    print(f"violation  {outcome.violation or 'none'}")
    return int(bool(outcome.violation))


def run_many(seeds: range, every_s: float) -> int:
    began = time.process_time()
    faults: Counter[str] = Counter()
    ended: Counter[str] = Counter()
    digest = hashlib.blake2b(digest_size=8)
    restarts = rollouts = 0
    virtual_s = 0.0
    violations = []
    with Progress() as progress:
        for seed in seeds:
            outcome: Outcome = run_faulty(seed, every_s=every_s)
            faults += outcome.faults
            ended += outcome.ended
            restarts += outcome.restarts
            rollouts += len(outcome.lengths)
            virtual_s += outcome.seconds
            digest.update(outcome.hash.encode())
            if outcome.violation:
                violations.append(seed)
                print(f"seed {seed}: {outcome.violation}\n    orz sim --seed {seed} --every {every_s:g} repeats it")
            progress(f"history {seed}", (seed - seeds.start + 1) / len(seeds))
    spent = time.process_time() - began
    print(f"{len(seeds):,} histories of {virtual_s:,.0f} virtual seconds (simulated), in {spent:.1f} s of one core")
    print(f"faults     {sum(faults.values()):,}: {_counts(faults)}")
    print(f"restarts   {restarts:,} of the learner, from checkpoint and journal")
    print(f"attempts   ended early {sum(ended.values()):,}: {_counts(ended)}")
    print(f"rollouts   {rollouts:,} trained")
    print(f"history    {digest.hexdigest()} (all of them)")
    print(f"violations {len(violations)}")
    return int(bool(violations))


def run_large(options: argparse.Namespace) -> int:
    began = time.process_time()
    scenario, tasks = large(
        0,
        generators=options.generators,
        steps=options.steps,
        rollouts=options.rollouts,
        max_lag=options.max_lag,
    )
    # Millions of live objects and hardly a cycle among them: looking for cycles would take a fifth of the time.
    gc.disable()
    try:
        outcome = World(scenario, tasks).run()
    finally:
        gc.enable()
    spent = time.process_time() - began
    rollouts = options.steps * options.rollouts
    print(f"{options.generators:,} generators, {options.steps:,} steps of {options.rollouts:,} rollouts (simulated)")
    print(
        f"time       {outcome.seconds:,.0f} virtual seconds in {spent:.1f} s of one core: "
        f"{spent / rollouts * 1e6:.0f} us a rollout"
    )
    print(f"ledger     {outcome.events:,} events")
    print(f"lag        tokens by lag: {_counts(outcome.lag_tokens)}")
    print(f"history    {outcome.hash}")
    print(f"violation  {outcome.violation or 'none'}")
    return int(bool(outcome.violation))


def _counts(counter: Counter[str] | Counter[int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in sorted(counter.items(), key=str) if count) or "none"
