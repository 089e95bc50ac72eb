"""Real processes on a tiny base model: a learner by torchrun, daemons by hand, nothing simulated."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PATIENCE_S = 150.0
"""A wait longer than this is a hang: two cores may be busy with another run."""


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Far from trained, but it ends its responses and now and then is right: enough for losses that are not zero."""
    from orz_async.learner.base import make_base

    out = tmp_path_factory.mktemp("base") / "base"
    make_base(out, seed=1, steps=60, threads=1)
    return out


class Run:
    """One run folder and the processes that work on it."""

    def __init__(self, folder: Path, base: Path, overrides: tuple[str, ...]) -> None:
        self.folder = folder
        self.overrides = (
            *("--run-dir", str(folder), "--model.path", str(base / "model")),
            *("--data.train", str(base / "train.jsonl"), "--data.heldout", str(base / "heldout.jsonl")),
            *("--sampling.max-new-tokens", "32", "--broker.prompts-per-step", "8", "--broker.samples-per-prompt", "4"),
            *("--eval.every", "0", "--checkpoint.every", "2", "--learner.lr", "1e-3"),
            *overrides,
        )
        self.processes: list[subprocess.Popen[bytes]] = []

    def learner(self, ranks: int = 1) -> subprocess.Popen[bytes]:
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        if ranks == 1:
            command = []  # torchrun forks the rank: a kill -9 of it must hit the learner itself
        return self._start([*command, "-m", "orz_async.learner", "tiny_cpu", *self.overrides], "learner")

    def generator(self, name: str) -> subprocess.Popen[bytes]:
        address = wait_for(lambda: (self.folder / "address").exists() and (self.folder / "address").read_text())
        command = ["-m", "orz_async.generator", "--connect", address, "--name", name, "--run-dir", str(self.folder)]
        return self._start([*command, "--threads", "1"], f"generator-{name}")

    def _start(self, command: list[str], name: str) -> subprocess.Popen[bytes]:
        logs = self.folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
        with (logs / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        self.processes.append(process)
        return process

    def events(self, process: str, kind: str) -> list[dict[str, Any]]:
        path = self.folder / "events" / f"{process}.jsonl"
        if not path.exists():
            return []
        lines = path.read_text().split("\n")
        # A process that was killed may have torn its last line.
        found = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
        return [event for event in found if event["kind"] == kind]

    def steps(self) -> list[dict[str, Any]]:
        """The last report of each step: after a resume some steps are reported twice."""
        by_step = {event["step"]: event for event in self.events("learner-0", "step")}
        return [by_step[step] for step in sorted(by_step)]

    def log(self, name: str) -> str:
        return (self.folder / "logs" / f"{name}.log").read_text()

    def finish(self, process: subprocess.Popen[bytes]) -> int:
        """Wait for the process to end and return its exit code."""
        return process.wait(timeout=PATIENCE_S)

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def wait_for(condition: Callable[[], Any], what: str = "a condition") -> Any:
    """Poll another process's files; its time is not ours to fake."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"{what} did not come true within {PATIENCE_S:g} s")


@pytest.fixture
def new_run(base: Path, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def make(name: str, *overrides: str) -> Run:
        runs.append(Run(tmp_path / name, base, overrides))
        return runs[-1]

    yield make
    for run in runs:
        run.close()
