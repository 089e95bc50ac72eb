"""Norms and gates of known families computed by our ops where the learner runs on a CPU.

Only their `forward` changes, and only for float32 in host memory outside of torch.compile: parameters, names and what a
GPU computes stay those of transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from orz_async import ops

_FAMILIES = ("Qwen2", "Qwen3", "Llama", "Mistral")
"""Those whose norm is weight * x / rms(x), and whose MLP is down(silu(gate) * up). Gemma's are others."""


def fuse(module: nn.Module) -> None:
    """Give every norm and every gated MLP in `module` that we know the forward of this file."""
    for part in module.modules():
        name = type(part).__name__
        if isinstance(part, _Norm | _Mlp):
            continue
        if name in _NORMS:
            part.__class__ = _subclass(_Norm, type(part))
        elif name in _MLPS and type(getattr(part, "act_fn", None)).__name__ in _SILU:
            part.__class__ = _subclass(_Mlp, type(part))


_NORMS = frozenset(f"{family}RMSNorm" for family in _FAMILIES)
_MLPS = frozenset(f"{family}MLP" for family in _FAMILIES)
_SILU = frozenset(("SiLU", "SiLUActivation"))
_made: dict[type, type] = {}


def _subclass(forward: type, of: type) -> type:
    """A class of its own for each class of transformers, which FSDP and copies may take further."""
    return _made.setdefault(of, type(of.__name__, (forward, of), {}))


class _Norm:
    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not _ours(hidden_states, self.weight):
            plain: Tensor = super().forward(hidden_states)  # type: ignore[misc]
            return plain
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        return ops.rms_norm(rows, self.weight, self.variance_epsilon).view(hidden_states.shape)


class _Mlp:
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if _ours(gate, up):
            gated = ops.silu_mul(gate.flatten(0, -2), up.flatten(0, -2)).view(gate.shape)
        else:
            gated = nn.functional.silu(gate) * up
        down: Tensor = self.down_proj(gated)
        return down


def _ours(*tensors: Any) -> bool:
    plain = all(x.device.type == "cpu" and x.dtype == torch.float32 for x in tensors)
    return plain and not torch.compiler.is_compiling()
