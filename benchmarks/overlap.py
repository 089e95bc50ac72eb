"""What asynchrony buys the demo's recipe: the same code and placement at S = 0, 1, 2, in turn.

At S = 0 a generator waits for the weights of the step before and the learner for the generators, except that both work
while the critic trains. How much overlap could bring at most is a question for a placement in which the two sides share
no core: the suite e2e.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.protocol import Row, row

STEPS = 24
LAGS = (0, 1, 2)
REPEATS = 2


def ensure_base() -> None:
    """Make the demo's base model where the recipe looks for it, unless it is there: a fresh clone has none."""
    if not Path("runs/base/model").is_dir():
        subprocess.run([sys.executable, "-m", "orz_async.cli", "make-base"], check=True, timeout=900)


def one_run(folder: Path, lag: int, extra: tuple[str, ...] = (), prefix: tuple[str, ...] = ()) -> dict[str, Any]:
    """Run the demo recipe for a few steps without evaluation and return its summary. `prefix`: words such as taskset's
    before the command. RuntimeError where it fails."""
    ensure_base()
    command = [
        *prefix,
        *(sys.executable, "-m", "orz_async.cli", "run", "tiny_cpu", "--run-dir", str(folder)),
        *("--steps", str(STEPS), "--broker.max-lag", str(lag), "--eval.every", "0", "--overwrite", *extra),
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def run() -> list[Row]:
    """Rollouts per second by S."""
    rates: dict[int, list[float]] = {lag: [] for lag in LAGS}
    summaries: dict[int, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(REPEATS):
            for lag in LAGS:
                summaries[lag] = one_run(Path(folder) / f"s{lag}_{turn}", lag)
                rates[lag].append(summaries[lag]["rollouts"]["trained"] / summaries[lag]["train_wall_s"])
    rows = []
    for lag in LAGS:
        ratios = sorted(a / b for a, b in zip(rates[lag], rates[0], strict=True))
        rows.append(
            row(
                "async",
                f"S = {lag}",
                "rollouts/s",
                rates[lag],
                speedup_over_s0=ratios[len(ratios) // 2],
                learner_idle=summaries[lag]["learner_idle"],
                generator_idle=summaries[lag]["generator_idle"],
                max_lag_observed=summaries[lag]["max_lag_observed"],
            )
        )
    return rows
