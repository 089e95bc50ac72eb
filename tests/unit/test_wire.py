"""Frames: what goes in comes out, others can read it, and damage of any kind is a WireError."""

from __future__ import annotations

import contextlib
import struct

import msgpack
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orz_async.broker import wire
from orz_async.broker.messages import (
    Ack,
    Bye,
    Cancel,
    Failure,
    GeneratorState,
    Grant,
    Hello,
    LeaseRef,
    Leave,
    Nack,
    Observe,
    Progress,
    Published,
    Report,
    Result,
    Status,
    Welcome,
)
from orz_async.crc import crc32c
from orz_async.errors import WireError
from orz_async.records import Lease, Sampling, Span, Trajectory, as_float32, as_int32, float32_bytes, int32_bytes

RUN = wire.run_hash("a run")
REF = LeaseRef("train", 7, 1)
LEASE = Lease("train", 7, 1, "p", int32_bytes([1, 2]), "42", 3, 2**63 - 1, 4, Sampling(1.0, 8))
TRAJECTORY = Trajectory(
    kind="train",
    rollout=7,
    attempt=1,
    prompt_id="p",
    sample=3,
    prompt=int32_bytes([1, 2]),
    response=int32_bytes([3, 4, 5]),
    logprobs=float32_bytes([-0.5, -1.25, 0.0]),
    spans=(Span(4, 0), Span(5, 2)),
    reward=1.0,
    finish="stop",
    verdict="correct",
    generator="a",
    generate_s=0.5,
)
TO_BROKER = (
    Hello("a", "fake", 8, 50, 1234),
    Status(8, -1, (Progress(REF, 17, False), Progress(LeaseRef("eval", 0, 0), 0, True))),
    Result(TRAJECTORY),
    Failure(REF, "the engine died", False),
    Leave("enough"),
    Observe(),
)
TO_GENERATOR = (
    Welcome("a run", "model", ("</answer>",), "tcp://127.0.0.1:1", 3, 0.5, 100),
    Grant((LEASE, LEASE)),
    Ack(REF),
    Nack(REF, "fenced"),
    Cancel((REF, REF)),
    Published(4),
    Bye("done", True),
    Report("a run", 3, "rollouts", 9, 4, 1, 2, {"deadline": 2}, (GeneratorState("a", "fake", 8, 3, 2, 10.5, 0.1),)),
)


def frame_of(message: wire.Message) -> bytes:
    return wire.encode(message, run=RUN, epoch=3, sequence=9)


@pytest.mark.parametrize("message", TO_BROKER, ids=lambda m: type(m).__name__)
def test_round_trip_to_broker(message: wire.Message) -> None:
    assert wire.decode_to_broker(frame_of(message)) == (wire.Header(RUN, 3, 9), message)
    with pytest.raises(WireError, match="not expected here"):
        wire.decode_to_generator(frame_of(message))


@pytest.mark.parametrize("message", TO_GENERATOR, ids=lambda m: type(m).__name__)
def test_round_trip_to_generator(message: wire.Message) -> None:
    assert wire.decode_to_generator(memoryview(frame_of(message))) == (wire.Header(RUN, 3, 9), message)
    with pytest.raises(WireError, match="not expected here"):
        wire.decode_to_broker(frame_of(message))


def test_every_message_has_a_number_a_limit_and_a_direction() -> None:
    assert {type(m) for m in TO_BROKER} == wire.TO_BROKER
    assert {type(m) for m in TO_GENERATOR} == wire.TO_GENERATOR
    assert wire.LIMITS.keys() == wire.TO_BROKER | wire.TO_GENERATOR


def test_layout_is_the_documented_one() -> None:
    frame = frame_of(Ack(REF))
    body = frame[40:]
    assert wire.HEADER_BYTES == 40
    assert struct.unpack("<4sHH16sIQI", frame[:40]) == (b"ORZ1", 1, 66, RUN, 3, 9, crc32c(body))


def test_any_messagepack_implementation_reads_and_writes_it() -> None:
    for message in (*TO_BROKER, *TO_GENERATOR):
        body = frame_of(message)[wire.HEADER_BYTES :]
        plain = msgpack.unpackb(body)
        assert plain[0] == type(message).__name__
        again = msgpack.packb(plain)
        assert msgspec.msgpack.decode(again, type=type(message)) == message
    name, trajectory = msgpack.unpackb(frame_of(Result(TRAJECTORY))[wire.HEADER_BYTES :])
    assert name == "Result"
    kind, rollout, attempt, prompt_id, sample, _, response, logprobs, spans, reward, finish, *_ = trajectory
    assert (kind, rollout, attempt, prompt_id, sample, reward, finish) == ("train", 7, 1, "p", 3, 1.0, "stop")
    assert np.frombuffer(response, "<i4").tolist() == as_int32(TRAJECTORY.response).tolist() == [3, 4, 5]
    assert np.frombuffer(logprobs, "<f4").tolist() == as_float32(TRAJECTORY.logprobs).tolist() == [-0.5, -1.25, 0.0]
    assert spans == [[4, 0], [5, 2]]


