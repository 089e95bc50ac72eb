"""gae against a token-by-token float64 loop and against closed forms."""

from __future__ import annotations

import numpy as np
import ops_oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from orz_async import ops

pytestmark = pytest.mark.usefixtures("ops_backend")


def packed(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    rewards, values = torch.randn((2, sum(lengths)), generator=generator)
    return rewards, values, cu_seqlens


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    gamma=st.sampled_from([0.0, 0.5, 0.99, 1.0]),
    lam=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    masked=st.booleans(),
    bootstrapped=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_matches_a_float64_loop(lengths, gamma, lam, masked, bootstrapped, seed) -> None:
    rewards, values, cu_seqlens = packed(lengths, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    mask = torch.rand(len(rewards), generator=generator) < 0.7 if masked else None
    bootstrap = torch.randn(len(lengths), generator=generator) if bootstrapped else None
    want = ops_oracle.gae(rewards, values, cu_seqlens, gamma, lam, mask, bootstrap)
    found = ops.gae(rewards, values, cu_seqlens, gamma=gamma, lam=lam, mask_N=mask, bootstrap_B=bootstrap)
    for x, y in zip(found, want, strict=True):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x.double(), y, atol=2e-5, rtol=2e-5)


# One token; below, at and above a block of 8, whose last token is always done alone; several blocks and a rest.
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 10, 15, 16, 17, 18, 63, 64, 65, 1000])
def test_block_edges(length: int) -> None:
    rewards, values, cu_seqlens = packed([3, length, 5])
    want = ops_oracle.gae(rewards, values, cu_seqlens, 0.9, 0.8)
    found = ops.gae(rewards, values, cu_seqlens, gamma=0.9, lam=0.8)
    for x, y in zip(found, want, strict=True):
        torch.testing.assert_close(x.double(), y, atol=1e-5, rtol=1e-5)


# The longest response of the recipe's model, and the longest anyone trains on.
@pytest.mark.parametrize("length", [8192, 131072])
def test_undiscounted_terminal_reward_is_exact(length: int) -> None:
    _, values, cu_seqlens = packed([length])
    rewards = torch.zeros(length)
    rewards[-1] = 1.0
    advantages, returns = ops.gae(rewards, values, cu_seqlens, gamma=1.0, lam=1.0)
    assert torch.equal(returns, torch.ones(length))
    assert torch.equal(advantages, 1 - values)


def test_endless_reward_of_one_is_the_geometric_series() -> None:
    gamma, length = 0.99, 500
    end = torch.tensor([1 / (1 - gamma)])
    cu_seqlens = torch.tensor([0, length], dtype=torch.int32)
    for lam in (0.0, 0.5, 1.0):
        values = torch.full((length,), 1 / (1 - gamma))
        advantages, returns = ops.gae(torch.ones(length), values, cu_seqlens, gamma=gamma, lam=lam, bootstrap_B=end)
        torch.testing.assert_close(returns, values, rtol=2e-6, atol=0)
        assert float(advantages.abs().max()) < 1e-3


def test_lambda_zero_is_the_one_step_error() -> None:
    rewards, values, cu_seqlens = packed([6])
    advantages, _ = ops.gae(rewards, values, cu_seqlens, gamma=0.9, lam=0.0)
    want = rewards + 0.9 * torch.cat([values[1:], torch.zeros(1)]) - values
    torch.testing.assert_close(advantages, want)


def test_sequences_do_not_leak_into_each_other() -> None:
    lengths = [5, 1, 17, 8, 30]
    rewards, values, cu_seqlens = packed(lengths)
    together = ops.gae(rewards, values, cu_seqlens, gamma=0.97, lam=0.9)
    for b, length in enumerate(lengths):
        rows = slice(int(cu_seqlens[b]), int(cu_seqlens[b + 1]))
        own = torch.tensor([0, length], dtype=torch.int32)
        alone = ops.gae(rewards[rows].clone(), values[rows].clone(), own, gamma=0.97, lam=0.9)
        for x, y in zip(together, alone, strict=True):
            torch.testing.assert_close(x[rows], y, atol=1e-6, rtol=1e-6)


