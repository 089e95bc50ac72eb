"""Attention of a packed forward over the slot cache, as a function Hugging Face models call by name.

A packed forward is one row of N tokens, so that every linear layer works on exactly the tokens there are:

    [ one token for each running sequence | whole prefixes of new ones | padding ]
      decode: attends to its slot's cache   attends to itself, causally   zeros

The model passes the `slot_batch` argument of its call down to here untouched.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface

from orz_async import ops
from orz_async.errors import ModelError
from orz_async.generator.kv_cache import KEY_BUCKET, KVCache

NAME = "orz_slots"

_COPY_COST = 3
_WORTHWHILE = 0.8
"""Two passes must save this much to pay for the operations they add."""

_QUERY_BLOCK = 512
"""Queries whose scores are held at once where they must be written out (soft cap, sliding window)."""


@dataclass(frozen=True, slots=True)
class Prefixes:
    """Sequences whose first L tokens are computed at once. Equal ones are computed once and written to many slots."""

    padded_UL: Tensor
    """Packed index of each token of each distinct prefix, right-padded with its last one."""
    unpadded: Tensor
    """Where each packed token is in the flattened padded form."""
    slots: Tensor
    """Slots to write."""
    source: Tensor
    """The distinct prefix that each of these slots gets."""


@dataclass(slots=True)
class SlotBatch:
    """What attention needs to know of a packed forward. Rows 0..num_decode-1 continue slots 0..num_decode-1."""

    cache: KVCache
    num_decode: int
    positions_R: Tensor
    """Position of each decode row's token."""
    places_R: NDArray[np.int64]
    """The same on the host."""
    prefixes: Prefixes | None
    _split: tuple[int, Tensor | None, int] | None = None
    _masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)
    _targets: dict[int, Tensor] = field(default_factory=dict)

    def split(self) -> tuple[int, Tensor | None, int]:
        """(cache positions that all decode rows read, in place; rows with more; how many those read, from a copy), so
        that one long sequence does not make all read as much. Computed once a forward, where attention needs it."""
        if self._split is None:
            near, stragglers, far = split_keys(self.places_R)
            device = self.positions_R.device
            self._split = (near, torch.from_numpy(stragglers).to(device) if len(stragglers) else None, far)
        return self._split

    def mask(self, num_keys: int, window: int | None) -> Tensor:
        """float32 [R, 1, 1, num_keys]: 0 where a decode token may look, -inf elsewhere. Computed once a forward."""
        if (num_keys, window) not in self._masks:
            keys = torch.arange(num_keys, device=self.positions_R.device)
            distance_RK = self.positions_R[:, None] - keys
            hidden_RK = distance_RK < 0
            if window is not None:
                hidden_RK |= distance_RK >= window
            mask_RK = torch.zeros(hidden_RK.shape, device=keys.device).masked_fill_(hidden_RK, float("-inf"))
            self._masks[num_keys, window] = mask_RK[:, None, None, :]
        return self._masks[num_keys, window]

    def targets(self, heads: int) -> Tensor:
        """[R * heads]: where the decode tokens go in a cache flattened to [slots * heads * max_tokens, head_dim]."""
        if heads not in self._targets:
            pairs = torch.arange(self.num_decode * heads, device=self.positions_R.device)
            self._targets[heads] = pairs * self.cache.max_tokens + self.positions_R.repeat_interleave(heads)
        return self._targets[heads]