def test_every_flipped_bit_is_noticed() -> None:
    frame = frame_of(Result(TRAJECTORY))
    silent = set()
    for position in range(len(frame)):
        for bit in range(8):
            damaged = bytearray(frame)
            damaged[position] ^= 1 << bit
            try:
                wire.decode_to_broker(bytes(damaged))
            except WireError:
                continue
            silent.add(position)
    # Run, epoch and sequence are compared by the receiver, so that the error can say whose frame it is.
    assert silent == set(range(8, 36))


def test_every_truncation_is_noticed() -> None:
    frame = frame_of(Result(TRAJECTORY))
    for length in range(len(frame)):
        with pytest.raises(WireError):
            wire.decode_to_broker(frame[:length])


def resealed(kind: int, body: bytes) -> bytes:
    return struct.pack("<4sHH16sIQI", b"ORZ1", 1, kind, RUN, 3, 9, crc32c(body)) + body


@settings(max_examples=300, deadline=None)
@given(st.sampled_from((1, 2, 3, 4, 5)), st.binary(max_size=80))
def test_nonsense_with_a_good_checksum(kind: int, body: bytes) -> None:
    with contextlib.suppress(WireError):
        wire.decode_to_broker(resealed(kind, body))


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(TO_BROKER), st.integers(0, 300), st.integers(0, 255), st.integers(0, 4))
def test_mutated_body_with_a_good_checksum(message: wire.Message, position: int, byte: int, cut: int) -> None:
    """Whatever decodes has the types of the schema, so that it can be encoded again."""
    frame = frame_of(message)
    body = bytearray(frame[wire.HEADER_BYTES :])
    body[position % len(body)] = byte
    body = body[: len(body) - cut]
    number = struct.unpack_from("<H", frame, 6)[0]
    try:
        _, decoded = wire.decode_to_broker(resealed(number, bytes(body)))
    except WireError:
        return
    assert type(decoded) is type(message)
    assert len(frame_of(decoded)) > wire.HEADER_BYTES


def test_deep_nesting_is_an_error() -> None:
    with pytest.raises(WireError, match="cannot be decoded"):
        wire.decode_to_broker(resealed(2, b"\x91" * 100_000))


def test_length_bombs_are_errors() -> None:
    for bomb in (b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff"):
        with pytest.raises(WireError, match="cannot be decoded"):
            wire.decode_to_broker(resealed(2, bomb))


def test_another_wire_version_says_what_to_do() -> None:
    frame = bytearray(frame_of(Leave("x")))
    frame[4] = 2
    with pytest.raises(wire.VersionError, match="speaks wire version 1, the peer speaks 2; install the same release"):
        wire.decode_to_broker(bytes(frame))


def test_limits_hold_on_both_sides() -> None:
    too_long = Leave("x" * (wire.LIMITS[Leave] + 1))
    with pytest.raises(WireError, match="a Leave may have"):
        frame_of(too_long)
    with pytest.raises(WireError, match="a Leave may have"):
        wire.decode_to_broker(resealed(5, msgspec.msgpack.encode(too_long)))


def test_a_result_of_the_longest_response_fits_the_frame_limit() -> None:
    """Worst case: a new version for every token."""
    length = 4096
    longest = msgspec.structs.replace(
        TRAJECTORY,
        prompt=int32_bytes(np.zeros(1000)),
        response=int32_bytes(np.zeros(length)),
        logprobs=float32_bytes(np.zeros(length)),
        spans=tuple(Span(1_000_000 + i, i) for i in range(length)),
    )
    assert len(frame_of(Result(longest))) < wire.frame_limit(1000 + length)


def test_the_trajectory_inside_a_result_is_found_where_it_is() -> None:
    frame = memoryview(frame_of(Result(TRAJECTORY)))
    inside = wire.trajectory_bytes(frame)
    assert inside is not None and msgspec.msgpack.decode(inside, type=Trajectory) == TRAJECTORY
    assert bytes(inside) == msgspec.msgpack.encode(TRAJECTORY)
    # The same message with long lengths, or with a field more than the schema has: valid, and encoded anew.
    body = bytes(frame[wire.HEADER_BYTES :])
    for other in (b"\xdc\x00\x02" + body[1:], body.replace(b"\x9e", b"\x9f", 1) + b"\x01"):
        again = memoryview(resealed(3, other))
        assert wire.decode_to_broker(again)[1] == Result(TRAJECTORY)
        assert wire.trajectory_bytes(again) is None
