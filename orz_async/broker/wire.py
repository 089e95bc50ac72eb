"""One message, one frame: a checked header and a MessagePack body.

    magic "ORZ1" | u16 wire version | u16 type | 16 bytes run id hash | u32 learner epoch | u64 sequence
    | u32 crc32c of the body | body                                                    (all little-endian)

The body is the message as msgspec writes it: an array whose first element is the message's name, followed by its
fields. Any MessagePack implementation reads it. Nothing is allocated for a frame beyond its limit.
"""

from __future__ import annotations

import hashlib
import struct
from typing import cast

import msgspec

from orz_async.broker import messages as m
from orz_async.crc import crc32c
from orz_async.errors import WireError

WIRE_VERSION = 1
MAGIC = b"ORZ1"
_HEADER = struct.Struct("<4sHH16sIQI")
HEADER_BYTES = _HEADER.size

ANY_RUN = bytes(16)
"""Run id hash of a generator that does not know the run yet: only in its first Hello."""

Message = m.ToBroker | m.ToGenerator

# Type numbers are part of the wire format: never reuse one.
_TYPES: dict[type[Message], int] = {
    m.Hello: 1,
    m.Status: 2,
    m.Result: 3,
    m.Failure: 4,
    m.Leave: 5,
    m.Observe: 6,
    m.Welcome: 64,
    m.Grant: 65,
    m.Ack: 66,
    m.Nack: 67,
    m.Cancel: 68,
    m.Published: 69,
    m.Bye: 70,
    m.Report: 71,
}
_KIB, _MIB = 1 << 10, 1 << 20
MAX_SLOTS = 8192
"""Most leases one generator may ask for: bounds a Status, a Grant and a Cancel."""
# The largest body of each type. `frame_limit` is tighter for results, because it knows the run's lengths.
LIMITS: dict[type[Message], int] = {
    m.Hello: 4 * _KIB,
    m.Status: 512 * _KIB,
    m.Result: 16 * _MIB,
    m.Failure: 8 * _KIB,
    m.Leave: 8 * _KIB,
    m.Observe: 64,
    m.Welcome: 128 * _KIB,
    m.Grant: 16 * _MIB,
    m.Ack: _KIB,
    m.Nack: 8 * _KIB,
    m.Cancel: 512 * _KIB,
    m.Published: 64 * _KIB,
    m.Bye: 8 * _KIB,
    m.Report: _MIB,
}
TO_BROKER: frozenset[type[Message]] = frozenset({m.Hello, m.Status, m.Result, m.Failure, m.Leave, m.Observe})
TO_GENERATOR: frozenset[type[Message]] = frozenset(_TYPES.keys() - TO_BROKER)
MAX_TO_GENERATOR = HEADER_BYTES + max(LIMITS[kind] for kind in TO_GENERATOR)
_BY_NUMBER = {number: kind for kind, number in _TYPES.items()}
_DECODERS = {kind: msgspec.msgpack.Decoder(kind) for kind in _TYPES}
_ENCODER = msgspec.msgpack.Encoder()


class VersionError(WireError):
    """The peer speaks another version of this protocol."""


class Header(msgspec.Struct, frozen=True, gc=False):
    run: bytes
    epoch: int
    sequence: int


def run_hash(run_id: str) -> bytes:
    return hashlib.sha256(run_id.encode()).digest()[:16]


def frame_limit(max_model_tokens: int) -> int:
    """Longest frame to the broker: a result has 4 bytes a prompt token, 8 a response token and at most 12 a span.

    An oversize frame would close the connection without a word, so the sender checks too.
    """
    result = 16 * _KIB + 20 * max_model_tokens
    return HEADER_BYTES + max(min(result, LIMITS[m.Result]), LIMITS[m.Status])


def encode(message: Message, *, run: bytes, epoch: int, sequence: int) -> bytes:
    body = _ENCODER.encode(message)
    limit = LIMITS[type(message)]
    if len(body) > limit:
        raise WireError(f"a {type(message).__name__} may have {limit} bytes, this one has {len(body)}")
    head = _HEADER.pack(MAGIC, WIRE_VERSION, _TYPES[type(message)], run, epoch, sequence, crc32c(body))
    return head + body


def decode_to_broker(frame: bytes | memoryview) -> tuple[Header, m.ToBroker]:
    """Raises WireError for anything but a well-formed message a generator may send."""
    header, message = _decode(frame, TO_BROKER)
    return header, cast(m.ToBroker, message)


def decode_to_generator(frame: bytes | memoryview) -> tuple[Header, m.ToGenerator]:
    """Raises WireError for anything but a well-formed message a broker may send."""
    header, message = _decode(frame, TO_GENERATOR)
    return header, cast(m.ToGenerator, message)


_RESULT_PREFIX = b"\x92\xa6Result\x9e"
"""An array of the name and an array of 14: how a Result begins, when its sender writes lengths the short way."""


def trajectory_bytes(frame: memoryview) -> memoryview | None:
    """The trajectory inside a Result that `decode_to_broker` has accepted, as the MessagePack its sender wrote.

    None if it is not where the short form has it: then encode it anew.
    """
    start = HEADER_BYTES + len(_RESULT_PREFIX) - 1
    return frame[start:] if frame[HEADER_BYTES : start + 1] == _RESULT_PREFIX else None


def _decode(frame: bytes | memoryview, accepted: frozenset[type[Message]]) -> tuple[Header, Message]:
    view = memoryview(frame)
    if len(view) < HEADER_BYTES:
        raise WireError(f"a frame has at least {HEADER_BYTES} bytes, this one has {len(view)}")
    magic, version, number, run, epoch, sequence, crc = _HEADER.unpack_from(view)
    if magic != MAGIC:
        raise WireError(f"a frame begins with {MAGIC!r}, this one with {magic!r}: the peer is not of this program")
    if version != WIRE_VERSION:
        raise VersionError(
            f"this side speaks wire version {WIRE_VERSION}, the peer speaks {version}; "
            "install the same release of orz_async on both sides"
        )
    kind = _BY_NUMBER.get(number)
    if kind is None or kind not in accepted:
        raise WireError(f"message type {number} is not expected here")
    body = view[HEADER_BYTES:]
    if len(body) > LIMITS[kind]:
        raise WireError(f"a {kind.__name__} may have {LIMITS[kind]} bytes, this one has {len(body)}")
    if crc32c(body) != crc:
        raise WireError(f"checksum of a {kind.__name__} does not match: the frame was damaged on its way")
    try:
        return Header(run, epoch, sequence), _DECODERS[kind].decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError) as error:
        raise WireError(f"body of a {kind.__name__} cannot be decoded: {error}") from error
