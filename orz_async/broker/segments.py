"""The journal's files: how a segment is laid out, read and scanned for a torn tail.

segment   journal-<first record's index>.orzj
header    magic "ORZJ" | u16 layout | u16 zero | 16 bytes run id hash | u64 index of the first record
          | u32 crc32c of the above
record    u32 length of the body | u32 crc32c of the body | body
body      one byte of kind | MessagePack                                              (all little-endian)
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from orz_async.broker.transitions import Ended, Granted, Restarted, Taken
from orz_async.crc import crc32c
from orz_async.errors import DiskError
from orz_async.records import Trajectory

LAYOUT = 1
MAGIC = b"ORZJ"
_HEADER = struct.Struct("<4sHH16sQ")
_CRC = struct.Struct("<I")
_RECORD = struct.Struct("<II")
HEADER_BYTES = _HEADER.size + _CRC.size
MAX_BODY = 64 << 20
"""Longer than any frame: a length beyond it is damage, and nothing is allocated for it."""

Record = Trajectory | Granted | Ended | Taken | Restarted
_TRAJECTORY, _ENTRY = b"\x01", b"\x02"
_ENCODER = msgspec.msgpack.Encoder()
_TRAJECTORIES = msgspec.msgpack.Decoder(Trajectory)
_ENTRIES = msgspec.msgpack.Decoder(Granted | Ended | Taken | Restarted)


def name_of(first: int) -> str:
    return f"journal-{first:012d}.orzj"


def segment_files(folder: Path) -> list[tuple[int, Path]]:
    """(index of the first record, file) of each segment, in order."""
    return sorted((int(path.stem.removeprefix("journal-")), path) for path in folder.glob("journal-*.orzj"))


def encode_header(run: bytes, first: int) -> bytes:
    head = _HEADER.pack(MAGIC, LAYOUT, 0, run, first)
    return head + _CRC.pack(crc32c(head))


def encode_record(record: Record, encoded: memoryview | None = None) -> tuple[bytes, bytes | memoryview]:
    """Head and rest of a record. `encoded` is its MessagePack where the caller has it already."""
    kind = _TRAJECTORY if isinstance(record, Trajectory) else _ENTRY
    body = _ENCODER.encode(record) if encoded is None else encoded
    return _RECORD.pack(len(body) + 1, crc32c(body, crc32c(kind))) + kind, body


def run_of(path: Path) -> bytes | None:
    """The run a segment belongs to; None if its header is damaged or was never completed."""
    with path.open("rb") as file:
        head = file.read(HEADER_BYTES)
    if len(head) < HEADER_BYTES or crc32c(head[: _HEADER.size]) != _CRC.unpack_from(head, _HEADER.size)[0]:
        return None
    magic, layout, _, run, _ = _HEADER.unpack_from(head)
    if magic != MAGIC or layout != LAYOUT:
        raise DiskError(
            f"expected a journal of layout {LAYOUT}, found {magic!r} {layout} in {path}; "
            "read it with the release that wrote it"
        )
    return bytes(run)


class Location(NamedTuple):
    """Where the body of a record lies."""

    path: Path
    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length


def scan(path: Path) -> Iterator[tuple[Location, bytes]]:
    """The whole records of a segment; ends silently where the file is torn."""
    if run_of(path) is None:
        return
    with path.open("rb") as file:
        position = file.seek(HEADER_BYTES)
        while len(head := file.read(_RECORD.size)) == _RECORD.size:
            length, crc = _RECORD.unpack(head)
            if not 0 < length <= MAX_BODY or len(body := file.read(length)) < length or crc32c(body) != crc:
                return
            yield Location(path, position + _RECORD.size, length), body
            position += _RECORD.size + length


_SEARCHED = 4 << 20
"""Bytes behind a broken record in which whole ones are looked for."""


def is_damaged(path: Path, end: int) -> bool:
    """Whether what follows the whole records, up to byte `end`, is more than the torn tail of a killed process.

    A write that was cut short leaves the beginning of one record. Bytes that changed later leave a whole record with a
    wrong checksum, or whole records behind the broken one.
    """
    with path.open("rb") as file:
        file.seek(end)
        data = file.read(_SEARCHED)
        rest = path.stat().st_size - end
    if len(data) >= _RECORD.size and 0 < _RECORD.unpack_from(data)[0] <= rest - _RECORD.size:
        return True
    return any(_is_record(data, i) for i in range(1, len(data) - _RECORD.size))


def _is_record(data: bytes, start: int) -> bool:
    kind = start + _RECORD.size
    if data[kind : kind + 1] not in (_TRAJECTORY, _ENTRY):
        return False
    length, crc = _RECORD.unpack_from(data, start)
    return bool(0 < length <= len(data) - kind and crc32c(data[kind : kind + length]) == crc)


def load(location: Location) -> Trajectory:
    """A trajectory that `records` has found before."""
    with location.path.open("rb") as file:
        file.seek(location.start)
        record = decode_body(file.read(location.length))
    assert isinstance(record, Trajectory), location
    return record


def decode_body(body: bytes) -> Record:
    try:
        return _TRAJECTORIES.decode(body[1:]) if body[:1] == _TRAJECTORY else _ENTRIES.decode(body[1:])
    except msgspec.DecodeError as error:
        # The checksum matched, so this is not damage.
        raise DiskError(
            f"a journal record of another layout: {error}; read it with the release that wrote it"
        ) from error


def records(folder: Path, first: int = 0) -> Iterator[tuple[int, Record, Location]]:
    """(index, record, where) from the segment that holds record `first` on, tolerant of torn tails.

    A crash may tear the tail of the segment that was being written; the next writer cuts it off and begins another
    segment. A hole between two segments means that whole records are missing: DiskError.
    """
    files = segment_files(folder)
    reached = [i for i, (start, _) in enumerate(files) if start <= first]
    expected: int | None = None
    for start, path in files[reached[-1] if reached else 0 :]:
        if expected is not None and start != expected:
            raise DiskError(
                f"expected record {expected} at the start of {path}, found {start}: the journal was damaged"
            )
        index = start
        for location, body in scan(path):
            yield index, decode_body(body), location
            index += 1
        expected = index


def read(path: Path) -> Iterator[Trajectory]:
    """The accepted trajectories of a journal folder or of one segment, in the order of acceptance."""
    if path.is_dir():
        for _, record, _ in records(path):
            if isinstance(record, Trajectory):
                yield record
    else:
        for _, body in scan(path):
            if body[:1] == _TRAJECTORY:
                yield _TRAJECTORIES.decode(body[1:])
