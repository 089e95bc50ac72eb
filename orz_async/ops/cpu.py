"""The ops on host memory: C++ where it pays, the reference for the rest, in so many words.

The LM-head ops are the reference's loops over chunks, with torch's matrix products and C++ between them. float64 goes
to the reference: it is the oracle, not a way to train.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from orz_async import _C
from orz_async.ops import reference
from orz_async.ops.cpu_decoder import decoder
from orz_async.ops.reference import head, moments, whiten
from orz_async.ops.sequences import Sequences
from orz_async.ops.stats import PPO_FIELDS, VALUE_FIELDS

__all__ = [
    "attend_packed_backward",
    "attend_packed_forward",
    "attend_slots",
    "decoder",
    "delta_apply",
    "delta_encode",
    "gae",
    "head_logprob_backward",
    "head_logprob_forward",
    "logprob_backward",
    "logprob_forward",
    "moments",
    "pack",
    "ppo_head",
    "ppo_loss",
    "rms_norm_backward",
    "rms_norm_forward",
    "silu_mul_backward",
    "silu_mul_forward",
    "sample",
    "value_loss",
    "whiten",
]


def gae(
    rewards_N: Tensor,
    values_N: Tensor,
    cu_seqlens_B1: Tensor,
    gamma: float,
    lam: float,
    mask_N: Tensor | None,
    bootstrap_B: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if torch.float64 in (rewards_N.dtype, values_N.dtype):
        return reference.gae(rewards_N, values_N, cu_seqlens_B1, gamma, lam, mask_N, bootstrap_B)
    advantages_N, returns_N = torch.empty((2, len(values_N)), dtype=torch.float32).unbind()
    _C.gae(
        rewards_N.detach().float().numpy(),
        values_N.detach().float().numpy(),
        cu_seqlens_B1.numpy(),
        gamma,
        lam,
        None if mask_N is None else mask_N.numpy(),
        None if bootstrap_B is None else bootstrap_B.detach().float().numpy(),
        advantages_N.numpy(),
        returns_N.numpy(),
    )
    return advantages_N, returns_N


def _floats(x_N: Tensor) -> NDArray[Any]:
    return x_N.detach().float().numpy()


def _maybe(x_N: Tensor | None) -> NDArray[Any] | None:
    return None if x_N is None else _floats(x_N)


def ppo_loss(
    logprobs_N: Tensor,
    sampled_logprobs_N: Tensor,
    advantages_N: Tensor,
    proximal_logprobs_N: Tensor | None,
    entropy_N: Tensor | None,
    mask_N: Tensor | None,
    denominator: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    behaviour_cap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if logprobs_N.dtype == torch.float64:
        return reference.ppo_loss(
            *(logprobs_N, sampled_logprobs_N, advantages_N, proximal_logprobs_N, entropy_N, mask_N, denominator),
            *(clip_low, clip_high, dual_clip, behaviour_cap),
        )
    slope_N, stats = torch.empty(len(logprobs_N)), torch.empty(len(PPO_FIELDS), dtype=torch.float64)
    bounds = (1 - clip_low, 1 + clip_high, dual_clip or math.inf, behaviour_cap or math.inf)
    _C.policy_loss(
        _floats(logprobs_N),
        _floats(sampled_logprobs_N),
        _floats(advantages_N),
        _maybe(proximal_logprobs_N),
        _maybe(entropy_N),
        None if mask_N is None else mask_N.numpy(),
        _floats(denominator),
        *bounds,
        slope_N.numpy(),
        stats.numpy(),
    )
    return stats[PPO_FIELDS.index("loss")].float(), slope_N, stats


def value_loss(
    values_N: Tensor,
    old_values_N: Tensor,
    returns_N: Tensor,
    mask_N: Tensor | None,
    denominator: Tensor,
    clip: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if values_N.dtype == torch.float64:
        return reference.value_loss(values_N, old_values_N, returns_N, mask_N, denominator, clip)
    slope_N, stats = torch.empty(len(values_N)), torch.empty(len(VALUE_FIELDS), dtype=torch.float64)
    _C.value_loss(
        _floats(values_N),
        _floats(old_values_N),
        _floats(returns_N),
        None if mask_N is None else mask_N.numpy(),
        _floats(denominator),
        clip or math.inf,
        slope_N.numpy(),
        stats.numpy(),
    )
    return stats[VALUE_FIELDS.index("loss")].float(), slope_N, stats


def _softmax(logits_CV: Tensor, targets_C: Tensor, temperature: float, consume: bool) -> head.Softmax:
    if logits_CV.dtype == torch.float64:
        return head.softmax_pass(logits_CV, targets_C, temperature, consume)
    z_CV = logits_CV.detach().float()
    logprobs_C, entropy_C, logsumexp_C, total_C = torch.empty((4, len(z_CV))).unbind()
    _C.softmax_forward(
        z_CV.numpy(),
        targets_C.numpy(),
        1 / temperature,
        z_CV.numpy() if consume else None,
        logprobs_C.numpy(),
        entropy_C.numpy(),
        logsumexp_C.numpy(),
        total_C.numpy(),
        torch.get_num_threads(),
    )
    return head.Softmax(z_CV, total_C, logprobs_C, entropy_C, logsumexp_C)


def _gradient(
    logits_CV: Tensor,
    targets_C: Tensor,
    logsumexp_C: Tensor,
    entropy_C: Tensor,
    grad_logprobs_C: Tensor,
    grad_entropy_C: Tensor | None,
    temperature: float,
    out_CV: Tensor,
) -> None:
    if logits_CV.dtype == torch.float64:
        rows = (logits_CV, targets_C, logsumexp_C, entropy_C, grad_logprobs_C, grad_entropy_C)
        return head.gradient_pass(*rows, temperature, out_CV)
    z_CV = logits_CV.detach().float()
    written_CV = out_CV.detach() if out_CV.dtype == torch.float32 else z_CV
    _C.softmax_backward(
        z_CV.numpy(),
        targets_C.numpy(),
        1 / temperature,
        logsumexp_C.numpy(),
        entropy_C.numpy(),
        grad_logprobs_C.float().numpy(),
        None if grad_entropy_C is None else grad_entropy_C.float().numpy(),
        written_CV.numpy(),
        torch.get_num_threads(),
    )
    if written_CV is z_CV:
        out_CV.copy_(z_CV)
    return None


CPP = head.RowMath(_softmax, _gradient, ppo_loss)
logprob_forward = partial(head.logprob_forward, math=CPP)
logprob_backward = partial(head.logprob_backward, math=CPP)
head_logprob_forward = partial(head.head_logprob_forward, math=CPP)
head_logprob_backward = partial(head.head_logprob_backward, math=CPP)
ppo_head = partial(head.ppo_head, math=CPP)

pack = _C.pack


def delta_encode(new: NDArray[Any], old: NDArray[Any], threads: int) -> bytes:
    return _C.delta_encode(new, old, new.itemsize, threads)


def delta_apply(words: NDArray[Any], payload: bytes, threads: int) -> None:
    _C.delta_apply(words, payload, words.itemsize, threads)


def attend_slots(
    query_RHD: Tensor,
    key_RKD: Tensor,
    value_RKD: Tensor,
    keys: Tensor,
    values: Tensor,
    positions_R: Tensor,
    scale: float,
    window: int | None,
    threads: int,
) -> Tensor:
    out_RHD = torch.empty(query_RHD.shape)
    _C.attend_slots(
        query_RHD.contiguous().numpy(),
        key_RKD.contiguous().numpy(),
        value_RKD.contiguous().numpy(),
        keys.numpy(),
        values.numpy(),
        positions_R.numpy(),
        keys.shape[1],
        keys.shape[3],
        keys.shape[2],
        scale,
        window or 0,
        out_RHD.numpy(),
        threads,
    )
    return out_RHD


def attend_packed_forward(
    query_NHD: Tensor,
    key_NKD: Tensor,
    value_NKD: Tensor,
    sequences: Sequences,
    scale: float,
    window: int | None,
    threads: int,
) -> tuple[Tensor, Tensor]:
    out_NHD, logsumexp_NH = torch.empty_like(query_NHD), torch.empty(query_NHD.shape[:2], dtype=torch.float64)
    _C.attend_packed_forward(
        query_NHD.detach().numpy(),
        key_NKD.detach().numpy(),
        value_NKD.detach().numpy(),
        sequences.rows_T,
        sequences.ends_B1,
        sequences.owned_B,
        key_NKD.shape[1],
        key_NKD.shape[2],
        scale,
        window or 0,
        out_NHD.numpy(),
        logsumexp_NH.numpy(),
        threads,
    )
    return out_NHD, logsumexp_NH


def attend_packed_backward(
    query_NHD: Tensor,
    key_NKD: Tensor,
    value_NKD: Tensor,
    sequences: Sequences,
    scale: float,
    window: int | None,
    threads: int,
    out_NHD: Tensor,
    logsumexp_NH: Tensor,
    grad_NHD: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_query_NHD, grad_key_NKD = torch.empty_like(query_NHD), torch.zeros_like(key_NKD)
    grad_value_NKD = torch.zeros_like(value_NKD)
    _C.attend_packed_backward(
        query_NHD.detach().numpy(),
        key_NKD.detach().numpy(),
        value_NKD.detach().numpy(),
        sequences.rows_T,
        sequences.ends_B1,
        sequences.owned_B,
        key_NKD.shape[1],
        key_NKD.shape[2],
        scale,
        window or 0,
        out_NHD.numpy(),
        logsumexp_NH.numpy(),
        grad_NHD.numpy(),
        grad_query_NHD.numpy(),
        grad_key_NKD.numpy(),
        grad_value_NKD.numpy(),
        threads,
    )
    return grad_query_NHD, grad_key_NKD, grad_value_NKD


def rms_norm_forward(x_ND: Tensor, weight_D: Tensor, eps: float, threads: int) -> tuple[Tensor, Tensor]:
    out_ND, inverse_N = torch.empty_like(x_ND), torch.empty(len(x_ND))
    _C.rms_norm_forward(x_ND.detach().numpy(), _copied(weight_D), eps, out_ND.numpy(), inverse_N.numpy(), threads)
    return out_ND, inverse_N


def _copied(weight_D: Tensor) -> NDArray[Any]:
    """A parameter's own memory must not become numpy's: FSDP2 frees it after each layer, which torch then refuses."""
    return weight_D.detach().clone().numpy()


def rms_norm_backward(
    x_ND: Tensor, weight_D: Tensor, inverse_N: Tensor, grad_ND: Tensor, threads: int
) -> tuple[Tensor, Tensor]:
    grad_x_ND, grad_weight_D = torch.empty_like(x_ND), torch.empty_like(weight_D)
    _C.rms_norm_backward(
        x_ND.detach().numpy(),
        _copied(weight_D),
        inverse_N.numpy(),
        grad_ND.numpy(),
        grad_x_ND.numpy(),
        grad_weight_D.numpy(),
        threads,
    )
    return grad_x_ND, grad_weight_D


def silu_mul_forward(gate: Tensor, up: Tensor, threads: int) -> Tensor:
    out = torch.empty_like(gate)
    _C.silu_mul_forward(gate.detach().numpy(), up.detach().numpy(), out.numpy(), threads)
    return out


def silu_mul_backward(gate: Tensor, up: Tensor, grad: Tensor, threads: int) -> tuple[Tensor, Tensor]:
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    _C.silu_mul_backward(
        gate.detach().numpy(), up.detach().numpy(), grad.numpy(), grad_gate.numpy(), grad_up.numpy(), threads
    )
    return grad_gate, grad_up


def sample(logits_RV: Tensor, temperatures_R: Tensor, uniforms_R: Tensor, threads: int) -> tuple[Tensor, Tensor]:
    tokens_R, logprobs_R = torch.empty(len(logits_RV), dtype=torch.int64), torch.empty(len(logits_RV))
    _C.sample(
        logits_RV.contiguous().numpy(),
        temperatures_R.numpy(),
        uniforms_R.numpy(),
        tokens_R.numpy(),
        logprobs_R.numpy(),
        threads,
    )
    return tokens_R, logprobs_R
