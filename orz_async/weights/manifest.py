"""A manifest comes from outside: nothing is allocated for it before `check` has passed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orz_async.errors import WireError
from orz_async.weights.snapshot import ITEM_BYTES, TensorSpec, digest_of
from orz_async.weights.wire import Entry, Manifest

MAX_CHUNK_BYTES = 16 << 20
MAX_SEGMENT_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a fetcher is willing to receive."""

    max_bytes: int = 256 << 30
    """Of all tensors together; memory is touched only as their bytes arrive."""
    max_tensors: int = 100_000
    max_dimensions: int = 8
    max_name_bytes: int = 512


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise WireError(f"refused a manifest: {message}")


def check(manifest: Manifest, *, limits: Limits) -> None:
    """Raise WireError unless the manifest is complete, consistent and within the limits."""
    _require(manifest.version >= 0, f"version {manifest.version}")
    _require(
        (manifest.base_version == -1) == (manifest.base_digest == ""),
        f"base version {manifest.base_version} goes with base digest {manifest.base_digest[:16]!r}",
    )
    chunk, segment = manifest.chunk_bytes, manifest.segment_bytes
    _require(0 < chunk <= MAX_CHUNK_BYTES, f"expected chunk_bytes from 1 to {MAX_CHUNK_BYTES}, got {chunk}")
    _require(
        0 < segment <= MAX_SEGMENT_BYTES and segment % 8 == 0,
        f"expected segment_bytes to be a multiple of 8 up to {MAX_SEGMENT_BYTES}, got {segment}",
    )
    check_specs([entry.spec for entry in manifest.entries], manifest.digest, limits)
    payload_bytes = sum(_check_blocks(entry, manifest) for entry in manifest.entries)
    _require(
        payload_bytes == manifest.payload_bytes,
        f"its blocks take {payload_bytes} bytes, but it announces {manifest.payload_bytes}",
    )


def check_specs(specs: Sequence[TensorSpec], digest: str, limits: Limits) -> int:
    """Total bytes of the tensors. Raises WireError unless they are sound, within the limits, and have this digest."""
    _require(0 < len(specs) <= limits.max_tensors, f"expected 1 to {limits.max_tensors} tensors, got {len(specs)}")
    total = 0
    names: set[str] = set()
    for spec in specs:
        name_bytes = len(spec.name.encode())
        _require(0 < name_bytes <= limits.max_name_bytes, f"a tensor's name has {name_bytes} bytes")
        where = f"tensor {spec.name!r}"
        _require(spec.name not in names, f"{where} is named twice")
        names.add(spec.name)
        _require(spec.dtype in ITEM_BYTES, f"{where}: dtype {spec.dtype[:32]!r} is not among {', '.join(ITEM_BYTES)}")
        _require(
            len(spec.shape) <= limits.max_dimensions and all(0 <= size <= limits.max_bytes for size in spec.shape),
            f"{where}: shape of {len(spec.shape)} dimensions, the least {min(spec.shape, default=0)}",
        )
        _require(0 <= spec.checksum < 1 << 32, f"{where}: checksum {spec.checksum} is not one of 32 bits")
        total += spec.num_bytes
        _require(
            total <= limits.max_bytes, f"{where}: the tensors up to it are over the limit of {limits.max_bytes} bytes"
        )
    found = digest_of(specs)
    _require(found == digest, f"its tensors have digest {found}, but it announces {digest[:16]!r}")
    return total


def _check_blocks(entry: Entry, manifest: Manifest) -> int:
    """Payload bytes of one tensor."""
    where, num_bytes, segment = f"tensor {entry.spec.name!r}", entry.spec.num_bytes, manifest.segment_bytes
    num_blocks = -(-num_bytes // segment)
    _require(len(entry.blocks) == num_blocks, f"{where}: expected {num_blocks} blocks, got {len(entry.blocks)}")
    total = 0
    for index, block in enumerate(entry.blocks):
        length = min(segment, num_bytes - index * segment)
        sound = {"same": block.bytes == 0, "full": block.bytes == length, "delta": 0 < block.bytes < length}
        _require(sound[block.form], f"{where}: a {block.form} block of {block.bytes} bytes for {length}")
        _require(block.form == "full" or manifest.base_digest != "", f"{where}: a {block.form} block without a base")
        total += block.bytes
    return total
