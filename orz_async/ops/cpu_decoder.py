"""The decoder in C++: the `decoder` of `cpu`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orz_async import _C
from orz_async.ops.network import Layer, Linear, Network


def decoder(network: Network) -> Callable[..., Tensor]:
    vocab, width = network.embedding_VD.shape
    packed = _C.Decoder(
        (vocab, width, network.heads, network.kv_heads, network.head_dim, network.hidden, len(network.cos)),
        network.eps,
        network.scale,
        _array(network.embedding_VD),
        _array(network.cos),
        _array(network.sin),
        [_layer(layer) for layer in network.layers],
        _array(network.norm_D),
        _linear(network.head),
    )

    def step(
        tokens_N: NDArray[np.int64],
        starts_S1: NDArray[np.int64],
        slots_S: NDArray[np.int64],
        positions_S: NDArray[np.int64],
        caches: Sequence[tuple[Tensor, Tensor]],
        threads: int,
    ) -> Tensor:
        logits_SV = torch.empty(len(slots_S), vocab)
        packed.step(
            tokens_N,
            starts_S1,
            slots_S,
            positions_S,
            [(keys.numpy(), values.numpy()) for keys, values in caches],
            caches[0][0].shape[2],
            logits_SV.numpy(),
            threads,
        )
        return logits_SV

    return step


def _array(tensor: Tensor) -> NDArray[Any]:
    made: NDArray[Any] = tensor.detach().contiguous().numpy()
    return made


def _linear(linear: Linear) -> tuple[NDArray[Any], NDArray[Any] | None]:
    return _array(linear.weight), None if linear.bias is None else _array(linear.bias)


def _layer(layer: Layer) -> tuple[Any, ...]:
    return (
        _array(layer.attention_norm_D),
        _linear(layer.qkv),
        None if layer.query_norm is None else _array(layer.query_norm),
        None if layer.key_norm is None else _array(layer.key_norm),
        _linear(layer.out),
        _array(layer.mlp_norm_D),
        _linear(layer.gate_up),
        _linear(layer.down),
        layer.window or 0,
    )
