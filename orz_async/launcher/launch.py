"""`orz run`: a configuration becomes a folder, processes, a view, and in the end a summary."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from orz_async.config import Config
from orz_async.config_toml import config_hash, load
from orz_async.errors import ConfigError, DiskError, ExitCode
from orz_async.keys.ring import weights_keys
from orz_async.launcher.commands import commands
from orz_async.launcher.limits import Limits
from orz_async.launcher.run_folder import Mode, RunFolder
from orz_async.launcher.supervisor import Outcome, Supervisor
from orz_async.observe.curve import draw_curve
from orz_async.observe.live import View, new_console
from orz_async.observe.summary import Summary, read_history, summarise, write_summary
from orz_async.observe.table import print_summary


def launch(config: Config, *, mode: Mode = Mode.CONTINUE, ranks: int = 1, limits: Limits | None = None) -> int:
    """Run it to its end and return the exit code. ConfigError if the folder must not be used."""
    console = new_console()
    outcome = Outcome(ExitCode.INTERNAL, "")
    with RunFolder(config, mode) as folder:
        try:
            outcome = _supervise(config, ranks, limits or Limits(), console)
            if outcome.code == ExitCode.CHECKPOINT:
                folder.settings_refused()
            if read_history(folder.path).lives:  # a learner that never came up leaves nothing to sum up
                conclude(folder.path, console)
        finally:
            if outcome.message:
                print(f"orz run: {outcome.message}", file=sys.stderr)
    return outcome.code


def _supervise(config: Config, ranks: int, limits: Limits, console: Console) -> Outcome:
    run_dir = Path(config.run_dir)
    weights_keys(config.broker.keys)  # the generators of this machine need theirs when they start
    view = View(run_dir, config, console)
    view.note(f"{run_dir}: {config.steps} steps; each process writes {run_dir}/logs and {run_dir}/events")
    try:
        return Supervisor(commands(config, ranks), run_dir, view, limits).run()
    finally:
        view.close()


def conclude(run_dir: Path, console: Console | None = None) -> Summary:
    """Compute the summary from the event logs, write summary.json and curve.png, print the table."""
    if not (run_dir / "config.toml").exists():
        raise ConfigError(f"expected the folder of a run, found no {run_dir}/config.toml; check the path")
    config = load(run_dir / "config.toml")
    history = read_history(run_dir)
    summary = summarise(history, config, config_hash(config))
    files = ["summary.json"]
    try:
        write_summary(run_dir, summary)
        if draw_curve(history, run_dir / "curve.png", run_dir.name):
            files.append("curve.png")
    except OSError as error:
        raise DiskError(
            f"expected to write the summary into {run_dir}, found {error}; free space, then `orz summary {run_dir}`"
        ) from error
    print_summary(summary, run_dir, files, console)
    return summary
