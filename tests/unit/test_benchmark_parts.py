"""Every suite has parts that exist, and the small ones run."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from benchmarks import journal
from benchmarks.run import SUITES

HOT_PATHS = {"cpu_ops", "wire", "journal", "engines", "weights", "learner_step", "e2e"}
"""Delta and packer are rows of cpu_ops."""


def test_every_hot_path_is_part_of_a_suite() -> None:
    parts = {part for suite in SUITES.values() for part in suite}
    assert parts >= HOT_PATHS
    assert all(importlib.util.find_spec(f"benchmarks.{part}") for part in parts)


def test_journal_is_measured_under_each_policy() -> None:
    rows = {(r["name"], r["variant"]): r for r in journal.run(repeats=2, num_records=20)}
    assert set(rows) == {
        *(("journal append", f"fsync {policy}") for policy in ("each", "interval", "none")),
        ("journal replay", "checksums verified"),
    }
    assert rows["journal append", "fsync none"]["n"] == 2
    assert rows["journal replay", "checksums verified"]["n"] == 6
    assert all(r["min"] > 0 and r["notes"]["MB_s"] > 0 for r in rows.values())


def test_a_journal_that_lost_records_is_no_measurement(tmp_path: Path) -> None:
    journal.append(tmp_path, "none", [journal.trajectory(number) for number in range(5)])
    assert journal.replay(tmp_path, 5) > 0
    [segment] = tmp_path.iterdir()
    segment.write_bytes(segment.read_bytes()[:-1])
    with pytest.raises(RuntimeError, match="expected 5 trajectories in the journal just written, found 4"):
        journal.replay(tmp_path, 5)
