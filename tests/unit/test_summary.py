"""The summary is a function of the event logs: also of a run that was killed and resumed in the same files."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orz_async.config import BrokerConfig, Config
from orz_async.observe import words
from orz_async.observe.account import Account, Stretch
from orz_async.observe.curve import draw_curve
from orz_async.observe.history import History
from orz_async.observe.live import View, picture
from orz_async.observe.summary import Summary, read_history, read_summary, summarise, wilson, write_summary
from orz_async.observe.table import print_summary

Emit = Callable[..., None]
CONFIG = Config(steps=6, broker=BrokerConfig(max_lag=1))


class Logs:
    """Event files with times of our choosing."""

    def __init__(self, run: Path) -> None:
        self.folder = run / "events"
        self.folder.mkdir(parents=True)
        self.sampled: dict[str, int] = {}
        """By generator, since it started."""

    def __call__(self, t: float, process: str, kind: str, **fields: Any) -> None:
        line = {"v": 1, "t": float(t), "m": float(t), "process": process, "kind": kind, **fields}
        with (self.folder / f"{process}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        if kind == "process":
            self.sampled.pop(process, None)

    def learner(self, t: float, resumed: int) -> None:
        self(t - 5, "learner-0", "process", pid=1, versions={"torch": "1"})
        self(
            t,
            "learner-0",
            "timeline",
            name="main",
            seconds={"load" if resumed else "wait_load": 5.0},
            state="x",
            state_s=0,
        )
        self(t, "learner-0", "run", run_id="r", resumed_step=resumed, epoch=resumed)

    def step(self, t: float, step: int, **fields: Any) -> None:
        """A step of 2 s, half of it waiting for rollouts."""
        seconds = {"wait_rollouts": 1.0, "policy": 1.0}
        self(t, "learner-0", "timeline", name="main", seconds=seconds, state="wait_rollouts", state_s=0)
        usual = {"tokens_trained": 100, "lag_max": min(step, 1), "mismatch_max": 1e-6 * (step + 1), "reward_mean": 0.5}
        self(t, "learner-0", "step", step=step, version=step + 1, length_mean=9.0, **(usual | fields))

    def eval(self, t: float, version: int, accuracy: float, length: float) -> None:
        self(t, "learner-0", "eval", version=version, accuracy=accuracy, length_mean=length, rollouts=100)

    def generator(self, t: float, name: str = "generator-g0", *, tokens_s: float = 50.0, idle: float = 0.25) -> None:
        """One second of a generator."""
        seconds = {"wait_leases": idle, "decode": 1.0 - idle}
        self(t, name, "timeline", name="main", seconds=seconds, state="decode", state_s=0)
        self.sampled[name] = self.sampled.get(name, 0) + int(tokens_s)
        fields = {"tokens": self.sampled[name], "tokens_s": tokens_s, "running": 3, "queued": 1, "rollouts": 2}
        self(t, name, "throughput", version=0, **fields)


@pytest.fixture
def logs(tmp_path: Path) -> Logs:
    return Logs(tmp_path)


def resumed_run(logs: Logs) -> None:
    """Life one: ready at 1000, steps 0 to 3, killed at 1009. Life two: ready at 2000, resumes at 2, steps 2 to 5."""
    logs.learner(1000, 0)
    logs(1000, "generator-g0", "process", pid=2, versions={})
    logs.eval(1001, 0, 0.2, 10.0)
    for step in range(4):
        logs.step(1002 + 2 * step, step, lag_max=0)
    for second in range(1, 21):
        logs.generator(1000 + second, idle=0.25 if second <= 8 else 1.0, tokens_s=50.0 if second <= 8 else 0.0)
    logs.eval(1008.5, 4, 0.9, 99.0)  # of a version that the resumed life makes anew
    logs(1008, "broker", "funnel", granted=20, trained=16, expired={}, quarantined=0, in_flight=4)
    logs.learner(2000, 2)
    logs(2000, "generator-g0", "process", pid=3, versions={})
    for step in range(2, 6):
        logs.step(2002 + 2 * (step - 2), step)
        logs.generator(2001 + 2 * (step - 2))
        logs.generator(2002 + 2 * (step - 2))
    logs.eval(2008.5, 4, 0.6, 20.0)
    logs.eval(2009, 6, 0.97, 30.0)
    logs(
        2009,
        "broker",
        "funnel",
        granted=30,
        trained=24,
        expired={"generator lost": 3, "end": 1},
        quarantined=1,
        in_flight=1,
    )


def summary_of(run: Path, config: Config = CONFIG) -> Summary:
    return summarise(read_history(run), config, "hash")


def test_a_resumed_run_counts_every_step_once(tmp_path: Path, logs: Logs) -> None:
    resumed_run(logs)
    got = summary_of(tmp_path)
    assert (got.run_id, got.finished, got.steps, got.restarts) == ("r", True, 6, 1)
    assert (got.accuracy_before, got.accuracy_after) == (0.2, 0.97)
    assert (got.length_before, got.length_after) == (10.0, 30.0)
    # Two lives of 8 s from ready to the last step; 992 s of downtime and 5 s of loading are not training.
    assert got.train_wall_s == pytest.approx(16.0)
    assert [(e.version, e.accuracy) for e in got.evals] == [(0, 0.2), (4, 0.6), (6, 0.97)]
    assert got.evals[0].wall_s == pytest.approx(1.0)
    assert got.evals[1].wall_s == pytest.approx(8.0 + 8.5)
    assert got.learner_tokens_per_s == pytest.approx(6 * 100 / 16.0)
    assert (got.max_lag, got.max_lag_observed) == (1, 1)
    assert got.mismatch_max == pytest.approx(6e-6)
    assert got.rollouts.unaccounted == 0
    assert (got.rollouts.expired, got.rollouts.expired_by_cause["generator lost"]) == (4, 3)
    assert got.versions == {"torch": "1"}


def test_a_learner_that_just_resumed_has_lost_the_steps_after_its_checkpoint(tmp_path: Path, logs: Logs) -> None:
    logs.learner(1000, 0)
    logs.eval(1001, 0, 0.2, 10.0)
    for step in range(4):
        logs.step(1002 + 2 * step, step)
    logs.eval(1008.5, 2, 0.3, 11.0)
    logs.eval(1008.6, 4, 0.4, 12.0)
    logs.learner(2000, 2)
    got = summary_of(tmp_path)
    assert (got.steps, [e.version for e in got.evals]) == (2, [0, 2])
    assert got.train_wall_s == pytest.approx(8.0), "the time of lost steps was spent all the same"


def test_idle_and_speed_are_of_the_training_time_only(tmp_path: Path, logs: Logs) -> None:
    resumed_run(logs)
    got = summary_of(tmp_path)
    # The generator idled from 1008 on because nobody trained: not its fault, not counted.
    assert got.generator_idle == pytest.approx({"leases": 0.25})
    assert got.generator_tokens_per_s == pytest.approx(50.0)
    assert got.learner_idle == pytest.approx({"rollouts": 0.5})


def test_idle_is_the_mean_over_daemons_and_speed_their_sum(tmp_path: Path, logs: Logs) -> None:
    logs.learner(1000, 0)
    for name in ("generator-a", "generator-b"):
        logs(1000, name, "process", pid=2, versions={})
    for step in range(3):
        logs.step(1002 + 2 * step, step)
    for second in range(1, 7):
        logs.generator(1000 + second, "generator-a", idle=0.0, tokens_s=100.0)
        logs.generator(1000 + second, "generator-b", idle=0.5, tokens_s=20.0)
    got = summary_of(tmp_path)
    assert got.generator_idle == pytest.approx({"leases": 0.25})
    assert got.generator_tokens_per_s == pytest.approx(120.0)
    assert not got.finished


def test_a_stretch_over_the_edge_of_the_window_counts_with_its_part() -> None:
    account = Account()
    account.add(Stretch(0.0, 4.0, {"wait_x": 1.0, "work": 3.0}))
    account.add(Stretch(4.0, 8.0, {"work": 4.0}))
    account.add(Stretch(8.0, 9.0, {"wait_x": 1.0}))
    account.settle((2.0, 5.0))
    assert account.read((2.0, 5.0)) == (3.0, {"wait_x": 0.5, "work": 2.5})
    account.settle((2.0, 6.0), close=True)
    account.settle((20.0, 30.0))
    assert account.read((20.0, 30.0)) == (4.0, {"wait_x": 0.5, "work": 3.5})


def test_an_account_does_not_grow_with_the_run() -> None:
    account = Account()
    for second in range(1000):
        account.add(Stretch(second, second + 1.0, {"work": 1.0}))
        account.settle((0.0, float(second)))
    assert len(account._open) <= 2
    assert account.read((0.0, 1000.0))[0] == pytest.approx(1000.0)


def test_a_run_without_any_step_or_evaluation(tmp_path: Path, logs: Logs) -> None:
    logs.learner(1000, 0)
    got = summary_of(tmp_path)
    assert (got.steps, got.accuracy_before, got.train_wall_s, got.mismatch_max) == (0, None, 0.0, None)
    assert got.learner_idle == {}
    assert draw_curve(read_history(tmp_path), tmp_path / "curve.png", "x") is False
    print_summary(got, tmp_path, [], Console(file=io.StringIO()))


def test_a_torn_log_and_logs_of_strangers_do_not_matter(tmp_path: Path, logs: Logs) -> None:
    resumed_run(logs)
    want = summary_of(tmp_path)
    with (logs.folder / "learner-0.jsonl").open("a") as file:
        file.write('{"v":1,"t":2010.0,"kind":"ste')
    logs(1500, "learner-1", "step", step=99)
    logs(1500, "weights", "weights_frame_refused", reason="x")
    assert summary_of(tmp_path) == want


def test_summary_json_has_the_promised_fields_and_reads_back(tmp_path: Path, logs: Logs) -> None:
    resumed_run(logs)
    got = summary_of(tmp_path)
    write_summary(tmp_path, got)
    assert read_summary(tmp_path) == got
    fields = json.loads((tmp_path / "summary.json").read_text())
    promised = "accuracy_before accuracy_after length_before length_after train_wall_s steps max_lag max_lag_observed "
    promised += (
        "generator_tokens_per_s learner_tokens_per_s learner_idle generator_idle rollouts mismatch_max versions "
    )
    promised += "config_hash evals"
    assert set(promised.split()) <= set(fields)
    assert {"granted", "trained", "expired", "quarantined", "in_flight"} <= set(fields["rollouts"])
    assert {"version", "wall_s", "accuracy", "length"} <= set(fields["evals"][0])


def test_the_table_says_when_rollouts_are_missing(tmp_path: Path, logs: Logs) -> None:
    resumed_run(logs)
    logs(2010, "broker", "funnel", granted=31, trained=24, expired={"end": 4}, quarantined=1, in_flight=1)
    out = io.StringIO()
    print_summary(summary_of(tmp_path), tmp_path, ["summary.json"], Console(file=out, width=200))
    assert "1 UNACCOUNTED" in out.getvalue()
    assert "0.200 -> 0.970" in out.getvalue()


def test_wilson_interval_against_published_values() -> None:
    # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3 (score): 81 of 263, 0 of 20, 1 of 29.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    assert wilson(5, 5)[1] == 1.0


def test_the_picture_is_drawn(tmp_path: Path, logs: Logs) -> None:
    resumed_run(logs)
    assert draw_curve(read_history(tmp_path), tmp_path / "curve.png", "run")
    data = (tmp_path / "curve.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert len(data) > 10_000


def test_the_view_says_what_each_side_waits_for_and_how_long_it_takes(tmp_path: Path, logs: Logs) -> None:
    resumed_run(logs)
    history: History = read_history(tmp_path)
    config = dataclasses.replace(CONFIG, steps=10)
    rows = {row[0]: row for row in words.process_rows(history, 2009.0)}
    assert "waits for rollouts" in rows["learner"][2]
    assert "idle 31% (rollouts 31%)" in rows["learner"][3]
    assert rows["g0"][1] == "50 tokens/s"
    assert "3 running, 1 queued" in rows["g0"][2]
    line = words.plain_line(history, config, 2009.0)
    for part in [
        "step 6/10",
        "0:08 left",
        "reward 0.5",
        "held-out 0.970 (0.9",
        "lag 1 of 1",
        "1 generators 50 tokens/s",
    ]:
        assert part in line
    assert words.doing(history.processes["learner-0"], 2109.0) == "silent for 1:40"
    logs(2009, "broker", "waiting", text="waits for [bold]2 rollouts[/bold] from g1")
    history = read_history(tmp_path)
    out = io.StringIO()
    Console(file=out, width=120).print(picture(history, config, 2009.0))
    assert "[bold]2 rollouts[/bold]" in out.getvalue(), "text of other processes is shown, never interpreted"


def test_the_view_on_a_terminal_and_on_one_that_goes_away(tmp_path: Path, logs: Logs) -> None:
    resumed_run(logs)
    out = io.StringIO()
    view = View(tmp_path, CONFIG, Console(file=out, force_terminal=True, width=100))
    view.update()
    view.note("something that stays")
    view.close()
    assert "step 6/6" in out.getvalue()
    assert "something that stays" in out.getvalue()

    class Hangup(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "the terminal was closed")

    for terminal in (True, False):
        gone = View(tmp_path, CONFIG, Console(file=Hangup(), force_terminal=terminal))
        gone.note("nobody hears this")
        gone.update(force=True)
        gone.close()
        assert gone.history.steps_done == 6
