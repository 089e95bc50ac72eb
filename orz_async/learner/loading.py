"""Base weights into modules that were built without any: tensor by tensor, and of each only what this rank owns.

A model is built on the meta device (names and shapes, no memory), sharded there, and given memory for its shards only.
Then each rank reads its rows straight out of the memory-mapped safetensors files. So no rank ever holds a whole model,
and at any time at most one rank's part of one tensor in the dtype of the file beside it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import AutoConfig, AutoModelForCausalLM

from orz_async.errors import ModelError
from orz_async.learner import attention
from orz_async.learner.hf_directory import ModelDirectory

_IGNORED = ("inv_freq", "lm_head.weight")
"""Endings of tensors that files may hold beyond what the model needs: old rotary buffers, a head that is tied."""


def meta_causal_lm(directory: ModelDirectory) -> nn.Module:
    """The causal LM of config.json: parameters on the meta device in float32, buffers (rotary tables) real, on CPU.

    Nothing in the directory is executed. ModelError where transformers cannot build it.
    """
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        config = AutoConfig.from_pretrained(directory.path, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            causal_lm: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=torch.float32, attn_implementation=attention.NAME, trust_remote_code=False
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"{directory.path}: expected a config.json that builds a model, found: {error}") from error
    for module in causal_lm.modules():
        buffers = {name: b for name, b in module._buffers.items() if b is not None and b.is_meta}
        for name, buffer in buffers.items():
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
        if buffers:
            # Fills the buffers; for parameters, which have no memory yet, it does nothing.
            causal_lm._init_weights(module)
    return causal_lm  # type: ignore[no-any-return]


def materialise(module: nn.Module, device: torch.device) -> None:
    """Give meta parameters memory on `device`, with undefined values; move everything else there as it is."""
    if not any(p.is_meta for p in module.parameters()):
        module.to(device)
        return
    owners: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                owners[id(parameter)].append((part, name))
    buffers = [(part, name, b) for part in module.modules() for name, b in part._buffers.items() if b is not None]
    module.to_empty(device=device)
    for part, name, buffer in buffers:
        part._buffers[name] = buffer.to(device)
    for (first, first_name), *others in owners.values():
        for part, name in others:  # tied weights, which to_empty takes apart
            if getattr(part, name) is not getattr(first, first_name):
                setattr(part, name, getattr(first, first_name))


@torch.no_grad()
def load_base(module: nn.Module, directory: ModelDirectory, *, own: Collection[str] = ()) -> None:
    """Fill every parameter of `module` but those named in `own`; ModelError, and nothing read, if one cannot be."""
    parameters = {name: p for name, p in module.named_parameters() if name not in own}
    keys = match(parameters, directory)
    by_file: dict[Path, list[str]] = defaultdict(list)
    for name, key in keys.items():
        by_file[directory.files[key]].append(name)
    for path, names in by_file.items():
        try:
            with safe_open(path, framework="pt") as file:
                for name in names:
                    copy_slice(parameters[name], file.get_slice(keys[name]))
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path}: expected readable weights, found: {error}; copy the file again") from error


def copy_slice(parameter: Tensor, stored: Any) -> None:
    """The part of a stored tensor that this rank owns, cast to the parameter's dtype."""
    if not isinstance(parameter, DTensor):
        parameter.copy_(stored[:])
        return
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    local = parameter.to_local()
    if local.numel():
        local.copy_(stored[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))])


def match(parameters: Mapping[str, Tensor], directory: ModelDirectory) -> dict[str, str]:
    """Parameter name -> its name in the files, which may have been saved without the language model's head."""
    keys, wrong, spare = differences(parameters, directory)
    wrong += [f"{key} belongs to no layer" for key in spare if "layers." in key]
    if wrong:
        told = ", ".join(wrong[:4]) + (f" and {len(wrong) - 4} more" if len(wrong) > 4 else "")
        raise ModelError(
            f"{directory.path}: expected the weights that config.json describes, found other ones: {told}; config and "
            "weights belong to different models, or files are missing"
        )
    return keys


def differences(
    parameters: Mapping[str, Tensor], directory: ModelDirectory
) -> tuple[dict[str, str], list[str], list[str]]:
    """(parameter name -> its name in the files, what is missing or has another shape, names that nobody asked for)."""
    keys: dict[str, str] = {}
    wrong = []
    spare = set(directory.shapes)
    for name, parameter in parameters.items():
        key = next((k for k in (name, name.removeprefix("model.")) if k in directory.shapes), None)
        if key is None:
            wrong.append(f"{name} is missing")
            continue
        spare.discard(key)
        if directory.shapes[key] != tuple(parameter.shape):
            wrong.append(f"{name} has shape {directory.shapes[key]} instead of {tuple(parameter.shape)}")
        else:
            keys[name] = key
    return keys, wrong, sorted(key for key in spare if not key.endswith(_IGNORED))
