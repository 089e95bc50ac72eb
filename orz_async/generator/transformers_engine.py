"""The embedded engine: continuous batching over any Hugging Face causal language model, on CPU or GPU.

Each `poll` is one packed forward: one token for every running sequence and the prompts of those that start. Sequences
that end leave at once, and the last row takes their place, so no forward computes a finished row.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from orz_async import ops
from orz_async.broker.messages import LeaseRef, Progress
from orz_async.errors import EngineError
from orz_async.generator.batch import Work
from orz_async.generator.engine import LeaseError, Partial, Sample, check_lease, ref_of
from orz_async.generator.model import SlotModel
from orz_async.generator.rows import Rows
from orz_async.generator.sampler import uniforms
from orz_async.generator.stop import StopMatcher
from orz_async.records import Finish, Lease, as_int32

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TransformersEngine:
    """See `Engine`. Leases are admitted in the order of submission, those of evaluations first.

    The same leases submitted in the same order, with the same weights applied at the same polls, give the same bits.
    On one CPU thread more holds (tested): a rollout's bits do not depend on what else runs.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        slots: int,
        max_model_tokens: int,
        stop: StopMatcher,
        eos_tokens: Iterable[int],
        keep_kv: bool = False,
        prefill_tokens: int = 8192,
    ) -> None:
        """`prefill_tokens` bounds the prompt tokens of one forward; a longer prompt gets one of its own."""
        self._model = SlotModel(model, slots=slots, max_tokens=max_model_tokens)
        self._rows = Rows(slots, max_model_tokens)
        self._slots = slots
        self._max_model_tokens = max_model_tokens
        self._stop = stop
        self._is_eos_V = np.zeros(self.vocab_size, np.bool_)
        self._is_eos_V[[token for token in eos_tokens if 0 <= token < self.vocab_size]] = True
        self._keep_kv = keep_kv
        self._prefill_tokens = prefill_tokens
        self._queues: dict[str, deque[Lease]] = {"eval": deque(), "train": deque()}
        self._failed: deque[LeaseError] = deque()
        self._version = -1
        self._tokens_sampled = self._steps_sampled = 0

    @property
    def version(self) -> int:
        return self._version

    @property
    def vocab_size(self) -> int:
        return self._model.vocab_size

    @property
    def idle(self) -> bool:
        return not (self._rows.count or self._failed or any(self._queues.values()))

    @property
    def tokens_sampled(self) -> int:
        return self._tokens_sampled

    @property
    def steps_sampled(self) -> int:
        return self._steps_sampled

    def submit(self, lease: Lease) -> None:
        check_lease(lease, self._max_model_tokens, self.vocab_size)
        self._queues[lease.kind].append(lease)

    def cancel(self, lease: LeaseRef) -> Partial | None:
        queue = self._queues[lease.kind]
        self._queues[lease.kind] = deque(held for held in queue if ref_of(held) != lease)
        for row, held in enumerate(self._rows.leases):
            if ref_of(held) == lease:
                partial = self._rows.partial(row)
                self._remove(row)
                return partial
        return None

    def poll(self) -> list[Sample]:
        if self._failed:
            raise self._failed.popleft()
        if self._rows.stale.any():
            self._recompute_kv()
            return []
        work = self._admit()
        if work is None:
            return []
        tokens_B, logprobs_B = self._sample(work)
        self._rows.append(tokens_B, logprobs_B)
        self._tokens_sampled += len(tokens_B)
        self._steps_sampled += 1
        return self._retire(tokens_B, logprobs_B)

    def apply(self, version: int, tensors: Mapping[str, torch.Tensor]) -> str:
        if self._rows.count and version <= self._version:
            raise EngineError(f"expected a version above {self._version} while sequences run, found {version}")
        digest = self._model.load(tensors)
        self._version = version
        self._rows.start_span(version)
        if not self._keep_kv or self._model.cache.is_empty:
            self._rows.stale[: self._rows.count] = True
        return digest

    @property
    def timings(self) -> Mapping[str, float]:
        return {}

    def progress(self) -> list[Progress]:
        work = self._rows.work[: self._rows.count].tolist()
        running = [
            Progress(ref_of(lease), tokens, queued=False) for lease, tokens in zip(self._rows.leases, work, strict=True)
        ]
        return running + [Progress(ref_of(lease), 0, queued=True) for queue in self._queues.values() for lease in queue]

    def close(self) -> None:
        self._rows = Rows(1, 1)
        self._queues = {kind: deque() for kind in self._queues}
        self._failed.clear()
        self._model.cache.release()

    def _admit(self) -> Work | None:
        """Fill free rows from the queues; the next forward: a token for each running row, the prompts of new ones."""
        running, now = self._rows.count, time.monotonic()
        prompts: dict[bytes, int] = {}  # samples of one prompt are computed once and written to all their slots
        source: list[int] = []
        tokens = 0
        for queue in self._queues.values():
            while queue and self._rows.count < self._slots:
                prompt = queue[0].prompt
                tokens += 0 if prompt in prompts else len(prompt) // 4
                if prompts and tokens > self._prefill_tokens:
                    break
                self._rows.add(queue.popleft(), self._version, now)
                source.append(prompts.setdefault(prompt, len(prompts)))
        if not self._rows.count:
            return None
        last = self._rows.length[:running] - 1
        return Work(
            decode_tokens=self._rows.tokens[np.arange(running), last],
            decode_positions=last,
            prefixes=[as_int32(prompt) for prompt in prompts],
            slots=range(running, self._rows.count),
            source=source,
        )

    def _recompute_kv(self) -> None:
        """Compute KV of as many stale rows as one forward may hold; those of like length together, to pad little."""
        stale = np.flatnonzero(self._rows.stale)
        lengths = self._rows.length[stale] - 1  # the last token's KV is written when it is decoded
        order = np.argsort(lengths, kind="stable")
        stale, lengths = stale[order], lengths[order]
        fit = max(1, int(np.searchsorted(np.cumsum(lengths), self._prefill_tokens, side="right")))
        chosen = stale[:fit]
        self._model.forward(
            Work(
                prefixes=[self._rows.tokens[row, :length] for row, length in zip(chosen, lengths, strict=False)],
                slots=chosen.tolist(),
                source=range(fit),
            )
        )
        self._rows.stale[chosen] = False
        self._rows.work[chosen] += lengths[:fit]

    def _sample(self, work: Work) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        rows, count = self._rows, self._rows.count
        draws_B = uniforms(rows.seed[:count], rows.length[:count] - rows.prompt_length[:count])
        logits_BV = self._model.forward(work)
        tokens_B, logprobs_B = ops.sample(
            logits_BV,
            torch.from_numpy(rows.temperature[:count]).to(logits_BV.device),
            torch.from_numpy(draws_B).to(logits_BV.device),
        )
        return tokens_B.cpu().numpy(), logprobs_B.cpu().numpy()

    def _retire(self, tokens_B: NDArray[np.int64], logprobs_B: NDArray[np.float32]) -> list[Sample]:
        """Take out the rows whose last token ended them, and those whose logits were not finite."""
        rows, count, now = self._rows, self._rows.count, time.monotonic()
        stopped_B = self._is_eos_V[tokens_B]
        for row in np.flatnonzero(self._stop.candidates(tokens_B) & ~stopped_B).tolist():
            stopped_B[row] = self._stop.completed(rows.response(row))
        broken_B = ~np.isfinite(logprobs_B)
        leaving: list[int] = np.flatnonzero(stopped_B | broken_B | (rows.length == rows.limit)[:count]).tolist()
        done: list[Sample] = []
        for row in leaving:
            finish: Finish = "stop" if stopped_B[row] else "length"
            if broken_B[row]:
                reason = (
                    f"logits are not finite at response token {len(rows.response(row)) - 1} (version {self._version})"
                )
                self._failed.append(LeaseError(ref_of(rows.leases[row]), reason))
                self._model.cache.clear(row)
            else:
                done.append(rows.sample(row, finish, now, kept_kv=self._keep_kv))
        for row in reversed(leaving):
            self._remove(row)
        return done

    def _remove(self, row: int) -> None:
        moved = self._rows.remove(row)
        if moved != row:
            self._model.cache.move(moved, row, int(self._rows.length[row]))
