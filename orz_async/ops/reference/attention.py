"""Attention of a decode step over a slot cache, row by row."""

from __future__ import annotations

import torch
from torch import Tensor


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
