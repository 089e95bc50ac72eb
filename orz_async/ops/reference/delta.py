"""Changed words of a tensor between two versions, in numpy. `csrc/cpu/delta.h` writes the same bytes.

Layout, little-endian::

    header  magic "ORZD" | u8 format = 1 | u8 word size | u8 kind | u8 0 | u64 words | u32 crc32c of the old words |
            u32 crc32c of the new words | u64 body size | u32 crc32c of the body | u32 crc32c of the header so far
    kind 0  body = all new words: sent when the changes would not be smaller
    kind 1  body = per block of 65,536 words: u32 changed words, u32 gap bytes;
            then per block: gap bytes; then per block: the new words

A gap byte g < 255 says that g unchanged words lie before the next changed one; 255 says that 255 do, and more follow.
A word counts as changed if its bits are: NaN payloads and signs of zero survive.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orz_async.crc import crc32c_numpy as crc32c

MAGIC = b"ORZD"
FORMAT = 1
FULL, CHANGED = 0, 1
BLOCK_WORDS = 65536
ESCAPE = 255
HEADER = struct.Struct("<4sBBBBQIIQI")
HEADER_BYTES = HEADER.size + 4

Words = NDArray[Any]
"""uint16 or uint32."""


def encode_gaps(positions: NDArray[np.int64]) -> bytes:
    """Positions ascend within one block."""
    gaps = np.diff(positions, prepend=-1) - 1
    escapes = gaps // ESCAPE
    out = np.full(len(gaps) + int(escapes.sum()), ESCAPE, np.uint8)
    out[np.cumsum(escapes + 1) - 1] = gaps % ESCAPE
    return out.tobytes()


def decode_gaps(data: bytes, num_changed: int, num_words: int) -> NDArray[np.int64]:
    """Inverse of `encode_gaps`; raises ValueError unless it names exactly `num_changed` words of the block."""
    gaps = np.frombuffer(data, np.uint8).astype(np.int64)
    is_last = gaps != ESCAPE
    positions: NDArray[np.int64] = np.cumsum(gaps + is_last)[is_last] - 1
    if len(positions) != num_changed or (len(gaps) and not is_last[-1]):
        raise ValueError(f"payload: expected {num_changed} changed words in a block, found {len(positions)}")
    if num_changed and positions[-1] >= num_words:
        raise ValueError(f"payload: expected positions below {num_words}, found {positions[-1]}")
    return positions


def delta_encode(new: Words, old: Words, threads: int) -> bytes:
    """One thread whatever `threads` says: the bytes do not depend on it."""
    counts, gaps, values = [], [], []
    for start in range(0, len(new), BLOCK_WORDS):
        block = new[start : start + BLOCK_WORDS]
        positions = np.flatnonzero(block != old[start : start + BLOCK_WORDS])
        gaps.append(encode_gaps(positions))
        values.append(block[positions].tobytes())
        counts.append(struct.pack("<II", len(positions), len(gaps[-1])))
    body, kind = b"".join(counts + gaps + values), CHANGED
    if len(body) >= new.nbytes:
        body, kind = new.tobytes(), FULL
    head = HEADER.pack(
        *(MAGIC, FORMAT, new.itemsize, kind, 0, len(new), crc32c(old), crc32c(new), len(body), crc32c(body))
    )
    return head + struct.pack("<I", crc32c(head)) + body


def delta_apply(words: Words, payload: bytes, threads: int) -> None:
    """Patch in place, after everything has been checked on a copy."""
    words[:] = decode(words, payload)


def decode(old: Words, payload: bytes) -> Words:
    """The new words; raises ValueError if anything about the payload or its base is not as it was encoded."""
    if len(payload) < HEADER_BYTES:
        raise ValueError(f"payload: expected at least {HEADER_BYTES} bytes, found {len(payload)}")
    head, (head_crc,) = payload[: HEADER.size], struct.unpack_from("<I", payload, HEADER.size)
    if crc32c(head) != head_crc:
        raise ValueError("payload: expected an intact header, found one whose checksum is wrong")
    magic, version, itemsize, kind, _, num_words, old_crc, new_crc, size, body_crc = HEADER.unpack(head)
    body = payload[HEADER_BYTES:]
    for what, expected, found in (
        ("magic and format", (MAGIC, FORMAT), (magic, version)),
        ("kind", True, kind in (FULL, CHANGED)),
        ("word size", old.itemsize, itemsize),
        ("number of words", len(old), num_words),
        ("body size", size, len(body)),
        ("body checksum", body_crc, crc32c(body)),
    ):
        if expected != found:
            raise ValueError(f"payload: expected {what} {expected}, found {found}")
    if kind == FULL:
        if size != old.nbytes:
            raise ValueError(f"payload: expected {old.nbytes} bytes of words, found {size}")
        new = np.frombuffer(body, old.dtype)
    else:
        if crc32c(old) != old_crc:
            raise ValueError(f"tensor: expected checksum {old_crc:#010x}, the base of this payload, found another")
        new = _patched(old, body)
    if crc32c(new) != new_crc:
        raise ValueError(f"payload: expected a result with checksum {new_crc:#010x}, found {crc32c(new):#010x}")
    return new


def _patched(old: Words, body: bytes) -> Words:
    num_blocks = -(-len(old) // BLOCK_WORDS)
    if len(body) < 8 * num_blocks:
        raise ValueError(f"payload: expected {num_blocks} block headers, found {len(body)} bytes")
    counts = np.frombuffer(body, "<u4", 2 * num_blocks).reshape(-1, 2).astype(np.int64)
    gap_at = 8 * num_blocks
    value_at = gap_at + int(counts[:, 1].sum())
    if (expected := value_at + int(counts[:, 0].sum()) * old.itemsize) != len(body):
        raise ValueError(f"payload: expected a body of {expected} bytes, found {len(body)}")
    new = old.copy()
    for block, (num_changed, gap_bytes) in enumerate(counts.tolist()):
        words = new[block * BLOCK_WORDS : (block + 1) * BLOCK_WORDS]
        positions = decode_gaps(body[gap_at : gap_at + gap_bytes], num_changed, len(words))
        words[positions] = np.frombuffer(body, old.dtype, num_changed, value_at)
        gap_at += gap_bytes
        value_at += num_changed * old.itemsize
    return new
