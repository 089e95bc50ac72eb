"""CRC-32C (Castagnoli), the checksum of frames, journal records, deltas and tensors.

The C++ core computes it with the processor's own instruction. Without the core, numpy advances 2,048 lanes of the
buffer at once and folds their remainders: the register is linear, so R(A || B) = shift(R(A), len(B)) ^ R(B).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

_POLYNOMIAL = 0x82F63B78  # reflected
_LANES = 2048
_LANE_WORDS = 256  # of 16 bits: 1 MiB a block keeps the lanes in the second-level cache
_BYTEWISE = 4 * _LANES

_U32 = NDArray[np.uint32]


@lru_cache(maxsize=1)
def _word_table() -> _U32:
    """Register after one 16-bit word, for each of its values: uint32 [65536]."""
    table = np.arange(1 << 16, dtype=np.uint32)
    for _ in range(16):
        table = (table >> np.uint32(1)) ^ (np.uint32(_POLYNOMIAL) * (table & np.uint32(1)))
    return table


@lru_cache(maxsize=1)
def _byte_table() -> list[int]:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> np.uint32(1)) ^ (np.uint32(_POLYNOMIAL) * (table & np.uint32(1)))
    return [int(value) for value in table]


def _apply(tables: _U32, register: _U32) -> _U32:
    result: _U32 = tables[0][register & np.uint32(255)]
    for byte in (1, 2, 3):
        result = result ^ tables[byte][(register >> np.uint32(8 * byte)) & np.uint32(255)]
    return result


@lru_cache(maxsize=64)
def _shift(num_bytes: int) -> _U32:
    """The register after `num_bytes` (a power of two) zero bytes, as one table a byte: uint32 [4, 256]."""
    values = np.arange(256, dtype=np.uint32)[None, :] << np.array([[0], [8], [16], [24]], np.uint32)
    if num_bytes == 1:
        table: _U32 = np.array(_byte_table(), np.uint32)
        shifted: _U32 = (values >> np.uint32(8)) ^ table[values & np.uint32(255)]
        return shifted
    half = _shift(num_bytes // 2)
    return _apply(half, _apply(half, values))


def _block(register: int, block: NDArray[np.uint8]) -> int:
    words = block.view("<u2").reshape(_LANES, -1)
    table = _word_table()
    lanes = np.zeros(_LANES, np.uint32)
    for word in np.ascontiguousarray(words.T):
        lanes = (lanes >> np.uint32(16)) ^ table[(lanes & np.uint32(0xFFFF)) ^ word]
    num_bytes = words.shape[1] * 2
    while len(lanes) > 1:
        lanes = _apply(_shift(num_bytes), lanes[0::2]) ^ lanes[1::2]
        num_bytes *= 2
    return int(_apply(_shift(num_bytes), np.array([register], np.uint32))[0] ^ lanes[0])


def crc32c_numpy(data: Any, init: int = 0) -> int:
    """CRC-32C of a bytes-like object; `init` is the checksum of what came before it."""
    rest = np.frombuffer(data, np.uint8)
    register = init ^ 0xFFFFFFFF
    lane_words = _LANE_WORDS
    while len(rest) >= _BYTEWISE:
        size = _LANES * 2 * lane_words
        if len(rest) < size:
            lane_words //= 2
            continue
        register, rest = _block(register, rest[:size]), rest[size:]
    table = _byte_table()
    for value in rest.tobytes():
        register = (register >> 8) ^ table[(register ^ value) & 0xFF]
    return register ^ 0xFFFFFFFF


def _choose() -> Callable[..., int]:
    try:
        native: Callable[..., int] = importlib.import_module("orz_async._C").crc32c
    except (ImportError, AttributeError):
        return crc32c_numpy
    return native


crc32c: Callable[..., int] = _choose()
