"""One version on its way into vLLM's processes: a file in memory that each worker maps and takes its part of."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from orz_async.errors import DiskError

if TYPE_CHECKING:
    from torch import Tensor

_MEMORY = Path("/dev/shm")


def served_path(path: str, worker: int) -> Path:
    """Where a worker says what it serves, beside the file that it loaded."""
    return Path(path).with_name(f"served-{worker}.json")


class WeightFile:
    """At most one file exists at a time; it is this user's alone to read, and gone when the engine has taken it."""

    def __init__(self) -> None:
        self._directory: Path | None = None

    def write(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], str]:
        """What the workers are told, with the checksum of every tensor, and the digest of the whole."""
        from safetensors.torch import save_file

        from orz_async.weights.snapshot import digest_of, spec_of

        state = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        specs = [spec_of(name, tensor) for name, tensor in state.items()]
        self.remove()
        self._directory = Path(tempfile.mkdtemp(prefix="orz-weights-", dir=_MEMORY if _MEMORY.is_dir() else None))
        path = self._directory / "version.safetensors"
        try:
            save_file(state, path)
        except OSError as error:
            size = sum(spec.num_bytes for spec in specs)
            raise DiskError(
                f"expected {size} bytes free in {self._directory} for the weights on their way, found: {error}; "
                "enlarge /dev/shm, or set TMPDIR where there is none"
            ) from error
        return {"path": str(path), "checksums": {spec.name: spec.checksum for spec in specs}}, digest_of(specs)

    def served(self) -> list[dict[str, int]]:
        """Of each worker that has loaded the file: CRC-32C by tensor, of those that can be read where they serve."""
        assert self._directory is not None
        return [msgspec.json.decode(one.read_bytes(), type=dict[str, int]) for one in self._directory.glob("served-*")]

    def remove(self) -> None:
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None
