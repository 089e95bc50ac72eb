"""Every numeric op in plain torch and numpy: the specification that the faster backends are held to.

consumes  checked tensors and numbers (the contract is in `orz_async.ops.backend`)
produces  tensors; runs on any device, in float64 too, where it is the oracle of itself and of the others
"""

from __future__ import annotations

from orz_async.ops.reference.advantage import gae, moments, whiten
from orz_async.ops.reference.attention import attend_packed_backward, attend_packed_forward, attend_slots
from orz_async.ops.reference.decoding import decoder
from orz_async.ops.reference.delta import delta_apply, delta_encode
from orz_async.ops.reference.head import (
    head_logprob_backward,
    head_logprob_forward,
    logprob_backward,
    logprob_forward,
    ppo_head,
)
from orz_async.ops.reference.layers import (
    rms_norm_backward,
    rms_norm_forward,
    silu_mul_backward,
    silu_mul_forward,
)
from orz_async.ops.reference.loss import ppo_loss, value_loss
from orz_async.ops.reference.packing import pack
from orz_async.ops.reference.sampling import sample

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
