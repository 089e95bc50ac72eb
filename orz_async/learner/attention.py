"""Causal attention within each sequence of a packed [1, N] batch, behind transformers' attention interface.

Linear layers, norms and rotary embeddings see the packed tokens, so padding costs them nothing. Only the attention
itself is computed on right-padded groups of sequences of similar length. That is exact: a padded key stands after every
real query of its row, so the causal mask already hides it, and the rows of padded queries are dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from orz_async.errors import ModelError

NAME = "orz_varlen"
"""What `attn_implementation` is called in a model that runs packed."""

_SIMILAR = 0.6
"""Sequences at least this fraction of the longest of their group are padded to it: attention then costs at most 2.8
times the unpadded arithmetic, in few calls."""


class PackedLayout:
    """Where each packed token goes in the padded groups, computed once a microbatch and used by every layer."""

    def __init__(self, lengths_B: Sequence[int], device: torch.device | str = "cpu") -> None:
        if not lengths_B or min(lengths_B) < 1:
            raise ValueError(
                f"lengths_B: expected at least one sequence of at least one token, found {list(lengths_B)}"
            )
        self.lengths_B = tuple(int(n) for n in lengths_B)
        starts_B = np.concatenate([[0], np.cumsum(self.lengths_B)[:-1]])
        self.num_tokens = sum(self.lengths_B)
        self.groups: list[tuple[int, int]] = []
        """(sequences, padded length) of each group; the groups follow each other in the padded rows."""
        sources, targets, row = [], np.empty(self.num_tokens, np.int64), 0
        for members in _similar_lengths(self.lengths_B):
            longest = self.lengths_B[members[0]]
            self.groups.append((len(members), longest))
            for b in members:
                length = self.lengths_B[b]
                # Padding repeats a real token: what it holds is never read, and it must not be NaN times zero.
                sources.append(starts_B[b] + np.minimum(np.arange(longest), length - 1))
                targets[starts_B[b] : starts_B[b] + length] = np.arange(row, row + length)
                row += longest
        self.source_P = torch.from_numpy(np.concatenate(sources)).to(device)
        """[padded rows]: the packed token each padded row copies."""
        self.target_N = torch.from_numpy(targets).to(device)
        """[N]: the padded row that holds each packed token."""
        self._windows: dict[tuple[int, int], Tensor] = {}

    def window_mask(self, length: int, window: int) -> Tensor:
        """bool [length, length]: query q sees keys q - window < k <= q."""
        if (length, window) not in self._windows:
            at = torch.arange(length, device=self.source_P.device)
            behind = at[:, None] - at[None, :]
            self._windows[length, window] = (behind >= 0) & (behind < window)
        return self._windows[length, window]


def _similar_lengths(lengths_B: Sequence[int]) -> list[list[int]]:
    """Group sequence numbers, longest first; each group's shortest is at least `_SIMILAR` of its longest."""
    groups: list[list[int]] = []
    for b in sorted(range(len(lengths_B)), key=lambda b: (-lengths_B[b], b)):
        if groups and lengths_B[b] >= _SIMILAR * lengths_B[groups[-1][0]]:
            groups[-1].append(b)
        else:
            groups.append([b])
    return groups


class _Pad(torch.autograd.Function):
    """Packed rows to padded rows. Backward reads only real rows: a padded row has no gradient (see the module)."""

    @staticmethod
    def forward(ctx: Any, x_NX: Tensor, source_P: Tensor, target_N: Tensor) -> Tensor:
        ctx.save_for_backward(target_N)
        return x_NX.index_select(0, source_P)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (target_N,) = ctx.saved_tensors
        return grads[0].index_select(0, target_N), None, None


class _Unpad(torch.autograd.Function):
    """Padded rows to packed rows. Backward puts zeros into padding, so that padded queries add nothing to real keys."""

    @staticmethod
    def forward(ctx: Any, x_PX: Tensor, source_P: Tensor, target_N: Tensor) -> Tensor:
        ctx.save_for_backward(target_N)
        ctx.rows = len(source_P)
        return x_PX.index_select(0, target_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (target_N,) = ctx.saved_tensors
        (grad_NX,) = grads
        return grad_NX.new_zeros(ctx.rows, grad_NX.shape[1]).index_copy_(0, target_N, grad_NX), None, None


def _pad(x: Tensor, layout: PackedLayout) -> Tensor:
    """[1, heads, N, head width] to [padded rows, heads, head width]."""
    x_NX = x[0].transpose(0, 1).flatten(1)
    x_PX: Tensor = _Pad.apply(x_NX, layout.source_P, layout.target_N)  # type: ignore[no-untyped-call]
    return x_PX.view(len(x_PX), x.shape[1], x.shape[3])


def _attend(
    query: Tensor, key: Tensor, value: Tensor, *, scaling: float | None, softcap: float | None, mask: Tensor | None
) -> Tensor:
    """[B, heads, L, head width] each, keys and values with as many or fewer heads; causal unless a mask says more."""
    grouped = query.shape[1] != key.shape[1]
    if softcap is None:
        return scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
        )
    if grouped:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    length = query.shape[2]
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    scores = query @ key.transpose(2, 3) * (scaling if scaling is not None else query.shape[3] ** -0.5)
    scores = (torch.tanh(scores / softcap) * softcap).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    layout: PackedLayout | None = None,
    **ignored: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer: query [1, heads, N, head width] to [1, N, heads, head width]."""
    if layout is None or query.shape[0] != 1 or query.shape[2] != layout.num_tokens:
        raise ValueError(f"{NAME}: expected one packed row and its `layout`, found query {tuple(query.shape)}")
    if dropout or ignored.get("position_bias") is not None or ignored.get("s_aux") is not None:
        raise ModelError(
            f"{type(module).__name__}: expected attention without dropout, position bias or sinks, found one of them; "
            "this model family cannot be trained packed"
        )
    padded = [_pad(x, layout) for x in (query, key, value)]
    outputs, row = [], 0
    for count, length in layout.groups:
        rows = slice(row, row + count * length)
        row = rows.stop
        group = [x[rows].view(count, length, *x.shape[1:]).transpose(1, 2) for x in padded]
        windowed = sliding_window is not None and sliding_window < length
        mask = layout.window_mask(length, int(sliding_window or 0)) if windowed else None
        attended = _attend(*group, scaling=scaling, softcap=softcap, mask=mask)
        outputs.append(attended.transpose(1, 2).flatten(0, 1).flatten(1))
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    out_NX: Tensor = _Unpad.apply(joined, layout.source_P, layout.target_N)  # type: ignore[no-untyped-call]
    return out_NX.view(1, layout.num_tokens, query.shape[1], value.shape[3]), None


AttentionInterface.register(NAME, packed_attention)
