"""A run folder under attack: its processes, every kill with its time, and how long the broker took to notice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orz_async.observe.process import die_with_parent

ROOT = Path(__file__).parents[2]
SETTINGS = (
    *("--broker.prompts-per-step", "2", "--broker.samples-per-prompt", "2", "--sampling.max-new-tokens", "8"),
    *("--broker.heartbeat-s", "0.2", "--broker.lease-s", "3", "--broker.max-lag", "1", "--eval.every", "0"),
    *("--checkpoint.every", "5", "--learner.critic-steps", "1", "--learner.audit-rollouts", "0"),
    # Lean generators invent their log-probs, and with a constant rate the number of steps may change on the way.
    *(
        "--learner.mismatch-warn",
        "1e9",
        "--learner.lr-final",
        "1",
        "--learner.lr",
        "1e-6",
        "--journal.min-free-mb",
        "1",
    ),
)
LEAN, DAEMON, LEARNER, LAUNCHER = "lean generator", "generator daemon", "learner", "launcher"


@dataclass(slots=True)
class Kill:
    kind: str
    name: str
    t: float
    point: str = ""


@dataclass(slots=True)
class Process:
    kind: str
    name: str
    popen: subprocess.Popen[bytes]
    born: float
    stopped: bool = False
    """SIGSTOP for ever."""
    wakes: float = 0.0

    @property
    def alive(self) -> bool:
        return self.popen.poll() is None


@dataclass(slots=True)
class Folder:
    """One run. `process` objects stay in `processes` until they are reaped by `reap`."""

    path: Path
    base: Path
    overrides: tuple[str, ...] = ()
    victim: tuple[str, ...] = ()
    """Options of victim.py for every learner of this run."""
    processes: list[Process] = field(default_factory=list)
    kills: list[Kill] = field(default_factory=list)
    ends: Counter[str] = field(default_factory=Counter)
    """How processes that nobody killed ended: "kind exit code"."""

    @property
    def settings(self) -> tuple[str, ...]:
        return (
            *("tiny_cpu", "--run-dir", str(self.path), "--model.path", str(self.base / "model")),
            *("--data.train", str(self.base / "train.jsonl"), "--data.heldout", str(self.base / "heldout.jsonl")),
            *SETTINGS,
            *self.overrides,
        )

    def start(self, kind: str, name: str, module: str, *words: str) -> Process:
        logs = self.path / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
        with (logs / f"{name}.log").open("ab") as log:
            popen = subprocess.Popen(
                [sys.executable, "-m", module, *words],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        process = Process(kind, name, popen, time.time())
        self.processes.append(process)
        return process

    def learner(self, *overrides: str, die: str = "") -> Process:
        armed = ("--die", die) if die else ()
        return self.start(LEARNER, "learner", "tests.chaos.victim", *armed, *self.victim, *self.settings, *overrides)

    def lean(self, name: str, address: str, *words: str) -> Process:
        return self.start(LEAN, name, "tests.chaos.lean", "--connect", address, "--name", name, *words)

    def daemon(self, name: str, address: str) -> Process:
        words = ("--connect", address, "--run-dir", str(self.path), "--name", name, "--slots", "4", "--queue", "0")
        return self.start(DAEMON, name, "orz_async.generator", *words, "--threads", "1")

    def those(self, kind: str) -> list[Process]:
        return [process for process in self.processes if process.kind == kind and process.alive]

    def kill(self, process: Process, point: str = "at random") -> None:
        if process.alive:
            self.kills.append(Kill(process.kind, process.name, time.time(), point))
            os.killpg(process.popen.pid, signal.SIGKILL)
            process.popen.wait()
            self.processes.remove(process)

    def reap(self) -> list[Process]:
        """Processes that ended by themselves."""
        ended = [process for process in self.processes if not process.alive]
        for process in ended:
            self.processes.remove(process)
            self.ends[f"{process.kind} {process.popen.returncode}"] += 1
        return ended

    def close(self) -> None:
        for process in self.processes:
            if process.alive:
                os.killpg(process.popen.pid, signal.SIGKILL)
                process.popen.wait()

    def address(self) -> str:
        try:
            return (self.path / "address").read_text()
        except FileNotFoundError:
            return ""

    def events(self, process: str) -> list[dict[str, Any]]:
        try:
            text = (self.path / "events" / f"{process}.jsonl").read_text()
        except FileNotFoundError:
            return []
        # A killed process may have torn its last line.
        return [json.loads(line) for line in text.split("\n") if line.startswith("{") and line.endswith("}")]

    def steps(self) -> int:
        return max((event["step"] for event in self.events("learner-0") if event["kind"] == "step"), default=-1) + 1

    def log(self, name: str, lines: int = 15) -> str:
        try:
            return "\n".join((self.path / "logs" / f"{name}.log").read_text().splitlines()[-lines:])
        except FileNotFoundError:
            return f"{name} wrote no log"

    def detection(self) -> list[float]:
        """Seconds from the kill of a generator that the broker knew until its leases were free to be lent again.

        Kills near a death of the learner are left out: there the restart ends all leases, and nothing is detected.
        """
        noticed: dict[str, list[float]] = {}
        joined: dict[str, float] = {}
        births = []
        for event in self.events("broker"):
            if event["kind"] == "process":
                births.append(event["t"])
            elif event["kind"] == "joined":
                joined[event["generator"]] = event["t"]
            elif event["kind"] in ("expired", "left") and event.get("cause") != "learner_restart":
                noticed.setdefault(event["generator"], []).append(event["t"])
        deaths = [kill.t for kill in self.kills if kill.kind == LEARNER]
        found = []
        for kill in self.kills:
            if kill.kind not in (LEAN, DAEMON) or kill.name not in joined or joined[kill.name] > kill.t:
                continue
            after = [t for t in noticed.get(kill.name, []) if t >= kill.t]
            if after and not any(kill.t <= t <= min(after) for t in (*births, *deaths)):
                found.append(min(after) - kill.t)
        return sorted(found)

    def comebacks(self) -> list[float]:
        """Seconds from the kill of a learner until a learner had trained a step again."""
        steps = [event["t"] for event in self.events("learner-0") if event["kind"] == "step"]
        deaths = [kill.t for kill in self.kills if kill.kind == LEARNER]
        found = []
        for i, death in enumerate(deaths):
            until = deaths[i + 1] if i + 1 < len(deaths) else float("inf")
            after = [t for t in steps if death < t < until]
            if after:
                found.append(min(after) - death)
        return sorted(found)


def percentile(values: list[float], share: float) -> float:
    """Nearest rank, of sorted values."""
    return values[min(len(values) - 1, int(share * len(values)))] if values else float("nan")
