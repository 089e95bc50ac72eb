"""Sharded tensors into safetensors files of rank 0, tensor by tensor, and none of them whole anywhere.

FSDP2 shards the first dimension, so a tensor's bytes are those of its shards one after the other: rank 0 writes its
own, then each other's as it arrives. Beside its shards it holds one shard of one tensor, the others nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from orz_async.learner.parallel import World

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.uint8: "U8",
}


class TensorFiles:
    """Files that all ranks write together. A disk that fails ends nothing at once: rank 0 takes the rest and drops it,
    so that nobody waits in vain, and `check` raises what happened."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._error: OSError | None = None

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Rank 0: what touches the disk; the first OSError is kept for `check`."""
        try:
            yield
        except OSError as error:
            self._error = self._error or error

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    def write(
        self,
        path: Path,
        tensors: Sequence[tuple[str, Tensor]],
        *,
        dtype: torch.dtype | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """All ranks, with the same names in the same order; `dtype` other than the tensors' casts them on the way."""
        with ExitStack() as stack:
            file = None
            if self.world.is_first and self._error is None:
                with self.attempt():
                    file = stack.enter_context(path.open("wb"))
                    file.write(header([(n, dtype or t.dtype, tuple(t.shape)) for n, t in tensors], metadata or {}))
            for _, tensor in tensors:
                for part in self.world.shards(tensor):
                    if file is not None and self._error is None:
                        with self.attempt():
                            file.write(_bytes(part.to("cpu", dtype or part.dtype)))
                    del part
            if file is not None:
                with self.attempt():
                    file.close()


def header(entries: Sequence[tuple[str, torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """What a safetensors file begins with: the length of a JSON object, and the object: dtype, shape and place of each
    tensor in the bytes that follow. Padded with blanks, so that these begin at a multiple of 8."""
    told: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, dtype, shape in entries:
        start, end = end, end + dtype.itemsize * math.prod(shape)
        told[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": (start, end)}
    encoded = msgspec.json.encode(told)
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


def _bytes(tensor: Tensor) -> memoryview:
    """Its own memory, not a copy."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
