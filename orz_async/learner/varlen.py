"""Attention kernels of a GPU that read packed sequences where they lie: flash-attention 3 or 2, else flex_attention.

Both take queries of packed rows that belong to sequences one after the other, and compute causal attention within each,
with a sliding window and capped scores where the family has them. Nothing is padded and no mask of [N, N] is held.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

_FLASH_WIDTH = 256
"""Widest head of flash-attention."""


class Sequences(Protocol):
    """What of a `PackedLayout` is needed here."""

    cu_seqlens_B1: Tensor
    longest: int
    num_tokens: int
    blocks: dict[int | None, BlockMask]
    """Block masks by window, made once a microbatch."""


class Kernel(Protocol):
    """Query [1, heads, N, width], key and value with as many or fewer heads; gives [1, N, heads, width]."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sequences: Sequences,
        *,
        scaling: float | None,
        window: int | None,
        softcap: float | None,
    ) -> Tensor: ...


def best(query: Tensor) -> Kernel | None:
    """The fastest kernel for this tensor; None on CPU, where padded groups are faster."""
    if not query.is_cuda:
        return None
    half = query.dtype in (torch.bfloat16, torch.float16)
    return flash if half and query.shape[3] <= _FLASH_WIDTH and flash_function() is not None else flex


@cache
def flash_function() -> Callable[..., Any] | None:
    """flash-attention 3 (flash_attn_interface), 2 (flash_attn), or None where neither is installed."""
    for name in ("flash_attn_interface", "flash_attn"):
        if importlib.util.find_spec(name) is not None:
            found: Callable[..., Any] = importlib.import_module(name).flash_attn_varlen_func
            return found
    return None


def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: Sequences,
    *,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    function = flash_function()
    assert function is not None
    cu = sequences.cu_seqlens_B1
    out = function(
        *(x[0].transpose(0, 1) for x in (query, key, value)),
        cu,
        cu,
        sequences.longest,
        sequences.longest,
        softmax_scale=scaling,
        causal=True,
        # Its window counts keys to the left of the query, ours counts the query too.
        window_size=(-1, -1) if window is None else (window - 1, 0),
        softcap=softcap or 0.0,
    )
    out_NHX: Tensor = out[0] if isinstance(out, tuple) else out
    return out_NHX.unsqueeze(0)


@cache
def _compiled() -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=True)
    return compiled


def flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: Sequences,
    *,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    if window not in sequences.blocks:
        sequences.blocks[window] = _block_mask(sequences, window)

    def capped(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        assert softcap is not None
        return torch.tanh(score / softcap) * softcap

    function: Any = _compiled() if query.is_cuda else flex_attention
    out = function(
        query,
        key,
        value,
        score_mod=None if softcap is None else capped,
        block_mask=sequences.blocks[window],
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, Tensor)
    return out.transpose(1, 2)


def _block_mask(sequences: Sequences, window: int | None) -> BlockMask:
    cu = sequences.cu_seqlens_B1
    lengths = cu[1:] - cu[:-1]
    of_N = torch.arange(len(lengths), device=cu.device).repeat_interleave(lengths)

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        inside = (of_N[q] == of_N[k]) & (k <= q)
        return inside if window is None else inside & (q - k < window)

    return create_block_mask(visible, None, None, sequences.num_tokens, sequences.num_tokens, device=str(cu.device))
