"""Keys and values of every slot, one pair of tensors a layer, [slots, heads, max_tokens, head_dim]."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from orz_async.errors import ConfigError

KEY_BUCKET = 32
"""Keys are read in multiples of this many. It also makes sums over keys independent of the longest sequence: vector
lanes see the same keys, and what is appended is zero."""


class KVCache:
    """Memory for `slots` sequences of up to `max_tokens` tokens; a layer is allocated when its first key arrives.

    Positions that a sequence has not reached hold zeros or a former sequence's values: always finite, because the
    attention weight 0 they are multiplied with would not hide a NaN.
    """

    def __init__(self, slots: int, max_tokens: int, num_layers: int) -> None:
        self.slots = slots
        self.max_tokens = -(-max_tokens // KEY_BUCKET) * KEY_BUCKET
        self._num_layers = num_layers
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._copied: list[Any] = []
        """The same memory, on a CPU as arrays of bytes."""

    def layer(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The pair of a layer; `key` and `value` [1, heads, N, head_dim] give its shape, dtype and device."""
        pair = self._layers.get(index)
        if pair is None:
            pair = self._layers[index] = (self._allocate(key), self._allocate(value))
            # NumPy copies some kilobytes in a quarter of the time of torch.
            self._copied += [one.view(torch.uint8).numpy() if one.device.type == "cpu" else one for one in pair]
        return pair

    def _allocate(self, like: Tensor) -> Tensor:
        shape = (self.slots, like.shape[1], self.max_tokens, like.shape[3])
        layer_bytes = self.slots * like.shape[1] * self.max_tokens * like.shape[3] * like.element_size()
        total, present = 2 * self._num_layers * layer_bytes, _memory_bytes(like.device)
        if total > present:
            raise ConfigError(
                f"the KV cache of {self.slots} slots of {self.max_tokens} tokens needs {total / 2**30:.1f} GiB, found "
                f"{present / 2**30:.1f} GiB on {like.device}; lower --slots, sampling.max_new_tokens or "
                "data.max_prompt_tokens"
            )
        # On the CPU, zeros of this size are pages the system provides when a sequence reaches them.
        with torch.inference_mode(False):  # else nothing could be written outside that mode
            return torch.zeros(shape, dtype=like.dtype, device=like.device)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot to another."""
        for cache in self._copied:
            cache[target, :, :length] = cache[source, :, :length]

    def clear(self, slot: int) -> None:
        """Remove values that are not finite."""
        for key, value in self._layers.values():
            key[slot].zero_()
            value[slot].zero_()

    @property
    def is_empty(self) -> bool:
        return not self._layers

    def release(self) -> None:
        """Free the memory; a layer is allocated again when it is next used."""
        self._layers.clear()
        self._copied.clear()


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
