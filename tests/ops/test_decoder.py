"""What a decoder refuses. Its numbers are compared with transformers in tests/unit/test_fused.py."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from orz_async import ops

pytestmark = pytest.mark.usefixtures("ops_backend")


def network() -> ops.Network:
    """Width 8, two heads of 4 over one, 6 wide inside, 11 tokens, 20 positions."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape)

    layer = ops.Layer(
        attention_norm_D=draw(8),
        qkv=ops.Linear(draw(16, 8), draw(16)),
        query_norm=None,
        key_norm=draw(4),
        out=ops.Linear(draw(8, 8)),
        mlp_norm_D=draw(8),
        gate_up=ops.Linear(draw(12, 8)),
        down=ops.Linear(draw(8, 6)),
        window=3,
    )
    table = draw(20, 4)
    return ops.Network(draw(11, 8), (layer,), draw(8), ops.Linear(draw(11, 8)), table, table, 2, 1, 4, 1e-6, 0.5)


def cache(slots: int = 3, **kind: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    return [(torch.zeros(slots, 1, 16, 4, **kind), torch.zeros(slots, 1, 16, 4, **kind))]


def test_a_copy_of_the_weights_is_made_and_the_rest_of_the_cache_left_alone(ops_backend: str) -> None:
    net, caches = network(), cache()
    decoder = ops.Decoder(net)
    step = (np.array([3, 4, 5]), np.array([0, 2, 3]), np.array([2, 0]), np.array([0, 9]))
    before = decoder.step(*step, caches)
    written = torch.zeros(3, 16, dtype=torch.bool)
    written[2, :2] = written[0, 9] = True
    for one in caches[0]:
        assert torch.equal((one != 0).any(-1)[:, 0], written)
    if ops_backend == "cpu":
        net.layers[0].out.weight.zero_()
        assert torch.equal(decoder.step(*step, caches), before)


def test_what_does_not_fit_is_refused() -> None:
    net = network()
    layer = net.layers[0]
    bad = {
        "qkv: expected shape": dataclasses.replace(layer, qkv=ops.Linear(torch.zeros(12, 8))),
        "out: expected shape": dataclasses.replace(layer, out=ops.Linear(torch.zeros(8, 4))),
        "gate_up: expected float32": dataclasses.replace(layer, gate_up=ops.Linear(torch.zeros(12, 8).double())),
    }
    for message, one in bad.items():
        with pytest.raises(ValueError, match=message):
            ops.Decoder(dataclasses.replace(net, layers=(one,)))
    with pytest.raises(ValueError, match="heads: expected a multiple of 2"):
        ops.Decoder(dataclasses.replace(net, kv_heads=2, heads=3))
    with pytest.raises(ValueError, match="cos: expected width 4"):
        ops.Decoder(dataclasses.replace(net, cos=torch.zeros(20, 2), sin=torch.zeros(20, 2)))
    step = ops.Decoder(net).step
    tokens, starts, slots, places = np.array([3, 4]), np.array([0, 1, 2]), np.array([0, 1]), np.array([0, 0])
    with pytest.raises(ValueError, match="slots_S: expected shape"):
        step(tokens, starts, slots[:1], places, cache())
    with pytest.raises(ValueError, match="caches: expected 1 layers, found 2"):
        step(tokens, starts, slots, places, cache() * 2)
    with pytest.raises(ValueError, match="caches: expected float32"):
        step(tokens, starts, slots, places, cache(dtype=torch.float64))
