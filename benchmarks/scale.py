"""How far does it scale? Simulated, after the simulator has predicted real runs of this machine.

    validation   rates from tiny_cpu at S = 1; three runs that gave none are predicted: other S, more rollouts a step.
                 One generator and one learner on two cores, for the model lets nobody take another's core.
    sweeps       scale_sweeps.py: strong and weak scaling, lengths, failures. No GPU was measured: rates are assumed.

A row is measured unless its unit says simulated.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from benchmarks import scale_sweeps
from benchmarks.overlap import one_run
from benchmarks.protocol import Row, row
from orz_async.sim.measured import Measured, measure, predict

BOUND = 0.15
"""Of the measured time of a step: what a prediction may be off by."""
PLACEMENT = ("--generator.count", "1")
CALIBRATION = (1, PLACEMENT)
"""Lag and settings of the runs whose rates predict all: one before and one after them, as machines drift."""
RUNS: dict[str, tuple[int, tuple[str, ...]]] = {
    "S = 0": (0, PLACEMENT),
    "S = 2": (2, PLACEMENT),
    "S = 1, 64 x 4": (1, (*PLACEMENT, "--broker.prompts-per-step", "64")),
}
A_PROCESS = 32
"""Rollouts a step and process in the scaling with the rates of this machine."""


def run() -> list[Row]:
    """Validation, then the sweeps."""
    with TemporaryDirectory() as place:
        folder = Path(place)
        before = measured(folder / "before", *CALIBRATION)
        runs = {name: measured(folder / name, *how) for name, how in RUNS.items()}
        after = measured(folder / "after", *CALIBRATION)
        rows = [line for name, found in runs.items() for line in validated(name, found, (before, after))]
    gpus = scale_sweeps.orz_7b()
    rows += scale_sweeps.weak(scale_sweeps.measured_rates(before), A_PROCESS)
    rows += scale_sweeps.strong(gpus)
    rows += scale_sweeps.weak(gpus)
    rows += scale_sweeps.by_length()
    rows += scale_sweeps.failures(gpus)
    return rows


def measured(folder: Path, lag: int, settings: tuple[str, ...]) -> Measured:
    """A real run of a few steps."""
    one_run(folder, lag, settings)
    return measure(folder)


def validated(name: str, run: Measured, rated: Sequence[Measured]) -> list[Row]:
    """A step of `run`: measured, simulated with the rates of each of `rated`, and the error of that in percent."""
    forecasts = [predict(run, one.rates) for one in rated]
    steps, found = [ours.step_s for ours in forecasts], run.found
    error = abs(median(steps) / found.step_s - 1)
    title = "validation, tiny_cpu"
    shares = {"learner_idle": found.learner_idle, "generator_idle": found.generator_idle, "steps": run.steps}
    simulated = {
        "learner_idle": [ours.learner_idle for ours in forecasts],
        "generator_idle": [ours.generator_idle for ours in forecasts],
        "rates": [[_without_path(note) for note in one.rates.notes] for one in rated],
    }
    return [
        row(title, f"{name}: measured", "s a step", [found.step_s], **shares),
        row(title, f"{name}: simulated", "simulated s a step", steps, **simulated),
        row(title, f"{name}: error", "% of measured", [100 * error], bound=100 * BOUND, within=error <= BOUND),
    ]


def _without_path(note: str) -> str:
    """What was measured, without the folder of the run."""
    return note.split("measured in", 1)[0].strip() + note.rpartition(":")[2]
