"""Which tokens one forward computes and which logits it returns; packing them, from NumPy to tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orz_async.generator.attention import Prefixes, SlotBatch
from orz_async.generator.kv_cache import KVCache

_ROUND = 8
"""Tokens and logits come in multiples of this. Libraries multiply one to three rows by another kernel than four, and
compute the last elements of a vector of odd length by another function: padding keeps both away from real tokens, so
that a rollout's bits do not depend on how many others run."""

_ROUND_PREFIX = 16
"""The same for the keys of a prefix: one vector of the widest machine."""


def _none() -> NDArray[np.int64]:
    return np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True)
class Work:
    """What one forward computes: one token each for slots 0, 1, ... and whole prefixes."""

    decode_tokens: NDArray[np.integer[Any]] = field(default_factory=_none)
    decode_positions: NDArray[np.int64] = field(default_factory=_none)
    prefixes: Sequence[NDArray[np.integer[Any]]] = ()
    """Distinct ones."""
    slots: Sequence[int] = ()
    """Slots that get a prefix."""
    source: Sequence[int] = ()
    """The prefix that each of these slots gets."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One packed forward. `N` tokens, `K` of them with logits."""

    tokens_1N: Tensor
    positions_1N: Tensor
    logits_index: Tensor
    """[K]: packed index of each token whose logits are computed."""
    logits_rows: Tensor
    """For each row the caller asked for, an index into those K."""
    slots: SlotBatch


def pack_batch(work: Work, cache: KVCache, device: torch.device) -> Batch:
    """The rows of the result's logits are the decode rows, then slots[0], slots[1], ..."""
    rows, prefixes, source = len(work.decode_tokens), work.prefixes, work.source
    lengths_U = np.fromiter(map(len, prefixes), np.int64, len(prefixes))
    starts_U = rows + np.cumsum(lengths_U) - lengths_U
    used = rows + int(lengths_U.sum())
    tokens_N = np.zeros(_round_up(used, _ROUND), np.int64)
    positions_N = np.zeros(len(tokens_N), np.int64)
    tokens_N[:rows], positions_N[:rows] = work.decode_tokens, work.decode_positions
    for start, prefix in zip(starts_U, prefixes, strict=True):
        tokens_N[start : start + len(prefix)] = prefix
        positions_N[start : start + len(prefix)] = np.arange(len(prefix))
    index = np.concatenate((np.arange(rows), starts_U + lengths_U - 1))
    index_rows = np.concatenate((np.arange(rows), rows + np.asarray(source, np.int64)))
    padded_index = np.zeros(_round_up(len(index), _ROUND), np.int64)
    padded_index[: len(index)] = index

    def tensor(array: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array).to(device)

    return Batch(
        tokens_1N=tensor(tokens_N)[None],
        positions_1N=tensor(positions_N)[None],
        logits_index=tensor(padded_index),
        logits_rows=tensor(index_rows),
        slots=SlotBatch(
            cache=cache,
            num_decode=rows,
            positions_R=tensor(positions_N[:rows]),
            places_R=work.decode_positions,
            prefixes=_prefixes(starts_U, lengths_U, work.slots, source, device) if prefixes else None,
        ),
    )


def _round_up(count: int, step: int) -> int:
    return -(-count // step) * step


def _prefixes(
    starts_U: NDArray[np.int64],
    lengths_U: NDArray[np.int64],
    slots: Sequence[int],
    source: Sequence[int],
    device: torch.device,
) -> Prefixes:
    columns_L = np.arange(_round_up(int(lengths_U.max()), _ROUND_PREFIX))
    padded_UL = starts_U[:, None] + np.minimum(columns_L, lengths_U[:, None] - 1)
    real_UL = columns_L < lengths_U[:, None]

    def tensor(array: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array).to(device)

    return Prefixes(
        padded_UL=tensor(padded_UL),
        unpadded=tensor(np.flatnonzero(real_UL)),
        slots=tensor(np.asarray(slots, np.int64)),
        source=tensor(np.asarray(source, np.int64)),
    )
