"""The terminal view says what the event logs say."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from benchmarks.synthetic_run import write_run
from orz_async.config_toml import load
from orz_async.observe.top import BARS, sparkline, top


def test_a_curve_keeps_its_ends_and_its_width() -> None:
    assert sparkline([]) == "" and sparkline([3.0, 3.0]) == BARS[0] * 2
    line = sparkline([float(n) for n in range(1000)], 10)
    assert len(line) == 10 and line[0] == BARS[0] and line[-1] == BARS[-1] and list(line) == sorted(line)


def test_it_shows_learning_processes_and_the_funnel(tmp_path: Path) -> None:
    run = tmp_path / "[red]run"
    facts = write_run(run, steps=12, prompts=4, samples=2)
    out = io.StringIO()
    console = Console(file=out, width=160)
    top(run, load(run / "config.toml"), console, once=True, clock=lambda: 1e9 + 1 + 120.0)
    text = out.getvalue()
    assert "step 12/12" in text and "[red]run" in text
    assert f"{facts.rewards[-1]:.3f}" in text and "held-out accuracy" in text
    assert "g0" in text and "g1" in text and "33.6 MB in 0.30 s" in text
    assert f"{facts.rollouts:,} trained" in text and "all accounted for" in text
    assert "idle 10% (rollouts 10%)" in text
