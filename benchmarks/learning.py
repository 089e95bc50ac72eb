"""Does it learn, and what does staleness cost? The demo's task under variants of the recipe, each with several seeds.

    S = 0, 1, 2, 4, 8 x {ppo, decoupled}        clip around the behaviour policy, or around the proximal one
    S = 0, lambda 0.95                          against lambda 1
    S = 0, grpo                                 no critic
    S = 4, 4 policy steps a version             where the clip around the proximal policy acts at all

Runs go seed by seed, so that a suite that runs out of time has each variant equally often, as far as it came. One that
did not happen is named in the result, never made up. Reward and length are those of the rollouts that were trained on.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.overlap import one_run
from benchmarks.protocol import RESULTS, Row, row

BUDGET_S = 25 * 60.0
STEPS = 32
SEEDS = (0, 1)
LR = "4e-4"
"""Twice the demo's, and constant: what staleness costs shows sooner."""
LAST = 4
"""Steps whose mean reward is the result of a run."""

VARIANTS: dict[str, tuple[int, tuple[str, ...]]] = {
    **{f"S = {lag}, ppo": (lag, ()) for lag in (0, 1, 2, 4, 8)},
    **{f"S = {lag}, decoupled": (lag, ("--learner.objective", "decoupled")) for lag in (0, 1, 2, 4, 8)},
    "S = 0, lambda 0.95": (0, ("--learner.lam", "0.95")),
    "S = 0, grpo": (0, ("--learner.estimator", "grpo")),
    "S = 4, P = 4, ppo": (4, ("--learner.policy-steps", "4")),
    "S = 4, P = 4, decoupled": (4, ("--learner.policy-steps", "4", "--learner.objective", "decoupled")),
}


def curve(folder: Path) -> dict[str, list[float]]:
    """Reward, length, lag and wall time (since the first step was reported) by step, from the event log of a run."""
    steps = [
        event
        for event in map(json.loads, (folder / "events" / "learner-0.jsonl").read_text().splitlines())
        if event["kind"] == "step"
    ]
    return {
        "reward": [e["reward_mean"] for e in steps],
        "length": [e["length_mean"] for e in steps],
        "truncated": [e["truncated_fraction"] for e in steps],
        "clipped": [e["policy"]["clip_low"] + e["policy"]["clip_high"] for e in steps],
        "lag": [e["lag_mean"] for e in steps],
        "seconds": [e["t"] - steps[0]["t"] + steps[0]["step_s"] for e in steps],
    }


def run(*, steps: int = STEPS, seeds: tuple[int, ...] = SEEDS, only: tuple[str, ...] = ()) -> list[Row]:
    """Rows of the final reward, with every curve in their notes."""
    began = time.monotonic()
    curves: dict[str, list[dict[str, list[float]]]] = defaultdict(list)
    missing: list[str] = []
    slowest = 0.0
    chosen = {name: VARIANTS[name] for name in only or VARIANTS}
    with TemporaryDirectory() as folder:
        for seed in seeds:
            for number, (name, (lag, extra)) in enumerate(chosen.items()):
                if time.monotonic() - began + slowest > BUDGET_S:
                    missing.append(f"{name}, seed {seed}")
                    continue
                started, place = time.monotonic(), Path(folder) / f"{number}-{seed}"
                settings = (
                    "--steps",
                    str(steps),
                    "--seed",
                    str(seed),
                    "--learner.lr-final",
                    "1.0",
                    "--learner.lr",
                    LR,
                    *extra,
                )
                one_run(place, lag, settings)
                curves[name].append(curve(place))
                slowest = max(slowest, time.monotonic() - started)
                print(f"{name}, seed {seed}: {curves[name][-1]['reward'][-1]:.3f} in {slowest:.0f} s", flush=True)
    return [
        row(
            "learning",
            name,
            "reward",
            [sum(c["reward"][-LAST:]) / len(c["reward"][-LAST:]) for c in of_variant],
            curves=of_variant,
            missing=missing,
        )
        for name, of_variant in curves.items()
    ]


COLUMNS: dict[str, tuple[str, ...]] = {
    "ppo: clip around the policy that sampled": tuple(name for name in VARIANTS if name.endswith(", ppo")),
    "decoupled: clip around the policy at the start of the step": tuple(
        name for name in VARIANTS if name.endswith(", decoupled")
    ),
    "S = 0: lambda, no critic": ("S = 0, ppo", "S = 0, lambda 0.95", "S = 0, grpo"),
}
LINES = (("reward", "step", 1.0), ("reward", "training time, s", 1.0), ("length", "step", None))
"""What is drawn against what, and the top of its axis."""


def draw(rows: list[Row], path: Path | None = None) -> Path:
    """An SVG: reward by step and by time, length by step; objectives side by side, a line is the mean over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "learning", "svg.fonttype": "none"}  # the same rows, the same small file
    from matplotlib import pyplot

    path = path or RESULTS / "learning.svg"
    means = {made["variant"]: mean_curves(made["notes"]["curves"]) for made in rows}
    figure, axes = pyplot.subplots(len(LINES), len(COLUMNS), figsize=(15, 12), sharey="row", squeeze=False)
    for column, (title, names) in enumerate(COLUMNS.items()):
        for line, (what, against, top) in enumerate(LINES):
            axis = axes[line][column]
            for name in names:
                if curve_of := means.get(name):
                    x = curve_of["seconds"] if against != "step" else range(1, len(curve_of[what]) + 1)
                    axis.plot(x, curve_of[what], label=name, linewidth=1.4)
            axis.set(xlabel=against, ylabel=what if column == 0 else "", ylim=(0, top))
            axis.grid(alpha=0.3)
        axes[0][column].set_title(title, fontsize=10)
        axes[0][column].legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path


def mean_curves(curves: list[Mapping[str, list[float]]]) -> dict[str, Any]:
    """Step by step over the seeds, as far as the shortest goes."""
    length = min(len(c["reward"]) for c in curves)
    return {name: [sum(c[name][i] for c in curves) / len(curves) for i in range(length)] for name in curves[0]}
