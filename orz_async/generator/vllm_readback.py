"""What a loaded model of vLLM serves, tensor by tensor, as far as it can be read in the form in which it was sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from orz_async.weights.snapshot import tensor_bytes, tensor_checksum


def served_checksums(
    model: nn.Module, sent: Mapping[str, Tensor], checksums: Mapping[str, int], packed: Mapping[str, Sequence[str]]
) -> dict[str, int]:
    """CRC-32C of the bytes that serve each tensor of `sent`, whose own are `checksums`.

    packed: which parts a fused layer has, in order, as in {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}. A tensor that
    serves in another form is left out: packed for a CPU, split over devices, of another kind of number.
    """
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    found: dict[str, int] = {}
    for name, tensor in sent.items():
        served = _where(name, held, sent, packed)
        if served is None or served.dtype != tensor.dtype:
            continue
        # Compared where it lies: only what differs is worth the way to the CPU.
        same = torch.equal(_bits(served), _bits(tensor.to(served.device)))
        found[name] = checksums[name] if same else tensor_checksum(tensor_bytes(served.cpu().contiguous()))
    return found


def _where(
    name: str, held: Mapping[str, Tensor], sent: Mapping[str, Tensor], packed: Mapping[str, Sequence[str]]
) -> Tensor | None:
    shape = sent[name].shape
    if (whole := held.get(name)) is not None:
        # A vocabulary may be padded with rows that no token reads.
        is_padded = whole.dim() == len(shape) and whole.shape[1:] == shape[1:] and whole.shape[:1] >= shape[:1]
        return (whole[: shape[0]] if len(shape) else whole) if is_padded else None
    for fused, parts in packed.items():
        for index, part in enumerate(parts):
            whole = held.get(name.replace(f".{part}.", f".{fused}.")) if f".{part}." in name else None
            pieces = [sent.get(name.replace(f".{part}.", f".{other}.")) for other in parts]
            if whole is None or any(piece is None for piece in pieces):
                continue
            rows = [len(piece) for piece in pieces if piece is not None]
            if whole.shape == (sum(rows), *shape[1:]):
                return whole.narrow(0, sum(rows[:index]), rows[index])
    return None


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
