"""Causal attention within each sequence of a packed [1, N] batch, behind transformers' attention interface.

Linear layers, norms and rotary embeddings see the packed tokens, so padding costs them nothing. On a GPU the attention
kernel reads the sequences where they lie (`varlen.py`), and so does ours on a CPU (`ops.attend_packed`). What these do
not compute (soft caps, bfloat16, very long sequences on a CPU, shared prompts on a GPU) is computed on right-padded
groups of sequences of similar length. That is exact: a padded key stands after every real query of its row, so the
causal mask already hides it, and the rows of padded queries are dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from orz_async import ops
from orz_async.errors import ModelError
from orz_async.learner import varlen

NAME = "orz_varlen"
"""What `attn_implementation` is called in a model that runs packed."""

_SIMILAR = 0.6
"""Sequences at least this fraction of the longest of their group are padded to it: attention then costs at most 2.8
times the unpadded arithmetic, in few calls."""

_EXACT_LENGTH = 1024
"""Longer sequences on a CPU go through torch's own kernel: one query at a time costs as much as it at 50 tokens, three
times as much at 1,024, six times at 4,096 (forward and backward, one core)."""


class PackedLayout:
    """Which packed rows make up which sequence, computed once a microbatch and used by every layer.

    Sequences may share leading rows (the samples of one prompt): these tokens are then embedded, projected and
    normalised once, and only attention goes through them again.
    """

    def __init__(self, rows_B: Sequence[NDArray[np.int64]], device: torch.device | str = "cpu") -> None:
        if not rows_B or min(map(len, rows_B)) < 1:
            raise ValueError("rows_B: expected at least one sequence of at least one token, found an empty one")
        self.sequences = ops.Sequences.of(rows_B)
        self.num_tokens = self.sequences.num_rows
        self.longest = max(map(len, rows_B))
        self.in_order = np.array_equal(self.sequences.rows_T, np.arange(self.num_tokens))
        """The sequences share no rows and follow each other: kernels can read them where they lie."""
        ends = self.sequences.ends_B1 if self.in_order else np.zeros(1)
        self.cu_seqlens_B1 = torch.from_numpy(ends.astype(np.int32)).to(device)
        self.blocks: dict[int | None, BlockMask] = {}
        self._rows_B, self._device = rows_B, device
        self._windows: dict[tuple[int, int], Tensor] = {}

    @classmethod
    def from_lengths(cls, lengths_B: Sequence[int], device: torch.device | str = "cpu") -> PackedLayout:
        """Sequences that share nothing, one after the other."""
        ends = np.cumsum(lengths_B)
        return cls([np.arange(end - n, end) for n, end in zip(lengths_B, ends, strict=True)], device)

    @cached_property
    def padded(self) -> PaddedGroups:
        return PaddedGroups(self._rows_B, self._device)

    def window_mask(self, length: int, window: int) -> Tensor:
        """bool [length, length]: query q sees keys q - window < k <= q."""
        if (length, window) not in self._windows:
            at = torch.arange(length, device=self._device)
            behind = at[:, None] - at[None, :]
            self._windows[length, window] = (behind >= 0) & (behind < window)
        return self._windows[length, window]


class PaddedGroups:
    """Where each packed token goes in right-padded groups of sequences, for kernels that know no packed ones."""

    def __init__(self, rows_B: Sequence[NDArray[np.int64]], device: torch.device | str) -> None:
        self.groups: list[tuple[int, int]] = []
        """(sequences, padded length) of each group; the groups follow each other in the padded rows."""
        sources, real = [], []
        for members in _similar_lengths([len(rows) for rows in rows_B]):
            longest = len(rows_B[members[0]])
            self.groups.append((len(members), longest))
            for b in members:
                rows = rows_B[b]
                # Padding repeats a real token: what it holds is never read, and it must not be NaN times zero.
                sources += [rows, np.full(longest - len(rows), rows[-1])]
                real.append(np.arange(longest) < len(rows))
        source_P, real_P = np.concatenate(sources), np.concatenate(real)
        tokens, first = np.unique(np.where(real_P, source_P, -1), return_index=True)
        target_N = first[tokens >= 0]
        copies = real_P.copy()
        copies[target_N] = False
        self.source_P = torch.from_numpy(source_P).to(device)
        """[padded rows]: the packed token each padded row copies."""
        self.target_N = torch.from_numpy(target_N).to(device)
        """[N]: the first padded row that holds each packed token."""
        self.copies_C = torch.from_numpy(copies.nonzero()[0]).to(device)
        """[further copies of shared tokens]: their padded rows."""
        self.copied_C = self.source_P[self.copies_C]
        """[further copies of shared tokens]: the packed tokens."""


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
    """Packed rows to padded rows. Backward adds up the copies; padding has no gradient (see the module)."""

    @staticmethod
    def forward(ctx: Any, x_NX: Tensor, padding: PaddedGroups) -> Tensor:
        ctx.padding = padding
        return x_NX.index_select(0, padding.source_P)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        padding: PaddedGroups = ctx.padding
        grad_NX = grads[0].index_select(0, padding.target_N)
        if len(padding.copies_C):
            grad_NX.index_add_(0, padding.copied_C, grads[0].index_select(0, padding.copies_C))
        return grad_NX, None


class _Unpad(torch.autograd.Function):
    """Padded rows to packed rows, from the first copy of each. Backward puts zeros into all other padded rows."""

    @staticmethod
    def forward(ctx: Any, x_PX: Tensor, padding: PaddedGroups) -> Tensor:
        ctx.padding = padding
        return x_PX.index_select(0, padding.target_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        padding: PaddedGroups = ctx.padding
        grad_PX = grads[0].new_zeros(len(padding.source_P), grads[0].shape[1])
        return grad_PX.index_copy_(0, padding.target_N, grads[0]), None


def _pad(x: Tensor, padding: PaddedGroups) -> Tensor:
    """[1, heads, N, head width] to [padded rows, heads, head width]."""
    x_NX = x[0].transpose(0, 1).flatten(1)
    x_PX: Tensor = _Pad.apply(x_NX, padding)  # type: ignore[no-untyped-call]
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
    scaling = scaling if scaling is not None else query.shape[3] ** -0.5
    scores = query @ key.transpose(2, 3) * scaling
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
    kernel = varlen.best(query) if layout.in_order else None
    if kernel is not None:
        return kernel(query, key, value, layout, scaling=scaling, window=sliding_window, softcap=softcap), None
    exact = query.device.type == "cpu" and query.dtype == torch.float32 and layout.longest <= _EXACT_LENGTH
    if exact and softcap is None and value.shape[3] == query.shape[3]:
        scale = scaling if scaling is not None else query.shape[3] ** -0.5
        query_NHD, key_NKD, value_NKD = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
        out_NHD = ops.attend_packed(query_NHD, key_NKD, value_NKD, layout.sequences, scale=scale, window=sliding_window)
        return out_NHD[None], None
    return _padded_attention(query, key, value, layout, scaling=scaling, window=sliding_window, softcap=softcap), None


def _padded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackedLayout,
    *,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    padding = layout.padded
    sizes = [count * length for count, length in padding.groups]
    # split, not slices: its backward writes one tensor, where each slice would fill a whole one with zeros and add it.
    padded = zip(*(torch.split(_pad(x, padding), sizes) for x in (query, key, value)), strict=True)
    outputs = []
    for (count, length), parts in zip(padding.groups, padded, strict=True):
        group = [x.view(count, length, *x.shape[1:]).transpose(1, 2) for x in parts]
        mask = layout.window_mask(length, window) if window is not None and window < length else None
        attended = _attend(*group, scaling=scaling, softcap=softcap, mask=mask)
        outputs.append(attended.transpose(1, 2).flatten(0, 1).flatten(1))
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    out_NX: Tensor = _Unpad.apply(joined, padding)  # type: ignore[no-untyped-call]
    return out_NX.view(1, layout.num_tokens, query.shape[1], value.shape[3])


AttentionInterface.register(NAME, packed_attention)
