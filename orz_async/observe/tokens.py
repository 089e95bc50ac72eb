"""Per-token numbers of a few rollouts a step, as the learner saw them: RUN/tokens/tokens-<epoch>.orzt.

Text, rewards and versions of these rollouts are in the journal; here is only what the learner alone knows. One file a
life of the learner, records appended; a step that a later life repeated is taken from the later file.

file      header "ORZT" | u16 layout | u16 zero
record    u32 length of the body | u32 crc32 of the body | body: MessagePack of StepTokens      (all little-endian)
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from orz_async.errors import DiskError

LAYOUT = 1
_HEADER = struct.pack("<4sHH", b"ORZT", LAYOUT, 0)
_RECORD = struct.Struct("<II")
MAX_BODY = 64 << 20
"""A length beyond it is damage, and nothing is allocated for it."""


class StepTokens(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Rollouts of one learner step; the float arrays hold their response tokens one after the other."""

    step: int
    rollouts: bytes
    """int32, rollout numbers."""
    lengths: bytes
    """int32, response tokens of each."""
    values: bytes
    """float32: of the critic before its update."""
    advantages: bytes
    """float32: whitened over the whole step."""
    log_ratios: bytes
    """float32: log-prob of the policy under training minus that of the engine when it sampled."""
    gaps: bytes
    """float32: log-prob of the learner minus that of the engine under equal weights. Not a number: not computed."""

    def columns(self) -> Iterator[tuple[int, dict[str, NDArray[np.float32]]]]:
        """(rollout number, its arrays by name); raises ValueError where the lengths do not fit."""
        lengths = np.frombuffer(self.lengths, "<i4")
        rollouts = np.frombuffer(self.rollouts, "<i4")
        arrays = {
            name: np.frombuffer(getattr(self, name), "<f4") for name in ("values", "advantages", "log_ratios", "gaps")
        }
        if len(lengths) != len(rollouts) or any(len(a) != lengths.sum() for a in arrays.values()) or min(lengths) < 0:
            raise ValueError(f"step {self.step}: arrays of other lengths than they claim")
        ends = np.cumsum(lengths)
        for rollout, length, end in zip(rollouts.tolist(), lengths.tolist(), ends.tolist(), strict=True):
            yield rollout, {name: array[end - length : end] for name, array in arrays.items()}


class TokenLog:
    """Appends; a full disk costs records (`dropped`), never training."""

    def __init__(self, folder: Path, epoch: int) -> None:
        self.dropped = 0
        self._encoder = msgspec.msgpack.Encoder()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"tokens-{epoch:06d}.orzt"
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o644)
            os.write(self._file, _HEADER)
        except OSError as error:
            raise DiskError(
                f"expected a writable folder {folder}, found {error.strerror}; free space or choose another run_dir"
            ) from error

    def append(self, tokens: StepTokens) -> None:
        body = self._encoder.encode(tokens)
        record = _RECORD.pack(len(body), zlib.crc32(body)) + body
        end = os.fstat(self._file).st_size
        try:
            if os.write(self._file, record) == len(record):
                return
            os.ftruncate(self._file, end)  # half a record would hide all that follow it
        except OSError:  # ENOSPC, EDQUOT, EIO
            pass
        self.dropped += 1

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _scan(path: Path) -> Iterator[StepTokens]:
    """The whole records of a file; ends where it is torn or damaged."""
    decoder = msgspec.msgpack.Decoder(StepTokens)
    with path.open("rb") as file:
        if file.read(len(_HEADER)) != _HEADER:
            return
        while len(head := file.read(_RECORD.size)) == _RECORD.size:
            length, crc = _RECORD.unpack(head)
            if not 0 < length <= MAX_BODY or len(body := file.read(length)) < length or zlib.crc32(body) != crc:
                return
            try:
                yield decoder.decode(body)
            except msgspec.DecodeError:
                return


def read_tokens(folder: Path) -> Iterator[StepTokens]:
    """Every step once, in order, from the life that trained it last."""
    files = sorted(folder.glob("tokens-*.orzt"))
    beginnings = [next((tokens.step for tokens in _scan(path)), None) for path in files]
    for index, path in enumerate(files):
        repeated_from = min((step for step in beginnings[index + 1 :] if step is not None), default=None)
        for tokens in _scan(path):
            if repeated_from is None or tokens.step < repeated_from:
                yield tokens
