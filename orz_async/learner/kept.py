"""Rollouts of a step that went wrong, kept as a file, so that it can be looked at and trained again."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from orz_async.errors import DataError, NumericError, OutOfMemoryError
from orz_async.learner.durable import replace_file
from orz_async.learner.services import Services
from orz_async.records import Trajectory

log = logging.getLogger(__name__)

_MAX_BYTES = 1 << 34
_decoder = msgspec.msgpack.Decoder(list[Trajectory])


def folder(run_dir: Path) -> Path:
    return run_dir / "kept"


def keep(services: Services, trajectories: Sequence[Trajectory], step: int, reason: str) -> Path:
    """Write the rollouts of a step to RUN/kept/step-N.msgpack, and say so in the event log."""
    path = folder(services.run_dir) / f"step-{step:08d}.msgpack"
    replace_file(path, msgspec.msgpack.encode(list(trajectories)))
    services.events.emit("kept", step=step, path=str(path.relative_to(services.run_dir)), reason=reason)
    log.warning("the %d rollouts of step %d are kept in %s: %s", len(trajectories), step, path, reason)
    return path


def load(path: Path) -> list[Trajectory]:
    """What `keep` wrote; DataError where the file is something else."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise DataError(f"{path}: expected at most {_MAX_BYTES} bytes, found {path.stat().st_size}")
        return _decoder.decode(path.read_bytes())
    except (OSError, msgspec.DecodeError) as error:
        raise DataError(
            f"{path}: expected rollouts that a learner kept, found: {error}; copy the file again"
        ) from error


@contextmanager
def keeping(services: Services, trajectories: Sequence[Trajectory], step: int) -> Iterator[None]:
    """Keep the rollouts if the step inside the block ends the run."""
    try:
        yield
    except (NumericError, OutOfMemoryError) as error:
        keep(services, trajectories, step, str(error))
        raise
