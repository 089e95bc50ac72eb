"""Checkpoints that are whole or absent, also across kill -9.

Commit: fresh temporary directory -> tensors, ledger -> manifest with size and sha256 of each -> fsync of files and
directory -> rename -> fsync of the parent -> LATEST replaced atomically -> only then older ones are pruned. The loader
trusts nothing but a manifest that matches its files, walks back to the newest one that does, and says what was wrong
with the others. Tensors are safetensors, whole and under their Hugging Face names: any number of ranks can resume. They
are written shard by shard and read the same way: no rank ever holds a whole one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from orz_async.config import Config
from orz_async.errors import CheckpointError, DiskError
from orz_async.learner import loading
from orz_async.learner.durable import Identity, replace_file, sync_directory, sync_file
from orz_async.learner.tensor_file import TensorFiles
from orz_async.learner.trainer import Trainer

_LAYOUT = 1
_TENSOR_FILES = ("policy", "critic", "policy_optimizer", "critic_optimizer", "rng")
_LEDGER = "ledger.bin"
_FILES = {f"{name}.safetensors" for name in _TENSOR_FILES} | {_LEDGER}
_MAX_MANIFEST_BYTES = 1 << 20


class FileRecord(msgspec.Struct, frozen=True):
    size: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True):
    """What a checkpoint holds; the last file written into it."""

    layout: int
    run_id: str
    epoch: int
    """Of the learner that wrote it."""
    step: int
    """Learner steps done."""
    version: int
    """Policy version these weights are."""
    world: int
    """Ranks that wrote it."""
    config_hash: str
    config: dict[str, Any]
    files: dict[str, FileRecord]


@dataclass(frozen=True, slots=True)
class Found:
    """The newest checkpoint that verifies, and a sentence for each newer one that does not."""

    path: Path
    manifest: Manifest
    damaged: list[str] = field(default_factory=list)

    def ledger(self) -> bytes:
        return (self.path / _LEDGER).read_bytes()


def folder(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def save(trainer: Trainer, *, run_dir: Path, identity: Identity, ledger: bytes) -> Path:
    """All ranks. Only rank 0 writes; the others send it their shards and pass anything as `ledger`."""
    root = folder(run_dir)
    final = root / f"step-{trainer.num_steps:08d}"
    temporary = root / f".saving-{trainer.num_steps:08d}-{os.getpid()}"
    files = TensorFiles(trainer.world)
    if trainer.world.is_first:
        with files.attempt():
            root.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
    try:
        _write(temporary, trainer, files, identity, ledger)
        if not trainer.world.is_first:
            return final
        _move(temporary, final)
        sync_directory(root)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise DiskError(
            f"{final}: expected to write a checkpoint, found: {error}; earlier checkpoints are untouched: "
            "free space and start the same command again"
        ) from error
    replace_file(root / "LATEST", f"{final.name}\n".encode())
    _prune(root, trainer.config.checkpoint.keep, final)
    return final


def _write(directory: Path, trainer: Trainer, files: TensorFiles, identity: Identity, ledger: bytes) -> None:
    for name, tensors in _states(trainer):
        files.write(directory / f"{name}.safetensors", tensors)
    if not trainer.world.is_first:
        return
    files.check()
    (directory / _LEDGER).write_bytes(ledger)
    records = {
        name: FileRecord(size=(directory / name).stat().st_size, sha256=_sha256(directory / name)) for name in _FILES
    }
    config = plain(trainer.config)
    manifest = Manifest(
        layout=_LAYOUT,
        run_id=identity.run_id,
        epoch=identity.epoch,
        step=trainer.num_steps,
        version=trainer.num_steps,
        world=trainer.world.size,
        config_hash=hashlib.sha256(msgspec.json.encode(config, order="sorted")).hexdigest(),
        config=config,
        files=dict(sorted(records.items())),
    )
    (directory / "manifest.json").write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))
    for path in directory.iterdir():
        sync_file(path)
    sync_directory(directory)


def _states(trainer: Trainer) -> Iterator[tuple[str, list[tuple[str, Tensor]]]]:
    """All ranks: one file's tensors after the other, sharded as they are."""
    yield "policy", _parameters(trainer.policy)
    # Without a critic its two files are there and empty: the layout stays one.
    critic, optimizer = trainer.critic, trainer.critic_optimizer
    yield "critic", [] if critic is None else _parameters(critic)
    yield "policy_optimizer", list(trainer.policy_optimizer.state())
    yield "critic_optimizer", [] if optimizer is None else list(optimizer.state())
    rng = trainer.world.gather(torch.get_rng_state())
    yield "rng", [(f"cpu.{rank}", state) for rank, state in enumerate(rng)]


def _parameters(module: torch.nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, parameter.detach()) for name, parameter in module.named_parameters()]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _move(temporary: Path, final: Path) -> None:
    """The commit. A checkpoint of the same step, which a resumed run may find there, gives way only to its equal."""
    doomed = _aside(final) if final.exists() else None
    temporary.rename(final)
    if doomed is not None:
        shutil.rmtree(doomed, ignore_errors=True)


