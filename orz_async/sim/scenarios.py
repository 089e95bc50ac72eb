"""What `orz sim` runs: small runs with faults every few seconds, and one with thousands of generators."""

from __future__ import annotations

from random import Random

from orz_async.broker.leases import ledger_config
from orz_async.broker.transitions import LedgerConfig
from orz_async.config import BrokerConfig, Config, EvalConfig, SamplingConfig
from orz_async.sim.hub import MakeLedger
from orz_async.sim.models import EngineModel, FaultModel, LearnerModel, LengthModel, NetworkModel
from orz_async.sim.tasks import Contents, Lengths
from orz_async.sim.world import Outcome, Scenario, World, real_ledger

CALM_S = 400.0
"""After the last fault the run must end within so many virtual seconds: a sound one needs a tenth of that."""


def faulty(
    seed: int, *, every_s: float = 2.0, max_lag: int | None = None, window: int | None = None, steps: int = 12
) -> tuple[Scenario, Contents]:
    """A small run in a hostile world; sizes, bound and window are drawn from the seed where they are not given."""
    random = Random(f"scenario {seed}")
    lag = random.randint(0, 4) if max_lag is None else max_lag
    config = Config(
        seed=seed,
        steps=steps,
        broker=BrokerConfig(
            prompts_per_step=random.choice((3, 5, 8)),
            samples_per_prompt=random.choice((1, 2, 4)),
            max_lag=lag,
            window=random.randint(0, lag) if window is None else min(window, lag),
            lease_s=4.0,
            heartbeat_s=0.5,
            max_attempts=3,
        ),
        sampling=SamplingConfig(max_new_tokens=120),
        eval=EvalConfig(every=4, prompts=3),
    )
    ledger = ledger_config(config, num_heldout=3)
    poison = random.choice((0, 11, 23))
    scenario = Scenario(
        seed=seed,
        ledger=ledger,
        generators=random.randint(1, 5),
        engine=EngineModel(
            slots=random.choice((4, 8, 16)),
            queue=random.choice((0, 4, 16)),
            step_s=0.03,
            row_s=0.001,
            prefill_s=0.0005,
            swap_s=0.05,
            fetch_s=0.2,
        ),
        learner=LearnerModel(
            fixed_s=0.2, policy_s=2e-4, publish_s=0.05, critic_s=3e-4, checkpoint_s=0.1, checkpoint_every=3
        ),
        network=NetworkModel(delay_s=0.005, jitter_s=0.05, loss=0.02, repeat=0.05),
        faults=FaultModel(every_s=every_s, until_s=60.0, poison=poison),
        prompt_tokens=8.0,
        eval_every=config.eval.every,
        fsync_s=0.2,
        limit_s=60.0 + CALM_S,
    )
    return scenario, Contents(config, LengthModel(mean=30.0, spread=0.6, longest=120), poison)


def run_faulty(seed: int, *, every_s: float = 2.0, make_ledger: MakeLedger = real_ledger) -> Outcome:
    scenario, tasks = faulty(seed, every_s=every_s)
    return World(scenario, tasks, make_ledger).run()


def large(
    seed: int, *, generators: int, steps: int, rollouts: int, max_lag: int = 1, hashed: bool = True
) -> tuple[Scenario, Lengths]:
    """Many generators and no faults. A lease is looked at once per lease_s, so heartbeats are sent four times in that
    time (the slowest the configuration allows) and when the version changes; the ledger handles every one of them."""
    lengths = LengthModel(mean=1000.0, spread=0.6, longest=8000)
    scenario = Scenario(
        seed=seed,
        ledger=LedgerConfig(
            rollouts_per_step=rollouts,
            samples_per_prompt=64 if rollouts % 64 == 0 else 1,
            max_lag=max_lag,
            total_steps=steps,
            lease_s=480.0,
            heartbeat_s=120.0,
        ),
        generators=generators,
        engine=EngineModel(slots=64, queue=64, step_s=0.02, row_s=0.0002, swap_s=0.5, fetch_s=2.0),
        learner=LearnerModel(policy_s=2e-6, publish_s=1.0, critic_s=4e-6),
        prompt_tokens=100.0,
        hashed=hashed,
    )
    return scenario, Lengths(seed, lengths)
