"""The Triton kernels as a backend, for GPU tensors, or for CPU tensors under TRITON_INTERPRET=1.

float64 goes to the reference: it is the oracle, not a way to train.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from orz_async.ops import reference
from orz_kernels import gae as _gae
from orz_kernels import head_logprob as _head_logprob
from orz_kernels import logprob as _logprob
from orz_kernels import ppo_head as _ppo_head
from orz_kernels import ppo_loss as _ppo_loss
from orz_kernels import value_loss as _value_loss
from orz_kernels import whiten as _whiten

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

Op = Callable[..., Any]


def unless_float64(kernel: Op, wide: Op) -> Op:
    def op(*args: Any) -> Any:
        return (wide if args[0].dtype == torch.float64 else kernel)(*args)

    return op


gae = unless_float64(_gae.gae, reference.gae)
moments = unless_float64(_whiten.moments, reference.moments)
whiten = unless_float64(_whiten.whiten, reference.whiten)
logprob_forward = unless_float64(_logprob.logprob_forward, reference.logprob_forward)
logprob_backward = unless_float64(_logprob.logprob_backward, reference.logprob_backward)
head_logprob_forward = unless_float64(_head_logprob.head_logprob_forward, reference.head_logprob_forward)
head_logprob_backward = unless_float64(_head_logprob.head_logprob_backward, reference.head_logprob_backward)
ppo_loss = unless_float64(_ppo_loss.ppo_loss, reference.ppo_loss)
value_loss = unless_float64(_value_loss.value_loss, reference.value_loss)
ppo_head = unless_float64(_ppo_head.ppo_head, reference.ppo_head)
