"""The summary of a run as it is printed at its end."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from orz_async.observe import words
from orz_async.observe.live import new_console
from orz_async.observe.summary import Rollouts, Summary


def accuracy_line(summary: Summary) -> str:
    if not summary.evals:
        return "not evaluated"
    first, last = summary.evals[0], summary.evals[-1]
    interval = f"(95 % interval {last.accuracy_low:.3f} to {last.accuracy_high:.3f}, {last.rollouts} samples)"
    best = max(last.passes, key=int, default="1")
    told = f", pass@{best} {first.passes.get(best, 0.0):.3f} -> {last.passes[best]:.3f}" if best != "1" else ""
    return f"{first.accuracy:.3f} -> {last.accuracy:.3f} {interval}{told}"


def length_line(summary: Summary) -> str:
    if not summary.evals:
        return "not evaluated"
    return f"{summary.evals[0].length:.1f} -> {summary.evals[-1].length:.1f} tokens"


def rollouts_line(rollouts: Rollouts) -> str:
    causes = ", ".join(f"{cause} {n}" for cause, n in sorted(rollouts.expired_by_cause.items()))
    expired = f"{rollouts.expired} expired" + (f" ({causes})" if causes else "")
    missing = f", {rollouts.unaccounted} UNACCOUNTED" if rollouts.unaccounted else ": all accounted for"
    return (
        f"{rollouts.granted:,} granted = {rollouts.trained:,} trained + {expired} + "
        f"{rollouts.quarantined} quarantined + {rollouts.in_flight} in flight{missing}"
    )


def rows(summary: Summary) -> list[tuple[str, str]]:
    state = "finished" if summary.finished else "not finished"
    resumed = f", resumed {summary.restarts} times" if summary.restarts else ""
    mismatch = "not measured" if summary.mismatch_max is None else f"{summary.mismatch_max:.2e}"
    return [
        ("run", f"{summary.run_id or 'unnamed'}, {state} after {summary.steps} steps{resumed}"),
        ("held-out accuracy", accuracy_line(summary)),
        ("held-out length", length_line(summary)),
        ("training time", f"{words.duration(summary.train_wall_s)} ({summary.train_wall_s:.1f} s)"),
        ("lag", f"{summary.max_lag_observed} observed, {summary.max_lag} allowed"),
        ("log-prob mismatch", f"{mismatch} at most, learner against engine"),
        ("generators", f"{words.rate(summary.generator_tokens_per_s)}, {words.idle(summary.generator_idle)}"),
        ("learner", f"{words.rate(summary.learner_tokens_per_s)}, {words.idle(summary.learner_idle)}"),
        ("rollouts", rollouts_line(summary.rollouts)),
    ]


def print_summary(summary: Summary, run_dir: Path, files: list[str], console: Console | None = None) -> None:
    """The table, and where the files are."""
    console = console or new_console()
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in rows(summary):
        table.add_row(Text(name, style="cyan"), Text(value))
    console.print(table)
    if files:
        console.print(Text(f"written: {', '.join(str(run_dir / name) for name in files)}"), soft_wrap=True)
