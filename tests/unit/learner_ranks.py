"""One rank of the tests in test_parallel.py, started as a process of its own: `python learner_ranks.py CASE FOLDER`."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import learner_kit as kit
import torch

from orz_async.config import Config
from orz_async.learner import checkpoint
from orz_async.learner.durable import Identity
from orz_async.learner.export import export
from orz_async.learner.parallel import World, full_parameters
from orz_async.learner.trainer import Trainer

# name -> (rollouts a step, changed learner settings). With 9 sequences and 40 tokens a microbatch, ranks have unequal
# work; one rollout leaves every rank but one with nothing at all.
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "uneven": (9, {"max_tokens": 40, "policy_steps": 2, "critic_steps": 3, "objective": "decoupled"}),
    "sequence": (9, {"max_tokens": 40, "loss_aggregation": "sequence"}),
    "nothing": (1, {"max_tokens": 40}),
}
STEPS = 3


def config_of(case: str, folder: Path) -> Config:
    return kit.config(folder / "model", learner=CASES[case][1] | {"grad_clip": 0.5}, checkpoint={"keep": 9})


def train(trainer: Trainer, case: str, steps: range) -> list[list[float]]:
    """Losses and gradient norms of each step."""
    told = []
    for version in steps:
        step = trainer.begin(kit.rollouts(CASES[case][0], seed=version, version=version, max_lag=1))
        policy, table = trainer.update_policy(step)
        critic = trainer.update_critic(step)
        stats = [*policy.stats.values(), *critic.stats.values(), *table.mismatch(), *map(float, table.histogram.values())]
        told.append(policy.losses + critic.losses + policy.grad_norms + critic.grad_norms + stats)
    return told


def steps(case: str, folder: Path, world: World) -> dict[str, Any]:
    trainer = kit.trainer(config_of(case, folder), world)
    told = train(trainer, case, range(STEPS))
    state = [t.flatten().clone() for m in (trainer.policy, trainer.critic) for _, t in full_parameters(m)]
    checkpoint.save(trainer, run_dir=folder / f"run{world.size}", identity=Identity("run", 1), ledger=b"ledger")
    export(trainer, source=folder / "model", target=folder / f"export{world.size}")
    return {"told": told, "weights": torch.cat(state).tolist()}


def resume(case: str, folder: Path, world: World, source: int) -> dict[str, Any]:
    """Continue what `source` ranks saved."""
    trainer = kit.trainer(dataclasses.replace(config_of(case, folder), seed=0), world)
    found = checkpoint.find(folder / f"run{source}")
    assert found is not None
    checkpoint.restore(trainer, found.path)
    return {"told": train(trainer, case, range(STEPS, STEPS + 1))}


def messages(world: World) -> dict[str, Any]:
    """Rank 0 waits three times as long as any collective may take; the message after that still arrives whole."""
    payload = bytes(range(256)) * 1000
    if world.is_first:
        with world.keepalive(period_s=0.2):
            time.sleep(6.0)
        world.send(3, payload)
        world.send(4)
        return {}
    began = time.monotonic()
    first, second = world.receive(), world.receive()
    assert time.monotonic() - began > 5.0
    return {"kinds": [first.kind, second.kind], "whole": first.payload == payload, "empty": second.payload == b""}


def main() -> None:
    case, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    world = World.start(timeout_s=2.0 if case == "messages" else 60.0)
    name, _, source = case.partition(":")
    if case == "messages":
        told = messages(world)
    elif source:
        told = resume(name, folder, world, int(source))
    else:
        told = steps(name, folder, world)
    (folder / f"{case}-{world.size}-{world.rank}.json").write_text(json.dumps(told))
    world.close()


if __name__ == "__main__":
    main()
