"""The live view of `orz run`: reads the event logs and nothing else, so it can show a process that answers nobody."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from orz_async.config import Config
from orz_async.observe import words
from orz_async.observe.history import History
from orz_async.observe.tail import Tail

TERMINAL_S = 0.5
"""Seconds between two pictures on a terminal."""
PLAIN_S = 10.0
"""Seconds between two lines when the output is not a terminal."""


def new_console(*, quiet: bool = False) -> Console:
    """As wide as the terminal; in a file or a pipe wide enough to leave the lines whole."""
    return Console(highlight=False, quiet=quiet, width=None if sys.stdout.isatty() else 200)


def picture(history: History, config: Config, now: float) -> Group:
    """The compact view: progress, learning, one row a process, what the broker waits for."""
    bar = Table.grid(padding=(0, 2))
    bar.add_row(
        ProgressBar(total=config.steps, completed=history.steps_done, width=30),
        Text(words.headline(history, config, now), style="bold"),
    )
    rows = Table.grid(padding=(0, 2))
    for name, speed, doing, idle in words.process_rows(history, now):
        rows.add_row(Text(name, style="cyan"), Text(speed, justify="right"), Text(doing), Text(idle, style="dim"))
    # Text, never markup: names and reasons come from other processes.
    parts: list[RenderableType] = [bar]
    if learning := words.learning(history, config):
        parts.append(Text(learning))
    parts.append(rows)
    if waiting := words.waiting(history, now):
        parts.append(Text(waiting, style="yellow"))
    return Group(*parts)


class View:
    """Shows a run while it goes on. `update` is cheap to call often; `note` says something that stays.

    A terminal that went away ends the showing, not the run.
    """

    def __init__(self, run_dir: Path, config: Config, console: Console | None = None) -> None:
        self.history = History()
        self._config = config
        self._tail = Tail(run_dir / "events")
        self._console = console or new_console()
        self._live: Live | None = None
        self._next = 0.0
        self._gone = False
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)

    def note(self, text: str) -> None:
        """One line that stays, with the time of day."""
        self._show(lambda: self._console.print(Text(f"{time.strftime('%H:%M:%S')} {text}"), soft_wrap=True))

    def update(self, *, force: bool = False) -> None:
        now = time.time()
        if now < self._next and not force:
            return
        self.history.feed_all(self._tail.poll())
        if self._live is None:
            self._next = now + PLAIN_S
            if self.history.processes:
                self.note(words.plain_line(self.history, self._config, now))
        else:
            self._next = now + TERMINAL_S
            self._show(lambda: self._draw(now))

    def read(self) -> History:
        """The history up to now, without showing it."""
        self.history.feed_all(self._tail.poll())
        return self.history

    def _draw(self, now: float) -> None:
        assert self._live is not None
        if not self._live.is_started:
            self._live.start()
        self._live.update(picture(self.history, self._config, now), refresh=True)

    def _show(self, draw: Callable[[], None]) -> None:
        if self._gone:
            return
        try:
            draw()
        except OSError:  # EIO or EPIPE: the terminal or the pipe was closed
            self._gone = True

    def close(self) -> None:
        """Show the last state and leave the terminal as it was."""
        if self._live is not None:
            self.update(force=True)
            self._show(self._live.stop)
