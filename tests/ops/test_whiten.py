from __future__ import annotations

import pytest
import torch

from orz_async import ops

pytestmark = pytest.mark.usefixtures("ops_backend")


def test_mean_zero_variance_one_over_the_mask() -> None:
    x = torch.randn(1001) * 3 + 7
    mask = torch.rand(1001) < 0.4
    white = ops.whiten(x, mask)
    kept = white[mask].double()
    assert abs(float(kept.mean())) < 1e-6
    assert abs(float(kept.var(correction=0)) - 1) < 1e-6
    assert not white[~mask].any()
    torch.testing.assert_close(white[mask], ((x - x[mask].mean()) / x[mask].std(correction=0))[mask])


def test_a_large_mean_costs_no_digits() -> None:
    # E[x^2] - mean^2 in float32 would lose all of this variance; the inputs themselves are exact.
    x = 1e4 + torch.arange(64).float() / 64
    white = ops.whiten(x)
    want = (x.double() - x.double().mean()) / x.double().std(correction=0)
    torch.testing.assert_close(white.double(), want, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("sizes", [[1, 1], [0, 5, 3], [100, 1, 0, 57], [7]])
def test_pieces_merge_to_the_whole(sizes: list[int]) -> None:
    pieces = [torch.randn(n) * (i + 1) + 10 * i for i, n in enumerate(sizes)]
    merged = ops.merge_moments([ops.moments(piece) for piece in pieces])
    torch.testing.assert_close(merged, ops.moments(torch.cat(pieces)), rtol=1e-12, atol=1e-9)
    whole = ops.whiten(torch.cat(pieces))
    parts = torch.cat([ops.whiten(piece, over=merged) for piece in pieces])
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-6)


def test_nothing_and_one_and_constant() -> None:
    assert len(ops.whiten(torch.zeros(0))) == 0
    assert float(ops.whiten(torch.tensor([5.0]))) == 0.0
    assert not ops.whiten(torch.full((9,), 3.0)).any()
    assert not ops.whiten(torch.randn(9), torch.zeros(9, dtype=torch.bool)).any()


def test_masked_values_are_not_read_and_bits_repeat() -> None:
    x, mask = torch.randn(500), torch.rand(500) < 0.5
    first = ops.whiten(x, mask)
    x[~mask] = torch.nan
    assert all(torch.equal(first, ops.whiten(x, mask)) for _ in range(20))


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="x_N: expected finite numbers, found nan at index 1"):
        ops.whiten(torch.tensor([0.0, torch.nan]))
    with pytest.raises(ValueError, match="eps: expected a positive finite number, found 0"):
        ops.whiten(torch.zeros(3), eps=0)
    with pytest.raises(ValueError, match=r"over: expected shape \[3\]"):
        ops.whiten(torch.zeros(3), over=torch.zeros(2, dtype=torch.float64))
