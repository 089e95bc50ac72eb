"""The bytes of one transfer: a manifest and the pieces that follow it, read in chunks without joining them first."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from orz_async.weights.snapshot import State, tensor_bytes
from orz_async.weights.wire import Block, Chunk, Entry, Manifest

CHUNK_BYTES = 1 << 20
SEGMENT_BYTES = 32 << 20
"""Bounds the memory and the time of coding one block."""


class Payload:
    """What one (version, base) pair costs on the wire. Many fetchers may read it at their own pace."""

    def __init__(self, manifest: Manifest, pieces: Sequence[memoryview]) -> None:
        self.manifest = manifest
        self._pieces = [piece for piece in pieces if len(piece)]
        self._ends = list(accumulate(len(piece) for piece in self._pieces))

    def chunk(self, index: int) -> Chunk:
        manifest = self.manifest
        start = index * manifest.chunk_bytes
        data = self._read(start, manifest.chunk_length(index))
        return Chunk(manifest.version, manifest.base_digest, index, data)

    def _read(self, start: int, length: int) -> memoryview:
        at = bisect_right(self._ends, start)
        offset = start - (self._ends[at - 1] if at else 0)
        parts: list[memoryview] = []
        while length:
            part = self._pieces[at][offset : offset + length]
            parts.append(part)
            length -= len(part)
            at, offset = at + 1, 0
        return parts[0] if len(parts) == 1 else memoryview(b"".join(parts))


def segments(data: memoryview, segment_bytes: int) -> list[memoryview]:
    return [data[start : start + segment_bytes] for start in range(0, len(data), segment_bytes)]


def full_payload(state: State, *, chunk_bytes: int = CHUNK_BYTES, segment_bytes: int = SEGMENT_BYTES) -> Payload:
    """Every byte of a state, for whoever holds nothing it could be built on."""
    parts = [part for spec in state.specs for part in segments(tensor_bytes(state.tensors[spec.name]), segment_bytes)]
    blocks = [(Block("full", len(part)), part) for part in parts]
    return delta_payload(state, -1, "", blocks, chunk_bytes=chunk_bytes, segment_bytes=segment_bytes)


def delta_payload(
    state: State,
    base_version: int,
    base_digest: str,
    blocks: Sequence[tuple[Block, memoryview]],
    *,
    chunk_bytes: int,
    segment_bytes: int,
) -> Payload:
    """A state as blocks, one a segment in the order of its tensors, against the base named."""
    entries: list[Entry] = []
    start = 0
    for spec in state.specs:
        end = start + -(-spec.num_bytes // segment_bytes)
        entries.append(Entry(spec, tuple(block for block, _ in blocks[start:end])))
        start = end
    manifest = Manifest(
        version=state.version,
        digest=state.digest,
        base_version=base_version,
        base_digest=base_digest,
        segment_bytes=segment_bytes,
        chunk_bytes=chunk_bytes,
        payload_bytes=sum(block.bytes for block, _ in blocks),
        entries=tuple(entries),
    )
    return Payload(manifest, [piece for _, piece in blocks])
