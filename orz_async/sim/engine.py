"""Continuous batching without tokens: all running sequences advance together, and the shortest rest ends first."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Protocol

from orz_async.broker.messages import LeaseRef
from orz_async.records import Kind, Span
from orz_async.sim.clock import Clock
from orz_async.sim.models import EngineModel


class Work(Protocol):
    """A lease, or the ledger's terms of one."""

    @property
    def kind(self) -> Kind: ...
    @property
    def rollout(self) -> int: ...
    @property
    def attempt(self) -> int: ...
    @property
    def version_floor(self) -> int: ...


class Sequence:
    """A lease in the engine."""

    __slots__ = ("began", "length", "ref", "start", "work")

    def __init__(self, work: Work, ref: LeaseRef, length: int) -> None:
        self.work = work
        self.ref = ref
        self.length = length
        self.start = -1.0
        """Level at admission; -1 while queued."""
        self.began = 0.0


class Engine:
    """The *level* is the number of tokens that a sequence running since the beginning would have: it rises by one
    every decode step, and a sequence admitted at level x ends at level x + length. So a change of the batch costs a
    logarithm, not a walk over the rows.
    """

    def __init__(
        self, model: EngineModel, clock: Clock, prompt_tokens: float, done: Callable[[Sequence, tuple[Span, ...]], None]
    ) -> None:
        self.model = model
        self.clock = clock
        self.version = -1
        self.held: dict[LeaseRef, Sequence] = {}
        self.tokens = 0.0
        self.slowness = 1.0
        self._done = done
        self._prefill_s = model.prefill_s * prompt_tokens
        self._queues: tuple[deque[Sequence], deque[Sequence]] = (deque(), deque())
        """Of evaluations, and of training."""
        self._ends: list[tuple[float, int, Sequence]] = []
        self._rows = 0
        self._level = 0.0
        self._since = 0.0
        """The level is that of this moment."""
        self._blocked_until = 0.0
        self._swaps: list[tuple[float, int]] = []
        self._serial = 0
        self._timer = 0

    @property
    def rows(self) -> int:
        return self._rows

    def submit(self, work: Work, ref: LeaseRef, length: int) -> None:
        sequence = self.held[ref] = Sequence(work, ref, length)
        self._queues[work.kind == "train"].append(sequence)
        if self._rows < self.model.slots:
            self._advance()
            self._admit()
            self._schedule()

    def cancel(self, ref: LeaseRef) -> None:
        sequence = self.held.pop(ref, None)
        if sequence is None:
            return
        if sequence.start >= 0:
            self._advance()
            self._rows -= 1
            self._admit()
            self._schedule()

    def swap(self, version: int) -> None:
        """New weights: a pause, and KV computed anew."""
        self._advance()
        self.version = version
        if self._rows:
            self._swaps.append((self._level, version))
        else:
            self._swaps = [(self._level, version)]
        pause = self.model.swap_s
        if not self.model.keep_kv and self._rows and self.model.prefill_s:
            starts = [s.start for s in self.held.values() if s.start >= 0]
            pause += self.model.prefill_s * (len(starts) * self._level - sum(starts)) + self._prefill_s * len(starts)
        self._pause(pause)
        self._schedule()

    def slow(self, slowness: float) -> None:
        self._advance()
        self.slowness = slowness
        self._schedule()

    def freeze(self, until: float) -> None:
        self._advance()
        self._blocked_until = max(self._blocked_until, until)
        self._schedule()

    def stop(self) -> None:
        """The process is gone: nothing of it happens any more."""
        self._timer += 1
        self._rows = 0
        self.held = {}

    def progress(self, sequence: Sequence) -> int:
        """Tokens so far; -1 while queued."""
        if sequence.start < 0:
            return -1
        self._advance()
        return int(self._level - sequence.start)

    def _step_s(self) -> float:
        return self.slowness * self.model.seconds_per_token(self._rows)

    def _advance(self) -> None:
        now = self.clock.now
        begin = self._since if self._since > self._blocked_until else self._blocked_until
        if self._rows and now > begin:
            tokens = (now - begin) / self._step_s()
            self._level += tokens
            self.tokens += tokens * self._rows
        self._since = now

    def _pause(self, seconds: float) -> None:
        if seconds:
            self._blocked_until = max(self._blocked_until, self.clock.now) + seconds

    def _admit(self) -> None:
        admitted = 0
        for queue in self._queues:
            while queue and self._rows < self.model.slots:
                sequence = queue.popleft()
                if self.held.get(sequence.ref) is not sequence:
                    continue  # cancelled while it waited
                sequence.start, sequence.began = self._level, self.clock.now
                self._rows += 1
                self._serial += 1
                heappush(self._ends, (self._level + sequence.length, self._serial, sequence))
                admitted += 1
        self._pause(admitted * self._prefill_s)

    def _schedule(self) -> None:
        self._timer += 1
        while self._ends and self.held.get(self._ends[0][2].ref) is not self._ends[0][2]:
            heappop(self._ends)
        if self._ends:
            begin = self._since if self._since > self._blocked_until else self._blocked_until
            left = self._ends[0][0] - self._level
            self.clock.at(begin + (left * self._step_s() if left > 0 else 0.0), self._end, self._timer)

    def _end(self, timer: int) -> None:
        if timer != self._timer:
            return  # the batch has changed since
        self._advance()
        level, _, sequence = heappop(self._ends)
        self._level = max(self._level, level)  # rounding
        del self.held[sequence.ref]
        self._rows -= 1
        self._admit()
        self._schedule()
        self._done(sequence, self._spans(sequence))

    def _spans(self, sequence: Sequence) -> tuple[Span, ...]:
        swaps = self._swaps
        first = bisect_right(swaps, sequence.start, key=lambda swap: swap[0]) - 1
        spans = [Span(swaps[first][1], 0)]
        for level, version in swaps[first + 1 :]:
            start = round(level - sequence.start)
            if start >= sequence.length:
                break
            if start <= spans[-1].start:
                spans.pop()
            spans.append(Span(version, start if spans else 0))
        return tuple(spans)
