"""The synchronous loop without a broker: the rollouts of a journal, trained in order by nothing but a Trainer."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import torch

from orz_async.broker.segments import read
from orz_async.config import Config
from orz_async.config_toml import load
from orz_async.learner.model import build_critic, load_policy
from orz_async.learner.parallel import World
from orz_async.learner.trainer import Trainer
from orz_async.records import Trajectory


def batches(config: Config, run_dir: Path) -> list[list[Trajectory]]:
    """The rollouts of each step: with no window, number n belongs to step n // B."""
    assert config.broker.window == 0
    by_step: dict[int, dict[int, Trajectory]] = defaultdict(dict)
    for trajectory in read(run_dir / "journal"):
        if trajectory.kind == "train":
            rollouts = by_step[trajectory.rollout // config.broker.rollouts_per_step]
            assert trajectory.rollout not in rollouts, f"rollout {trajectory.rollout} was accepted twice"
            rollouts[trajectory.rollout] = trajectory
    return [[by_step[step][n] for n in sorted(by_step[step])] for step in sorted(by_step)]


def train(run_dir: Path) -> tuple[list[dict[str, list[float]]], Trainer]:
    """The losses of every step, as the learner reports them, and the trainer at the end."""
    config = load(run_dir / "config.toml")
    torch.set_num_threads(config.learner.threads)
    torch.manual_seed(config.seed)
    policy = load_policy(config.model.path)
    trainer = Trainer(config, policy, build_critic(policy, seed=config.seed), World.start())
    losses = []
    for batch in batches(config, run_dir):
        step = trainer.begin(batch)
        policy_report, _ = trainer.update_policy(step)
        losses.append({"policy": policy_report.losses, "value": trainer.update_critic(step).losses})
    return losses, trainer
