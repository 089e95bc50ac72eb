"""Causal attention in host memory: of a decode step over a slot cache (engine), of whole packed sequences (learner)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from orz_async.ops import backend, checks
from orz_async.ops.sequences import Sequences


def attend_slots(
    query_RHD: Tensor,
    key_RKD: Tensor,
    value_RKD: Tensor,
    keys: Tensor,
    values: Tensor,
    positions_R: Tensor,
    *,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """softmax(scale q K^T) V for the newest token of each row: [R, H, D], float32, in host memory.

    `keys`, `values` [slots, K, tokens, D] are the cache: key and value of row r are written to slot r at its position
    (int64 [R]), which then sees the positions up to its own, or the last `window` of them. H is a multiple of K; query
    heads that share a key head follow each other. Scores are summed in float64. A row's bits depend on nothing but its
    own slot; what is not finite in it makes that row not finite.
    """
    rows, heads, dim = query_RHD.shape
    shape = (rows, keys.shape[1], dim)
    checks.require(key_RKD.shape == value_RKD.shape == shape, "key and value", f"shape {shape}", tuple(key_RKD.shape))
    checks.require(keys.shape == values.shape and keys.shape[3] == dim, "cache", f"heads of {dim}", tuple(keys.shape))
    checks.require(rows <= len(keys) and heads % shape[1] == 0, "query", "rows of the cache", tuple(query_RHD.shape))
    checks.require(
        all(x.dtype == torch.float32 and x.device.type == "cpu" for x in (query_RHD, key_RKD, value_RKD, keys, values)),
        "query, key, value and cache",
        "float32 in host memory",
        f"{query_RHD.dtype} on {query_RHD.device}",
    )
    made: Tensor = backend.selected().host.attend_slots(
        query_RHD, key_RKD, value_RKD, keys, values, positions_R, scale, window, torch.get_num_threads()
    )
    return made


class _Attend(torch.autograd.Function):
    """The products of queries and keys are summed in float64, everything else is float32.

    Scores of a trained model may be 50 or more: float32 knows such a sum to 1e-6 or 1e-5, and engine and learner, which
    sum in another order, then differ by as much in a log-prob. This halves the difference or better.
    """

    @staticmethod
    def forward(ctx: Any, query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, *how: Any) -> Tensor:
        out_NHD, logsumexp_NH = backend.selected().host.attend_packed_forward(query_NHD, key_NKD, value_NKD, *how)
        ctx.save_for_backward(query_NHD, key_NKD, value_NKD, out_NHD, logsumexp_NH)
        ctx.how = how
        made: Tensor = out_NHD
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NHD: Tensor) -> Any:
        query_NHD, key_NKD, value_NKD, out_NHD, logsumexp_NH = ctx.saved_tensors
        gradients = backend.selected().host.attend_packed_backward(
            query_NHD, key_NKD, value_NKD, *ctx.how, out_NHD, logsumexp_NH, grad_NHD.contiguous()
        )
        return *gradients, None, None, None, None


def attend_packed(
    query_NHD: Tensor,
    key_NKD: Tensor,
    value_NKD: Tensor,
    sequences: Sequences,
    *,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """softmax(scale Q K^T) V, causal within each sequence: [N, H, D], float32, in host memory; differentiable.

    A position sees those of its sequence up to its own, or the last `window` of them. H is a multiple of K; query heads
    that share a key head follow each other. A row that sequences share is a query once: it sees the same rows in each.
    Holds no matrix of scores: backward makes them a second time. The bits depend on no number of threads.
    """
    rows, heads, dim = query_NHD.shape
    for name, x in (("query_NHD", query_NHD), ("key_NKD", key_NKD), ("value_NKD", value_NKD)):
        checks.tensor(name, x, [rows, None, dim], [torch.float32])
        checks.require(x.device.type == "cpu", name, "host memory", x.device)
    kv_heads = key_NKD.shape[1]
    checks.require(value_NKD.shape[1] == kv_heads, "value_NKD", f"{kv_heads} heads", value_NKD.shape[1])
    checks.require(heads % kv_heads == 0, "query_NHD", f"a multiple of {kv_heads} heads", heads)
    checks.require(sequences.num_rows == rows, "sequences", f"{rows} rows", sequences.num_rows)
    checks.require(window is None or window >= 1, "window", "at least 1, or None", window)
    made: Tensor = _Attend.apply(  # type: ignore[no-untyped-call]
        query_NHD, key_NKD, value_NKD, sequences, float(scale), window, torch.get_num_threads()
    )
    return made
