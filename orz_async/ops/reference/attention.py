"""Attention of a decode step over a slot cache, row by row, and of a packed batch, sequence by sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from orz_async.ops.sequences import Sequences


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
    out_RHD = torch.empty_like(query_RHD)
    heads, dim = query_RHD.shape[1:]
    kv_heads = key_RKD.shape[1]
    for row, position in enumerate(positions_R.tolist()):
        keys[row, :, position] = key_RKD[row]
        values[row, :, position] = value_RKD[row]
        first = 0 if window is None else max(0, position + 1 - window)
        seen_key, seen_value = (cache[row, :, first : position + 1] for cache in (keys, values))
        query = query_RHD[row].view(kv_heads, heads // kv_heads, dim).double() * scale
        scores = query @ seen_key.double().transpose(1, 2)
        weights = torch.softmax((scores - scores.amax(-1, keepdim=True)).float(), dim=-1)
        out_RHD[row] = (weights @ seen_value).view(heads, dim)
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
    for rows_L, owned in sequences.each():
        queries = rows_L[owned:]
        scores = _scores(query_NHD[queries], key_NKD[rows_L], owned, scale, window)
        # Differences to the largest need no more than the dtype of the rest.
        weights = (scores - scores.amax(-1, keepdim=True)).to(query_NHD.dtype).softmax(-1)
        out_NHD[queries] = (weights @ _spread(value_NKD[rows_L], query_NHD.shape[1])).transpose(0, 1)
        logsumexp_NH[queries] = scores.logsumexp(-1).T
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
    grad_query, grad_key, grad_value = map(torch.zeros_like, (query_NHD, key_NKD, value_NKD))
    heads, kv_heads = query_NHD.shape[1], key_NKD.shape[1]
    for rows_L, owned in sequences.each():
        queries = rows_L[owned:]
        query_HQD, grad_HQD = query_NHD[queries].transpose(0, 1), grad_NHD[queries].transpose(0, 1)
        key_HLD, value_HLD = _spread(key_NKD[rows_L], heads), _spread(value_NKD[rows_L], heads)
        scores = _scores(query_NHD[queries], key_NKD[rows_L], owned, scale, window)
        weights = (scores - logsumexp_NH[queries].T[:, :, None]).to(query_NHD.dtype).exp()
        delta_HQ1 = (grad_HQD * out_NHD[queries].transpose(0, 1)).sum(-1, keepdim=True)
        slopes = weights * (grad_HQD @ value_HLD.transpose(1, 2) - delta_HQ1) * scale
        grad_query[queries] = (slopes @ key_HLD).transpose(0, 1)
        for grad, spread_HLD in (
            (grad_key, slopes.transpose(1, 2) @ query_HQD),
            (grad_value, weights.transpose(1, 2) @ grad_HQD),
        ):
            shared_KGLD = spread_HLD.view(kv_heads, heads // kv_heads, *spread_HLD.shape[1:])
            grad.index_add_(0, rows_L, shared_KGLD.sum(1).transpose(0, 1))
    return grad_query, grad_key, grad_value


def _scores(query_QHD: Tensor, key_LKD: Tensor, owned: int, scale: float, window: int | None) -> Tensor:
    """float64 [H, Q, L], -inf where query owned + q may not look."""
    key_HLD = _spread(key_LKD, query_QHD.shape[1])
    scores = query_QHD.transpose(0, 1).double() * scale @ key_HLD.double().transpose(1, 2)
    behind_QL = torch.arange(owned, len(key_LKD))[:, None] - torch.arange(len(key_LKD))
    hidden_QL = behind_QL < 0 if window is None else (behind_QL < 0) | (behind_QL >= window)
    return scores.masked_fill_(hidden_QL, -torch.inf)


def _spread(x_LKD: Tensor, heads: int) -> Tensor:
    """[H, L, D]: each key head for all query heads that share it."""
    return x_LKD.transpose(0, 1).repeat_interleave(heads // x_LKD.shape[1], 0)
