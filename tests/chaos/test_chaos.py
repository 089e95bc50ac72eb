"""A small part of `make chaos`, on real processes all the same."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

from tests.chaos import saves
from tests.chaos.folder import LEAN, LEARNER, Folder
from tests.chaos.run import check, finite, same_losses
from tests.chaos.storm import Storm


def test_a_checkpoint_loads_after_every_kill_during_save(tmp_path: Path) -> None:
    assert "8 of 8 loadable" in saves.ordeal(tmp_path, 8, seed=1)


@pytest.mark.timeout(900)  # it waits for deaths, however long a busy machine takes to start a learner
def test_a_small_storm(tmp_path: Path) -> None:
    """The learner dies twice at named points, eight generators die, the wire is bad; the run is as if nothing was."""
    from orz_async.learner.base import make_base

    make_base(tmp_path / "base", seed=1, steps=20, threads=1)
    points = ("after-publish:3", "journal-append:4")
    folder = Folder(tmp_path / "storm", tmp_path / "base")
    with closing(folder):
        storm = Storm(
            folder,
            points=points,
            random_deaths=0,
            kills=10,
            seconds=400.0,
            kill_every_s=1.5,
            daemons=0,
            seed=3,
            say=print,
        )
        storm.run()
    result = check(folder)
    assert result.expired["learner_restart"] > 0
    killed = Counter(kill.kind for kill in folder.kills)
    assert killed[LEARNER] >= 2, folder.kills
    assert killed[LEAN] >= 5
    assert {kill.point for kill in folder.kills} >= {point.partition(":")[0] for point in points}
    assert finite(folder) >= result.trained
    assert "bit for bit" in same_losses(folder)
