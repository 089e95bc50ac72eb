"""Checkpoints are whole or absent, continue bit for bit, and a damaged one is named and passed over."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import learner_kit as kit
import pytest
import torch

from orz_async.config import Config
from orz_async.errors import CheckpointError, ConfigError, DiskError
from orz_async.learner import checkpoint
from orz_async.learner.compatibility import changes
from orz_async.learner.durable import Identity, begin_epoch, lock, replace_file
from orz_async.learner.trainer import Trainer

IDENTITY = Identity(run_id="run", epoch=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kit.save_model(tmp_path_factory.mktemp("model"))


def train(trainer: Trainer, steps: int) -> None:
    for version in range(trainer.num_steps, trainer.num_steps + steps):
        step = trainer.begin(kit.rollouts(6, seed=version, version=version, max_lag=1))
        trainer.update_policy(step)
        trainer.update_critic(step)


def save(trainer: Trainer, run_dir: Path, ledger: bytes = b"ledger") -> Path:
    return checkpoint.save(trainer, run_dir=run_dir, identity=IDENTITY, ledger=ledger)


def state(trainer: Trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for m in (trainer.policy, trainer.critic) for p in m.parameters()]


def three_checkpoints(config: Config, run_dir: Path) -> Trainer:
    trainer = kit.trainer(config)
    for _ in range(3):
        train(trainer, 1)
        save(trainer, run_dir)
    return trainer


def test_continuation_is_bit_exact(model: Path, tmp_path: Path) -> None:
    config = kit.config(model)
    straight = kit.trainer(config)
    train(straight, 5)

    first = kit.trainer(config)
    train(first, 2)
    torch.rand(7)
    path = save(first, tmp_path, b"the ledger as it was")
    random_then = torch.rand(3)
    resumed = kit.trainer(config)
    found = checkpoint.find(tmp_path)
    assert found is not None
    assert (found.path, found.ledger(), found.damaged) == (path, b"the ledger as it was", [])
    checkpoint.restore(resumed, found.path)
    assert torch.equal(torch.rand(3), random_then)
    assert resumed.num_steps == 2
    train(resumed, 3)
    assert all(torch.equal(a, b) for a, b in zip(state(straight), state(resumed), strict=True))


def test_before_the_first_step(model: Path, tmp_path: Path) -> None:
    config = kit.config(model)
    save(kit.trainer(config), tmp_path)
    found = checkpoint.find(tmp_path)
    assert found is not None
    resumed = kit.trainer(config)
    checkpoint.restore(resumed, found.path)
    straight = kit.trainer(config)
    train(resumed, 2)
    train(straight, 2)
    assert all(torch.equal(a, b) for a, b in zip(state(straight), state(resumed), strict=True))


def test_manifest_and_latest(model: Path, tmp_path: Path) -> None:
    path = save(kit.trainer(kit.config(model)), tmp_path)
    manifest = checkpoint.verify(path)
    assert (manifest.step, manifest.version, manifest.epoch, manifest.world, manifest.run_id) == (0, 0, 1, 1, "run")
    assert (tmp_path / "checkpoints" / "LATEST").read_text() == "step-00000000\n"
    assert {p.name for p in path.iterdir()} == {*manifest.files, "manifest.json"}
    assert manifest.config["learner"]["lr"] == 1e-3


def test_only_the_newest_are_kept(model: Path, tmp_path: Path) -> None:
    three_checkpoints(kit.config(model, checkpoint={"keep": 2}), tmp_path)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["LATEST", "step-00000002", "step-00000003"]


def test_a_damaged_newer_checkpoint_never_costs_the_sound_one(model: Path, tmp_path: Path) -> None:
    config = kit.config(model, checkpoint={"keep": 1})
    trainer = kit.trainer(config)
    save(trainer, tmp_path)
    folder = tmp_path / "checkpoints"
    (folder / "step-00000009").mkdir()
    train(trainer, 1)
    save(trainer, tmp_path)
    found = checkpoint.find(tmp_path)
    assert found is not None
    assert found.path.name == "step-00000001"
    assert not (folder / "step-00000000").exists()


def test_the_ledgers_before_are_those_of_sound_checkpoints(model: Path, tmp_path: Path) -> None:
    trainer = kit.trainer(kit.config(model, checkpoint={"keep": 3}))
    for name in (b"one", b"two", b"three"):
        train(trainer, 1)
        save(trainer, tmp_path, name)
    found = checkpoint.find(tmp_path)
    assert found is not None
    assert checkpoint.older_ledgers(found) == (b"two", b"one")
    flip(tmp_path / "checkpoints" / "step-00000002" / "ledger.bin")
    assert checkpoint.older_ledgers(found) == (b"one",)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "one bit": (lambda p: flip(p / "critic_optimizer.safetensors"), "does not have the sha256"),
    "truncated": (lambda p: os.truncate(p / "policy.safetensors", 100), "has 100 bytes"),
    "file gone": (lambda p: (p / "ledger.bin").unlink(), "No such file"),
    "manifest gone": (lambda p: (p / "manifest.json").unlink(), "no manifest.json"),
    "manifest cut": (lambda p: os.truncate(p / "manifest.json", 50), "cannot be read"),
    "another layout": (
        lambda p: (p / "manifest.json").write_text(
            (p / "manifest.json").read_text().replace('"layout": 1', '"layout": 9')
        ),
        "found layout 9",
    ),
    "a name that leaves the folder": (
        lambda p: (p / "manifest.json").write_text((p / "manifest.json").read_text().replace("ledger.bin", "../../x")),
        "expected layout",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_are_walked_back(model: Path, tmp_path: Path, damage: str) -> None:
    break_it, told = DAMAGES[damage]
    three_checkpoints(kit.config(model, checkpoint={"keep": 3}), tmp_path)
    folder = tmp_path / "checkpoints"
    for name in ("step-00000003", "step-00000002"):
        break_it(folder / name)
    found = checkpoint.find(tmp_path)
    assert found is not None
    assert found.path.name == "step-00000001"
    assert [name in line for name, line in zip(("00000003", "00000002"), found.damaged, strict=True)] == [True, True]
    assert all(told in line for line in found.damaged), found.damaged
    break_it(folder / "step-00000001")
    with pytest.raises(CheckpointError, match="3 damaged") as caught:
        checkpoint.find(tmp_path)
    assert told in str(caught.value)


def test_nothing_saved_is_nothing_to_resume(tmp_path: Path) -> None:
    assert checkpoint.find(tmp_path) is None


def test_another_model_is_refused(model: Path, tmp_path: Path) -> None:
    path = save(kit.trainer(kit.config(model)), tmp_path)
    other = kit.save_model(tmp_path / "other", "llama")
    with pytest.raises(CheckpointError, match=r"found other tensors.*lm_head"):
        checkpoint.restore(kit.trainer(kit.config(other)), path)


def test_full_disk_leaves_the_earlier_checkpoint(model: Path, tmp_path: Path) -> None:
    trainer = kit.trainer(kit.config(model))
    first = save(trainer, tmp_path)
    train(trainer, 1)
    root = tmp_path / "checkpoints"
    # A file in the place of the temporary directory: creating it fails as on a disk without space.
    (root / f".saving-00000001-{os.getpid()}").write_text("")
    with pytest.raises(DiskError, match="earlier checkpoints are untouched"):
        save(trainer, tmp_path)
    found = checkpoint.find(tmp_path)
    assert found is not None
    assert found.path == first


def test_settings_that_change_the_math_are_refused(model: Path, tmp_path: Path) -> None:
    base = kit.config(model)
    save(kit.trainer(base), tmp_path)
    found = checkpoint.find(tmp_path)
    assert found is not None
    assert changes(found, base) == []
    harmless = kit.config(model, steps=7, eval={"every": 3}, learner={"threads": 2}, run_dir="elsewhere")
    assert sorted(line.split(" was ")[0] for line in changes(found, harmless)) == [
        "eval.every",
        "learner.threads",
        "run_dir",
        "steps",
    ]
    with pytest.raises(CheckpointError, match=r"learner\.lr was 0\.001 and is now 0\.5.*another run_dir"):
        changes(found, kit.config(model, learner={"lr": 0.5}))
    with pytest.raises(CheckpointError, match=r"broker\.max_lag"):
        changes(found, kit.config(model, broker={"max_lag": 0}))


def test_settings_that_matter_only_beside_others(model: Path, tmp_path: Path) -> None:
    base = kit.config(model, learner={"lr_final": 0.1, "loss_aggregation": "pack"})
    save(kit.trainer(base), tmp_path)
    found = checkpoint.find(tmp_path)
    assert found is not None
    with pytest.raises(CheckpointError, match="steps was 1000 and is now 7"):
        changes(found, dataclasses.replace(base, steps=7))
    with pytest.raises(CheckpointError, match=r"learner\.max_tokens"):
        changes(found, kit.changed(base, max_tokens=128))


def test_a_checkpoint_older_than_a_setting_had_its_default(model: Path, tmp_path: Path) -> None:
    base = kit.config(model)
    save(kit.trainer(base), tmp_path)
    found = checkpoint.find(tmp_path)
    assert found is not None
    del found.manifest.config["learner"]["lr_final"]
    assert changes(found, base) == []
    with pytest.raises(CheckpointError, match=r"learner\.lr_final was 1\.0 and is now 0\.5"):
        changes(found, kit.changed(base, lr_final=0.5))


def test_epochs_count_up_and_survive(tmp_path: Path) -> None:
    first, second = begin_epoch(tmp_path), begin_epoch(tmp_path)
    assert (first.epoch, second.epoch) == (1, 2)
    assert first.run_id == second.run_id
    assert begin_epoch(tmp_path / "other").run_id != first.run_id
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match="restore the file"):
        begin_epoch(tmp_path)


def test_replace_file_leaves_no_remains(tmp_path: Path) -> None:
    replace_file(tmp_path / "a", b"1")
    replace_file(tmp_path / "a", b"22")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"a": b"22"}


def test_a_folder_belongs_to_one_learner(tmp_path: Path) -> None:
    with lock(tmp_path), pytest.raises(ConfigError, match="another learner"), lock(tmp_path):
        pass
    with lock(tmp_path):
        pass


KILLED_SAVES = """
import os, shutil, signal, sys
from pathlib import Path
import learner_kit as kit, torch
from test_checkpoint import save, train

