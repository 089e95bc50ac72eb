"""Batches out of a journal: those the run took, in its order. (tests/e2e trains on them, bit for bit.)"""

from __future__ import annotations

from pathlib import Path

import pytest
from broker_fakes import FakeGenerator, make_broker, small_config

from orz_async import cli
from orz_async.broker.segments import segment_files
from orz_async.broker.server import ResumePoint
from orz_async.config_toml import to_toml
from orz_async.errors import ConfigError, DataError
from orz_async.launcher.replay import compare
from orz_async.learner.replay import EndOfJournalError, JournalRollouts
from orz_async.observe.history import History
from orz_async.records import Trajectory


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[Trajectory]]]:
    """A run of three steps in two journal files, and the batches its learner took."""
    run_dir = tmp_path_factory.mktemp("replayed") / "run"
    taken: list[list[Trajectory]] = []
    snapshot = None
    for epoch, steps in ((1, range(2)), (2, range(2, 3))):
        broker = make_broker(run_dir, small_config(max_lag=1), epoch=epoch, start=snapshot)
        broker.start()
        with FakeGenerator(broker.address, "a"):
            broker.published(steps.start)
            for step in steps:
                taken.append(broker.take(step))
                broker.published(step + 1)
            snapshot = ResumePoint(broker.snapshot(), steps.stop)
            broker.close(finished=False, reason="the test goes on")
    (run_dir / "config.toml").write_text(to_toml(small_config(max_lag=1)))
    return run_dir, taken


def test_the_batches_are_those_the_learner_took(run: tuple[Path, list[list[Trajectory]]]) -> None:
    run_dir, taken = run
    rollouts = JournalRollouts(run_dir / "journal")
    assert rollouts.num_steps == 3
    assert [rollouts.take(step) for step in range(3)] == taken
    with pytest.raises(EndOfJournalError, match="ends with step 2"):
        rollouts.take(3)


def test_a_pruned_journal_says_what_is_missing(run: tuple[Path, list[list[Trajectory]]], tmp_path: Path) -> None:
    _, path = segment_files(run[0] / "journal")[-1]
    (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(DataError, match="begins with step 2: older files were deleted by retention"):
        _ = JournalRollouts(tmp_path).num_steps


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--run-dir", "{run}"], "a replay is another run"),
        (["--broker.samples-per-prompt", "8"], "another number of rollouts a step"),
        (["--learner.lrr", "1"], "did you mean learner.lr"),
    ],
)
def test_what_a_replay_may_not_be(
    run: tuple[Path, list[list[Trajectory]]], tmp_path: Path, words: list[str], told: str
) -> None:
    filled = [word.format(run=run[0]) for word in words]
    with pytest.raises(ConfigError, match=told):
        cli.dispatch(["replay", str(run[0]), "--run-dir", str(tmp_path / "new"), *filled])
    assert not (tmp_path / "new").exists()


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"found no .*config\.toml"):
        cli.dispatch(["replay", str(tmp_path)])


def history(*losses: float) -> History:
    found = History()
    for step, loss in enumerate(losses):
        event = {"t": float(step), "process": "learner-0", "kind": "step", "step": step, "losses": {"policy": [loss]}}
        found.feed(event)
    return found


def test_losses_are_compared_exactly() -> None:
    assert compare(history(0.1, 0.2), history(0.1, 0.2, 0.3)) == (2, None)
    assert compare(history(0.1, 0.2, 0.3), history(0.1, 0.2 + 1e-16, 0.3)) == (3, 1)
    assert compare(history(), history(0.1)) == (0, None)
