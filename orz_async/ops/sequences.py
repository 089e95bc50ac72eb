"""Which packed rows make up which sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sequences:
    """B sequences over N packed rows, which may share leading rows: the samples of one prompt hold its rows once."""

    rows_T: NDArray[np.int64]
    """The row of each position of each sequence, one sequence after the other."""
    ends_B1: NDArray[np.int64]
    """Sequence b is rows_T[ends_B1[b] : ends_B1[b + 1]]."""
    owned_B: NDArray[np.int64]
    """The first position of a sequence whose row is in none before it."""
    num_rows: int

    @classmethod
    def of(cls, rows_B: Sequence[NDArray[np.int64]]) -> Sequences:
        """ValueError unless every row is in a sequence, and what a sequence shares with earlier ones is its start."""
        ends_B1 = np.cumsum([0, *map(len, rows_B)])
        rows_T = np.concatenate([*rows_B, np.zeros(0, np.int64)]).astype(np.int64)
        num_rows = int(rows_T.max(initial=-1)) + 1
        found, first = np.unique(rows_T, return_index=True)
        if len(found) != num_rows or (num_rows and found[0] < 0):
            raise ValueError(f"rows_B: expected every row below {num_rows} in a sequence, found {len(found)} rows")
        new_T = np.zeros(len(rows_T), np.bool_)
        new_T[first] = True
        owned_B = np.array([np.count_nonzero(~new) for new in np.split(new_T, ends_B1[1:-1])], np.int64)
        for b, owned in enumerate(owned_B.tolist()):
            if not new_T[ends_B1[b] + owned : ends_B1[b + 1]].all():
                raise ValueError(f"rows_B: expected sequences to share leading rows only, found others in sequence {b}")
        return cls(rows_T, ends_B1, owned_B[: len(rows_B)], num_rows)

    def each(self) -> Iterator[tuple[Tensor, int]]:
        """(rows_L, first owned position) of every sequence."""
        for b, owned in enumerate(self.owned_B.tolist()):
            yield torch.from_numpy(self.rows_T[self.ends_B1[b] : self.ends_B1[b + 1]]), owned
