"""Which module computes: one list of names, one place that chooses.

A backend is a module that exports every name of `TENSOR_OPS`, taking and returning plain tensors and numbers, so that
a kernel package can be one without importing anything of ours. Autograd, argument checks and the typed results live
once, above, in the public functions of `orz_async.ops`. What a backend does not compute itself it re-exports from
another one, in so many words.

Contract (float inputs may be float64, float32, bfloat16 or float16; math is float32 at least; every result repeats
bitwise; tensors are contiguous, on one device, and checked by the caller; N may be 0)::

    gae(rewards_N, values_N, cu_seqlens_B1, gamma, lam, mask_N | None, bootstrap_B | None) -> advantages_N, returns_N
    moments(x_N, mask_N | None) -> float64 [3]: count, mean, M2 = sum of squared deviations from the mean
    whiten(x_N, mask_N | None, moments_3, eps) -> (x - mean) / sqrt(M2 / count + eps), 0 where masked out
    logprob_forward(logits_NV, targets_N, temperature) -> logprobs_N, entropy_N, logsumexp_N
    logprob_backward(logits_NV, targets_N, logsumexp_N, entropy_N, grad_logprobs_N, grad_entropy_N | None,
                     temperature, in_place) -> grad_logits_NV (the storage of logits_NV if in_place)
    head_logprob_forward(hidden_ND, weight_VD, targets_N, temperature, chunk | None) -> as logprob_forward
    head_logprob_backward(hidden_ND, weight_VD, targets_N, logsumexp_N, entropy_N, grad_logprobs_N,
                          grad_entropy_N | None, temperature, chunk | None, need_hidden, need_weight)
                          -> grad_hidden_ND | None, grad_weight_VD | None
    ppo_loss(logprobs_N, sampled_logprobs_N, advantages_N, proximal_logprobs_N | None, entropy_N | None,
             mask_N | None, denominator, clip_low, clip_high, dual_clip | None, behaviour_cap | None)
             -> loss [], d loss / d logprobs_N, statistics in the order of stats.PPO_FIELDS (float64 or float32)
    value_loss(values_N, old_values_N, returns_N, mask_N | None, denominator, clip | None)
             -> loss [], d loss / d values_N, statistics in the order of stats.VALUE_FIELDS
    ppo_head(hidden_ND, weight_VD, targets_N, sampled_logprobs_N, advantages_N, proximal_logprobs_N | None,
             mask_N | None, denominator, clip_low, clip_high, dual_clip | None, behaviour_cap | None, temperature,
             chunk | None, need_hidden, need_weight)
             -> loss [], grad_hidden_ND | None, grad_weight_VD | None, logprobs_N, entropy_N, statistics

`denominator` is a float32 or float64 tensor, [] or [N]. Rows that are masked out cost nothing, may hold anything, and
come back as 0. `HOST_OPS` work on host memory, in numpy arrays but for attention, layers and what is called a tensor,
and come from `cpu`, or from `reference` without the extension::

    pack(lengths_B int64, max_tokens, num_ranks, (a, b)) -> [rank][microbatch][index]
    delta_encode(new uint16 | uint32, old, threads) -> bytes
    delta_apply(words, payload, threads) -> None, in place
    attend_slots(query_RHD, key_RKD, value_RKD, keys, values, positions_R, scale, window | None, threads)
             -> [R, H, D]; float32 tensors, the cache is written in place
    attend_packed_forward(query_NHD, key_NKD, value_NKD, sequences, scale, window | None, threads)
             -> out_NHD, logsumexp_NH (float64); float32 tensors, here and below
    attend_packed_backward(the same arguments, out_NHD, logsumexp_NH, grad_NHD) -> grad_query, grad_key, grad_value
    rms_norm_forward(x_ND, weight_D, eps, threads) -> out_ND, inverse_N
    rms_norm_backward(x_ND, weight_D, inverse_N, grad_ND, threads) -> grad_x_ND, grad_weight_D
    silu_mul_forward(gate, up, threads) -> out
    silu_mul_backward(gate, up, grad, threads) -> grad_gate, grad_up
    decoder(network) -> step(tokens_N int64, starts_S1, slots_S, positions_S, caches, threads)
             -> logits_SV, a tensor as those of the network and the caches, which are written in place
    sample(logits_RV float32, temperatures_R float32, uniforms_R float64, threads) -> tokens_R, logprobs_R; tensors
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch

TENSOR_OPS = (
    "gae",
    "moments",
    "whiten",
    "logprob_forward",
    "logprob_backward",
    "head_logprob_forward",
    "head_logprob_backward",
    "ppo_loss",
    "value_loss",
    "ppo_head",
)
HOST_OPS = (
    *("pack", "delta_encode", "delta_apply", "attend_slots", "attend_packed_forward", "attend_packed_backward"),
    *("rms_norm_forward", "rms_norm_backward", "silu_mul_forward", "silu_mul_backward"),
    *("decoder", "sample"),
)
MODULES = {
    "reference": "orz_async.ops.reference",
    "cpu": "orz_async.ops.cpu",
    "triton": "orz_async.ops.triton",
    "cuda": "orz_async.ops.cuda",
}
HOST_BACKENDS = ("cpu", "reference")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Selection:
    """The modules that serve tensors in host memory, tensors on a GPU, and the host ops."""

    name: str
    cpu: ModuleType
    gpu: ModuleType
    host: ModuleType


def load(name: str) -> ModuleType:
    """Import one backend by name; raise if it is unknown, cannot be imported, or lacks a name on the list."""
    if name not in MODULES:
        raise ValueError(f"ORZ_BACKEND: expected auto or one of {sorted(MODULES)}, found {name!r}")
    module = importlib.import_module(MODULES[name])
    names = TENSOR_OPS + (HOST_OPS if name in HOST_BACKENDS else ())
    if missing := [op for op in names if not hasattr(module, op)]:
        raise ImportError(f"backend {name!r} does not export {missing}")
    return module


def _first_that_loads(*names: str) -> ModuleType:
    for name in names[:-1]:
        try:
            return load(name)
        except ImportError as error:
            log.warning("backend %r is not used: %s; trying the next of %s", name, error, names)
    return load(names[-1])


def choose(name: str) -> Selection:
    """A named backend loads or raises; `auto` takes the fastest that loads and logs what it passed over."""
    host = load(name) if name in HOST_BACKENDS else _first_that_loads(*HOST_BACKENDS)
    if name != "auto":
        module = load(name)
        return Selection(name, cpu=module, gpu=module, host=host)
    gpu = _first_that_loads("cuda", "triton", "reference") if torch.cuda.is_available() else load("reference")
    return Selection(name, cpu=host, gpu=gpu, host=host)


_selection = choose(os.environ.get("ORZ_BACKEND", "auto"))


def selected() -> Selection:
    return _selection


def for_tensor(x: torch.Tensor) -> ModuleType:
    """The backend that serves tensors on the device of `x`."""
    return _selection.gpu if x.is_cuda else _selection.cpu


@contextmanager
def using(name: str) -> Iterator[Selection]:
    """Another backend for the length of a `with` block: for tests and benchmarks that compare two."""
    global _selection
    before, _selection = _selection, choose(name)
    try:
        yield _selection
    finally:
        _selection = before
