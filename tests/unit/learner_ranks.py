"""The work of test_parallel.py on one rank; `python learner_ranks.py FOLDER` is one of several."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import learner_kit as kit
import torch
import torch.distributed as dist

from orz_async.config import Config
from orz_async.learner import checkpoint, loading
from orz_async.learner.durable import Identity
from orz_async.learner.export import export
from orz_async.learner.hf_directory import inspect
from orz_async.learner.model import load_models, load_policy, meta_models
from orz_async.learner.parallel import World, full_parameters
from orz_async.learner.sample import response_rows, sampled_members
from orz_async.learner.trainer import Trainer

# name -> (rollouts a step, changed learner settings). With 9 sequences and 40 tokens a microbatch, ranks have unequal
# work; one rollout leaves every rank but one with nothing at all.
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "uneven": (9, {"max_tokens": 40, "policy_steps": 2, "critic_steps": 3, "objective": "decoupled"}),
    "sequence": (9, {"max_tokens": 40, "loss_aggregation": "sequence"}),
    "nothing": (1, {"max_tokens": 40}),
    # Two copies of the weights on four ranks, one rank with nothing; every layer is computed twice.
    "hybrid": (
        3,
        {
            "max_tokens": 40,
            "shard_ranks": 2,
            "activation_checkpointing": True,
            "offload_optimizer": True,
            "offload_critic": True,
            "mismatch_mask": "token",
            "mismatch_mask_above": 4.0,
        },
    ),
    "grpo": (9, {"max_tokens": 40, "estimator": "grpo", "loss_aggregation": "sequence"}),
}
STEPS = 3


RESUMED = range(STEPS, STEPS + 1)


def config_of(case: str, folder: Path, size: int) -> Config:
    learner = CASES[case][1] | {"grad_clip": 0.5}
    if size == 1:
        learner = learner | {"shard_ranks": 0}
    return kit.config(folder / "model", learner=learner, checkpoint={"keep": 9})


def trainer_of(case: str, folder: Path, world: World) -> Trainer:
    """In float64, norms included: what is left of the differences between numbers of ranks is the algorithm's."""
    return kit.trainer(config_of(case, folder, world.size), world, dtype=torch.float64, exact=True)


def train(trainer: Trainer, case: str, steps: range) -> list[float]:
    """Everything the updates say of themselves, on rollouts that the model may have sampled: ratios are near 1."""
    base = load_policy(trainer.config.model.path)
    told: list[float] = []
    for version in steps:
        made = kit.rollouts(CASES[case][0], seed=version, version=version, max_lag=1)
        step = trainer.begin(kit.sampled_by(base, made, noise=0.1))
        policy, table = trainer.update_policy(step)
        critic = trainer.update_critic(step)
        told += policy.losses + critic.losses + policy.grad_norms + critic.grad_norms + list(policy.stats.values())
        told += [*critic.stats.values(), *table.mismatch(), *map(float, table.histogram.values())]
        # What the sample shows of a rollout does not depend on which rank trained it; "not computed" is told as 7.
        rows = response_rows(step.batch, sampled_members(trainer.config, step.batch))
        told += [*table.log_ratios_R[rows].tolist(), *table.gaps_R[rows].nan_to_num(nan=7.0).tolist()]
    return told


def from_start(case: str, folder: Path, world: World) -> dict[str, Any]:
    trainer = trainer_of(case, folder, world)
    told = train(trainer, case, range(STEPS))
    modules = [m for m in (trainer.policy, trainer.critic) if m is not None]
    state = [t.flatten().clone() for m in modules for _, t in full_parameters(m)]
    return {"told": told, "weights": torch.cat(state).tolist(), "held": write(trainer, case, folder)}


