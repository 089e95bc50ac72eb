"""`python -m tests.chaos.saves --kills N`: kill -9 in the middle of saving a checkpoint, then load what is there.

Every second kill hits a file operation of the save (the first, the second, ... in turn), every other one a random
moment of it, which also reaches the writing of tensors. The saving process is forked: what is tested is the disk.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

import learner_kit as kit
import torch

from orz_async.learner import checkpoint
from orz_async.learner.durable import Identity
from orz_async.learner.trainer import Trainer

OPERATIONS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}
IDENTITY = Identity(run_id="saves", epoch=1)


def fill(trainer: Trainer, step: int) -> None:
    """Weights that say which step they are of."""
    with torch.no_grad():
        for module in (trainer.policy, trainer.critic):
            for i, parameter in enumerate(module.parameters()):
                parameter.fill_(step + i / 1024)
    trainer.num_steps = step


def is_whole(trainer: Trainer, found: checkpoint.Found) -> bool:
    """Load it, and look at every value."""
    checkpoint.restore(trainer, found.path)
    step = found.manifest.step
    same = all(
        bool((parameter == step + i / 1024).all())
        for module in (trainer.policy, trainer.critic)
        for i, parameter in enumerate(module.parameters())
    )
    return same and found.ledger() == f"ledger {step}".encode() and trainer.num_steps == step


def save(trainer: Trainer, run_dir: Path, step: int) -> None:
    fill(trainer, step)
    checkpoint.save(trainer, run_dir=run_dir, identity=IDENTITY, ledger=f"ledger {step}".encode())


def child(trainer: Trainer, run_dir: Path, step: int, at: int) -> int:
    """Fork a process that saves; `at`: the file operation it dies before, 0: none. Returns its pid."""
    if pid := os.fork():
        return pid
    seen = [0]

    def watch(event: str, args: tuple[object, ...]) -> None:
        if event in OPERATIONS and str(args[0]).startswith(str(run_dir)):
            seen[0] += 1
            if seen[0] == at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    try:
        save(trainer, run_dir, step)
        (run_dir / "operations").write_text(str(seen[0]))
    finally:
        os._exit(0)


def ordeal(root: Path, kills: int, seed: int = 0) -> str:
    """Kill that many saves; AssertionError if one leaves nothing that loads, or loses a checkpoint that was there."""
    config = kit.config(kit.save_model(root / "model"), checkpoint={"keep": 2})
    trainer, reader = kit.trainer(config), kit.trainer(config)
    run_dir, rng = root / "run", random.Random(seed)
    save(trainer, run_dir, 1)
    began = time.monotonic()
    os.waitpid(child(trainer, run_dir, 2, at=0), 0)
    save_s, operations = time.monotonic() - began, int((run_dir / "operations").read_text())
    newest, loadable, outcomes = 2, 0, Counter[str]()
    for i in range(10 * kills):
        at = 1 + (i // 2) % operations if i % 2 == 0 else 0
        pid = child(trainer, run_dir, newest + 1, at)
        if not at:
            time.sleep(rng.uniform(0.0, save_s))
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        died = os.WIFSIGNALED(status)
        found = checkpoint.find(run_dir)
        assert found is not None, f"kill {i}: no checkpoint is left"
        assert found.manifest.step in (newest, newest + 1), f"kill {i}: step {newest} is lost"
        assert is_whole(reader, found), f"kill {i}: {found.path} loads other values than were saved"
        if died:  # else the kill came after the save
            loadable += 1
            outcomes["the new one" if found.manifest.step > newest else "the one before"] += 1
            outcomes["at a file operation" if at else "at a random moment"] += 1
        newest = found.manifest.step
        if loadable == kills:
            break
    told = ", ".join(f"{name} {n}" for name, n in outcomes.items())
    return (
        f"checkpoints: {loadable} of {kills} loadable after kill -9 during save, {operations} file operations ({told})"
    )


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m tests.chaos.saves", description=__doc__)
    options.add_argument("--kills", type=int, default=100)
    given = options.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="orz-saves-") as root:
        print(ordeal(Path(root), given.kills))


if __name__ == "__main__":
    main()
