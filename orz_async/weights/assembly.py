"""Chunks become tensors: the receiving half of a transfer, without sockets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from orz_async.errors import WireError
from orz_async.weights.delta import apply_block
from orz_async.weights.snapshot import State, TensorSpec, tensor_bytes, tensor_checksum
from orz_async.weights.wire import Block, Manifest

if TYPE_CHECKING:
    from torch import Tensor


class DamagedTransfer(WireError):
    """The chunks arrived intact and yet do not make the tensor that was announced."""


@dataclass(slots=True)
class _Open:
    """The tensor being filled."""

    spec: TensorSpec
    blocks: tuple[Block, ...]
    data: memoryview
    tensor: Tensor


class Assembly:
    """Builds one version from a checked manifest, its chunks in order, and the base version if one is named.

    Memory is taken tensor by tensor as their bytes arrive. A tensor that did not change is shared with the base; one
    that did is a new tensor, because the base is still being served.
    """

    def __init__(self, manifest: Manifest, base: State | None) -> None:
        self.manifest = manifest
        self.next_chunk = 0
        self._base = base
        self._base_specs = {spec.name: spec for spec in base.specs} if base is not None else {}
        self._tensors: dict[str, Tensor] = {}
        self._entry = 0
        self._block = 0
        self._open: _Open | None = None
        self._coded = bytearray()  # a delta block, until it is whole
        self._filled = 0  # bytes of the current block received
        self._settle()

    @property
    def complete(self) -> bool:
        return self._entry == len(self.manifest.entries)

    def feed(self, data: memoryview | bytes) -> None:
        """Take the chunk number `next_chunk`."""
        expected = self.manifest.chunk_length(self.next_chunk)
        if len(data) != expected:
            raise DamagedTransfer(f"expected {expected} bytes in chunk {self.next_chunk}, got {len(data)}")
        rest = memoryview(data)
        while len(rest):
            rest = self._take(rest)
            self._settle()
        self.next_chunk += 1

    def state(self) -> State:
        assert self.complete
        manifest = self.manifest
        specs = tuple(entry.spec for entry in manifest.entries)
        return State(manifest.version, manifest.digest, specs, {spec.name: self._tensors[spec.name] for spec in specs})

    def _take(self, rest: memoryview) -> memoryview:
        """Move the beginning of `rest` into the current block; the tail goes to the next one."""
        assert self._open is not None
        block = self._open.blocks[self._block]
        part = rest[: block.bytes - self._filled]
        if block.form == "delta":
            self._coded += part
        else:
            start = self._block * self.manifest.segment_bytes + self._filled
            self._open.data[start : start + len(part)] = part
        self._filled += len(part)
        return rest[len(part) :]

    def _settle(self) -> None:
        """Close every block and tensor that needs no further byte, and open the one that does."""
        while not self.complete:
            if self._open is None:
                self._open = self._begin()
            blocks = self._open.blocks
            while self._block < len(blocks) and self._filled == blocks[self._block].bytes:
                if blocks[self._block].form == "delta":
                    self._decode_delta(self._open)
                self._block, self._filled = self._block + 1, 0
            if self._block < len(blocks):
                return
            self._finish(self._open)

    def _begin(self) -> _Open:
        import torch

        entry = self.manifest.entries[self._entry]
        spec, forms = entry.spec, {block.form for block in entry.blocks}
        dtype: torch.dtype = getattr(torch, spec.dtype)
        if forms <= {"full"}:
            tensor = torch.empty(spec.shape, dtype=dtype)
        else:
            base = self._base_specs.get(spec.name)
            if self._base is None or base is None or (base.dtype, base.shape) != (spec.dtype, spec.shape):
                raise DamagedTransfer(f"tensor {spec.name!r} builds on one of the same kind, which is not held: {base}")
            tensor = self._base.tensors[spec.name]
            if forms != {"same"}:
                tensor = tensor.clone()
        return _Open(spec, entry.blocks, tensor_bytes(tensor), tensor)

    def _decode_delta(self, opened: _Open) -> None:
        start = self._block * self.manifest.segment_bytes
        segment = opened.data[start : start + self.manifest.segment_bytes]
        try:
            apply_block(segment, opened.spec.dtype, opened.blocks[self._block], self._coded)
        except ValueError as error:
            raise DamagedTransfer(f"tensor {opened.spec.name!r} of version {self.manifest.version}: {error}") from error
        self._coded = bytearray()

    def _finish(self, opened: _Open) -> None:
        spec = opened.spec
        base = self._base_specs.get(spec.name)
        shared = base is not None and self._base is not None and opened.tensor is self._base.tensors[spec.name]
        found = base.checksum if shared and base is not None else tensor_checksum(opened.data)
        if found != spec.checksum:
            raise DamagedTransfer(
                f"tensor {spec.name!r} of version {self.manifest.version}: expected checksum {spec.checksum:08x}, "
                f"found {found:08x}"
            )
        self._tensors[spec.name] = opened.tensor
        self._open = None
        self._entry, self._block, self._filled = self._entry + 1, 0, 0
