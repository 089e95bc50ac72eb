"""Attention of a decode step: against plain float64, and a row's bits against those of the row alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from orz_async import ops

pytestmark = pytest.mark.usefixtures("ops_backend")

SLOTS, TOKENS = 6, 64


def inputs(heads: int, kv_heads: int, dim: int, seed: int = 0) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(seed)
    positions = torch.tensor([0, 63, 17, 31, 32])
    query = torch.randn(len(positions), heads, dim, generator=draw)
    key, value = torch.randn(2, len(positions), kv_heads, dim, generator=draw).unbind()
    keys, values = torch.randn(2, SLOTS, kv_heads, TOKENS, dim, generator=draw).unbind()
    return query, key, value, keys.clone(), values.clone(), positions


def plain(query: Tensor, keys: Tensor, values: Tensor, position: int, scale: float, window: int | None) -> Tensor:
    """One row in float64, the cache holding its newest token."""
    first = 0 if window is None else max(0, position + 1 - window)
    seen = [x[:, first : position + 1].double().repeat_interleave(len(query) // len(x), 0) for x in (keys, values)]
    scores = torch.einsum("hd,htd->ht", query.double(), seen[0]) * scale
    return torch.einsum("ht,htd->hd", scores.softmax(-1), seen[1])


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(2, 2, 64), (8, 2, 16), (4, 1, 13), (3, 3, 40)])
@pytest.mark.parametrize("window", [None, 1, 20])
def test_equals_float64(heads: int, kv_heads: int, dim: int, window: int | None) -> None:
    query, key, value, keys, values, positions = inputs(heads, kv_heads, dim)
    before = keys.clone(), values.clone()
    found = ops.attend_slots(query, key, value, keys, values, positions, scale=0.3, window=window)
    for row, position in enumerate(positions.tolist()):
        assert torch.equal(keys[row, :, position], key[row])
        assert torch.equal(values[row, :, position], value[row])
        before[0][row, :, position], before[1][row, :, position] = key[row], value[row]
        want = plain(query[row], keys[row], values[row], position, 0.3, window)
        torch.testing.assert_close(found[row].double(), want, rtol=1e-5, atol=1e-6)
    assert torch.equal(keys, before[0])
    assert torch.equal(values, before[1])


def test_large_scores_are_summed_in_float64() -> None:
    query, key, value, keys, values, positions = inputs(2, 2, 64)
    query, keys = query * 8, keys * 8  # scores of some hundreds: float32 knows them to 1e-5 or so
    found = ops.attend_slots(query, key, value, keys, values, positions, scale=1.0)
    for row, position in enumerate(positions.tolist()):
        want = plain(query[row], keys[row], values[row], position, 1.0, None)
        torch.testing.assert_close(found[row].double(), want, rtol=2e-6, atol=2e-6)


def test_a_row_does_not_depend_on_its_neighbours_or_on_threads() -> None:
    query, key, value, keys, values, positions = inputs(4, 2, 24)
    whole = ops.attend_slots(query, key, value, keys.clone(), values.clone(), positions, scale=0.2)
    torch.set_num_threads(2)
    assert torch.equal(ops.attend_slots(query, key, value, keys.clone(), values.clone(), positions, scale=0.2), whole)
    for row in range(len(positions)):
        one = slice(row, row + 1)
        cache = keys[one].clone(), values[one].clone()
        alone = ops.attend_slots(query[one], key[one], value[one], *cache, positions[one], scale=0.2)
        assert torch.equal(alone[0], whole[row])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(bad: float) -> None:
    query, key, value, keys, values, positions = inputs(2, 1, 16)
    values[2, 0, 5, 3] = bad
    keys[1, 0, 9, 0] = float("nan")
    found = ops.attend_slots(query, key, value, keys, values, positions, scale=0.2).isfinite().flatten(1).all(1)
    assert found.tolist() == [True, False, False, True, True]


def test_what_does_not_fit_is_refused() -> None:
    query, key, value, keys, values, positions = inputs(2, 2, 16)
    with pytest.raises(ValueError, match="key and value: expected shape"):
        ops.attend_slots(query, key[1:], value, keys, values, positions, scale=1.0)
    with pytest.raises(ValueError, match="cache: expected heads of 16"):
        ops.attend_slots(query, key, value, keys, values[1:], positions, scale=1.0)
    with pytest.raises(ValueError, match="query: expected rows of the cache"):
        ops.attend_slots(query, key, value, keys[:2], values[:2], positions, scale=1.0)
    with pytest.raises(ValueError, match="float32 in host memory"):
        ops.attend_slots(query.double(), key, value, keys, values, positions, scale=1.0)
