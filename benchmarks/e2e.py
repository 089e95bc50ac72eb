"""End to end on this machine: how fast, how much of it is overlap, how soon it has learned, what each side waits for.

overlap     one generator and the learner, each on a core of its own, on a workload that stays as it is (a learning
            rate of next to nothing) and keeps both busy: strictly synchronous, then S = 0, 1, 2, 4. Told are rollouts/s
            and the part of the overlap limit that was reached (`e2e_times.py`); the limit is that of the same turn.
            The broker is a thread of the learner and so on its core.
embedded    the demo's recipe with 1, 2, 3 generators at S = 0, 1, 2, 4, on all cores
vllm        the same with one daemon on vLLM, at S = 0, 1
accuracy    the first steps of the demo, with its learning rates: training seconds until 90 % of the held-out samples
            are right, as of the first evaluation that says so; the only runs with evaluations
cores       how much slower a core computes while the other one does: what they share, no engine can win back

Runs go turn by turn, each variant once a turn, so that what else the machine does meets all alike. What did not
happen, for want of time, an interpreter with vLLM or because it failed, is named in the row "missing" with its reason.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.e2e_times import Times, of_limit, read_events, time_to, times
from benchmarks.overlap import one_run
from benchmarks.protocol import Row, row

BUDGET_S = 12 * 60.0
LAGS = (0, 1, 2, 4)
COUNTS = (1, 2, 3)
TURNS = 2
SKIP = 5
"""First steps of a run that are not counted: until then S = 4 still fills what it may hold."""
STEPS = 25
ACCURACY = 0.9
STRICT = "strictly synchronous"
VLLM = Path(".venv-vllm/bin/python")
"""Where `make vllm-dev` puts it."""

_STEADY = ("--learner.lr", "1e-6", "--learner.lr-final", "1.0")
# At this temperature the base model writes 30 tokens on average and now and then 96: a long tail, as in real runs. With
# 16 slots sampling takes two thirds of the time of learning: there is much to hide, and the learner decides, on whose
# core the broker is.
_BALANCED = ("--generator.count", "1", "--generator.slots", "16", "--sampling.temperature", "3.0", *_STEADY)
_FIRST_STEPS = 28
# The demo's learning rates fall to a tenth in 80 steps; these are as far down after so many.
_DEMO = ("--steps", str(_FIRST_STEPS), "--learner.lr-final", str(1 - 0.9 * _FIRST_STEPS / 80), "--eval.every", "4")


@dataclass(frozen=True, slots=True)
class Job:
    """One run."""

    part: str
    variant: str
    lag: int
    settings: tuple[str, ...]
    turn: int = 0
    missing: str = ""
    """Why it cannot be; empty where it can."""

    @property
    def name(self) -> str:
        return f"{self.part}, {self.variant}" + (f", turn {self.turn + 1}" if self.turn else "")


Measured = dict[tuple[str, str], list[Times]]
"""(part, variant) -> turn by turn, as far as it came."""


@dataclass(slots=True)
class Outcome:
    """What came of all jobs."""

    times: Measured = field(default_factory=dict)
    seconds: dict[str, float | None] = field(default_factory=dict)
    """Variant of accuracy -> seconds until ACCURACY; None: not within the run."""
    missing: dict[str, str] = field(default_factory=dict)
    """Job -> why there is no result."""


def jobs(vllm: Path | None) -> Iterator[Job]:
    """In the order of what is least to be done without; a budget that ends takes the last ones."""
    missing = "" if vllm else f"no interpreter with vLLM: name one with --vllm, or `make vllm-dev` for {VLLM}"
    other_engine = ("--generator.count", "1", "--generator.engine", "vllm", "--generator.python", str(vllm))
    yield from _overlap(0)
    yield from (Job("accuracy", f"S = {lag}", lag, _DEMO) for lag in LAGS)
    yield from _embedded(2)
    yield from (Job("vllm", f"S = {lag}, 1 generator", lag, other_engine, missing=missing) for lag in LAGS[:2])
    for turn in range(1, TURNS):
        yield from _overlap(turn)
    yield from (job for count in COUNTS if count != 2 for job in _embedded(count))


def _overlap(turn: int) -> Iterator[Job]:
    yield Job("overlap", STRICT, 0, (*_BALANCED, "--learner.publish-early", "false"), turn)
    yield from (Job("overlap", f"S = {lag}", lag, _BALANCED, turn) for lag in LAGS)


def _embedded(count: int) -> Iterator[Job]:
    for lag in LAGS:
        yield Job("embedded", f"S = {lag}, {count} generators", lag, ("--generator.count", str(count)))


def skipped(lag: int) -> int:
    """How many first steps do not count, so that the others are whole bursts: lag + 1 steps are admitted together, and
    where generators have time to spare they end together."""
    return SKIP + (STEPS - SKIP) % (lag + 1)


def work(chosen: Sequence[Job], do: Callable[[Job, Outcome], None], clock: Callable[[], float]) -> Outcome:
    """Every job while the budget lasts: one is begun only if the slowest of its part so far would still fit."""
    outcome, slowest, began = Outcome(), dict[str, float](), clock()
    for job in chosen:
        started = clock()
        if job.missing:
            outcome.missing[job.name] = job.missing
        elif started - began + slowest.get(job.part, 0.0) > BUDGET_S:
            outcome.missing[job.name] = f"no time left of {BUDGET_S:.0f} s"
        else:
            try:
                do(job, outcome)
            except (RuntimeError, ValueError, subprocess.TimeoutExpired) as error:
                outcome.missing[job.name] = str(error)[-500:]
            slowest[job.part] = max(slowest.get(job.part, 0.0), clock() - started)
    return outcome


class Runs:
    """Does jobs in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._cores = sorted(os.sched_getaffinity(0))
        self._pinned_python = folder / "python-pinned"

    def do(self, job: Job, outcome: Outcome) -> None:
        """RuntimeError or ValueError where it came to nothing."""
        run_dir, began = self._folder / job.name.replace(" ", "_"), time.monotonic()
        length = () if job.part == "accuracy" else ("--steps", str(STEPS), "--checkpoint.every", "1000")
        prefix, placed = self._placement() if job.part == "overlap" else ((), ())
        summary = one_run(run_dir, job.lag, (*length, *placed, *job.settings), prefix)
        if job.part == "accuracy":
            outcome.seconds[job.variant] = found = time_to(ACCURACY, summary["evals"])
            if found is None:
                best = max((e["accuracy"] for e in summary["evals"]), default=None)
                outcome.missing[job.name] = f"{ACCURACY:.0%} was not reached within {_FIRST_STEPS} steps; best {best}"
            told = "not reached" if found is None else f"{found:.1f} s"
        else:
            made = times(read_events(run_dir), skipped(job.lag))
            outcome.times.setdefault((job.part, job.variant), []).append(made)
            told = f"{made.rollouts_s:.1f} rollouts/s, step {made.step_s:.2f} s, of it waiting {made.wait_s:.2f} s"
        shutil.rmtree(run_dir)
        print(f"{job.name}: {told} ({time.monotonic() - began:.0f} s)", flush=True)

    def _placement(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Learner and launcher on the last core, the generator on the first: what to prefix, and a setting."""
        if len(self._cores) < 2 or shutil.which("taskset") is None:
            raise RuntimeError("expected two cores and the command taskset, to keep the two sides apart, found fewer")
        self._pinned_python.write_text(f'#!/bin/sh\nexec taskset -c {self._cores[0]} "{sys.executable}" "$@"\n')
        self._pinned_python.chmod(0o755)
        return ("taskset", "-c", str(self._cores[-1])), ("--generator.python", str(self._pinned_python))


def rows_of(outcome: Outcome) -> list[Row]:
    """What was measured, and last what was not."""
    rows = [*_overlap_rows(outcome.times), *_throughput_rows(outcome.times)]
    for variant, seconds in outcome.seconds.items():
        if seconds is not None:
            rows.append(row("e2e accuracy", variant, "s", [seconds], accuracy=ACCURACY))
    return [*rows, row("e2e missing", "rows", "count", [len(outcome.missing)], missing=outcome.missing)]


def _overlap_rows(measured: Measured) -> list[Row]:
    strict = measured.get(("overlap", STRICT), [])
    rows: list[Row] = []
    if strict:
        rows.append(row("e2e overlap limit", STRICT, "ratio", [turn.limit for turn in strict]))
    for (part, variant), turns in measured.items():
        if part != "overlap":
            continue
        notes: dict[str, Any] = {}
        paired = list(zip(strict, turns, strict=False))
        if paired and variant != STRICT:
            reached = [of_limit(synchronous, made) for synchronous, made in paired]
            rows.append(row("e2e part of the limit", variant, "ratio", reached))
            notes["speedup"] = statistics.median(made.rollouts_s / sync.rollouts_s for sync, made in paired)
            notes["bottleneck_idle"] = statistics.median(made.idle_of(sync.bottleneck) for sync, made in paired)
        if variant == STRICT:
            notes |= {"generate_s": turns[-1].wait_s, "learn_s": turns[-1].learn_s, "bottleneck": turns[-1].bottleneck}
        rates = [made.rollouts_s for made in turns]
        rows.append(row("e2e overlap", variant, "rollouts/s", rates, **notes, **_notes(turns)))
    return rows


def _throughput_rows(measured: Measured) -> list[Row]:
    rows: list[Row] = []
    for (part, variant), turns in measured.items():
        if part != "overlap":
            rows.append(row(f"e2e {part}", variant, "rollouts/s", [made.rollouts_s for made in turns], **_notes(turns)))
            rows.append(row(f"e2e {part}", variant, "tokens/s", [made.tokens_s for made in turns]))
    return rows


def _notes(turns: list[Times]) -> dict[str, Any]:
    """Of the last turn, which the others resemble or the spread tells."""
    last = turns[-1]
    return {
        "trained_tokens_s": last.tokens_s,
        "step_s": last.step_s,
        "length": last.length,
        "max_lag": last.max_lag,
        "learner_s": last.learner_s,
        "generator_s": last.generator_s,
        "learner_idle": last.learner_idle,
        "generator_idle": last.generator_idle,
    }


def cores(seconds: float = 1.0, repeats: int = 5) -> list[Row]:
    """Matrix products of one core, alone and beside another core that does the same, in turn."""
    alone, beside = [], []
    for _ in range(repeats):
        alone.append(_products(seconds, 1)[0])
        beside.append(min(_products(seconds, 2)))
    pairs = [b / a for a, b in zip(alone, beside, strict=True)]
    return [row("e2e cores", "a core beside a busy one", "ratio", pairs)]


def _products(seconds: float, processes: int) -> list[float]:
    """Products a second of each process, each pinned to a core of its own."""
    available = sorted(os.sched_getaffinity(0))
    begin = time.time() + _IMPORT_S
    running = [
        subprocess.Popen(
            [sys.executable, "-c", _BUSY, str(available[n % len(available)]), str(seconds), str(begin)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        for n in range(processes)
    ]
    return [float(process.communicate(timeout=60 + seconds)[0]) for process in running]


_IMPORT_S = 1.0
_BUSY = """
import os, sys, time
import numpy
os.sched_setaffinity(0, {int(sys.argv[1])})
a = numpy.random.default_rng(0).random((256, 256), dtype=numpy.float32)
numpy.dot(a, a)
time.sleep(max(0.0, float(sys.argv[3]) - time.time()))
began, done = time.monotonic(), 0
while time.monotonic() - began < float(sys.argv[2]):
    numpy.dot(a, a)
    done += 1
print(done / (time.monotonic() - began))
"""


def run(vllm: Path | None = None) -> list[Row]:
    """All rows. `vllm`: an interpreter of an environment with vLLM; without one, VLLM where it exists."""
    found = vllm if vllm is not None else VLLM if VLLM.exists() else None
    with tempfile.TemporaryDirectory() as folder:
        shared = cores()
        outcome = work(list(jobs(found)), Runs(Path(folder)).do, time.monotonic)
    for name, reason in outcome.missing.items():
        print(f"missing: {name}: {reason}", flush=True)
    return [*shared, *rows_of(outcome)]
