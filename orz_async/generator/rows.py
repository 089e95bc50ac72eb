"""Running sequences as arrays: row i is the sequence in KV slot i, and rows 0..count-1 are all in use."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from orz_async.generator.engine import Partial, Sample
from orz_async.records import Finish, Lease, Span, as_int32


class Rows:
    """Up to `slots` sequences of up to `max_tokens` tokens. Leaving rows are filled from the end, so none is empty."""

    def __init__(self, slots: int, max_tokens: int) -> None:
        self.count = 0
        self.leases: list[Lease] = []
        self.tokens = np.zeros((slots, max_tokens), np.int32)
        """Prompt and response."""
        self.length = np.zeros(slots, np.int64)
        """Of prompt and response so far. The last token is not in the KV cache yet: the next decode step reads it."""
        self.prompt_length = np.zeros(slots, np.int64)
        self.limit = np.zeros(slots, np.int64)
        """Length at which the sequence is cut."""
        self.temperature = np.ones(slots, np.float32)
        self.seed = np.zeros(slots, np.uint64)
        self.stale = np.zeros(slots, np.bool_)
        """The KV cache of the slot is to be computed again, because the weights changed."""
        self.work = np.zeros(slots, np.int64)
        """Tokens computed for the sequence, recomputation included: it grows whenever something is done."""
        self._logprobs = np.zeros((slots, max_tokens), np.float32)
        self._spans: list[list[Span]] = []
        self._started: list[float] = []
        self._moved: tuple[NDArray[Any], ...] = (
            self.tokens,
            self._logprobs,
            self.length,
            self.prompt_length,
            self.limit,
            self.temperature,
            self.seed,
            self.stale,
            self.work,
        )

    def add(self, lease: Lease, version: int, now: float) -> int:
        """Start a sequence; returns its row. Its prompt's KV is for the caller to compute."""
        row, prompt = self.count, as_int32(lease.prompt)
        self.count += 1
        self.tokens[row, : len(prompt)] = prompt
        self.length[row] = self.prompt_length[row] = self.work[row] = len(prompt)
        self.limit[row] = len(prompt) + lease.sampling.max_new_tokens
        self.temperature[row] = lease.sampling.temperature
        self.seed[row] = lease.seed
        self.stale[row] = False
        self.leases.append(lease)
        self._spans.append([Span(version, 0)])
        self._started.append(now)
        return row

    def append(self, tokens_B: NDArray[np.int64], logprobs_B: NDArray[np.float32]) -> None:
        """One more token for every row."""
        rows, at = np.arange(self.count), self.length[: self.count]
        self.tokens[rows, at] = tokens_B
        self._logprobs[rows, at] = logprobs_B
        self.length[: self.count] += 1
        self.work[: self.count] += 1

    def response(self, row: int) -> NDArray[np.int32]:
        """A view of the tokens sampled so far."""
        return self.tokens[row, self.prompt_length[row] : self.length[row]]

    def start_span(self, version: int) -> None:
        """Tokens sampled from now on are of this version."""
        sampled = (self.length - self.prompt_length)[: self.count].tolist()
        for spans, start in zip(self._spans, sampled, strict=True):
            if spans[-1].start == start:
                spans.pop()  # a version that sampled no token of this sequence
            spans.append(Span(version, start))

    def sample(self, row: int, finish: Finish, now: float, *, kept_kv: bool = False) -> Sample:
        """What this row has produced, copied. `kept_kv`: its keys and values were never computed anew."""
        return Sample(
            lease=self.leases[row],
            response=self.response(row).copy(),
            logprobs=self._logprobs[row, self.prompt_length[row] : self.length[row]].copy(),
            spans=tuple(self._spans[row]),
            finish=finish,
            generate_s=now - self._started[row],
            kv_version=self._spans[row][0].version if kept_kv else None,
        )

    def partial(self, row: int) -> Partial | None:
        """What this row has produced so far, copied; None if that is nothing."""
        count = int(self.length[row] - self.prompt_length[row])
        if not count:
            return None
        # Its newest version may have sampled no token yet.
        spans = tuple(span for span in self._spans[row] if span.start < count)
        logprobs = self._logprobs[row, self.prompt_length[row] : self.length[row]].copy()
        return Partial(self.leases[row], self.response(row).copy(), logprobs, spans)

    def remove(self, row: int) -> int:
        """Forget a row and move the last one into it; returns the former index of the one moved (maybe `row`)."""
        last = self.count - 1
        if row != last:
            for array in self._moved:
                array[row] = array[last]
        self.leases[row], self._spans[row], self._started[row] = (
            self.leases[last],
            self._spans[last],
            self._started[last],
        )
        del self.leases[last], self._spans[last], self._started[last]
        self.count = last
        return last
