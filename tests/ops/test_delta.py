"""delta: lossless, the same bytes from C++ and numpy, and nothing that comes from outside harms a tensor."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from orz_async import ops
from orz_async.crc import crc32c_numpy as crc32c
from orz_async.ops import backend
from orz_async.ops.reference import delta as layout

pytestmark = pytest.mark.usefixtures("ops_backend")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INTS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def bits(x: Tensor) -> Tensor:
    return x.view(INTS[x.dtype])


def versions(count: int, changed: float, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(new, old) with every bit pattern possible, NaN and infinity included."""
    generator = torch.Generator().manual_seed(seed)
    limit = 2 ** (8 * torch.tensor([], dtype=dtype).element_size() - 1)
    old = torch.randint(-limit, limit, (count,), generator=generator).to(INTS[dtype])
    new = old ^ (torch.rand(count, generator=generator) < changed).to(INTS[dtype])
    return new.view(dtype), old.view(dtype)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    count=st.one_of(st.integers(0, 300), st.integers(65000, 66000), st.integers(131000, 200000)),
    changed=st.sampled_from([0.0, 0.0005, 0.02, 0.3, 1.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_round_trip_and_equal_bytes(count: int, changed: float, dtype: torch.dtype, seed: int) -> None:
    new, old = versions(count, changed, dtype, seed)
    payloads = []
    for name in ("reference", "cpu"):
        with backend.using(name):
            payloads += [ops.delta_encode(new, old, threads=threads) for threads in (1, 3)]
    assert len(set(payloads)) == 1
    tensor = old.clone()
    ops.delta_apply(tensor, payloads[0])
    assert torch.equal(bits(tensor), bits(new))
    assert len(payloads[0]) <= layout.HEADER_BYTES + new.nbytes


@pytest.mark.parametrize(
    "positions", [[0], [254], [255], [256], [509], [510], [511], [65535], [65536], [0, 1, 65534, 69999], []]
)
def test_gaps_at_the_edges_of_their_coding(positions: list[int]) -> None:
    old = torch.zeros(70000)
    new = old.clone()
    new[positions] = 1.0
    tensor = old.clone()
    ops.delta_apply(tensor, ops.delta_encode(new, old))
    assert torch.equal(tensor, new)


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_per_cent_changed_costs_at_most_five(dtype: torch.dtype) -> None:
    new, old = versions(1 << 20, 0.02, dtype)
    assert len(ops.delta_encode(new, old)) <= 0.05 * new.nbytes


def test_the_smaller_form_is_sent() -> None:
    new, old = versions(5000, 1.0, torch.bfloat16)
    payload = ops.delta_encode(new, old)
    assert len(payload) == layout.HEADER_BYTES + new.nbytes
    # Sent whole, it does not depend on the base.
    tensor = torch.zeros_like(old)
    ops.delta_apply(tensor, payload)
    assert torch.equal(bits(tensor), bits(new))


def test_signs_of_zero_and_nan_payloads_survive() -> None:
    old = torch.tensor([0.0, torch.nan, 1.0])
    new = torch.tensor([-0.0, 0.0, 1.0])
    bits(new)[1] = 0x7FC01234
    tensor = old.clone()
    ops.delta_apply(tensor, ops.delta_encode(new, old))
    assert torch.equal(bits(tensor), bits(new))


def test_the_header_names_the_checksum_of_the_result() -> None:
    new, old = versions(200_000, 0.02, torch.bfloat16)
    header = layout.HEADER.unpack_from(ops.delta_encode(new, old, threads=2))
    assert header[6] == crc32c(bits(old).numpy()) and header[7] == crc32c(bits(new).numpy())


def refused(tensor: Tensor, payload: bytes, message: str | None = None) -> None:
    before = bits(tensor).clone()
    with pytest.raises(ValueError, match=message):
        ops.delta_apply(tensor, payload)
    assert torch.equal(bits(tensor), before), "a refused payload left its mark"


def test_another_base_is_refused() -> None:
    new, old = versions(100_000, 0.02, torch.bfloat16)
    payload = ops.delta_encode(new, old)
    other = old.clone()
    bits(other)[77_777] ^= 1
    refused(other, payload, "tensor: expected")
    refused(new.clone(), payload, "tensor: expected")


def test_other_shapes_and_dtypes_are_refused() -> None:
    new, old = versions(1000, 0.02, torch.bfloat16)
    payload = ops.delta_encode(new, old)
    refused(old[:999].clone(), payload, "number of words")
    refused(torch.zeros(500), payload, "word size")


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_noticed(data: st.DataObject) -> None:
    # Half of them sent as changes, half whole.
    new, old = versions(700, data.draw(st.sampled_from([0.05, 1.0])), torch.bfloat16)
    payload = bytearray(ops.delta_encode(new, old))
    how = data.draw(st.sampled_from(["flip", "cut", "extend", "swap"]))
    at = data.draw(st.integers(0, len(payload) - 1))
    if how == "flip":
        payload[at] ^= 1 << data.draw(st.integers(0, 7))
    elif how == "cut":
        del payload[at:]
    elif how == "extend":
        payload += bytes(data.draw(st.integers(1, 50)))
    else:
        payload[at], payload[at - 1] = payload[at - 1], payload[at] ^ 0xFF
    refused(old.clone(), bytes(payload))


def forged(
    old: Tensor, body: bytes, *, kind: int = layout.CHANGED, num_words: int | None = None, new_crc: int = 0
) -> bytes:
    """A payload whose own checksums are all right, as an attacker would make it."""
    words = bits(old).numpy()
    head = layout.HEADER.pack(
        layout.MAGIC,
        layout.FORMAT,
        words.itemsize,
        kind,
        0,
        num_words or len(words),
        crc32c(words),
        new_crc,
        len(body),
        crc32c(body),
    )
    return head + struct.pack("<I", crc32c(head)) + body


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "block headers"),
        (struct.pack("<II", 1, 1) + b"\x05", "body"),  # a value is missing
        (struct.pack("<II", 0xFFFFFFFF, 0xFFFFFFFF), "body"),  # counts far beyond the payload
        (struct.pack("<II", 1, 1) + b"\xfe" + b"\x01\x02", "position"),  # 254 in a block of 100 words
        (struct.pack("<II", 1, 3) + b"\xff\xff\x05" + b"\x01\x02", "position"),  # 515
        (struct.pack("<II", 1, 1) + b"\x64" + b"\x01\x02", "position"),  # 100, the first that is not there
        (struct.pack("<II", 1, 1) + b"\xff" + b"\x01\x02", "position|changed words"),  # an escape and nothing after it
        (struct.pack("<II", 1, 2) + b"\x01\xff" + b"\x01\x02", "position|changed words"),  # a trailing escape
        (struct.pack("<II", 1, 2) + b"\x01\x01" + b"\x01\x02", "position|changed words"),  # more gaps than values
        (struct.pack("<II", 2, 1) + b"\x01" + b"\x01\x02\x03\x04", "position|changed words"),  # fewer
        (struct.pack("<II", 1, 1) + b"\x05" + b"\x01\x02", "checksum"),  # well formed, but not the result it names
    ],
)
def test_forged_payloads_are_refused(body: bytes, message: str) -> None:
    _, old = versions(100, 0.0, torch.bfloat16)
    refused(old, forged(old, body), message)


