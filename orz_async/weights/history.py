"""How to get from the newest version back to earlier ones, kept as small as the changes were.

A generator that lags by k versions is served one merged delta: the changes it has to see, each word once. For that
the publisher needs the bits of the version k back. Keeping that version whole costs a copy of the model for each k;
keeping the reverse delta of each step costs what the step changed, and segment by segment the old version is rebuilt
from the newest one when somebody asks for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from orz_async.weights.delta import apply_block, encode_block
from orz_async.weights.payload import segments
from orz_async.weights.snapshot import State, TensorSpec, tensor_bytes
from orz_async.weights.wire import Block

_PROBE_TENSORS = 8
_PROBE_BYTES = 64 << 10
_PROBE_WORTH = 0.8


@dataclass(slots=True)
class BackStep:
    """The version before, as changes to the one after it."""

    version: int
    digest: str
    blocks: dict[tuple[str, int], tuple[Block, memoryview]] = field(default_factory=dict)
    """By tensor name and segment; absent where nothing changed."""
    num_bytes: int = 0

    def add(self, name: str, index: int, block: Block, piece: memoryview) -> None:
        self.blocks[name, index] = (block, piece)
        self.num_bytes += len(piece)


class History:
    """Back steps from the newest version, at most `max_steps` and at most `max_bytes` together."""

    def __init__(self, *, max_steps: int) -> None:
        self._max_steps = max_steps
        self._steps: list[BackStep] = []  # newest first

    def __len__(self) -> int:
        return len(self._steps)

    def push(self, step: BackStep, max_bytes: int) -> None:
        self._steps.insert(0, step)
        while len(self._steps) > self._max_steps or sum(one.num_bytes for one in self._steps) > max_bytes:
            self._steps.pop()

    def clear(self) -> None:
        self._steps.clear()

    def path(self, digest: str) -> tuple[BackStep, ...]:
        """Steps from the newest version back to the one with this digest; () if it is not remembered."""
        for depth, step in enumerate(self._steps, 1):
            if step.digest == digest:
                return tuple(self._steps[:depth])
        return ()


def rebuild(newest: memoryview, path: Sequence[BackStep], spec: TensorSpec, index: int) -> memoryview:
    """Segment `index` of a tensor as it was at the end of `path`."""
    segment = memoryview(bytearray(newest))
    for step in path:
        if (spec.name, index) in step.blocks:
            block, piece = step.blocks[spec.name, index]
            apply_block(segment, spec.dtype, block, piece)
    return segment


def same_kind(new: State, old: State) -> bool:
    """The tensors differ in nothing but their values."""
    return [(spec.name, spec.dtype, spec.shape) for spec in new.specs] == [
        (spec.name, spec.dtype, spec.shape) for spec in old.specs
    ]


def worth_coding(new: State, old: State) -> bool:
    """Code samples of the largest tensors; where almost every word changed, as in fp32, coding them all is a waste."""
    largest = sorted(new.specs, key=lambda spec: spec.num_bytes, reverse=True)[:_PROBE_TENSORS]
    sampled = coded = 0
    for spec in largest:
        parts = segments(tensor_bytes(new.tensors[spec.name]), _PROBE_BYTES)
        index = len(parts) // 2
        if not parts:
            continue
        before = segments(tensor_bytes(old.tensors[spec.name]), _PROBE_BYTES)[index]
        block, _ = encode_block(parts[index], before, spec.dtype)
        sampled += len(parts[index])
        coded += block.bytes
    return coded < _PROBE_WORTH * sampled
