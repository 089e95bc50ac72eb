"""How far does it scale? Simulated, after the simulator has predicted real runs of this machine.

    validation   rates from one run of tiny_cpu; three others, which gave none, are predicted: other S, more rollouts a
                 step. One generator and one learner on two cores, for the model lets nobody take another's core.
    sweeps       scale_sweeps.py: strong and weak scaling, lengths, failures. No GPU was measured: rates are assumed.

A row is measured unless its unit says simulated.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import scale_sweeps
from benchmarks.overlap import one_run
from benchmarks.protocol import Row, row
from orz_async.sim.measured import Measured, measure, predict

BOUND = 0.15
"""Of the measured time of a step: what a prediction may be off by."""
PLACEMENT = ("--generator.count", "1")
CALIBRATION = (1, PLACEMENT)
"""Lag and settings of the run whose rates predict all."""
RUNS: dict[str, tuple[int, tuple[str, ...]]] = {
    "S = 0": (0, PLACEMENT),
    "S = 2": (2, PLACEMENT),
    "S = 1, 64 x 4": (1, (*PLACEMENT, "--broker.prompts-per-step", "64")),
}
A_PROCESS = 32
"""Rollouts a step and process in the scaling with the rates of this machine."""


def run() -> list[Row]:
    """Validation, then the sweeps."""
    with TemporaryDirectory() as folder:
        rated = measured(Path(folder) / "rates", *CALIBRATION)
        rows = [
            line for name, how in RUNS.items() for line in validated(name, measured(Path(folder) / name, *how), rated)
        ]
    gpus = scale_sweeps.orz_7b()
    rows += scale_sweeps.weak(scale_sweeps.measured_rates(rated), A_PROCESS)
    rows += scale_sweeps.strong(gpus)
    rows += scale_sweeps.weak(gpus)
    rows += scale_sweeps.by_length()
    rows += scale_sweeps.failures(gpus)
    return rows


def measured(folder: Path, lag: int, settings: tuple[str, ...]) -> Measured:
    """A real run of a few steps."""
    one_run(folder, lag, settings)
    return measure(folder)


def validated(name: str, run: Measured, rated: Measured) -> list[Row]:
    """A step of `run`: measured, simulated with the rates of `rated`, and the error of that in percent."""
    ours, theirs = predict(run, rated.rates), run.found
    error = abs(ours.step_s / theirs.step_s - 1)
    title = "validation, tiny_cpu"
    shares = {"learner_idle": theirs.learner_idle, "generator_idle": theirs.generator_idle, "steps": run.steps}
    simulated = {"learner_idle": ours.learner_idle, "generator_idle": ours.generator_idle}
    rates = {"rates": [note.split("measured in", 1)[0].strip() + note.rpartition(":")[2] for note in rated.rates.notes]}
    return [
        row(title, f"{name}: measured", "s a step", [theirs.step_s], **shares),
        row(title, f"{name}: simulated", "simulated s a step", [ours.step_s], **simulated, **rates),
        row(title, f"{name}: error", "% of measured", [100 * error], bound=100 * BOUND, within=error <= BOUND),
    ]
