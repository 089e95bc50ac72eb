"""Frames and manifests: what a hostile or broken peer may send is refused with a WireError, before memory is taken."""

from __future__ import annotations

import struct
import tracemalloc

import msgpack
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orz_async.crc import crc32c
from orz_async.errors import WireError
from orz_async.weights.manifest import Limits, check
from orz_async.weights.snapshot import TensorSpec, digest_of
from orz_async.weights.wire import (
    MAGIC,
    Block,
    Chunk,
    Entry,
    Gone,
    Manifest,
    Message,
    OtherEpoch,
    OtherWireVersion,
    Pull,
    Waiting,
    Want,
    decode,
    encode,
)


def manifest_of(*specs: TensorSpec, segment_bytes: int = 64, chunk_bytes: int = 100) -> Manifest:
    entries, total = [], 0
    for spec in specs:
        lengths = [min(segment_bytes, spec.num_bytes - at) for at in range(0, spec.num_bytes, segment_bytes)]
        entries.append(Entry(spec, tuple(Block("full", length) for length in lengths)))
        total += spec.num_bytes
    return Manifest(3, digest_of(specs), -1, "", segment_bytes, chunk_bytes, total, tuple(entries))


WEIGHT = TensorSpec("weight", "float32", (5, 8), 17)
SOUND = manifest_of(WEIGHT, TensorSpec("bias", "bfloat16", (5,), 18))
MESSAGES: list[Message] = [
    Want(3, 2, "00c0ffee"),
    Waiting(-1),
    SOUND,
    Pull(3, "", 7),
    Chunk(3, "", 7, memoryview(b"payload")),
    Gone(3),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_a_message_comes_back(message: Message) -> None:
    assert decode(bytes(encode(message, 4)), 4) == message


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_any_damage_is_seen(message: Message) -> None:
    frame = bytes(encode(message, 4))
    for position in range(len(frame)):
        for bit in (0, 7):
            spoilt = bytearray(frame)
            spoilt[position] ^= 1 << bit
            with pytest.raises(WireError):
                decode(bytes(spoilt), 4)
        with pytest.raises(WireError):
            decode(frame[:position], 4)


def test_any_messagepack_implementation_reads_a_frame() -> None:
    frame = bytes(encode(SOUND, 4))
    body = msgpack.unpackb(frame[16:])
    assert body[:2] == [3, SOUND.digest]
    assert body[-1][0] == [["weight", "float32", [5, 8], 17], [["full", 64], ["full", 64], ["full", 32]]]


def test_another_epoch_and_another_release_are_told_apart_from_damage() -> None:
    with pytest.raises(OtherEpoch, match="expected a frame of learner epoch 5, got epoch 4"):
        decode(bytes(encode(Waiting(1), 4)), 5)
    header = struct.pack("<4sHHII", MAGIC, 2, 0, 4, 0)
    with pytest.raises(OtherWireVersion, match="install the same release"):
        decode(header, 4)


def framed(kind: int, body: bytes) -> bytes:
    head = struct.pack("<4sHHII", MAGIC, 1, kind, 4, 0)
    return head[:12] + struct.pack("<I", crc32c(body, crc32c(head))) + body


# Text that is no UTF-8, wrong types, too few fields, nesting without end.
@pytest.mark.parametrize("body", [b"\x93\x00\x00\xa1\x80", b"\x93\xa1a\x00\xa0", b"\x91\x00", b"\x91" * 100_000, b""])
def test_a_malformed_body_is_refused(body: bytes) -> None:
    with pytest.raises(WireError, match="malformed Want"):
        decode(framed(0, body), 4)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 8), st.binary(max_size=200))
def test_sound_frames_with_arbitrary_bodies_do_no_harm(kind: int, body: bytes) -> None:
    try:
        message = decode(framed(kind, body), 4)
    except WireError:
        return
    if isinstance(message, Manifest):
        with pytest.raises(WireError):
            check(message, limits=Limits(max_bytes=1000))


def test_a_sound_manifest_passes() -> None:
    check(SOUND, limits=Limits(max_bytes=170, max_tensors=2))
    assert [SOUND.num_chunks, SOUND.chunk_length(0), SOUND.chunk_length(1)] == [2, 100, 70]


def spec(**changes: object) -> Manifest:
    return manifest_of(msgspec.structs.replace(WEIGHT, **changes))


