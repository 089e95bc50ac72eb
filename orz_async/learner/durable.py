"""Files that survive a power cut: written aside, synced, renamed. And who this run is, before anything else."""

from __future__ import annotations

import fcntl
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from orz_async.errors import CheckpointError, ConfigError, DiskError


class Identity(msgspec.Struct, frozen=True):
    """Which run this folder is, and how often a learner has started in it."""

    run_id: str
    epoch: int
    """1 at the first start; leases and weights of an earlier epoch are void."""


def sync_directory(path: Path) -> None:
    """Make renames and new names in this directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """The file holds the old bytes or the new ones, at every moment and after a crash."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_bytes(data)
        sync_file(fresh)
        fresh.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise DiskError(f"{path}: expected to write {len(data)} bytes, found: {error.strerror}; free space") from error


@contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Two learners in one run folder would destroy each other's checkpoints. A killed one leaves no lock behind."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / "learner.lock").open("w")
    except OSError as error:
        raise DiskError(f"{directory}: expected a folder to write to, found: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{directory.parent}: expected a run_dir of its own, found another learner at work in it; stop it, or "
                "choose another run_dir"
            ) from None
        yield


def begin_epoch(directory: Path) -> Identity:
    """Count this start of a learner, durably, before anyone can hear of it."""
    path = directory / "run.json"
    try:
        last = msgspec.json.decode(path.read_bytes(), type=Identity)
    except FileNotFoundError:
        last = Identity(run_id=uuid.uuid4().hex, epoch=0)
    except (OSError, msgspec.DecodeError) as error:
        raise CheckpointError(
            f"{path}: expected run_id and epoch, found: {error}; restore the file, or choose another run_dir"
        ) from error
    identity = Identity(run_id=last.run_id, epoch=last.epoch + 1)
    replace_file(path, msgspec.json.encode(identity))
    return identity