def test_what_masked_tokens_hold_is_not_read() -> None:
    rewards, values, cu_seqlens = packed([9, 12])
    mask = torch.rand(21) < 0.5
    first = ops.gae(rewards, values, cu_seqlens, gamma=0.9, lam=0.9, mask_N=mask)
    values[~mask] = torch.nan
    rewards[~mask] = torch.inf
    second = ops.gae(rewards, values, cu_seqlens, gamma=0.9, lam=0.9, mask_N=mask)
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y)
        assert not x[~mask].any()


def test_repeats_bitwise_and_needs_no_gradient() -> None:
    rewards, values, cu_seqlens = packed([1000, 77, 3])
    values.requires_grad_()
    first = ops.gae(rewards, values, cu_seqlens, gamma=0.99, lam=0.95)
    assert not first[0].requires_grad
    for _ in range(20):
        again = ops.gae(rewards, values, cu_seqlens, gamma=0.99, lam=0.95)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_empty() -> None:
    nothing = torch.zeros(0)
    for cu_seqlens in ([0], [0, 0, 0]):
        found = ops.gae(nothing, nothing, torch.tensor(cu_seqlens, dtype=torch.int32), gamma=1.0, lam=1.0)
        assert [len(x) for x in found] == [0, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    rewards, values, cu_seqlens = packed([20, 30])
    rewards, values = rewards.to(dtype), values.to(dtype)
    want = ops_oracle.gae(rewards, values, cu_seqlens, 0.9, 0.9)
    found = ops.gae(rewards, values, cu_seqlens, gamma=0.9, lam=0.9)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for x, y in zip(found, want, strict=True):
        assert x.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(x.double(), y, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards_N": torch.zeros(4)}, r"rewards_N: expected shape \[5\], found shape \[4\]"),
        ({"rewards_N": torch.zeros(5, dtype=torch.int64)}, "rewards_N: expected float32 or .*, found int64"),
        ({"values_N": torch.zeros(10)[::2]}, "values_N: expected a contiguous tensor"),
        (
            {"values_N": torch.tensor([0, 1, torch.nan, 0, 0])},
            "values_N: expected finite numbers, found nan at index 2",
        ),
        ({"rewards_N": torch.tensor([0, 1, 0, 0, -torch.inf])}, "rewards_N: expected finite .*, found -inf at index 4"),
        ({"cu_seqlens_B1": torch.tensor([0, 5])}, "cu_seqlens_B1: expected int32, found int64"),
        ({"cu_seqlens_B1": torch.tensor([0, 4], dtype=torch.int32)}, "cu_seqlens_B1: expected to run from 0 to 5"),
        ({"cu_seqlens_B1": torch.tensor([1, 5], dtype=torch.int32)}, "cu_seqlens_B1: expected to run from 0 to 5"),
        ({"cu_seqlens_B1": torch.tensor([0, 3, 2, 5], dtype=torch.int32)}, "cu_seqlens_B1: expected a sequence that"),
        ({"cu_seqlens_B1": torch.zeros(0, dtype=torch.int32)}, "cu_seqlens_B1: expected at least one element"),
        ({"gamma": 1.5}, r"gamma: expected a number in \[0.0, 1.0\], found 1.5"),
        ({"lam": float("nan")}, "lam: expected a number"),
        ({"mask_N": torch.ones(5)}, "mask_N: expected bool, found float32"),
        ({"bootstrap_B": torch.zeros(2)}, r"bootstrap_B: expected shape \[1\]"),
        ({"values_N": [0.0] * 5}, "values_N: expected a torch.Tensor, found list"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], message: str) -> None:
    good = {
        "rewards_N": torch.zeros(5),
        "values_N": torch.zeros(5),
        "cu_seqlens_B1": torch.tensor([0, 5], dtype=torch.int32),
        "gamma": 1.0,
        "lam": 1.0,
    }
    ops.gae(**good)
    with pytest.raises(ValueError, match=message):
        ops.gae(**(good | change))
