# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Generalised advantage estimation over packed sequences, as a scan over affine maps in two launches.

With X_t what the tokens after t hand back to it,

    G_t = r_t + X_t,   A_t = G_t - V_t,   X_{t-1} = gamma * (1 - lam) * V_t + gamma * lam * G_t

so X_{t-1} = a * X_t + b is affine in X_t with a = gamma * lam, b = gamma * (1 - lam) * V_t + gamma * lam * r_t. A
masked token is the identity; after the last token of a sequence X is gamma * bootstrap whatever follows: a = 0. Maps
compose associatively. At gamma = lam = 1 no value enters a sum: the result is exactly "rewards to come, minus value".
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from orz_kernels.launching import as_bytes, cdiv, launch, optional
from orz_kernels.registry import register
from orz_kernels.whiten import block_moments, merge_moments

BLOCK = 1024  # with 8 warps: other shapes spill under one version of ptxas or another
SPAN = 128  # block aggregates one step of the carry reads


@triton.jit
def _compose(a_after, b_after, a, b):
    return a * a_after, a * b_after + b


@triton.jit
def _first(x, SIZE: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, SIZE) == 0, x, 0.0), 0)


@triton.jit
def _maps(
    rewards, values, mask, starts, bootstrap, t, num_tokens, num_sequences, steps, gamma, decay, blend,
    HAS_MASK: tl.constexpr, HAS_BOOTSTRAP: tl.constexpr,
):  # fmt: skip
    """The map (a, b) that gives X_t from X_{t+1}: the one of token t + 1, or the end of the sequence of t."""
    inside = t < num_tokens
    # The last sequence that begins at or before t; of several at one place all but the last are empty.
    low = tl.zeros_like(t)
    high = low + num_sequences
    for _ in range(steps):
        middle = (low + high) // 2
        begun = tl.load(starts + middle, mask=inside, other=0) <= t
        low = tl.where(begun, middle, low)
        high = tl.where(begun, high, middle)
    is_last = tl.load(starts + low + 1, mask=inside, other=0) == t + 1
    follows = inside & (t + 1 < num_tokens) & ~is_last
    if HAS_MASK:
        follows = follows & (tl.load(mask + t + 1, mask=follows, other=0) != 0)
    reward = tl.load(rewards + t + 1, mask=follows, other=0.0).to(tl.float32)
    value = tl.load(values + t + 1, mask=follows, other=0.0).to(tl.float32)
    a = tl.where(follows, decay, 1.0)
    b = tl.where(follows, blend * value + decay * reward, 0.0)
    if HAS_BOOTSTRAP:
        end = gamma * tl.load(bootstrap + low, mask=inside & is_last, other=0.0).to(tl.float32)
    else:
        end = 0.0
    return tl.where(is_last, 0.0, a), tl.where(is_last, end, b)


@triton.jit(do_not_specialize=["num_tokens", "num_sequences", "steps", "num_blocks"])
def _aggregate_kernel(
    rewards, values, mask, starts, bootstrap, aggregates,
    num_tokens, num_sequences, steps, num_blocks, gamma, decay, blend,
    BLOCK: tl.constexpr, HAS_MASK: tl.constexpr, HAS_BOOTSTRAP: tl.constexpr,
):  # fmt: skip
    """The composition of all maps of a block, so that the second launch need not read what comes after its own."""
    block = tl.program_id(0)
    t = block * BLOCK + tl.arange(0, BLOCK)
    a, b = _maps(
        rewards, values, mask, starts, bootstrap, t, num_tokens, num_sequences, steps, gamma, decay, blend,
        HAS_MASK, HAS_BOOTSTRAP,
    )  # fmt: skip
    a, b = tl.associative_scan((a, b), 0, _compose, reverse=True)
    tl.store(aggregates + block, _first(a, BLOCK))
    tl.store(aggregates + num_blocks + block, _first(b, BLOCK))


