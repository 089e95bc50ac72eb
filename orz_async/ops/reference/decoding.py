"""A Llama-like network over a slot cache. The equations are those of transformers' Llama, Mistral, Qwen2 and Qwen3."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from orz_async.ops.network import Layer, Linear, Network
from orz_async.ops.reference.attention import attend_slots

Step = Callable[..., Tensor]

_ROUND = 8
"""Libraries multiply few rows by another kernel than many: padded, a row's bits do not depend on their number."""


def decoder(network: Network) -> Step:
    @torch.inference_mode()
    def step(
        tokens_N: NDArray[np.int64],
        starts_S1: NDArray[np.int64],
        slots_S: NDArray[np.int64],
        positions_S: NDArray[np.int64],
        caches: Sequence[tuple[Tensor, Tensor]],
        threads: int,
    ) -> Tensor:
        lengths_S = np.diff(starts_S1)
        slots_N = np.repeat(slots_S, lengths_S).tolist()
        places_N = torch.from_numpy(np.arange(len(tokens_N)) - np.repeat(starts_S1[:-1] - positions_S, lengths_S))
        padded = functional.pad(torch.from_numpy(tokens_N), (0, -len(tokens_N) % _ROUND))
        x_ND = functional.embedding(padded, network.embedding_VD)
        for layer, (keys, values) in zip(network.layers, caches, strict=True):
            x_ND = x_ND + _attention(network, layer, x_ND, keys, values, slots_N, places_N)
            x_ND = x_ND + _mlp(network, layer, x_ND)
        x_ND = _rms_norm(x_ND, network.norm_D, network.eps)
        return _linear(x_ND, network.head)[torch.from_numpy(starts_S1[1:] - 1)]

    return step


def _linear(x_ND: Tensor, linear: Linear) -> Tensor:
    return functional.linear(x_ND, linear.weight, linear.bias)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight (Zhang, Sennrich 2019, arXiv:1910.07467)."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def _turn(x_NHd: Tensor, cos_Nd: Tensor, sin_Nd: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021, arXiv:2104.09864); the halves of a head are the two coordinates."""
    first, second = x_NHd.chunk(2, dim=-1)
    return x_NHd * cos_Nd[:, None] + torch.cat((-second, first), dim=-1) * sin_Nd[:, None]


def _attention(
    network: Network,
    layer: Layer,
    x_ND: Tensor,
    keys: Tensor,
    values: Tensor,
    slots_N: Sequence[int],
    places_N: Tensor,
) -> Tensor:
    """Token by token: each sees the keys that those before it in its sequence have written."""
    count, dim = len(places_N), network.head_dim
    heads_N = _linear(_rms_norm(x_ND, layer.attention_norm_D, network.eps), layer.qkv)[:count].view(count, -1, dim)
    parts = [network.heads, network.kv_heads, network.kv_heads]
    query, key, value = torch.split(heads_N, parts, dim=1)
    if layer.query_norm is not None:
        query = _rms_norm(query, layer.query_norm, network.eps)
    if layer.key_norm is not None:
        key = _rms_norm(key, layer.key_norm, network.eps)
    query, key = (_turn(x, network.cos[places_N], network.sin[places_N]) for x in (query, key))
    seen_ND = x_ND.new_zeros(len(x_ND), network.heads * dim)
    for row, slot in enumerate(slots_N):
        one, cache = slice(row, row + 1), slice(slot, slot + 1)
        form = (places_N[one], network.scale, layer.window, 1)
        out = attend_slots(query[one], key[one], value[one], keys[cache], values[cache], *form)
        seen_ND[row] = out.flatten()
    return _linear(seen_ND, layer.out)


def _mlp(network: Network, layer: Layer, x_ND: Tensor) -> Tensor:
    gate, up = _linear(_rms_norm(x_ND, layer.mlp_norm_D, network.eps), layer.gate_up).chunk(2, dim=-1)
    return _linear(functional.silu(gate) * up, layer.down)
