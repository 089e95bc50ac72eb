from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orz_async import ops

pytestmark = pytest.mark.usefixtures("ops_backend")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    count=st.one_of(st.integers(1, 40), st.integers(1000, 5000)),
    kept=st.floats(0.0, 1.0),
    mean=st.sampled_from([0.0, -3.0, 1e4]),
    spread=st.sampled_from([1e-3, 1.0, 50.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_ragged_masks_against_float64(count, kept, mean, spread, dtype, seed) -> None:
    torch.manual_seed(seed)
    x = (mean + spread * torch.randn(count, dtype=torch.float64)).to(dtype)
    mask = torch.rand(count) < kept
    exact = x.double()[mask]
    found = ops.whiten(x, mask)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not found[~mask].any()
    n, found_mean, m2 = ops.moments(x, mask).tolist()
    assert n == len(exact)
    if len(exact):
        assert found_mean == pytest.approx(float(exact.mean()), rel=1e-12, abs=1e-12)
        assert m2 == pytest.approx(float((exact - exact.mean()).square().sum()), rel=1e-9, abs=1e-9)
        want = (exact - exact.mean()) / (exact.var(correction=0) + 1e-8).sqrt()
        torch.testing.assert_close(found[mask].double(), want, atol=1e-5, rtol=1e-5)


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
    with pytest.raises(ValueError, match=r"x_N: expected float32 or .*, found int64"):
        ops.whiten(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="mask_N: expected device cpu, found meta"):
        ops.moments(torch.zeros(3), torch.ones(3, dtype=torch.bool, device="meta"))
    with pytest.raises(ValueError, match=r"parts\[1\]: expected float64, found float32"):
        ops.merge_moments([torch.zeros(3).double(), torch.zeros(3)])
    with pytest.raises(ValueError, match=r"parts\[0\]: expected shape \[3\], found shape \[2\]"):
        ops.merge_moments([torch.zeros(2).double()])
