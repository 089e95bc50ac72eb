"""Journal: accepted trajectories and the ledger's decisions, on disk before anyone acts on them.

Only the broker's thread calls it. With fsync "interval" the waiting for the disk happens in a thread of its own, and
`durable` says up to where it has got: acknowledgements are held back until then, so a generator forgets a result only
when a power cut cannot lose it. (kill -9 of the process loses nothing that was written, under any policy.)
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from orz_async.broker.segments import (
    Record,
    encode_header,
    encode_record,
    is_damaged,
    name_of,
    run_of,
    scan,
    segment_files,
)
from orz_async.config import JournalConfig
from orz_async.errors import CheckpointError, ConfigError, DiskError

log = logging.getLogger(__name__)

_MB = 1 << 20
_WRITE_BYTES = 64 << 10
"""A queue that is worth a write of its own."""
_PARTS = 512
"""Of one writev; the system's limit is 1,024."""
_CHECK_S = 1.0
"""Period of the look at free space."""


class Journal:
    """Records have indices, 0, 1, 2, ... over all segments; a segment is named by its first one."""

    def __init__(self, folder: Path, run: bytes, config: JournalConfig) -> None:
        self.folder = folder
        self.run = run
        self.config = config
        self.next_index = 0
        self.durable = 0
        """Records below this index survive a power cut (under fsync "none": a kill -9)."""
        self._buffer: list[bytes | memoryview] = []
        self._buffered = 0
        """Bytes in it."""
        self._checked_bytes = 0
        self._file = -1
        self._segment = 0
        """Index of the first record of the open segment."""
        self._segment_bytes = 0
        self._sizes: dict[int, int] = {}
        """Bytes of the closed segments."""
        self._needed = 0
        """The oldest checkpoint needs the segment that holds this record, and all after it."""
        self._syncer: ThreadPoolExecutor | None = None
        self._syncing: tuple[int, Future[None]] | None = None
        self._synced_at = self._checked_at = 0.0

    def open(self, at_least: int = 0, keep_from: int = 0) -> None:
        """Cut a torn tail off and begin a new segment. `at_least` is the index that a checkpoint knows of, `keep_from`
        the first record that one needs: what lies before may have to go before there is space to begin.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._adopt()
            if self._sizes and self.next_index < at_least:
                raise CheckpointError(
                    f"expected the {at_least} journal records that the checkpoint knows of, {self.folder} has "
                    f"{self.next_index}; resume from an older checkpoint, or move the folder away and lose the rest"
                )
            self.next_index = self.durable = self._segment = max(self.next_index, at_least)
            self.keep_from(keep_from)
            self._check_space()
            self._begin_segment()
        except OSError as error:
            raise _disk_error(self.folder, error) from error
        self._syncer = ThreadPoolExecutor(1, "journal-fsync")

    def _adopt(self) -> None:
        """Take over the segments of earlier processes; only the last one with records can have a torn tail."""
        files = segment_files(self.folder)
        for first, path in files:
            run = run_of(path)
            if run is not None and run != self.run:
                raise ConfigError(f"{path} is the journal of another run; choose another run_dir or remove the old one")
            self._sizes[first] = path.stat().st_size
        for first, path in reversed(files):
            end, count = 0, 0
            for location, _ in scan(path):
                end = location.end
                count += 1
            if count:
                self._cut(path, end)
                self._sizes[first] = end
                self.next_index = first + count
                break
            path.unlink()
            del self._sizes[first]

    def _cut(self, path: Path, end: int) -> None:
        """Make the last whole record the end of the file. A torn write goes; what may be damage is kept beside it.

        Records behind a damaged one were acknowledged and perhaps trained on. The checkpoint has seen none of what the
        ledger no longer knows, so their rollouts are lent again; but nobody should lose the evidence without a word.
        """
        if path.stat().st_size > end and is_damaged(path, end):
            aside = path.with_suffix(".damaged")
            with path.open("rb") as file:
                file.seek(end)
                aside.write_bytes(file.read())
            log.warning(
                "%s: expected a torn write at most, found damage at byte %d; what lies behind it is in %s, and its "
                "rollouts are generated again",
                *(path, end, aside.name),
            )
        os.truncate(path, end)

    def _begin_segment(self) -> None:
        self._segment = self.next_index
        path = self.folder / name_of(self._segment)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o644)
        head = encode_header(self.run, self._segment)
        _write(self._file, [head])
        self._segment_bytes = len(head)
        if self.config.fsync != "none":
            os.fsync(self._file)
            _sync_folder(self.folder)

    def append(self, record: Record, encoded: memoryview | None = None) -> int:
        """Queue a record for the next `write`. Returns the index that `durable` must pass.

        `encoded` is the record as MessagePack where the caller has it.
        """
        parts = encode_record(record, encoded)
        self._buffer += parts
        self._buffered += sum(map(len, parts))
        self.next_index += 1
        return self.next_index

    def ease(self) -> None:
        """Hand a long queue to the operating system while it is still in the processor's cache.

        One long write at the end of a turn takes twice as long as many of this size.
        """
        if self._buffered >= _WRITE_BYTES:
            self._drain()

    def _drain(self) -> None:
        parts, size = self._buffer, self._buffered
        self._buffer, self._buffered = [], 0
        try:
            for first in range(0, len(parts), _PARTS):
                _write(self._file, parts[first : first + _PARTS])
        except OSError as error:
            raise _disk_error(self.folder, error) from error
        self._segment_bytes += size

    def write(self, now: float) -> None:
        """Hand everything queued to the operating system, and to the disk as the policy says."""
        if self._buffer:
            self._drain()
        if self._segment_bytes != self._checked_bytes:
            self._checked_bytes = self._segment_bytes
            if now - self._checked_at >= _CHECK_S:
                self._checked_at = now
                self._check_space()
        if self.config.fsync == "none":
            self.durable = self.next_index
        elif self.config.fsync == "each":
            if self.durable < self.next_index:
                self.sync()
        else:
            self._sync_aside(now)
        if self._segment_bytes >= self.config.segment_mb * _MB:
            try:
                self._roll()
            except OSError as error:
                raise _disk_error(self.folder, error) from error

    def sync(self) -> None:
        """Everything written is durable when this returns."""
        self._join_syncer()
        try:
            os.fsync(self._file)
        except OSError as error:
            raise _disk_error(self.folder, error) from error
        self.durable = self.next_index

    def _sync_aside(self, now: float) -> None:
        if self._syncing is not None and self._syncing[1].done():
            self._join_syncer()
        due = now - self._synced_at >= self.config.interval_s
        if self._syncing is None and self.durable < self.next_index and due and self._syncer is not None:
            self._synced_at = now
            self._syncing = (self.next_index, self._syncer.submit(os.fsync, self._file))

    def _join_syncer(self) -> None:
        if self._syncing is None:
            return
        index, done = self._syncing
        self._syncing = None
        try:
            done.result()
        except OSError as error:
            raise _disk_error(self.folder, error) from error
        self.durable = max(self.durable, index)

    def _roll(self) -> None:
        if self.config.fsync != "none":
            self.sync()
        os.close(self._file)
        self._sizes[self._segment] = self._segment_bytes
        self._begin_segment()
        self._prune()

    # Disk space.

    def keep_from(self, index: int) -> None:
        """The oldest checkpoint kept needs the records from this one on; segments before may go if space is short."""
        self._needed = max(self._needed, index)
        self._prune()

    def segment_of(self, index: int) -> int:
        """First record of the segment that holds this record."""
        return max((first for first in (*self._sizes, self._segment) if first <= index), default=index)

    def _prune(self) -> None:
        limit = self.config.max_mb * _MB
        needed = self.segment_of(self._needed)
        for first in sorted(self._sizes):
            if self._total() <= limit or first >= needed:
                break
            (self.folder / name_of(first)).unlink(missing_ok=True)
            del self._sizes[first]

    def _total(self) -> int:
        return sum(self._sizes.values()) + self._segment_bytes

    def _check_space(self) -> None:
        """Refuse before the disk is full: the checkpoint that ends the run needs room too."""
        total = self._total()
        if total > self.config.max_mb * _MB:
            raise DiskError(
                f"the journal in {self.folder} has {total / _MB:.0f} MB that the oldest checkpoint needs, "
                f"journal.max_mb allows {self.config.max_mb}; checkpoint more often or raise it, then resume"
            )
        free = shutil.disk_usage(self.folder).free
        if free < self.config.min_free_mb * _MB:
            raise DiskError(
                f"expected journal.min_free_mb = {self.config.min_free_mb} MB free at {self.folder}, "
                f"found {free / _MB:.0f} MB; free space, then resume"
            )

    def close(self) -> None:
        """Idempotent. Everything written is on the disk afterwards."""
        if self._file < 0:
            return
        self.write(time.monotonic())
        if self.config.fsync != "none":
            self.sync()
        os.close(self._file)
        self._file = -1
        if self._syncer is not None:
            self._syncer.shutdown()


def _write(file: int, parts: Sequence[bytes | memoryview]) -> None:
    """All of it, in one call where the system takes it in one."""
    written = os.writev(file, parts)
    for part in parts:
        view = memoryview(part)[min(written, len(part)) :]
        written -= len(part) - len(view)
        while view:
            view = view[os.write(file, view) :]


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _disk_error(folder: Path, error: OSError) -> DiskError:
    return DiskError(f"expected to write the journal in {folder}, found: {error.strerror}; free space, then resume")
