"""Checksums and the digest that names a state."""

from __future__ import annotations

import importlib
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from weights_support import assert_same_bits, model

from orz_async.crc import crc32c, crc32c_numpy
from orz_async.weights.snapshot import capture, digest_of, spec_of, state_digest, tensor_checksum


def bytewise(data: bytes, init: int = 0) -> int:
    register = init ^ 0xFFFFFFFF
    for value in data:
        register ^= value
        for _ in range(8):
            register = (register >> 1) ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


def test_crc_of_the_standard() -> None:
    # RFC 3720, B.4
    for data, expected in (
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
    ):
        assert crc32c(data) == crc32c_numpy(data) == expected


# Around the sizes where the fallback changes its way: 8 KiB in lanes, 1 MiB a block.
@pytest.mark.parametrize("size", [0, 1, 8191, 8192, 8193, 16384 + 7, (1 << 20) + 4097])
def test_crc_fallback_agrees(size: int) -> None:
    data = random.Random(size).randbytes(size)
    expected = bytewise(data, 7) if size < 20_000 else crc32c_numpy(data[1000:], crc32c_numpy(data[:1000], 7))
    assert crc32c_numpy(data, 7) == expected
    assert crc32c(data, 7) == expected


def test_crc_is_the_native_one_where_it_is_built() -> None:
    pytest.importorskip("orz_async._C")
    assert crc32c is importlib.import_module("orz_async._C").crc32c


@settings(max_examples=30, deadline=None)
@given(st.binary(max_size=300), st.binary(max_size=300))
def test_crc_continues(first: bytes, second: bytes) -> None:
    assert crc32c(second, crc32c(first)) == crc32c(first + second)


def test_digest_does_not_depend_on_order_but_on_everything_else() -> None:
    named = model()
    digest = state_digest(named)
    assert state_digest(dict(reversed(named.items()))) == digest
    weight = named["embed.weight"]
    for name, tensor in (
        ("other", weight),
        ("embed.weight", weight.reshape(128, 512)),
        ("embed.weight", weight.view(torch.int32)),
        ("embed.weight", -weight),
    ):
        others = {key: value for key, value in named.items() if key != "embed.weight"}
        assert state_digest({**others, name: tensor}) != digest, name


def test_digest_sees_every_bit() -> None:
    zero, minus_zero = torch.tensor([0.0]), torch.tensor([-0.0])
    quiet = torch.tensor([0x7FC00000], dtype=torch.int32).view(torch.float32)
    payload = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert len({state_digest({"w": tensor}) for tensor in (zero, minus_zero, quiet, payload)}) == 4


def test_digest_is_computed_on_values_wherever_they_lie() -> None:
    weight = torch.randn(8, 8)
    assert state_digest({"w": weight.t()}) == state_digest({"w": weight.t().contiguous()})


def test_capture_copies() -> None:
    named = model()
    expected = {name: tensor.clone() for name, tensor in named.items()}
    state = capture(3, ((name, torch.nn.Parameter(t) if t.is_floating_point() else t) for name, t in named.items()))
    for tensor in named.values():
        tensor.zero_()
    assert_same_bits(state.tensors, expected)
    assert state.digest == state_digest(expected) == digest_of([spec_of(*item) for item in expected.items()])
    assert state.num_bytes == sum(tensor.nbytes for tensor in expected.values())
    assert not any(tensor.requires_grad for tensor in state.tensors.values())


def test_tied_parameters_count_once() -> None:
    module = torch.nn.Module()
    module.embed = torch.nn.Embedding(8, 4)
    module.head = torch.nn.Linear(4, 8, bias=False)
    module.head.weight = module.embed.weight
    assert list(capture(0, module.named_parameters()).tensors) == ["embed.weight"]


def test_capture_refuses_what_cannot_travel() -> None:
    with pytest.raises(ValueError, match="published twice"):
        capture(0, [("w", torch.zeros(1)), ("w", torch.zeros(1))])
    with pytest.raises(ValueError, match="complex64"):
        capture(0, [("w", torch.zeros(1, dtype=torch.complex64))])
    with pytest.raises(ValueError, match="at least one tensor"):
        capture(0, [])
    with pytest.raises(ValueError, match="contiguous"):
        spec_of("w", torch.zeros(2, 3).t())
    assert tensor_checksum(b"") == 0
