"""Frames between a fetcher and a publisher: one ZeroMQ frame a message, nothing pickled, every size limited.

Frame: magic "ORZW", wire version, type, learner epoch, CRC-32C of all that (with the field itself as 0) and the body;
body: MessagePack of one struct below as an array. The fetcher asks and the publisher answers, each request with at most
one frame, so that the fetcher's open requests are its credit and the publisher holds no state that a lost frame could
spoil.

    Want ──► Waiting      nothing new enough yet: asked again every second, answered at once when it is published
    Want ──► Manifest     what will come, chunk by chunk
    Pull ──► Chunk        one chunk of it
    Pull ──► Gone         no longer held: Want again
"""

from __future__ import annotations

import struct
from typing import Literal

import msgspec

from orz_async.crc import crc32c
from orz_async.errors import WireError
from orz_async.weights.snapshot import TensorSpec

WIRE_VERSION = 1
MAGIC = b"ORZW"
_HEADER = struct.Struct("<4sHHII")

REQUEST_BYTES = 4096
"""Longest frame a publisher accepts."""
REPLY_BYTES = 64 << 20
"""Longest frame a fetcher accepts: a manifest of 100,000 tensors, or a chunk."""


class Want(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Send the newest version, if it is at least `min_version`. The sender holds `base`, "" if nothing."""

    min_version: int
    base_version: int
    base_digest: str


class Waiting(msgspec.Struct, frozen=True, gc=False, array_like=True):
    newest: int
    """-1: nothing is published yet. As new as wanted: its difference to the base is being made."""
    progress: int = 0
    """Of a relay: changes while something newer is on its way to it."""


class Block(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """`segment_bytes` of one tensor, the last one shorter."""

    form: Literal["same", "full", "delta"]
    """As in the base version, its bytes as they are, or `ops.delta_encode` against the base version."""
    bytes: int
    """What travels for it; 0 for "same"."""


class Entry(msgspec.Struct, frozen=True, gc=False, array_like=True):
    spec: TensorSpec
    blocks: tuple[Block, ...]


class Manifest(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Everything about a transfer but its payload. Equal manifests have interchangeable payloads."""

    version: int
    digest: str
    base_version: int
    """-1: no base is needed."""
    base_digest: str
    segment_bytes: int
    chunk_bytes: int
    """Every chunk is this long but the last."""
    payload_bytes: int
    entries: tuple[Entry, ...]

    @property
    def num_chunks(self) -> int:
        return -(-self.payload_bytes // self.chunk_bytes)

    def chunk_length(self, index: int) -> int:
        return min(self.chunk_bytes, self.payload_bytes - index * self.chunk_bytes)


class Pull(msgspec.Struct, frozen=True, gc=False, array_like=True):
    version: int
    base_digest: str
    index: int


class Chunk(msgspec.Struct, frozen=True, gc=False, array_like=True):
    version: int
    base_digest: str
    index: int
    data: memoryview


class Gone(msgspec.Struct, frozen=True, gc=False, array_like=True):
    version: int


Request = Want | Pull
Reply = Waiting | Manifest | Chunk | Gone
Message = Request | Reply

_TYPES: tuple[type[Message], ...] = (Want, Waiting, Manifest, Pull, Chunk, Gone)
_DECODERS = tuple(msgspec.msgpack.Decoder(kind) for kind in _TYPES)
_ENCODER = msgspec.msgpack.Encoder()


class OtherEpoch(WireError):
    """The frame is sound but belongs to another life of the learner."""

    def __init__(self, epoch: int, expected: int) -> None:
        super().__init__(f"expected a frame of learner epoch {expected}, got epoch {epoch}")
        self.epoch = epoch


class OtherWireVersion(WireError):
    """The peer runs another release of this protocol; trying again cannot help."""


def encode(message: Message, epoch: int) -> bytearray:
    frame = bytearray(_HEADER.size)
    _ENCODER.encode_into(message, frame, _HEADER.size)
    kind = _TYPES.index(type(message))
    head = _HEADER.pack(MAGIC, WIRE_VERSION, kind, epoch, 0)
    checksum = crc32c(memoryview(frame)[_HEADER.size :], crc32c(head))
    _HEADER.pack_into(frame, 0, MAGIC, WIRE_VERSION, kind, epoch, checksum)
    return frame


def decode(frame: bytes | memoryview, epoch: int) -> Message:
    """Raises WireError for anything but an intact message of this epoch. `Chunk.data` is a view of the frame."""
    if len(frame) < _HEADER.size:
        raise WireError(f"expected at least {_HEADER.size} bytes, got {len(frame)}")
    magic, version, kind, frame_epoch, checksum = _HEADER.unpack_from(frame)
    if magic != MAGIC:
        raise WireError(f"expected a frame that begins with {MAGIC!r}, got {bytes(magic)!r}: not a weight stream")
    if version != WIRE_VERSION:
        raise OtherWireVersion(
            f"expected weight protocol version {WIRE_VERSION}, got {version}: install the same release on both sides"
        )
    body = memoryview(frame)[_HEADER.size :]
    if crc32c(body, crc32c(_HEADER.pack(magic, version, kind, frame_epoch, 0))) != checksum:
        raise WireError(f"checksum of a frame of {len(frame)} bytes does not match: it was damaged on the way")
    if frame_epoch != epoch:
        raise OtherEpoch(frame_epoch, epoch)
    if kind >= len(_TYPES):
        raise WireError(f"expected a message type below {len(_TYPES)}, got {kind}")
    try:
        message: Message = _DECODERS[kind].decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:  # msgspec lets UnicodeDecodeError through
        raise WireError(f"malformed {_TYPES[kind].__name__}: {error}") from error
    return message
