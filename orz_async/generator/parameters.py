"""Which tensor is which of a model's: what both engines ask before they serve anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from orz_async.errors import EngineError

if TYPE_CHECKING:
    from torch import Tensor, nn


def served_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What has to travel: parameters and persistent buffers, a tied one once, under its first name."""
    persistent = model.state_dict(keep_vars=True)
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    return dict(model.named_parameters()) | buffers


def match_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensor of each of `served_tensors`, by its name there; the values of the model are not read.

    Tied parameters may come under any of their names. EngineError, naming the tensor, if one is missing, unknown, of
    another shape or kind, or not finite.
    """
    import torch

    parameters = served_tensors(model)
    first_name = {id(parameter): name for name, parameter in parameters.items()}
    aliases = {
        name: first_name[id(tensor)]
        for name, tensor in (
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        )
        if id(tensor) in first_name
    }
    given: dict[str, Tensor] = {}
    for alias, tensor in tensors.items():
        name = aliases.get(alias)
        if name is None:
            raise EngineError(
                f"unexpected tensor {alias!r}: the model has no parameter or persistent buffer of that name"
            )
        if tensor.shape != parameters[name].shape:
            raise EngineError(
                f"tensor {alias!r}: expected shape {tuple(parameters[name].shape)}, found {tuple(tensor.shape)}"
            )
        if tensor.is_floating_point() != parameters[name].is_floating_point():
            raise EngineError(f"tensor {alias!r}: expected {parameters[name].dtype}, found {tensor.dtype}")
        if not bool(torch.isfinite(tensor).all()):
            raise EngineError(f"tensor {alias!r} ({tensor.dtype}) has values that are not finite numbers")
        if name in given and not torch.equal(given[name], tensor):
            raise EngineError(f"tensor {alias!r} differs from the one it is tied to, {name!r}")
        given[name] = tensor
    if missing := [name for name in parameters if name not in given]:
        raise EngineError(f"{len(missing)} of {len(parameters)} tensors are missing, first {missing[0]!r}")
    return given
