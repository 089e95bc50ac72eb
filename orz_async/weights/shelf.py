"""What a publisher has in memory: the newest version, the way back to earlier ones, and what is still being read."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from orz_async.weights.delta import encode_block
from orz_async.weights.history import BackStep, History, rebuild, same_kind, worth_coding
from orz_async.weights.payload import SEGMENT_BYTES, Payload, delta_payload, full_payload, segments
from orz_async.weights.snapshot import State, tensor_bytes
from orz_async.weights.wire import Block

HOLD_S = 10.0
"""A payload nobody asked for a chunk of for this long is not being read."""

Coding = Generator[None, None, None]
"""Work in pieces of one segment, so that serving goes on in between."""


@dataclass(slots=True)
class _Item:
    payload: Payload
    used: float
    """When a fetcher last asked for a part of it."""


class Shelf:
    """Payloads by (version, digest of the base).

    At most two versions are held in full: the newest, and of the older ones the one that has been read for longest,
    while it is being read. Its readers finish; readers of a version in between start over with the newest. A third,
    the one before the newest, is held until the difference of the two is coded.
    """

    def __init__(self, *, chunk_bytes: int, history: int, segment_bytes: int = SEGMENT_BYTES) -> None:
        self._chunk_bytes, self._segment_bytes, self._max_steps = chunk_bytes, segment_bytes, history
        self._newest: State | None = None
        self._items: dict[tuple[int, str], _Item] = {}
        self._history = History(max_steps=history)
        self._step: Coding | None = None
        self._merges: dict[str, Coding] = {}

    @property
    def newest_version(self) -> int:
        return -1 if self._newest is None else self._newest.version

    @property
    def can_put(self) -> bool:
        """The step to the newest version is coded; the next version would break the chain before that."""
        return self._step is None

    @property
    def busy(self) -> bool:
        """There is work() to do."""
        return self._step is not None or bool(self._merges)

    def work(self, now: float) -> None:
        """Code one segment of what is being made."""
        if self._step is not None:
            if next(self._step, "done") == "done":
                self._step = None
        elif self._merges:
            digest, coding = next(iter(self._merges.items()))
            if next(coding, "done") == "done":
                del self._merges[digest]
        self.retire(now)

    def put(self, state: State, now: float) -> None:
        assert self.can_put
        old, self._newest = self._newest, state
        self._merges.clear()  # they lead to what is no longer the newest; who waits for one is served the new one
        if old is not None and self._max_steps > 0 and same_kind(state, old) and worth_coding(state, old):
            self._step = self._code_step(state, old, now)
        else:
            self._history.clear()

    def payload_for(self, base_digest: str, now: float) -> Payload | None:
        """How the newest version reaches a holder of `base_digest`; None while that is being worked out."""
        newest = self._newest
        assert newest is not None
        key = (newest.version, base_digest)
        if key not in self._items:
            if self._step is not None and base_digest != "":
                return None  # nearly always it is the version before, and otherwise the way back is not known yet
            path = self._history.path(base_digest)
            if path:
                if base_digest not in self._merges:
                    self._merges[base_digest] = self._code_merge(newest, path, now)
                return None
            key = (newest.version, "")
        if key not in self._items:
            payload = full_payload(newest, chunk_bytes=self._chunk_bytes, segment_bytes=self._segment_bytes)
            self._items[key] = _Item(payload, now)
        self._items[key].used = now
        return self._items[key].payload

    def find(self, version: int, base_digest: str, now: float) -> Payload | None:
        item = self._items.get((version, base_digest))
        if item is None:
            return None
        item.used = now
        return item.payload

    def retire(self, now: float) -> None:
        """Drop what is neither of the newest version nor of the older one in use."""
        kept: int | None = None
        for key, item in list(self._items.items()):  # in the order of publication
            version = key[0]
            if version == self.newest_version:
                continue
            if now - item.used > HOLD_S or kept not in (None, version):
                del self._items[key]
            else:
                kept = version

    def _code_step(self, new: State, old: State, now: float) -> Coding:
        """The difference of two versions, both ways: forward to be sent, back to be remembered."""
        forward: list[tuple[Block, memoryview]] = []
        back, max_bytes = BackStep(old.version, old.digest), new.num_bytes // 2
        for spec in new.specs:
            new_parts = segments(tensor_bytes(new.tensors[spec.name]), self._segment_bytes)
            old_parts = segments(tensor_bytes(old.tensors[spec.name]), self._segment_bytes)
            for index, (new_part, old_part) in enumerate(zip(new_parts, old_parts, strict=True)):
                forward.append(encode_block(new_part, old_part, spec.dtype))
                if forward[-1][0].form != "same" and back.num_bytes <= max_bytes:
                    block, piece = encode_block(old_part, new_part, spec.dtype)
                    back.add(spec.name, index, block, memoryview(bytes(piece)) if block.form == "full" else piece)
                yield
        if back.num_bytes <= max_bytes:
            self._history.push(back, max_bytes)
        else:
            self._history.clear()
        self._add_delta(new, old.version, old.digest, forward, now)

    def _code_merge(self, new: State, path: tuple[BackStep, ...], now: float) -> Coding:
        """All changes since the version at the end of `path`, each word once."""
        blocks: list[tuple[Block, memoryview]] = []
        for spec in new.specs:
            for index, part in enumerate(segments(tensor_bytes(new.tensors[spec.name]), self._segment_bytes)):
                if any((spec.name, index) in step.blocks for step in path):
                    blocks.append(encode_block(part, rebuild(part, path, spec, index), spec.dtype))
                else:
                    blocks.append((Block("same", 0), memoryview(b"")))
                yield
        self._add_delta(new, path[-1].version, path[-1].digest, blocks, now)

    def _add_delta(
        self, new: State, version: int, digest: str, blocks: list[tuple[Block, memoryview]], now: float
    ) -> None:
        payload = delta_payload(
            new,
            version,
            digest,
            blocks,
            chunk_bytes=self._chunk_bytes,
            segment_bytes=self._segment_bytes,
        )
        self._items[new.version, digest] = _Item(payload, now)