@triton.jit(do_not_specialize=["num_tokens", "num_sequences", "steps", "num_blocks"])
def _scan_kernel(
    rewards, values, mask, starts, bootstrap, aggregates, advantages, returns, moments,
    num_tokens, num_sequences, steps, num_blocks, gamma, decay, blend,
    BLOCK: tl.constexpr, SPAN: tl.constexpr, HAS_MASK: tl.constexpr, HAS_BOOTSTRAP: tl.constexpr,
    MOMENTS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    # What later blocks hand back. Composition stops where a is 0: at the end of a sequence, or where decay underflows.
    carry_a = 1.0
    carry = 0.0
    after = block + 1
    while (after < num_blocks) & (carry_a != 0.0):
        j = after + tl.arange(0, SPAN)
        a = tl.load(aggregates + j, mask=j < num_blocks, other=1.0)
        b = tl.load(aggregates + num_blocks + j, mask=j < num_blocks, other=0.0)
        a, b = tl.associative_scan((a, b), 0, _compose, reverse=True)
        carry += carry_a * _first(b, SPAN)
        carry_a *= _first(a, SPAN)
        after += SPAN
    t = block * BLOCK + tl.arange(0, BLOCK)
    a, b = _maps(
        rewards, values, mask, starts, bootstrap, t, num_tokens, num_sequences, steps, gamma, decay, blend,
        HAS_MASK, HAS_BOOTSTRAP,
    )  # fmt: skip
    a, b = tl.associative_scan((a, b), 0, _compose, reverse=True)
    inside = t < num_tokens
    kept = inside
    if HAS_MASK:
        kept = inside & (tl.load(mask + t, mask=inside, other=0) != 0)
    total = tl.load(rewards + t, mask=kept, other=0.0).to(tl.float32) + a * carry + b
    value = tl.load(values + t, mask=kept, other=0.0).to(tl.float32)
    advantage = tl.where(kept, total - value, 0.0)
    tl.store(advantages + t, advantage, mask=inside)
    tl.store(returns + t, tl.where(kept, total, 0.0), mask=inside)
    if MOMENTS:
        block_moments(moments, advantage, kept, block, num_blocks)


def _launch(
    rewards_N: Tensor, values_N: Tensor, cu_seqlens_B1: Tensor, gamma: float, lam: float,
    mask_N: Tensor | None, bootstrap_B: Tensor | None, moments_3P: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    num_tokens, num_sequences = len(rewards_N), len(cu_seqlens_B1) - 1
    num_blocks = cdiv(num_tokens, BLOCK)
    out = [torch.empty(num_tokens, dtype=torch.float32, device=rewards_N.device) for _ in range(2)]
    aggregates = torch.empty(2 * num_blocks, dtype=torch.float32, device=rewards_N.device)
    inputs = (
        *(rewards_N, values_N, as_bytes(mask_N, rewards_N), cu_seqlens_B1, optional(bootstrap_B, rewards_N)),
        aggregates,
    )
    sizes = (num_tokens, num_sequences, num_sequences.bit_length(), num_blocks, gamma, gamma * lam, gamma * (1 - lam))
    meta = {"BLOCK": BLOCK, "HAS_MASK": mask_N is not None, "HAS_BOOTSTRAP": bootstrap_B is not None, "num_warps": 8}
    if num_blocks > 1:
        launch(_aggregate_kernel, (num_blocks,), *inputs, *sizes, **meta)
    launch(
        _scan_kernel, (num_blocks,), *inputs, *out, optional(moments_3P, aggregates), *sizes,
        SPAN=SPAN, MOMENTS=moments_3P is not None, **meta,
    )  # fmt: skip
    return out[0], out[1]


@register
def gae(
    rewards_N: Tensor, values_N: Tensor, cu_seqlens_B1: Tensor, gamma: float, lam: float,
    mask_N: Tensor | None, bootstrap_B: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Advantages and returns, float32; masked-out tokens are skipped and come back as 0."""
    return _launch(rewards_N, values_N, cu_seqlens_B1, gamma, lam, mask_N, bootstrap_B, None)


@gae.register_fake
def _(rewards_N, *_rest):
    return tuple(rewards_N.new_empty(rewards_N.shape, dtype=torch.float32) for _ in range(2))


@register
def gae_moments(
    rewards_N: Tensor, values_N: Tensor, cu_seqlens_B1: Tensor, gamma: float, lam: float,
    mask_N: Tensor | None, bootstrap_B: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`gae`, and the moments of the advantages for `whiten` without another pass over them."""
    moments_3P = torch.empty((3, cdiv(len(rewards_N), BLOCK)), dtype=torch.float64, device=rewards_N.device)
    advantages_N, returns_N = _launch(rewards_N, values_N, cu_seqlens_B1, gamma, lam, mask_N, bootstrap_B, moments_3P)
    return advantages_N, returns_N, merge_moments(moments_3P)


@gae_moments.register_fake
def _(rewards_N, *_rest):
    advantages_N, returns_N = (rewards_N.new_empty(rewards_N.shape, dtype=torch.float32) for _ in range(2))
    return advantages_N, returns_N, rewards_N.new_empty(3, dtype=torch.float64)
