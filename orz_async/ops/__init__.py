"""The numeric ops of PPO, one name each, whatever computes them (`ORZ_BACKEND=auto|reference|cpu|triton|cuda`).

consumes  packed tensors: log-probs, advantages, values, hidden states; lengths; versions of a weight tensor
produces  losses with gradients and statistics, advantages, microbatches, deltas

`reference/` is the specification; `backend.py` chooses the implementation once, at import.
"""

from __future__ import annotations

from orz_async.ops.advantage import gae, merge_moments, moments, whiten
from orz_async.ops.attention import attend_packed, attend_slots
from orz_async.ops.decoding import Decoder
from orz_async.ops.delta import delta_apply, delta_encode
from orz_async.ops.layers import rms_norm, silu_mul
from orz_async.ops.logprobs import head_logprob, logprob
from orz_async.ops.losses import ppo_head, ppo_loss, value_loss
from orz_async.ops.network import Layer, Linear, Network
from orz_async.ops.packing import pack
from orz_async.ops.sampling import sample
from orz_async.ops.sequences import Sequences
from orz_async.ops.stats import PpoHeadOutput, PpoStats, ValueStats

__all__ = [
    "Decoder",
    "Layer",
    "Linear",
    "Network",
    "PpoHeadOutput",
    "PpoStats",
    "Sequences",
    "ValueStats",
    "attend_packed",
    "attend_slots",
    "delta_apply",
    "delta_encode",
    "gae",
    "head_logprob",
    "logprob",
    "merge_moments",
    "moments",
    "pack",
    "ppo_head",
    "ppo_loss",
    "rms_norm",
    "silu_mul",
    "sample",
    "value_loss",
    "whiten",
]
