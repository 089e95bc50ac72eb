"""CRC-32C (Castagnoli, polynomial 0x1EDC6F41 reflected) without the extension: numpy, by halving.

zlib.crc32 is another polynomial. The CRC is linear over GF(2): the CRC of a message is the xor of what each byte alone
would give in its place. So long messages are cut into equal rows that run through the table side by side, and the rows
are joined by advancing each over the zeros that follow it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

POLYNOMIAL = 0x82F63B78
ROW_BYTES = 1024


@cache
def _table() -> NDArray[np.uint32]:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(POLYNOMIAL), table >> 1)
    return table


def _advance_matrix(num_bytes: int) -> NDArray[np.uint32]:
    """What each of the 32 bits of a CRC register becomes after `num_bytes` zero bytes."""
    state = np.uint32(1) << np.arange(32, dtype=np.uint32)
    matrix, power = state.copy(), _one_byte()
    while num_bytes:
        if num_bytes & 1:
            matrix = _apply(power, matrix)
        power, num_bytes = _apply(power, power), num_bytes >> 1
    return matrix


def _one_byte() -> NDArray[np.uint32]:
    state = np.uint32(1) << np.arange(32, dtype=np.uint32)
    image: NDArray[np.uint32] = _table()[state & 0xFF] ^ (state >> 8)
    return image


def _apply(matrix: NDArray[np.uint32], states: NDArray[np.uint32]) -> NDArray[np.uint32]:
    bits = (states[:, None] >> np.arange(32, dtype=np.uint32)) & 1
    image: NDArray[np.uint32] = np.bitwise_xor.reduce(np.where(bits != 0, matrix, np.uint32(0)), axis=1)
    return image


def crc32c(data: Any, init: int = 0) -> int:
    """Continue from `init`, the CRC of what came before."""
    octets = np.frombuffer(data, np.uint8)
    state = init ^ 0xFFFFFFFF
    table = _table()
    whole = len(octets) // ROW_BYTES
    if whole > 1:
        rows = octets[: whole * ROW_BYTES].reshape(whole, ROW_BYTES)
        states = np.zeros(whole, np.uint32)
        for column in np.ascontiguousarray(rows.T):
            states = table[(states ^ column) & 0xFF] ^ (states >> 8)
        advance = _advance_matrix(ROW_BYTES)
        for row_state in states.tolist():
            state = int(_apply(advance, np.array([state], np.uint32))[0]) ^ row_state
        octets = octets[whole * ROW_BYTES :]
    for octet in octets.tolist():
        state = int(table[(state ^ octet) & 0xFF]) ^ (state >> 8)
    return state ^ 0xFFFFFFFF
