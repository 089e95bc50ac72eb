"""After a restart: the checkpoint's snapshot and the journal become the ledger and its trajectories again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from orz_async.broker import frontier
from orz_async.broker.book import Book
from orz_async.broker.messages import LeaseRef
from orz_async.broker.rollouts import Rollout, State
from orz_async.broker.segments import Location, records, segment_files
from orz_async.broker.transitions import Accepted, LedgerConfig, Restarted
from orz_async.errors import CheckpointError
from orz_async.records import Trajectory


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """What a checkpoint holds of the broker."""

    snapshot: bytes
    version: int
    """Of the weights in the same checkpoint."""
    older: tuple[bytes, ...] = ()
    """Snapshots of the older checkpoints that are kept: the journal must go on serving them too."""


class Snapshot(msgspec.Struct, frozen=True):
    book: bytes
    next_record: int
    """Journal records from this one on are younger than the book."""
    oldest_record: int
    """The journal from this record on holds every accepted trajectory that is not trained."""


@dataclass(slots=True)
class Recovered:
    book: Book
    next_record: int
    """The least index the journal continues with."""
    oldest_record: int
    """The journal may not lose this record, nor later ones: the oldest checkpoint that is kept needs them."""
    stored: dict[int, tuple[int, Location]]
    """Accepted trajectories that are not trained: journal index and place, by rollout."""
    restarted: Restarted
    """To be journaled before anything else."""
    ended: list[tuple[Rollout, str]]
    """Attempts that the restart ended, with their causes."""


def recover(
    folder: Path, start: ResumePoint | None, epoch: int, config: LedgerConfig, prompt_id: Callable[[int], str]
) -> Recovered:
    """Without a checkpoint an existing journal is replayed from its beginning, else from the snapshot's position."""
    snapshot = _decode(start.snapshot) if start is not None else Snapshot(b"", 0, 0)
    book = frontier.load(snapshot.book, config, prompt_id) if start is not None else Book(config, prompt_id)
    if start is not None and book.version != start.version:
        raise CheckpointError(f"the checkpoint has weights of version {start.version}, its ledger {book.version}")
    files = segment_files(folder)
    if files and files[0][0] > snapshot.oldest_record:
        raise CheckpointError(
            f"expected the journal in {folder} from record {snapshot.oldest_record} on, it begins with {files[0][0]}; "
            "resume from a newer checkpoint or choose another run_dir"
        )
    stored: dict[int, tuple[int, Location]] = {}
    for index, record, location in records(folder, snapshot.oldest_record):
        if isinstance(record, Trajectory):
            if record.kind == "train" and _accept(book, record, replay=index >= snapshot.next_record):
                stored[record.rollout] = (index, location)
        elif index >= snapshot.next_record:
            frontier.replay(book, record)
    accepted = (State.READY, State.TAKEN)
    lost = [number for number, r in book.rollouts.items() if r.state in accepted and number not in stored]
    restarted = Restarted(epoch, tuple(lost))
    ended = book.restart(lost)
    older = [_decode(data) for data in start.older] if start is not None else []
    oldest = min(saved.oldest_record for saved in (snapshot, *older))
    return Recovered(book, snapshot.next_record, oldest, stored, restarted, ended)


def _accept(book: Book, trajectory: Trajectory, *, replay: bool) -> bool:
    """Whether the book counts this trajectory and has not trained on it."""
    if replay:
        lease = LeaseRef("train", trajectory.rollout, trajectory.attempt)
        frontier.replay(book, Accepted(trajectory.generator, lease, trajectory.version_first))
        return True
    rollout = book.rollouts.get(trajectory.rollout)
    return rollout is not None and rollout.attempt == trajectory.attempt and rollout.state is not State.LOST


def _decode(data: bytes) -> Snapshot:
    if not data:
        raise CheckpointError(
            "expected a checkpoint with a ledger, found one that was made by `orz replay`; continue it with that"
        )
    try:
        return msgspec.msgpack.decode(data, type=Snapshot)
    except msgspec.DecodeError as error:
        raise CheckpointError(f"the ledger's snapshot cannot be read: {error}; use an older checkpoint") from error
