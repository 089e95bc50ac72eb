"""One query a sequence over the keys and values of a slot cache: what a decode step of the embedded engine computes."""

from __future__ import annotations

import torch
from torch import Tensor

from orz_async.ops import backend, checks


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