torch.set_num_threads(1)
trainer = kit.trainer(kit.config(sys.argv[1], checkpoint={"keep": 1}))
train(trainer, 1)
count, limit = 0, -1

def kill(event, arguments):
    global count
    if limit >= 0 and event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"):
        count += 1
        if count > limit:
            os.kill(os.getpid(), signal.SIGKILL)

first = Path(sys.argv[2]) / "first"
save(trainer, first)
sys.addaudithook(kill)
for attempt in range(1000):
    child = os.fork()
    if not child:
        run_dir = Path(sys.argv[2]) / str(attempt)
        shutil.copytree(first, run_dir)
        trainer.num_steps, limit = 2, attempt
        save(trainer, run_dir)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        print(attempt)
        break
"""


def test_kill_9_during_save_leaves_a_loadable_state(model: Path, tmp_path: Path) -> None:
    """Killed before each file operation of a save in turn: the checkpoint before it is whole, or the new one is."""
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{here}:{here.parents[1]}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED_SAVES, str(model), str(tmp_path)]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert told.returncode == 0, told.stderr
    steps = []
    for attempt in range(int(told.stdout)):
        found = checkpoint.find(tmp_path / str(attempt))
        assert found is not None, attempt
        assert found.damaged == [], attempt
        steps.append(found.manifest.step)
    # Opening the tensors, the manifest and so on, then one rename that commits, then LATEST and the pruning.
    assert steps == sorted(steps)
    assert steps.count(1) > 10 < steps.count(2)
    resumed = kit.trainer(kit.config(model))
    checkpoint.restore(resumed, tmp_path / "5" / "checkpoints" / "step-00000001")
    save(resumed, tmp_path / "5")
    remains = [path.name for path in (tmp_path / "5" / "checkpoints").iterdir() if path.name.startswith(".")]
    assert remains == [], "the next save clears what the killed one left"


def test_manifest_is_json_others_can_read(model: Path, tmp_path: Path) -> None:
    path = save(kit.trainer(kit.config(model)), tmp_path)
    assert json.loads((path / "manifest.json").read_text())["step"] == 0
