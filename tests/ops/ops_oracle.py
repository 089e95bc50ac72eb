"""Slow and plain: every op again, one token or one formula at a time, in float64. Shares no code with the ops."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gae(rewards, values, cu_seqlens, gamma, lam, mask=None, bootstrap=None) -> tuple[Tensor, Tensor]:
    """Token by token in the textbook form, delta_t = r_t + gamma V_{t+1} - V_t."""
    rewards, values = rewards.double(), values.double()
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for b in range(len(cu_seqlens) - 1):
        next_value = float(bootstrap[b]) if bootstrap is not None else 0.0
        next_advantage = 0.0
        for t in reversed(range(int(cu_seqlens[b]), int(cu_seqlens[b + 1]))):
            if mask is not None and not mask[t]:
                continue
            delta = float(rewards[t]) + gamma * next_value - float(values[t])
            next_advantage = delta + gamma * lam * next_advantage
            next_value = float(values[t])
            advantages[t], returns[t] = next_advantage, next_advantage + next_value
    return advantages, returns


def logprob(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(logits.double() / temperature, dim=1)
    p = log_p.exp()
    entropy = -torch.where(p > 0, p * log_p, 0.0).sum(1)
    return log_p.gather(1, targets.long()[:, None]).squeeze(1), entropy


def policy_loss_terms(
    logprobs, sampled, advantages, *, proximal=None, clip_low=0.2, clip_high=0.2, dual_clip=None, behaviour_cap=None
) -> Tensor:
    """The textbook min / max form, term by term; differentiable."""
    logprobs, sampled, advantages = logprobs.double(), sampled.double(), advantages.double()
    anchor = sampled if proximal is None else proximal.double()
    ratio = (logprobs - anchor).exp()
    objective = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    if dual_clip is not None:
        objective = torch.where(advantages < 0, torch.maximum(objective, dual_clip * advantages), objective)
    weight = (anchor - sampled).exp()
    return -(weight if behaviour_cap is None else weight.clamp(max=behaviour_cap)) * objective


def policy_stats(
    logprobs,
    sampled,
    advantages,
    entropy=None,
    *,
    proximal=None,
    clip_low=0.2,
    clip_high=0.2,
    dual_clip=None,
    behaviour_cap=None,
) -> dict[str, float]:
    """What PpoStats.finalise says, but for the loss; one token after the other."""
    lows = highs = duals = capped = 0
    ratios, rhos, weights, k1, k3 = [], [], [], [], []
    for t in range(len(logprobs)):
        now, then, advantage = float(logprobs[t]), float(sampled[t]), float(advantages[t])
        anchor = then if proximal is None else float(proximal[t])
        ratio, rho, weight = math.exp(now - anchor), math.exp(now - then), math.exp(anchor - then)
        lows += advantage < 0 and ratio < 1 - clip_low
        highs += advantage > 0 and ratio > 1 + clip_high
        duals += dual_clip is not None and advantage < 0 and ratio > dual_clip
        capped += behaviour_cap is not None and weight > behaviour_cap
        weights.append(weight if behaviour_cap is None else min(weight, behaviour_cap))
        ratios.append(ratio)
        rhos.append(rho)
        k1.append(then - now)
        k3.append(math.expm1(now - then) - (now - then))
    n = len(ratios)
    return {
        "tokens": n,
        "clip_low": lows / n,
        "clip_high": highs / n,
        "clip_dual": duals / n,
        "ratio_mean": sum(ratios) / n,
        "ratio_max": max(ratios),
        "ratio_min": min(ratios),
        "kl_k1": sum(k1) / n,
        "kl_k3": sum(k3) / n,
        "weight_mean": sum(weights) / n,
        "weight_capped": capped / n,
        "entropy": 0.0 if entropy is None else float(entropy.double().mean()),
        "ess": sum(rhos) ** 2 / (n * sum(r * r for r in rhos)),
    }


def value_loss_terms(values, old_values, returns, clip) -> Tensor:
    values, old_values, returns = values.double(), old_values.double(), returns.double()
    if clip is None:
        return 0.5 * (values - returns).square()
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())


def relative(found: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference, relative to the expected one's."""
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))