def _discard(path: Path) -> None:
    """Renamed first, so that a directory half deleted never has the name of a checkpoint."""
    shutil.rmtree(_aside(path), ignore_errors=True)


def _aside(path: Path) -> Path:
    return path.rename(path.with_name(f".removing-{path.name}-{os.getpid()}"))


def _prune(root: Path, keep: int, newest: Path) -> None:
    # A name beyond the newest is a damaged checkpoint that a resume has passed over: it takes no sound one's place.
    for path in [path for path in _newest_first(root) if path.name <= newest.name][keep:]:
        _discard(path)
    for path in root.glob(".*ing-*"):
        shutil.rmtree(path, ignore_errors=True)


def older_ledgers(found: Found) -> tuple[bytes, ...]:
    """The ledgers of the sound checkpoints before this one: a later start may have to walk back to them."""
    root = found.path.parent
    ledgers = []
    for path in _newest_first(root):
        if path.name < found.path.name:
            with contextlib.suppress(CheckpointError):
                verify(path)
                ledgers.append((path / _LEDGER).read_bytes())
    return tuple(ledgers)


def oldest_version(run_dir: Path) -> int:
    """Of the checkpoints that are kept: trajectories from there on may be needed again."""
    return _step(_newest_first(folder(run_dir))[-1])


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _newest_first(root: Path) -> list[Path]:
    return sorted((p for p in root.glob("step-*") if p.is_dir()), key=lambda p: p.name, reverse=True)


def find(run_dir: Path) -> Found | None:
    """The newest checkpoint that verifies; None in a fresh folder. CheckpointError if there are some and none does."""
    damaged: list[str] = []
    for path in _newest_first(folder(run_dir)):
        try:
            return Found(path, verify(path), damaged)
        except CheckpointError as error:
            damaged.append(str(error))
    if damaged:
        told = "; ".join(damaged)
        raise CheckpointError(
            f"{folder(run_dir)}: expected a checkpoint that verifies, found {len(damaged)} damaged: {told}. "
            "Restore one from a backup, or choose another run_dir to start anew"
        )
    return None


def verify(path: Path) -> Manifest:
    """Every file of the manifest is there, as long and as it was written; CheckpointError says which one is not."""
    try:
        with (path / "manifest.json").open("rb") as file:
            manifest = msgspec.json.decode(file.read(_MAX_MANIFEST_BYTES), type=Manifest)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no manifest.json") from None
    except (OSError, msgspec.DecodeError) as error:
        raise CheckpointError(f"{path}: manifest.json cannot be read: {error}") from error
    if manifest.layout != _LAYOUT or manifest.files.keys() != _FILES:
        raise CheckpointError(
            f"{path}: expected layout {_LAYOUT} with {sorted(_FILES)}, found layout {manifest.layout} with "
            f"{sorted(manifest.files)}; another version of this package wrote it"
        )
    for name, record in manifest.files.items():
        try:
            size = (path / name).stat().st_size
            if size != record.size:
                raise CheckpointError(f"{path}: {name} has {size} bytes, written were {record.size}")
            if _sha256(path / name) != record.sha256:
                raise CheckpointError(f"{path}: {name} does not have the sha256 it was written with")
        except OSError as error:
            raise CheckpointError(f"{path}: {name}: {error.strerror}") from error
    return manifest


def restore(trainer: Trainer, path: Path) -> None:
    """All ranks, each reading its own rows: weights, optimizers, step, and the random state of its own rank."""
    with ExitStack() as stack:
        try:
            files = {
                name: stack.enter_context(safe_open(path / f"{name}.safetensors", framework="pt"))
                for name in _TENSOR_FILES
            }
            _restore_weights("policy", trainer.policy, files["policy"], path)
            _restore_weights("critic", trainer.critic, files["critic"], path)
            trainer.policy_optimizer.load(files["policy_optimizer"])
            if trainer.critic_optimizer is not None:
                trainer.critic_optimizer.load(files["critic_optimizer"])
            own = f"cpu.{trainer.world.rank}"
            if own in files["rng"].keys():  # noqa: SIM118 (a file is no mapping)
                torch.set_rng_state(files["rng"].get_tensor(own))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: expected readable tensors, found: {error}; copy it again") from error
    trainer.num_steps = _step(path)


@torch.no_grad()
def _restore_weights(what: str, module: torch.nn.Module | None, file: Any, path: Path) -> None:
    parameters = dict(module.named_parameters()) if module is not None else {}
    shapes = {key: tuple(p.shape) for key, p in parameters.items()}
    stored = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
    found = {key: tuple(part.get_shape()) for key, part in stored.items()}
    if shapes != found:
        differ = sorted(key for key in shapes.keys() | found.keys() if shapes.get(key) != found.get(key))
        raise CheckpointError(
            f"{path}: expected the {what} of model.path, found other tensors: {differ[:4]}; set model.path to the "
            "model this run began with"
        )
    for key, parameter in parameters.items():
        loading.copy_slice(parameter, stored[key])


def plain(config: Config) -> dict[str, Any]:
    """As JSON would give it back."""
    return msgspec.json.decode(msgspec.json.encode(dataclasses.asdict(config)), type=dict[str, Any])