def write(trainer: Trainer, case: str, folder: Path) -> dict[str, int]:
    """Save and export; the most bytes that lived meanwhile beside this rank's shards, and what to compare them with."""
    world, modules = trainer.world, [m for m in (trainer.policy, trainer.critic) if m is not None]
    optimizers = [o for o in (trainer.policy_optimizer, trainer.critic_optimizer) if o is not None]
    own = [p.detach() for m in modules for p in m.parameters()] + [t for o in optimizers for _, t in o.state()]
    folder_of_run, ledger = run_dir(case, folder, world.size), b"ledger"
    saved = kit.Peak().grown(
        own, lambda: checkpoint.save(trainer, run_dir=folder_of_run, identity=Identity("run", 1), ledger=ledger)
    )
    target = folder / f"{case}-export{world.size}"
    exported = kit.Peak().grown(own, lambda: export(trainer, source=folder / "model", target=target))
    largest = max(t.nbytes for t in own)
    return {"save": saved, "export": exported, "tensor": largest, "random": world.size * torch.get_rng_state().nbytes}


def run_dir(case: str, folder: Path, size: int) -> Path:
    return folder / f"{case}-run{size}"


def resumed(case: str, folder: Path, world: World, source: int) -> dict[str, Any]:
    """Continue what `source` ranks saved."""
    trainer = trainer_of(case, folder, world)
    found = checkpoint.find(run_dir(case, folder, source))
    assert found is not None
    assert found.manifest.world == source
    with counted_reads() as reads:
        checkpoint.restore(trainer, found.path)
    return {"read": sum(reads.values()), "told": train(trainer, case, RESUMED)}


def from_files(folder: Path, world: World) -> dict[str, Any]:
    """The base model straight into shards: what rank 0 gathers, and what each rank read of each tensor."""
    with counted_reads() as reads:
        directory = inspect(folder / "model")
        policy, critic = meta_models(directory, seed=1)
        assert critic is not None
        for module in (policy, critic):
            world.shard(module, module.layers, dtype=torch.bfloat16, ranks=2 if world.size == 4 else 0)
        load_models(policy, critic, directory)
    whole = dict(kit.random_causal_lm().named_parameters())
    equal = all(torch.equal(t, whole[name]) for name, t in full_parameters(policy))
    score = dict(full_parameters(critic))["score.weight"].tolist()
    return {
        "equal": equal,
        "score": score,
        "read": sum(reads.values()),
        "whole": sum(p.numel() for p in whole.values()),
    }


@contextmanager
def counted_reads() -> Iterator[dict[str, int]]:
    """Elements that this rank reads of weight and checkpoint files, by shape."""
    reads: dict[str, int] = {}
    copy_slice = loading.copy_slice

    def counted(parameter: torch.Tensor, stored: Any) -> None:
        copy_slice(parameter, Counted(stored, reads, str(tuple(parameter.shape))))

    loading.copy_slice = counted
    try:
        yield reads
    finally:
        loading.copy_slice = copy_slice


class Counted:
    def __init__(self, stored: Any, reads: dict[str, int], name: str) -> None:
        self.stored, self.reads, self.name = stored, reads, name

    def __getitem__(self, index: Any) -> torch.Tensor:
        part: torch.Tensor = self.stored[index]
        self.reads[self.name] = self.reads.get(self.name, 0) + part.numel()
        return part


def messages(world: World) -> dict[str, Any]:
    """Rank 0 waits longer than any collective may take; the messages after that still arrive whole."""
    patient = World(world.rank, world.size, world.device, dist.new_group(backend="gloo", timeout=timedelta(seconds=3)))
    payload = bytes(range(256)) * 1000
    if world.is_first:
        with patient.keepalive(period_s=0.2):
            time.sleep(5.0)
        patient.send(3, payload)
        patient.send(4)
        return {}
    began = time.monotonic()
    first, second = patient.receive(), patient.receive()
    return {
        "waited": time.monotonic() - began > 4.0,
        "kinds": [first.kind, second.kind],
        "payloads": [first.payload == payload, second.payload == b""],
    }


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    world = World.start(timeout_s=60.0)
    told = {case: from_start(case, folder, world) for case in CASES}
    for source in [int(n) for n in sys.argv[2:]]:
        told[f"resumed from {source}"] = resumed("uneven", folder, world, source)
    told["files"] = from_files(folder, world)
    if world.size == 2:
        told["messages"] = messages(world)
    (folder / f"rank{world.rank}of{world.size}.json").write_text(json.dumps(told))
    world.close()


if __name__ == "__main__":
    main()
