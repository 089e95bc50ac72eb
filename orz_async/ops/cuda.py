"""The CUDA C++ kernels as a backend where there are any, the Triton kernels for the rest, in so many words.

Scans and reductions over tokens are C++: one or two launches each. What meets the LM head is Triton and the library's
matrix products.
"""

from __future__ import annotations

from orz_async.ops import reference
from orz_async.ops.triton import (
    head_logprob_backward,
    head_logprob_forward,
    logprob_backward,
    logprob_forward,
    moments,
    ppo_head,
    unless_float64,
    whiten,
)
from orz_kernels import cuda as _cuda

__all__ = [
    "gae",
    "head_logprob_backward",
    "head_logprob_forward",
    "logprob_backward",
    "logprob_forward",
    "moments",
    "ppo_head",
    "ppo_loss",
    "value_loss",
    "whiten",
]

# Raises ImportError here, where a backend is chosen, and not at the first step.
_cuda.library()

gae = unless_float64(_cuda.gae, reference.gae)
ppo_loss = unless_float64(_cuda.ppo_loss, reference.ppo_loss)
value_loss = unless_float64(_cuda.value_loss, reference.value_loss)
