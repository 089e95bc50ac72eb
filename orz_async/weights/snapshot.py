"""The state of a policy as bytes: specifications, checksums and the digest that names it.

digest = CRC-32C over (name, dtype, shape, CRC-32C of the little-endian bytes) of every tensor, sorted by name. Tied
tensors count once, under the name `model.named_parameters()` gives them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from orz_async.crc import crc32c

if TYPE_CHECKING:
    from torch import Tensor

    from orz_async.weights.protocol import Snapshot

ITEM_BYTES = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
}
"""Every dtype that may travel. bool is not among them: bytes other than 0 and 1 in one are undefined behaviour."""


class TensorSpec(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """One tensor without its values."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    checksum: int
    """CRC-32C of its bytes."""

    @property
    def num_bytes(self) -> int:
        count = ITEM_BYTES[self.dtype]
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """One version in CPU memory that nobody writes to."""

    version: int
    digest: str
    specs: tuple[TensorSpec, ...]
    tensors: dict[str, Tensor]

    @property
    def num_bytes(self) -> int:
        return sum(spec.num_bytes for spec in self.specs)


def tensor_checksum(data: Any) -> int:
    """CRC-32C of a contiguous bytes-like object."""
    return crc32c(data)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, writable and without a copy."""
    import torch

    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(f"expected a contiguous CPU tensor, got {tensor.device.type} with strides {tensor.stride()}")
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def dtype_name(tensor: Tensor) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in ITEM_BYTES:
        raise ValueError(f"expected a dtype among {', '.join(ITEM_BYTES)}, got {name}")
    return name


def spec_of(name: str, tensor: Tensor) -> TensorSpec:
    return TensorSpec(name, dtype_name(tensor), tuple(tensor.shape), tensor_checksum(tensor_bytes(tensor)))


def digest_of(specs: Sequence[TensorSpec]) -> str:
    """Eight hexadecimal digits that name the state these tensors make up, whatever their order."""
    return f"{crc32c(msgspec.msgpack.encode(sorted(specs, key=lambda spec: spec.name))):08x}"


def state_digest(named: Mapping[str, Tensor]) -> str:
    """Digest of tensors on any device: what an engine reports about the weights it serves."""
    return digest_of([spec_of(name, tensor.detach().cpu().contiguous()) for name, tensor in named.items()])


def blame(snapshot: Snapshot) -> str:
    """Why an engine that was given this serves something else: the tensor that was damaged since, if one was."""
    for expected in snapshot.specs:
        found = spec_of(expected.name, snapshot.tensors[expected.name])
        if found != expected:
            return (
                f"tensor {expected.name!r} had checksum {expected.checksum:08x} when it arrived and has "
                f"{found.checksum:08x} now: this machine's memory was overwritten"
            )
    return (
        "its tensors are sound, so the engine holds others than it was given; give learner and generator the same "
        "model directory"
    )


def capture(version: int, named: Iterable[tuple[str, Tensor]]) -> State:
    """Copy tensors to the CPU, one at a time, so that a generator of gathered shards holds one group at once."""
    import torch

    tensors: dict[str, Tensor] = {}
    specs: list[TensorSpec] = []
    for name, tensor in named:
        if name in tensors:
            raise ValueError(f"tensor {name!r} is published twice")
        copy = torch.empty(tensor.shape, dtype=tensor.dtype)
        copy.copy_(tensor.detach())
        tensors[name] = copy
        specs.append(spec_of(name, copy))
    if not tensors:
        raise ValueError(f"expected at least one tensor in version {version}, got none")
    return State(version, digest_of(specs), tuple(specs), tensors)