def split_keys(positions_R: NDArray[np.int64]) -> tuple[int, NDArray[np.int64], int]:
    """(keys all rows read, rows that need more, keys those read) for the least traffic.

    Reading K keys for each of R rows in place costs R K; the n stragglers cost about 3 n L more: read, written to the
    copy, and read again.
    """
    needed_R = -(-(positions_R + 1) // KEY_BUCKET) * KEY_BUCKET
    choices_C, counts_C = np.unique(needed_R, return_counts=True)
    longer_C = len(needed_R) - np.cumsum(counts_C)
    costs_C = len(needed_R) * choices_C + _COPY_COST * longer_C * choices_C[-1]
    best = int(costs_C.argmin())
    if costs_C[best] > _WORTHWHILE * costs_C[-1]:
        best = len(choices_C) - 1
    num_keys = int(choices_C[best])
    return num_keys, np.flatnonzero(needed_R > num_keys), int(choices_C[-1])


def slot_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    slot_batch: SlotBatch | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query [1, H, N, D], key and value [1, H_kv, N, D] -> [1, N, H, D]."""
    if slot_batch is None:
        raise ModelError(f"{type(module).__name__} does not pass keyword arguments on to attention; use --engine vllm")
    for name in ("s_aux", "position_bias"):
        if others.get(name) is not None:
            raise ModelError(f"{type(module).__name__} needs {name} in attention, which this engine lacks")
    keys, values = slot_batch.cache.layer(int(module.layer_idx), key, value)  # type: ignore[arg-type]
    heads = _Heads(query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1))
    form = _Form(query.shape[3] ** -0.5 if scaling is None else scaling, sliding_window, softcap)
    rows = slot_batch.num_decode
    if slot_batch.prefixes is None and rows == query.shape[2]:
        return _decode(heads, keys, values, slot_batch, form)[None], None
    out_NHD = query.new_zeros(query.shape[2], query.shape[1], value.shape[3])
    if rows:
        out_NHD[:rows] = _decode(heads.narrow(rows), keys, values, slot_batch, form)
    if slot_batch.prefixes is not None:
        prefix_out = _prefill(heads, keys, values, slot_batch.prefixes, form)
        out_NHD[rows : rows + prefix_out.shape[0]] = prefix_out
    return out_NHD[None], None


@dataclass(frozen=True, slots=True)
class _Form:
    """How a layer turns products into weights."""

    scale: float
    window: int | None
    """Keys a query sees, itself included; None: all before it."""
    softcap: float | None

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """[..., queries, keys]; float32, and on a CPU float64 from float32: see `_Attend` in ops/attention.py."""
        if query.device.type == "cpu" and query.dtype == torch.float32:
            query, key = query.double(), key.double()
        scores = torch.matmul(query * self.scale, key.transpose(-2, -1))
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return scores if self.softcap is None else torch.tanh(scores / self.softcap) * self.softcap


@dataclass(frozen=True, slots=True)
class _Heads:
    """The packed projections, tokens first: [N, heads, D]."""

    query: Tensor
    key: Tensor
    value: Tensor

    def narrow(self, length: int) -> _Heads:
        return _Heads(self.query[:length], self.key[:length], self.value[:length])


def _decode(heads: _Heads, keys: Tensor, values: Tensor, batch: SlotBatch, form: _Form) -> Tensor:
    """Write one key and value a row, then attend to the cache of the row's slot. Returns [R, H, D]."""
    num_rows, num_heads, dim = heads.query.shape
    num_kv = heads.key.shape[1]
    is_float32 = heads.query.dtype == keys.dtype == torch.float32
    if keys.device.type == "cpu" and is_float32 and form.softcap is None and heads.value.shape[2] == dim:
        positions, window = batch.positions_R, form.window
        return ops.attend_slots(
            heads.query, heads.key, heads.value, keys, values, positions, scale=form.scale, window=window
        )
    targets = batch.targets(num_kv)
    keys.view(-1, dim).index_copy_(0, targets, heads.key.reshape(-1, dim))
    values.view(-1, values.shape[3]).index_copy_(0, targets, heads.value.reshape(-1, values.shape[3]))
    query = heads.query.reshape(num_rows, num_kv, num_heads // num_kv, dim)
    near, rows, far = batch.split()
    # Views, not copies: rows are packed at the front of the cache.
    out = _weigh(query, keys[:num_rows, :, :near], values[:num_rows, :, :near], batch.mask(near, form.window), form)
    if rows is not None:
        mask = batch.mask(far, form.window)[rows]
        out[rows] = _weigh(query[rows], keys[rows, :, :far], values[rows, :, :far], mask, form)
    return out.view(num_rows, num_heads, values.shape[3])


def _weigh(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, form: _Form) -> Tensor:
    """[R, H_kv, queries, D] over [R, H_kv, keys, D]; the query heads that share a key head are the queries."""
    scores = form.scores(query, key).add_(mask)
    # Differences to the largest need no more than float32, and its softmax is faster.
    weights = torch.softmax(scores.sub_(scores.amax(-1, keepdim=True)).float(), dim=-1)
    return torch.matmul(weights.to(value.dtype), value)


def _prefill(heads: _Heads, keys: Tensor, values: Tensor, prefixes: Prefixes, form: _Form) -> Tensor:
    """Attend causally inside each prefix and write its keys and values. Returns [tokens of all prefixes, H, D]."""
    length = prefixes.padded_UL.shape[1]
    query, key, value = (
        packed[prefixes.padded_UL].transpose(1, 2) for packed in (heads.query, heads.key, heads.value)
    )  # [U, heads, L, D]
    # What padding writes lies behind the sequence, where decode overwrites it before it can be seen.
    keys[prefixes.slots, :, :length] = key[prefixes.source]
    values[prefixes.slots, :, :length] = value[prefixes.source]
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if form.softcap is None and (form.window is None or length <= form.window):
        out = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=form.scale)
    else:
        out = _masked(query, key, value, form)
    return out.transpose(1, 2).flatten(0, 1)[prefixes.unpadded]


def _masked(query: Tensor, key: Tensor, value: Tensor, form: _Form) -> Tensor:
    """Causal attention with a soft cap or a sliding window, a block of queries at a time to bound memory."""
    length = query.shape[2]
    positions = torch.arange(length, device=query.device)
    blocks = []
    for start in range(0, length, _QUERY_BLOCK):
        scores = form.scores(query[:, :, start : start + _QUERY_BLOCK], key)
        distance = positions[start : start + _QUERY_BLOCK, None] - positions
        hidden = distance < 0 if form.window is None else (distance < 0) | (distance >= form.window)
        weights = torch.softmax(scores.masked_fill_(hidden, float("-inf")), dim=-1).to(value.dtype)
        blocks.append(torch.matmul(weights, value))
    return torch.cat(blocks, dim=2)


# Without a mask function under this name, transformers builds no mask at all, which is what is wanted here.
AttentionInterface.register(NAME, slot_attention)
