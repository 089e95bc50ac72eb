"""`orz top`: the whole of a run in a terminal, from its event logs: also of a run that was started elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from orz_async.config import Config
from orz_async.observe import words
from orz_async.observe.history import History
from orz_async.observe.summary import evaluation, rollouts
from orz_async.observe.table import rollouts_line
from orz_async.observe.tail import Event, Tail

BARS = "▁▂▃▄▅▆▇█"
PERIOD_S = 0.5
WIDTH = 48
"""Characters of a curve."""


def sparkline(values: list[float], width: int = WIDTH) -> str:
    """The curve as blocks, averaged to at most `width` of them; the lowest value is the lowest block."""
    if not values:
        return ""
    count = min(width, len(values))
    parts = [values[len(values) * n // count : len(values) * (n + 1) // count] for n in range(count)]
    means = [sum(part) / len(part) for part in parts]
    low, span = min(means), max(means) - min(means)
    return "".join(BARS[round((mean - low) / span * (len(BARS) - 1))] if span else BARS[0] for mean in means)


def _curve(history: History, *path: str) -> list[float]:
    values: list[float] = []
    for step in sorted(history.steps):
        value: object = history.steps[step]
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        if isinstance(value, int | float):
            values.append(float(value))
    return values


CURVES: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("reward", ("reward_mean",), "{:.3f}"),
    ("length", ("length_mean",), "{:.1f} tokens"),
    ("truncated", ("truncated_fraction",), "{:.1%}"),
    ("explained variance", ("explained_variance",), "{:.2f}"),
    ("entropy", ("policy", "entropy"), "{:.3f} nats"),
    ("KL to the sampler", ("policy", "kl_k3"), "{:.1e}"),
    ("largest ratio", ("policy", "ratio_max"), "{:.2f}"),
    ("log-prob mismatch", ("mismatch_max",), "{:.1e}"),
)


def _learning(history: History, config: Config) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    for name, path, form in CURVES:
        if values := _curve(history, *path):
            table.add_row(Text(name, style="cyan"), Text(sparkline(values)), Text(form.format(values[-1])))
    if history.evals:
        last = evaluation(history.evals[max(history.evals)])
        held = [evaluation(history.evals[version]).accuracy for version in sorted(history.evals)]
        told = f"{last.accuracy:.3f} ({last.accuracy_low:.2f} to {last.accuracy_high:.2f}) at step {last.version}"
        table.add_row(Text("held-out accuracy", style="cyan"), Text(sparkline(held)), Text(told, style="bold"))
    if history.steps:
        step = history.steps[max(history.steps)]
        lags = ", ".join(f"{lag}: {n:,}" for lag, n in (step.get("lag_histogram") or {}).items())
        table.add_row(Text("tokens by lag", style="cyan"), Text(f"{lags}   (bound {config.broker.max_lag})"))
    return table


def _processes(history: History, now: float) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("process", "speed", "does", "idle, last 30 s", "weights"):
        table.add_column(name)
    for name, speed, doing, idle in words.process_rows(history, now):
        process = history.processes.get(f"generator-{name}")
        weights = _weights(process.weights) if process else ""
        table.add_row(Text(name, style="cyan"), Text(speed), Text(doing), Text(idle), Text(weights, style="dim"))
    return table


def _weights(event: Event) -> str:
    if not event:
        return ""
    size = float(event.get("bytes") or 0.0) / 1e6
    return f"{size:,.1f} MB in {float(event.get('fetch_s') or 0):.2f} s, swap {float(event.get('swap_s') or 0):.2f} s"


def screen(history: History, config: Config, now: float, name: str) -> Group:
    """Everything at this moment. Text, never markup: names and reasons come from other processes."""
    bar = Table.grid(padding=(0, 2))
    bar.add_row(
        ProgressBar(total=config.steps, completed=history.steps_done, width=30),
        Text(words.headline(history, config, now), style="bold"),
    )
    parts: list[RenderableType] = [
        bar,
        Panel(_learning(history, config), title=Text(name), title_align="left", border_style="dim"),
        Panel(_processes(history, now), title="processes", title_align="left", border_style="dim"),
        Text(rollouts_line(rollouts(history.funnel))),
    ]
    if history.checkpoint:
        parts.append(Text(f"last checkpoint: step {history.checkpoint.get('step')}", style="dim"))
    if waiting := words.waiting(history, now):
        parts.append(Text(waiting, style="yellow"))
    return Group(*parts)


def top(run_dir: Path, config: Config, console: Console, *, once: bool, clock: Callable[[], float] = time.time) -> None:
    """Show the run until Ctrl-C; `once` prints one picture. Nothing is asked of the run's processes."""
    history, tail = History(), Tail(run_dir / "events")

    def picture() -> Group:
        history.feed_all(tail.poll())
        return screen(history, config, clock(), run_dir.name)

    if once or not console.is_terminal:
        console.print(picture())
        return
    with Live(console=console, auto_refresh=False, screen=True) as live:
        try:
            while True:
                live.update(picture(), refresh=True)
                time.sleep(PERIOD_S)
        except KeyboardInterrupt:
            return
