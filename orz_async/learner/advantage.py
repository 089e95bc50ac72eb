"""Rewards, advantages and loss weights of one step: pure functions over the response tokens R of the whole step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from orz_async import ops


def terminal_rewards(rewards_B: Tensor, cu_responses_B1: Tensor, num_tokens: int) -> Tensor:
    """The verifier's reward stands at the last token of each response, 0 before it; no KL and no format reward."""
    rewards_R = rewards_B.new_zeros(num_tokens)
    rewards_R[cu_responses_B1[1:].long() - 1] = rewards_B
    return rewards_R


def advantages(
    rewards_B: Tensor, values_R: Tensor, cu_responses_B1: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """(whitened advantages_R, returns_R). With gamma = lam = 1: A = R - V before whitening, and the return is R.

    A response that ran into the length limit is a finished episode with its reward (0): it is not bootstrapped.
    Every rank holds all values of the step, so the whitening sees the whole step in one fixed order.
    """
    rewards_R = terminal_rewards(rewards_B, cu_responses_B1, len(values_R))
    advantages_R, returns_R = ops.gae(rewards_R, values_R, cu_responses_B1, gamma=gamma, lam=lam)
    return ops.whiten(advantages_R), returns_R


def outcome_advantages(
    rewards_B: Tensor, groups: Sequence[str], lengths_B: Tensor, *, estimator: Literal["grpo", "reinforce"]
) -> Tensor:
    """[R]: every token of a rollout has the same advantage, and there is no critic.

    grpo       (reward - mean of its prompt's samples) / (their standard deviation + 1e-6)  (arXiv:2402.03300, sec. 4.1)
    reinforce  reward - mean of the step, whitened over the tokens of the step  (arXiv:2501.03262)

    `groups` names the prompt of each rollout; a prompt whose samples agree, or with one sample, teaches grpo nothing.
    """
    if estimator == "reinforce":
        return ops.whiten((rewards_B - rewards_B.mean()).repeat_interleave(lengths_B))
    members: dict[str, list[int]] = defaultdict(list)
    for b, group in enumerate(groups):
        members[group].append(b)
    advantages_B = torch.empty_like(rewards_B)
    for rows in members.values():
        rewards_G = rewards_B[rows]
        advantages_B[rows] = (rewards_G - rewards_G.mean()) / (rewards_G.std(correction=0) + 1e-6)
    return advantages_B.repeat_interleave(lengths_B)


def explained_variance(values_R: Tensor, returns_R: Tensor) -> float | None:
    """1 - Var(return - value) / Var(return); None where the returns hardly vary (nearly all right, or all wrong)."""
    variance = float(returns_R.double().var(correction=0))
    if variance < 1e-4:
        return None
    return 1.0 - float((returns_R - values_R).double().var(correction=0)) / variance


def loss_denominators(
    aggregation: Literal["token", "sequence", "pack"],
    lengths_b: Tensor,
    *,
    num_tokens: int,
    num_sequences: int,
    num_packs: int,
) -> Tensor:
    """What each token's loss is divided by, so that a plain sum over microbatches and ranks is the wanted mean.

    `lengths_b` are the response lengths in one microbatch; the three counts are of the whole optimizer step, over all
    ranks. token: mean over tokens. sequence: mean over sequences of their token means. pack: mean over microbatches of
    their token means, as Open-Reasoner-Zero does; it depends on the packing.
    """
    if aggregation == "token":
        return torch.tensor(float(num_tokens))
    if aggregation == "pack":
        return (lengths_b.sum() * num_packs).float()
    return (lengths_b * num_sequences).float().repeat_interleave(lengths_b)
