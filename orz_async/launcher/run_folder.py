"""May this run use this folder? A folder holds one run: new, continued, or refused with the way out."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
from contextlib import ExitStack
from enum import Enum, auto
from pathlib import Path

from orz_async.config import Config
from orz_async.config_toml import differences, load, to_toml
from orz_async.errors import ConfigError, DiskError
from orz_async.observe.process import read_records
from orz_async.observe.summary import read_history
from orz_async.observe.versions import versions

OURS = (
    *("config.toml", "versions.json", "address", "summary.json", "curve.png", "orz.lock"),
    *("events", "tokens", "evals", "journal", "kept", "checkpoints", "export", "logs", "report.html", "trace.json.gz"),
    *("tensorboard", "wandb", "sinks.id"),
)
"""Everything a run writes; --overwrite deletes these and nothing else."""


class Mode(Enum):
    CONTINUE = auto()  # start, or continue the same configuration
    RESUME = auto()  # continue with changed settings, as far as the learner's checkpoint allows
    OVERWRITE = auto()  # delete and start


class RunFolder:
    """The folder of one run, locked against a second launcher while it is open."""

    def __init__(self, config: Config, mode: Mode) -> None:
        self.path = Path(config.run_dir)
        self._config = config
        self._mode = mode
        self._lock: int | None = None
        self._before: str | None = None

    def __enter__(self) -> RunFolder:
        with ExitStack() as undo:
            undo.callback(self._release)
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                self._acquire()
                self._prepare(self._mode)
            except OSError as error:
                raise DiskError(
                    f"expected a run_dir that can be written, found {error}; free space or choose another --run-dir"
                ) from error
            undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._release()

    def _acquire(self) -> None:
        self._lock = os.open(self.path / "orz.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._lock, 32).decode(errors="replace").strip()
            raise ConfigError(
                f"expected a run_dir of its own, found {self.path} in use by another orz run (pid {holder}); "
                "wait for it, stop it, or choose another --run-dir"
            ) from None
        os.truncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    def _prepare(self, mode: Mode) -> None:
        if mode is Mode.OVERWRITE:
            self._clear()
        elif (self.path / "config.toml").exists():
            self._check(load(self.path / "config.toml"), mode)
        elif mode is Mode.RESUME:
            raise ConfigError(f"expected a run to resume in {self.path}, found none; leave out --resume to start one")
        elif any((self.path / name).exists() for name in ("events", "checkpoints", "journal")):
            raise ConfigError(
                f"expected an unused run_dir, found {self.path} with a run but no config.toml; choose another "
                "--run-dir, or --overwrite to delete that run"
            )
        for name in ("events", "logs"):
            (self.path / name).mkdir(exist_ok=True)
        config = self.path / "config.toml"
        self._before = config.read_text(encoding="utf-8") if config.exists() else None
        _replace(config, to_toml(self._config))
        _replace(self.path / "versions.json", json.dumps(versions(), indent=2) + "\n")

    def _clear(self) -> None:
        for name in OURS:
            path = self.path / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif name != "orz.lock":
                path.unlink(missing_ok=True)

    def _check(self, saved: Config, mode: Mode) -> None:
        here = dataclasses.replace(saved, run_dir=self._config.run_dir)  # the folder may have been moved
        changed = differences(here, self._config)
        text = ", ".join(f"{name} {old!r} -> {new!r}" for name, (old, new) in changed.items())
        # A learner killed between its last step and its end still has to save and export.
        ended = any(record.code == 0 for record in read_records(self.path / "logs", "learner"))
        done = read_history(self.path).steps_done
        if changed and mode is not Mode.RESUME:
            raise ConfigError(
                f"expected an unused run_dir or the configuration it was started with, found other settings in "
                f"{self.path}/config.toml ({text}); choose another --run-dir, or --resume to continue that run with "
                "the new settings, or --overwrite to delete it and start"
            )
        if ended and done >= self._config.steps:
            raise ConfigError(
                f"expected a run that is not complete, found {self.path} with all {done} steps done; --resume with a "
                "larger --steps trains on, --overwrite deletes it and starts anew, another --run-dir keeps both"
            )

    def settings_refused(self) -> None:
        """The learner would not continue its checkpoint with the new settings: what was saved before holds."""
        if self._before is not None:
            _replace(self.path / "config.toml", self._before)

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _replace(path: Path, text: str) -> None:
    fresh = path.with_name(f"{path.name}.tmp")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)
