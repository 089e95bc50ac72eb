"""What a restart reads back, and what it leaves for a restart from an older checkpoint."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from broker_fakes import CountingPrompts, FakeGenerator, make_broker, small_config

from orz_async.broker.leases import ledger_config
from orz_async.broker.recovery import ResumePoint, Snapshot, recover
from orz_async.errors import CheckpointError


def snapshots(run_dir: Path) -> list[bytes]:
    """Of versions 1 to 4."""
    broker = make_broker(run_dir, small_config(max_lag=0))
    broker.start()
    found = []
    with FakeGenerator(broker.address, "a"):
        broker.published(0)
        for step in range(4):
            broker.take(step)
            broker.published(step + 1)
            found.append(broker.snapshot())
        broker.close(finished=True, reason="done")
    return found


def test_the_journal_goes_on_serving_older_checkpoints(tmp_path: Path) -> None:
    old, _, _, new = snapshots(tmp_path)
    config = ledger_config(small_config(max_lag=0), 0)

    def oldest(start: ResumePoint) -> int:
        return recover(
            tmp_path / "journal", start, 2, config, lambda index: CountingPrompts().prompt(index).prompt_id
        ).oldest_record

    needed = [msgspec.msgpack.decode(data, type=Snapshot).oldest_record for data in (old, new)]
    assert needed[0] < needed[1], "the test shows nothing"
    assert oldest(ResumePoint(new, 4)) == needed[1]
    assert oldest(ResumePoint(new, 4, (old,))) == needed[0]
    assert oldest(ResumePoint(old, 1)) == needed[0]


def test_a_ledger_of_a_replay_is_refused(tmp_path: Path) -> None:
    config = ledger_config(small_config(), 0)
    with pytest.raises(CheckpointError, match=r"made by `orz replay`"):
        recover(tmp_path / "journal", ResumePoint(b"", 0), 2, config, str)
