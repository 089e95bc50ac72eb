"""A small network over a slot cache in one call: what the embedded engine computes on CPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orz_async.ops import backend, checks
from orz_async.ops.network import Network

Caches = Sequence[tuple[Tensor, Tensor]]
"""Keys and values of each layer, [slots, kv_heads, tokens, head_dim]."""


class Decoder:
    """A network with a copy of its weights, made for many steps: a change of the tensors later on is not seen."""

    def __init__(self, network: Network) -> None:
        _check_network(network)
        self._cache_shape = (network.kv_heads, network.head_dim)
        self._num_layers = len(network.layers)
        self._step = backend.selected().host.decoder(network)

    def step(
        self,
        tokens_N: NDArray[np.int64],
        starts_S1: NDArray[np.int64],
        slots_S: NDArray[np.int64],
        positions_S: NDArray[np.int64],
        caches: Caches,
    ) -> Tensor:
        """Logits [S, V] of the last token of each sequence.

        Sequence s goes on in slot slots[s], which holds positions[s] tokens of it, with tokens starts[s] to
        starts[s + 1]. Keys and values are written to the cache. A sequence's bits depend on nothing but its tokens and
        its slot; what is not finite in them makes its logits not finite.
        """
        for argument, array in (("slots_S", slots_S), ("positions_S", positions_S)):
            checks.require(array.shape == (len(starts_S1) - 1,), argument, f"shape {len(starts_S1) - 1}", array.shape)
        checks.require(len(caches) == self._num_layers, "caches", f"{self._num_layers} layers", len(caches))
        for keys, values in caches:
            shape = (keys.shape[1], keys.shape[3])
            checks.require(
                keys.shape == values.shape and shape == self._cache_shape, "caches", self._cache_shape, shape
            )
            _check_float32("caches", keys)
            _check_float32("caches", values)
        made: Tensor = self._step(tokens_N, starts_S1, slots_S, positions_S, caches, torch.get_num_threads())
        return made


def _check_float32(argument: str, tensor: Tensor) -> None:
    fits = tensor.dtype == torch.float32 and tensor.device.type == "cpu"
    checks.require(fits, argument, "float32 in host memory", f"{tensor.dtype} on {tensor.device}")


def _check_network(network: Network) -> None:
    width, query, key = network.embedding_VD.shape[1], network.heads, network.kv_heads
    checks.require(len(network.layers) >= 1, "layers", "at least one", 0)
    checks.require(query % key == 0, "heads", f"a multiple of {key} key heads", query)
    checks.require(network.cos.shape == network.sin.shape, "sin", network.cos.shape, network.sin.shape)
    checks.require(network.cos.shape[1] == network.head_dim, "cos", f"width {network.head_dim}", network.cos.shape)
    for layer in network.layers:
        for name, linear, shape in (
            ("qkv", layer.qkv, ((query + 2 * key) * network.head_dim, width)),
            ("out", layer.out, (width, query * network.head_dim)),
            ("gate_up", layer.gate_up, (2 * network.hidden, width)),
            ("down", layer.down, (width, network.hidden)),
        ):
            checks.require(linear.weight.shape == shape, name, f"shape {shape}", tuple(linear.weight.shape))
            _check_float32(name, linear.weight)
    for name, tensor in (("embedding_VD", network.embedding_VD), ("head", network.head.weight)):
        checks.require(tensor.shape == network.embedding_VD.shape, name, network.embedding_VD.shape, tensor.shape)
        _check_float32(name, tensor)
