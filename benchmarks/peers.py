"""TRL's GRPO beside ours, on the same base model, problems, rollouts an update and cores, in turns of one run.

    trl              GRPO of TRL in the peers' environment (`make peers-dev`, `benchmarks/peer_trl.py`)
    ours, no critic  --learner.estimator grpo: what TRL computes, so this is the comparison of like with like
    ours             the recipe as it is, with its critic

each on the demo, and on a base model a few of whose responses run long (`benchmarks/long_tail.py`).

Rollouts/s leave out the first `WARM_STEPS` updates and count from the end of one update to the end of a later one.
Time to 90 % is the training time at which the first version stood that was right in 90 % of the held-out samples. TRL's
clock stops while it is evaluated. Ours cannot, because the generators sample evaluations while they train: what these
cost is in our time to 90 %, and our rates are of a second run, without evaluations. Neither clock counts imports and
loading. A run that did not happen for want of time, or did not reach 90 %, is named in the notes.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import long_tail
from benchmarks.overlap import ensure_base, one_run
from benchmarks.protocol import Row, row

PYTHON = Path(".venv-peers/bin/python")
BASE, LONG = Path("runs/base"), Path("runs/long_tail")
BUDGET_S = 12 * 60.0
TURNS = 2
STEPS, WARM_STEPS, EVAL_EVERY = 60, 4, 5
"""The first two are multiples of lag + 1: where generators have time to spare, our steps end in bursts of that many."""
PROMPTS, SAMPLES = 32, 4
MAX_LAG = 1
TARGET = 0.9
LR, LR_FINAL = 2e-4, 0.1

TRL, GRPO, PPO = "trl", "ours, no critic", "ours"
OUR_PLACEMENT = {"--generator.count": 1, "--generator.slots": 128}
"""One core learns, one generates, in one batch: a decode step of 128 rows takes little longer than one of 64."""
WITHOUT_CRITIC = ("--learner.estimator", "grpo")


@dataclass(frozen=True, slots=True)
class Task:
    name: str
    base: Path
    max_new_tokens: int


TASKS = (Task("demo", BASE, 96), Task("long tail", LONG, 256))


@dataclass(frozen=True, slots=True)
class Course:
    """A run as both sides report it: training seconds at the end of each update, accuracy by policy version."""

    step_s: tuple[float, ...]
    """Of the run with evaluations."""
    accuracy: Mapping[int, float]
    mean_tokens: float
    longest: float
    free_s: tuple[float, ...]
    """As `step_s`, with no evaluation on the clock."""

    def rate(self) -> float:
        """Rollouts/s after the warm-up, with no evaluation on the clock."""
        seconds = self.free_s[-1] - self.free_s[WARM_STEPS - 1]
        return (len(self.free_s) - WARM_STEPS) * PROMPTS * SAMPLES / seconds

    def seconds_to(self, accuracy: float) -> float | None:
        """Training seconds at which the first version stood that is this good; None if none is."""
        good = [version for version, found in sorted(self.accuracy.items()) if found >= accuracy]
        if not good:
            return None
        return self.step_s[good[0] - 1] if good[0] else 0.0


def available() -> bool:
    return PYTHON.exists()


def run() -> list[Row]:
    """Turns of TRL, ours without and with the critic, for each task, as far as the time goes."""
    if not available():
        raise SystemExit(f"peers: expected TRL's interpreter at {PYTHON}, found none; `make peers-dev` makes it")
    began = time.monotonic()
    ensure_base()
    if not LONG.is_dir():
        long_tail.make(BASE, LONG)
    courses: dict[tuple[str, str], list[Course]] = {}
    missing: list[str] = []
    slowest: dict[tuple[str, str], float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(TURNS):
            for task in TASKS:
                for side in (GRPO, TRL, PPO):
                    key, started = (task.name, side), time.monotonic()
                    if started - began + slowest.get(key, 0.0) > BUDGET_S:
                        missing.append(f"{task.name}, {side}, seed {turn}")
                        continue
                    place = Path(folder) / f"{task.name}-{side}-{turn}".replace(" ", "_").replace(",", "")
                    course = trl(task, turn, place) if side == TRL else ours(task, turn, place, side)
                    courses.setdefault(key, []).append(course)
                    slowest[key] = time.monotonic() - started
                    print(f"{task.name}, {side}, seed {turn}: {course.rate():.0f} rollouts/s", flush=True)
    return rows_of(courses, missing)


def trl(task: Task, seed: int, place: Path) -> Course:
    options = {
        "base": str(task.base),
        "steps": STEPS,
        "seed": seed,
        "prompts": PROMPTS,
        "samples": SAMPLES,
        "max_new_tokens": task.max_new_tokens,
        "lr": LR,
        "lr_final": LR_FINAL,
        "eval_every": EVAL_EVERY,
        "threads": len(os.sched_getaffinity(0)),
    }
    place.mkdir()
    out = place / "record.json"
    command = [str(PYTHON), "-m", "benchmarks.peer_trl", "--options", json.dumps(options), "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((".", os.environ.get("PYTHONPATH", "")))}
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=900, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return trl_course(json.loads(out.read_text()))


def trl_course(record: Mapping[str, Any]) -> Course:
    """Of what `peer_trl` wrote."""
    steps = record["steps"]
    step_s = tuple(float(step["wall_s"]) for step in steps)
    return Course(
        step_s=step_s,
        accuracy={int(found["version"]): found["accuracy"] for found in record["evals"]},
        mean_tokens=statistics.mean(step["tokens"] for step in steps) / (PROMPTS * SAMPLES),
        longest=max(step["longest"] for step in steps),
        free_s=step_s,
    )


def ours(task: Task, seed: int, place: Path, side: str) -> Course:
    from orz_async.observe.summary import read_history

    settings = {
        "--steps": STEPS,
        "--seed": seed,
        "--model.path": task.base / "model",
        "--data.train": task.base / "train.jsonl",
        "--data.heldout": task.base / "heldout.jsonl",
        "--sampling.max-new-tokens": task.max_new_tokens,
        "--broker.prompts-per-step": PROMPTS,
        "--broker.samples-per-prompt": SAMPLES,
        "--learner.lr": LR,
        "--learner.lr-final": LR_FINAL,
        **OUR_PLACEMENT,
    }
    words = [str(word) for pair in settings.items() for word in pair]
    words += WITHOUT_CRITIC if side == GRPO else ()
    histories = []
    for every in (EVAL_EVERY, 0):
        run_dir = place / f"evaluated_every_{every}"
        one_run(run_dir, MAX_LAG, (*words, "--eval.every", str(every)))
        histories.append(read_history(run_dir))
    evaluated, free = histories
    return our_course(evaluated.steps, evaluated.evals, free.steps)


def our_course(
    steps: Mapping[int, Mapping[str, Any]],
    evals: Mapping[int, Mapping[str, Any]],
    free: Mapping[int, Mapping[str, Any]],
) -> Course:
    """Of the events `step` and `eval` of a run, and the steps of one without evaluations."""
    ordered = [steps[step] for step in sorted(steps)]
    return Course(
        step_s=tuple(float(step["wall_s"]) for step in ordered),
        free_s=tuple(float(free[step]["wall_s"]) for step in sorted(free)),
        accuracy={version: float(found["accuracy"]) for version, found in evals.items()},
        mean_tokens=statistics.mean(float(step["length_mean"]) for step in ordered),
        longest=max(float(step["length_max"]) for step in ordered),
    )


def rows_of(courses: Mapping[tuple[str, str], Sequence[Course]], missing: Sequence[str]) -> list[Row]:
    """Rates and times of each task; the ratio is to TRL's, turn by turn, and above 1 where ours is faster."""
    rows = []
    for task in dict.fromkeys(task for task, _ in courses):
        theirs = courses.get((task, TRL), [])
        for side in (TRL, GRPO, PPO):
            found = courses.get((task, side), [])
            if not found:
                continue
            rates = [course.rate() for course in found]
            notes = {
                "mean_tokens": [course.mean_tokens for course in found],
                "longest": [course.longest for course in found],
                "missing": [name for name in missing if name.startswith(f"{task}, {side}, ")],
            }
            pairs = list(zip(rates, (course.rate() for course in theirs), strict=False))
            rows.append(row(f"peers, {task}", side, "rollouts/s", rates, **notes) | _ratio([a / b for a, b in pairs]))
            times = [course.seconds_to(TARGET) for course in found]
            reached = [seconds for seconds in times if seconds is not None]
            accuracy = [max(course.accuracy.values(), default=0.0) for course in found]
            if reached:
                base = [course.seconds_to(TARGET) for course in theirs]
                faster = [b / a for a, b in zip(times, base, strict=False) if a and b]
                name = f"peers, {task}, to {TARGET:.0%}"
                rows.append(row(name, side, "s", reached, by_seed=times, best=accuracy) | _ratio(faster))
            else:
                rows[-1]["notes"]["not_reached"] = accuracy
    return rows


def _ratio(values: Sequence[float]) -> Row:
    return {"ratio_to_first": statistics.median(values)} if values else {}
