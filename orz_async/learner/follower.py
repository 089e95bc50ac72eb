"""Ranks other than 0: no outside world, the same collectives in the same order."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path

import msgspec
import torch

from orz_async.errors import PeerLostError
from orz_async.learner import checkpoint
from orz_async.learner.durable import Identity
from orz_async.learner.export import export
from orz_async.learner.parallel import full_state
from orz_async.learner.trainer import Trainer
from orz_async.observe.events import Timeline
from orz_async.observe.process import dump_stacks
from orz_async.records import Trajectory


class Command(IntEnum):
    """What rank 0 tells the others; kind 0 is the keepalive."""

    RESUME = 1  # name of the checkpoint to load, or nothing
    GATHER = 2  # the policy is being published
    LEARN = 3  # a step; with publish_early its policy is gathered between the updates of policy and critic
    SAVE = 4
    EXPORT = 5
    END = 6


_decoder = msgspec.msgpack.Decoder(list[Trajectory])


def encode_rollouts(trajectories: Sequence[Trajectory]) -> bytes:
    return msgspec.msgpack.encode(trajectories)


def follow(trainer: Trainer, timeline: Timeline, *, run_dir: Path) -> None:
    """Serve rank 0 until it ends.

    consumes  Message from rank 0   waits for  rank 0, which sends a keepalive while it waits for something itself
    ends      on END, or with the error of a collective if rank 0 is gone
    """
    with trainer.world.told():
        _follow(trainer, timeline, run_dir)


def _follow(trainer: Trainer, timeline: Timeline, run_dir: Path) -> None:
    nobody = Identity(run_id="", epoch=0)
    while True:
        try:
            with timeline.state("wait_rank0"):
                kind, payload = trainer.world.receive()
        except PeerLostError as error:
            dump_stacks(error)
            raise
        match Command(kind):
            case Command.LEARN:
                _learn(trainer, timeline, _decoder.decode(payload))
            case Command.GATHER:
                _gather(trainer)
            case Command.SAVE:
                checkpoint.save(trainer, run_dir=run_dir, identity=nobody, ledger=b"")
            case Command.EXPORT:
                export(trainer, source=run_dir, target=run_dir)
            case Command.END:
                return
            case Command.RESUME:
                raise AssertionError("RESUME comes before the loop")


def _learn(trainer: Trainer, timeline: Timeline, trajectories: list[Trajectory]) -> None:
    with timeline.state("values"):
        step = trainer.begin(trajectories)
    with timeline.state("policy"):
        policy, _ = trainer.update_policy(step)
    if trainer.config.learner.publish_early:  # else rank 0 asks for it after the step
        _gather(trainer)
    with timeline.state("critic"):
        critic = trainer.update_critic(step)
    trainer.conclude(policy, critic)


def _gather(trainer: Trainer) -> None:
    deque(full_state(trainer.policy, getattr(torch, trainer.config.model.dtype)), maxlen=0)
