"""One of two ranks of a learner whose rank 1 ends in the middle of a step: `python learner_endings.py FOLDER HOW`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import learner_kit as kit
import torch

from orz_async.learner.parallel import World
from orz_async.observe.process import run_main


def main() -> None:
    folder, how = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    world = World.start(timeout_s=60.0)
    trainer = kit.trainer(kit.config(folder / "model", learner={"max_tokens": 40}), world)
    layer = trainer.policy.layers[1]

    def end(*_: Any) -> None:
        if how == "out of memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        if how == "bug":
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
        os.kill(os.getpid(), signal.SIGKILL)

    with world.told():
        step = trainer.begin(kit.rollouts(9))
        if world.rank == 1:
            # Between the collectives of two layers, where the other rank is already waiting for the next one.
            layer.register_forward_pre_hook(end)
        trainer.update_policy(step)
    raise AssertionError("rank 1 ended, and nobody noticed")


if __name__ == "__main__":
    run_main(main, process=f"learner-{os.environ['RANK']}")
