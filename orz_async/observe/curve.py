"""The picture of a run: held-out accuracy with its interval, and response length, against time and against steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orz_async.observe.history import History
from orz_async.observe.summary import Evaluation, evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ACCURACY, LENGTH = "#1f6feb", "#d1570a"


def draw_curve(history: History, path: Path, title: str) -> bool:
    """Write the picture as PNG; False if there is no evaluation and no step to draw."""
    evals = [evaluation(event) for _, event in sorted(history.evals.items())]
    steps = [history.steps[step] for step in sorted(history.steps)]
    if not evals and not steps:
        return False
    # Imported here: half a second that only the end of a run needs to pay. Figure without pyplot needs no display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), dpi=150, layout="constrained")
    by_time, by_step = figure.subplots(1, 2)
    length = [(e["wall_s"], e["step"] + 1, e.get("length_mean") or 0.0) for e in steps]
    _panel(by_time, [e.wall_s for e in evals], evals, [(t, mean) for t, _, mean in length], "training time, s")
    _panel(by_step, [e.version for e in evals], evals, [(step, mean) for _, step, mean in length], "learner steps")
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, format="png")
    return True


def _panel(
    axes: Axes, x: Sequence[float], evals: Sequence[Evaluation], lengths: Sequence[tuple[float, float]], label: str
) -> None:
    below = [e.accuracy - e.accuracy_low for e in evals]
    above = [e.accuracy_high - e.accuracy for e in evals]
    lines: list[Any] = [
        axes.errorbar(
            x,
            [e.accuracy for e in evals],
            yerr=[below, above],
            color=ACCURACY,
            marker="o",
            markersize=3.5,
            capsize=2,
            label="held-out accuracy, 95 % interval",
        )
    ]
    axes.set_ylim(0, 1.02)
    axes.set_xlabel(label)
    axes.set_ylabel("accuracy", color=ACCURACY)
    axes.grid(alpha=0.25)
    right = axes.twinx()
    lines += right.plot([t for t, _ in lengths], [n for _, n in lengths], color=LENGTH, linewidth=0.9, alpha=0.6)
    lines[-1].set_label("response length, training")
    lines += right.plot(x, [e.length for e in evals], color=LENGTH, marker="s", markersize=3.5, linestyle="none")
    lines[-1].set_label("response length, held-out")
    right.set_ylim(bottom=0)
    right.set_ylabel("tokens", color=LENGTH)
    axes.legend(handles=lines, loc="lower right", fontsize=7, framealpha=0.85)
