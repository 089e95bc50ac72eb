"""The journal: what was written is read again, what was torn is cut off, what is damaged is noticed."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from orz_async.broker import segments
from orz_async.broker.journal import Journal
from orz_async.broker.messages import LeaseRef
from orz_async.broker.segments import Record, load, read, records, segment_files
from orz_async.broker.transitions import Ended, Granted, Restarted, Taken, Terms
from orz_async.broker.wire import run_hash
from orz_async.config import JournalConfig
from orz_async.errors import CheckpointError, ConfigError, DiskError
from orz_async.records import Span, Trajectory, float32_bytes, int32_bytes

RUN = run_hash("a run")
ENTRIES: list[Record] = [
    Restarted(1, (3, 4)),
    Granted("a", (Terms("train", 0, 0, 0, 0, 0), Terms("train", 1, 2, 0, 1, 0))),
    Ended("a", LeaseRef("train", 1, 2), "deadline", True, "p0 fails"),
    Taken(0, (0, 1)),
]


def trajectory(rollout: int, length: int = 3) -> Trajectory:
    return Trajectory(
        kind="train",
        rollout=rollout,
        attempt=0,
        prompt_id="p",
        sample=0,
        prompt=int32_bytes([1, 2]),
        response=int32_bytes(np.arange(length)),
        logprobs=float32_bytes(np.zeros(length)),
        spans=(Span(0, 0),),
        reward=1.0,
        finish="stop",
        verdict="correct",
        generator="a",
        generate_s=0.5,
    )


def opened(folder: Path, at_least: int = 0, **config: object) -> Journal:
    fields = {"fsync": "none", "min_free_mb": 0} | config
    journal = Journal(folder, RUN, JournalConfig(**fields))  # type: ignore[arg-type]
    journal.open(at_least)
    return journal


def written(folder: Path, batch: list[Record], **config: object) -> None:
    journal = opened(folder, **config)
    for record in batch:
        journal.append(record)
    journal.close()


def contents(folder: Path, first: int = 0) -> list[Record]:
    return [record for _, record, _ in records(folder, first)]


MEGABYTE = 131072 - 64
"""Tokens of a trajectory that takes just less than a megabyte."""


@pytest.mark.parametrize("fsync", ["each", "interval", "none"])
def test_round_trip_over_several_processes(tmp_path: Path, fsync: str) -> None:
    batches: list[list[Record]] = [[*ENTRIES, trajectory(0)], [], [trajectory(1)]]
    for batch in batches:
        written(tmp_path, batch, fsync=fsync)
    assert contents(tmp_path) == [*ENTRIES, trajectory(0), trajectory(1)]
    assert [index for index, _, _ in records(tmp_path)] == list(range(6))
    assert list(read(tmp_path)) == [trajectory(0), trajectory(1)]
    assert [load(place) for _, record, place in records(tmp_path) if isinstance(record, Trajectory)] == list(
        read(tmp_path)
    )


def test_segments_and_reading_from_the_middle(tmp_path: Path) -> None:
    journal = opened(tmp_path, segment_mb=1)
    for rollout in range(6):
        journal.append(trajectory(rollout, MEGABYTE // 2))
        journal.write(time.monotonic())
    assert [first for first, _ in segment_files(tmp_path)] == [0, 3, 6]
    # The open segment can be read while it is written.
    assert [t.rollout for t in read(tmp_path)] == list(range(6))
    assert [index for index, _, _ in records(tmp_path, 4)] == [3, 4, 5]
    assert [t.rollout for t in read(segment_files(tmp_path)[1][1])] == [3, 4, 5]
    assert journal.segment_of(5) == 3
    journal.close()


def test_every_torn_tail_is_cut_and_the_journal_goes_on(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    written(whole, [*ENTRIES, trajectory(0)])
    data = segment_files(whole)[0][1].read_bytes()
    ends = [place.end for _, _, place in records(whole)]
    for length in range(len(data)):
        torn = tmp_path / str(length)
        torn.mkdir()
        (torn / "journal-000000000000.orzj").write_bytes(data[:length])
        survivors = [*ENTRIES, trajectory(0)][: sum(end <= length for end in ends)]
        assert contents(torn) == survivors
        written(torn, [trajectory(7)])
        assert contents(torn) == [*survivors, trajectory(7)]


def test_damage_in_the_middle_is_noticed_and_spares_what_lies_behind(tmp_path: Path) -> None:
    written(tmp_path, [*ENTRIES, trajectory(0)])
    written(tmp_path, [trajectory(1)])
    path = segment_files(tmp_path)[0][1]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DiskError, match=r"expected record [123] at the start of .* found 5: the journal was damaged"):
        contents(tmp_path)
    written(tmp_path, [trajectory(2)])
    assert path.read_bytes() == data
    assert contents(tmp_path, first=5) == [trajectory(1), trajectory(2)]


def test_damage_at_the_end_is_kept_aside_and_a_torn_tail_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written(tmp_path, [*ENTRIES, trajectory(0)])
    path = segment_files(tmp_path)[0][1]
    whole = path.read_bytes()
    second = next(place for index, _, place in records(tmp_path) if index == 1)
    path.write_bytes(whole[: second.start + 3] + b"?" + whole[second.start + 4 :])
    written(tmp_path, [])
    assert contents(tmp_path) == ENTRIES[:1]
    aside = path.with_suffix(".damaged")
    assert path.read_bytes() + aside.read_bytes() == whole[: second.start + 3] + b"?" + whole[second.start + 4 :]
    assert "generated again" in caplog.text

    aside.unlink()
    path.write_bytes(whole[:-5])
    written(tmp_path, [])
    assert contents(tmp_path) == ENTRIES
    assert not aside.exists()


def test_a_full_disk_at_a_new_segment_is_a_typed_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = opened(tmp_path, segment_mb=1)
    journal.append(trajectory(0, MEGABYTE + 64))

    def full() -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(journal, "_begin_segment", full)
    with pytest.raises(DiskError, match="No space left"):
        journal.write(0.0)
    assert list(read(tmp_path)) == [trajectory(0, MEGABYTE + 64)]


def test_a_length_beyond_reason_allocates_nothing(tmp_path: Path) -> None:
    written(tmp_path, [trajectory(0)])
    with segment_files(tmp_path)[0][1].open("ab") as file:
        file.write(b"\xff\xff\xff\x7f" + bytes(100))
    assert contents(tmp_path) == [trajectory(0)]


def test_durability_follows_the_policy(tmp_path: Path) -> None:
    for fsync, at_once in (("each", True), ("none", True), ("interval", False)):
        journal = opened(tmp_path / fsync, fsync=fsync, interval_s=10.0)
        index = journal.append(trajectory(0))
        assert index == 1
        assert journal.durable == 0, "nothing is durable before it is written"
        journal.write(now := time.monotonic())
        if not at_once:
            journal._join_syncer()
            journal.append(trajectory(1))
            journal.write(now + 9.0)
            assert journal.durable == 1, "the interval is not over"
            journal.write(now + 11.0)
            journal._join_syncer()
        assert journal.durable == journal.next_index
        journal.close()


def test_old_segments_go_only_when_space_is_short_and_no_checkpoint_needs_them(tmp_path: Path) -> None:
    journal = opened(tmp_path, segment_mb=1, max_mb=3)
    for rollout in range(4):
        journal.append(trajectory(rollout, MEGABYTE + 64))
        journal.write(0.0)
    assert [first for first, _ in segment_files(tmp_path)] == [0, 1, 2, 3, 4]
    journal.keep_from(1)
    assert [first for first, _ in segment_files(tmp_path)] == [1, 2, 3, 4]
    journal.keep_from(4)
    assert [first for first, _ in segment_files(tmp_path)] == [2, 3, 4], "below the limit nothing more is deleted"
    journal.close()


def test_a_journal_over_its_limit_opens_again_if_old_files_may_go(tmp_path: Path) -> None:
    journal = opened(tmp_path, segment_mb=1, max_mb=9)
    for rollout in range(4):
        journal.append(trajectory(rollout, MEGABYTE + 64))
        journal.write(0.0)
    journal.close()
    with pytest.raises(DiskError, match=r"journal\.max_mb allows 3"):
        opened(tmp_path, segment_mb=1, max_mb=3)
    journal = Journal(tmp_path, RUN, JournalConfig(fsync="none", min_free_mb=0, segment_mb=1, max_mb=3))
    journal.open(keep_from=3)
    journal.close()
    assert [first for first, _ in segment_files(tmp_path)] == [2, 3, 4]


def test_a_journal_that_may_not_grow_refuses_before_it_writes(tmp_path: Path) -> None:
    journal = opened(tmp_path, segment_mb=1, max_mb=2)
    with pytest.raises(DiskError, match=r"journal.max_mb allows 2; checkpoint more often"):
        for rollout in range(10):
            journal.append(trajectory(rollout, MEGABYTE))
            journal.write(10.0 * rollout)
    assert [t.rollout for t in read(tmp_path)] == [0, 1, 2]


def test_little_free_space_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match=r"expected journal.min_free_mb = 1000000000 MB free"):
        opened(tmp_path, min_free_mb=1_000_000_000)


@pytest.fixture
def small_files() -> Iterator[None]:
    """Files end at 64 KiB: stands for a full disk, without one."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("small_files")