def blocks(*forms: Block, base: str = "") -> Manifest:
    total = sum(block.bytes for block in forms)
    return msgspec.structs.replace(
        manifest_of(WEIGHT),
        entries=(Entry(WEIGHT, forms),),
        payload_bytes=total,
        base_digest=base,
        base_version=1 if base else -1,
    )


def huge(shape: tuple[int, ...]) -> Manifest:
    """Announces a size no list of blocks could have."""
    giant = TensorSpec("weight", "float32", shape, 0)
    return Manifest(3, digest_of([giant]), -1, "", 64, 100, giant.num_bytes, (Entry(giant, ()),))


FULL, REST = Block("full", 64), Block("full", 32)
HOSTILE = {
    "no tensors": (msgspec.structs.replace(SOUND, entries=()), "expected 1 to"),
    "twice": (manifest_of(WEIGHT, WEIGHT), "named twice"),
    "too many": (manifest_of(*[TensorSpec(f"w{i}", "int8", (1,), 0) for i in range(6)]), "expected 1 to 5 tensors"),
    "no name": (spec(name=""), "name has 0 bytes"),
    "long name": (spec(name="w" * 1000), "name has 1000 bytes"),
    "dimensions": (spec(shape=(1,) * 9), "9 dimensions"),
    "negative": (huge((-1, -40)), "the least -40"),
    "terabytes": (huge((1 << 19, 1 << 19)), "over the limit of 1000000 bytes"),
    "overflow": (huge((1 << 40,) * 8), "8 dimensions"),
    "many that are large together": (
        manifest_of(*[TensorSpec(f"w{i}", "int8", (300_000,), 0) for i in range(4)], segment_bytes=1 << 20),
        "tensor 'w3': the tensors up to it are over the limit",
    ),
    "checksum": (spec(checksum=1 << 32), "not one of 32 bits"),
    "digest": (msgspec.structs.replace(SOUND, digest="00000000"), "it announces '00000000'"),
    "version": (msgspec.structs.replace(SOUND, version=-3), "version -3"),
    "chunk 0": (msgspec.structs.replace(SOUND, chunk_bytes=0), "chunk_bytes"),
    "chunk of gigabytes": (msgspec.structs.replace(SOUND, chunk_bytes=1 << 40), "chunk_bytes"),
    "segment 0": (msgspec.structs.replace(SOUND, segment_bytes=0), "segment_bytes"),
    "segment splits words": (msgspec.structs.replace(SOUND, segment_bytes=60), "segment_bytes"),
    "payload": (msgspec.structs.replace(SOUND, payload_bytes=1 << 50), "but it announces"),
    "payload below 0": (msgspec.structs.replace(SOUND, payload_bytes=-1), "but it announces -1"),
    "a block short": (blocks(FULL, FULL), "expected 3 blocks, got 2"),
    "a long block": (blocks(FULL, FULL, Block("full", 64)), "a full block of 64 bytes for 32"),
    "a negative block": (blocks(FULL, Block("delta", -64), REST, base="aa"), "a delta block of -64"),
    "a delta as long as the words": (blocks(FULL, Block("delta", 64), REST, base="aa"), "a delta block of 64"),
    "same with bytes": (blocks(FULL, Block("same", 1), REST, base="aa"), "a same block of 1"),
    "delta of nothing": (blocks(FULL, Block("delta", 3), REST), "a delta block without a base"),
    "base without digest": (msgspec.structs.replace(SOUND, base_version=2), "goes with base digest"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_manifest_is_refused_before_anything_is_allocated(name: str) -> None:
    manifest, reason = HOSTILE[name]
    tracemalloc.start()
    try:
        with pytest.raises(WireError, match="refused a manifest") as refusal:
            check(manifest, limits=Limits(max_bytes=1_000_000, max_tensors=5))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert reason in str(refusal.value)


@pytest.mark.parametrize("dtype", ["bool", "object", "complex64", "float32x", "__class__", ""])
def test_a_dtype_that_is_not_on_the_list_is_refused(dtype: str) -> None:
    entries = (Entry(TensorSpec("w", dtype, (1,), 0), (Block("full", 4),)),)
    with pytest.raises(WireError, match="dtype"):
        check(msgspec.structs.replace(SOUND, entries=entries), limits=Limits())
