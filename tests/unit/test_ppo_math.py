"""The pure functions of the learner against closed forms."""

from __future__ import annotations

import pytest
import torch

from orz_async.learner.advantage import advantages, explained_variance, loss_denominators, terminal_rewards
from orz_async.learner.optim import Schedule


def test_reward_stands_at_the_last_token() -> None:
    rewards_R = terminal_rewards(torch.tensor([1.0, 0.0, 0.5]), torch.tensor([0, 3, 4, 6]), 6)
    assert rewards_R.tolist() == [0, 0, 1.0, 0, 0, 0.5]


def test_without_discount_the_return_is_the_reward() -> None:
    values_R = torch.tensor([0.1, -0.4, 2.0, 0.3, 0.25, 0.125])
    rewards_B, ends_B1 = torch.tensor([1.0, 0.0, 0.5]), torch.tensor([0, 3, 4, 6], dtype=torch.int32)
    advantages_R, returns_R = advantages(rewards_B, values_R, ends_B1, gamma=1.0, lam=1.0)
    assert returns_R.tolist() == [1.0, 1.0, 1.0, 0.0, 0.5, 0.5]
    raw_R = returns_R - values_R
    want_R = (raw_R - raw_R.mean()) / raw_R.std(correction=0)
    torch.testing.assert_close(advantages_R, want_R, atol=1e-6, rtol=1e-6)
    assert abs(float(advantages_R.mean())) < 1e-6


def test_lambda_0_is_the_one_step_error() -> None:
    values_R = torch.tensor([0.5, 0.25, 1.0])
    _, returns_R = advantages(
        torch.tensor([2.0]), values_R, torch.tensor([0, 3], dtype=torch.int32), gamma=0.5, lam=0.0
    )
    assert returns_R.tolist() == [0.125, 0.5, 2.0]


def test_equal_rewards_and_values_give_no_signal_and_no_infinity() -> None:
    advantages_R, _ = advantages(
        torch.ones(2), torch.zeros(4), torch.tensor([0, 2, 4], dtype=torch.int32), gamma=1.0, lam=1.0
    )
    assert advantages_R.abs().max() == 0.0


def test_explained_variance_guards_its_division() -> None:
    returns_R = torch.tensor([0.0, 1.0, 0.0, 1.0])
    assert explained_variance(returns_R, returns_R) == 1.0
    assert explained_variance(torch.zeros(4), returns_R) == 0.0
    assert explained_variance(1 - returns_R, returns_R) == -3.0
    assert explained_variance(torch.rand(4), torch.ones(4)) is None


@pytest.mark.parametrize(
    ("aggregation", "want"),
    [("token", [12.0]), ("pack", [5.0 * 4]), ("sequence", [2.0 * 3] * 2 + [3.0 * 3] * 3)],
)
def test_denominators_make_sums_means(aggregation: str, want: list[float]) -> None:
    """A microbatch with responses of 2 and 3 tokens, in a step of 3 sequences, 12 tokens and 4 packs."""
    found = loss_denominators(
        aggregation,  # type: ignore[arg-type]
        torch.tensor([2, 3]),
        num_tokens=12,
        num_sequences=3,
        num_packs=4,
    )
    assert found.flatten().tolist() == want


def test_warm_up_is_linear_and_then_constant() -> None:
    constant = Schedule(1.0, warmup_steps=4, final=1.0, num_steps=6)
    assert [constant.at(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert Schedule(0.3, warmup_steps=0, final=1.0, num_steps=6).at(0) == 0.3
    falling = Schedule(2.0, warmup_steps=2, final=0.5, num_steps=4)
    assert [falling.at(step) for step in range(5)] == [1.0, 1.75, 1.5, 1.25, 1.0]