def test_a_failed_write_is_an_error_with_advice_and_tears_only_the_tail(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    journal.append(trajectory(0))
    journal.write(0.0)
    journal.append(trajectory(1, 20_000))
    with pytest.raises(DiskError, match="free space, then resume"):
        journal.write(0.0)
    journal.close()
    assert list(read(tmp_path)) == [trajectory(0)]


def test_the_journal_of_another_run_is_refused(tmp_path: Path) -> None:
    written(tmp_path, [trajectory(0)])
    with pytest.raises(ConfigError, match="journal of another run"):
        Journal(tmp_path, run_hash("another"), JournalConfig()).open()


def test_a_checkpoint_ahead_of_the_journal_is_refused_unless_the_journal_is_gone(tmp_path: Path) -> None:
    written(tmp_path, [trajectory(0)])
    with pytest.raises(CheckpointError, match="expected the 5 journal records that the checkpoint knows of"):
        opened(tmp_path, at_least=5)
    journal = opened(tmp_path / "empty", at_least=5)
    assert journal.append(trajectory(9)) == 6
    journal.close()
    assert [index for index, _, _ in records(tmp_path / "empty")] == [5]


def test_another_layout_says_so(tmp_path: Path) -> None:
    written(tmp_path, [trajectory(0)])
    path = segment_files(tmp_path)[0][1]
    head = segments._HEADER.pack(b"ORZJ", 2, 0, RUN, 0)
    path.write_bytes(head + segments._CRC.pack(segments.crc32c(head)) + path.read_bytes()[segments.HEADER_BYTES :])
    with pytest.raises(DiskError, match="expected a journal of layout 1"):
        contents(tmp_path)


def test_entries_are_small() -> None:
    """A grant costs a fraction of a percent of the trajectory it leads to."""
    terms = tuple(Terms("train", 10**6 + i, 0, 10**5, i, 10**4) for i in range(1000))
    assert len(msgspec.msgpack.encode(Granted("generator", terms))) < 30 * 1000


def test_the_senders_own_bytes_make_the_same_record(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    for number in range(3):
        journal.append(trajectory(number, 9_000), memoryview(msgspec.msgpack.encode(trajectory(number, 9_000))))
        journal.ease()  # 72 KB: written now
    for number in range(3, 1200):
        journal.append(trajectory(number))
        journal.ease()
    journal.close()
    assert [t.rollout for t in read(tmp_path)] == list(range(1200))
    assert next(iter(read(tmp_path))) == trajectory(0, 9_000)


def test_what_the_system_does_not_take_in_one_call_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writev = os.writev
    monkeypatch.setattr(os, "writev", lambda file, parts: writev(file, [b"".join(parts)[:13]]))
    journal = opened(tmp_path)
    for number in range(5):
        journal.append(trajectory(number))
    journal.close()
    assert [t.rollout for t in read(tmp_path)] == list(range(5))
