"""`orz replay`: a run is trained again from its journal, in this process, and compared with what it was."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

from orz_async.config import Config
from orz_async.config_toml import differences, load
from orz_async.errors import ConfigError, DataError
from orz_async.launcher.run_folder import Mode, RunFolder
from orz_async.observe.history import History
from orz_async.observe.live import View, new_console
from orz_async.observe.summary import read_history

_MAY_DIFFER = ("run_dir", "eval.", "generator.", "journal.", "checkpoint.")
"""Settings that do not touch what is learned."""


def replay(source: Path, config: Config) -> int:
    """Returns the exit code; ConfigError and DataError before anything is written."""
    # Imported here: a wrong option needs no torch.
    from orz_async.learner.replay import EndOfJournalError, JournalRollouts, Replay
    from orz_async.learner.start import start

    original = load(source / "config.toml")
    if Path(config.run_dir).resolve() == source.resolve():
        raise ConfigError(f"expected a --run-dir of its own, found {source} itself: a replay is another run")
    if config.broker.rollouts_per_step != original.broker.rollouts_per_step:
        raise ConfigError(
            "expected the batches of the run, found another number of rollouts a step; leave it as it was"
        )
    rollouts = JournalRollouts(source / "journal")
    if not rollouts.num_steps:
        raise DataError(f"expected at least one complete batch in {source}/journal, found none")
    # At the end of the journal the run may have had more steps to do: what there is has been trained and saved.
    with RunFolder(config, Mode.CONTINUE), _Showing(config), contextlib.suppress(EndOfJournalError):
        start(config, Replay(rollouts))
    for line in report(source, Path(config.run_dir), original, config):
        print(line)
    return 0


class _Showing:
    """The live view beside a learner that has the main thread."""

    def __init__(self, config: Config) -> None:
        self._view = View(Path(config.run_dir), config, new_console())
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._show, name="view", daemon=True)

    def _show(self) -> None:
        while not self._done.wait(0.2):
            self._view.update()

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._view.close()


def report(source: Path, run_dir: Path, original: Config, config: Config) -> list[str]:
    """What was trained, and whether it is what the run trained."""
    mine, theirs = read_history(run_dir), read_history(source)
    lines = [f"{run_dir}: {mine.steps_done} steps trained from the journal of {source}"]
    changed = [name for name in differences(original, config) if not name.startswith(_MAY_DIFFER)]
    compared, first = compare(mine, theirs)
    if not compared:
        lines.append("nothing to compare: the run's event log has no losses of these steps")
    elif first is None:
        lines.append(f"losses equal those of the run, bit for bit, in all {compared} steps")
    else:
        why = f" (changed settings: {', '.join(changed)})" if changed else ""
        lines.append(f"losses differ from those of the run from step {first} on{why}")
    return lines


def compare(mine: History, theirs: History) -> tuple[int, int | None]:
    """Steps that both report, and the first one whose losses differ."""
    both = sorted(mine.steps.keys() & theirs.steps.keys())
    differ = (step for step in both if mine.steps[step].get("losses") != theirs.steps[step].get("losses"))
    return len(both), next(differ, None)