def test_more_forgeries() -> None:
    _, old = versions(100, 0.0, torch.bfloat16)
    refused(old, forged(old, bytes(198), kind=layout.FULL), "words")
    refused(old, forged(old, bytes(200), kind=layout.FULL, new_crc=1), "result")
    refused(old, forged(old, bytes(200), kind=7), "kind")
    refused(old, forged(old, b"", num_words=2**62), "number of words")
    refused(old, b"ORZD", "at least 40 bytes")
    refused(old, bytes(40), "header")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.delta_encode(torch.zeros(3), torch.zeros(4)), r"old: expected shape \[3\], found shape \[4\]"),
        (lambda: ops.delta_encode(torch.zeros(3), torch.zeros(3).half()), "old: expected float32, found float16"),
        (lambda: ops.delta_encode(torch.zeros(3).double(), torch.zeros(3).double()), "new: expected float32 or"),
        (lambda: ops.delta_encode(torch.zeros(4, 4).T, torch.zeros(4, 4)), "new: expected a contiguous tensor"),
        (lambda: ops.delta_apply(torch.zeros(4, 4).T, b""), "tensor: expected a contiguous tensor"),
        (lambda: ops.delta_apply(torch.zeros(4), "text"), "payload: expected bytes, found str"),
        (lambda: ops.delta_apply(np.zeros(4), b""), "tensor: expected a torch.Tensor, found ndarray"),
        (lambda: ops.delta_encode(torch.zeros(3), torch.zeros(3), threads=0), "threads: expected an integer"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
