"""vLLM as the engine of a daemon: it samples in processes of its own, also while the daemon does something else.

Weights arrive in flight: pause, keeping the running requests -> load -> label -> resume. Keys and values of running
requests are computed anew with the new weights, unless `keep_kv`; each token carries the engine's own label.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from orz_async.broker.messages import LeaseRef, Progress
from orz_async.errors import EngineError
from orz_async.generator import vllm_shim as shim
from orz_async.generator.engine import LeaseError, Partial, Sample, check_lease, ref_of
from orz_async.generator.parameters import match_tensors
from orz_async.generator.stop import StopMatcher
from orz_async.generator.vllm_loop import Chunk, VllmLoop
from orz_async.generator.vllm_weights import WeightFile
from orz_async.records import Finish, Lease, Span, as_int32

if TYPE_CHECKING:
    import torch

_POLL_S = 0.01
"""A poll waits so long for a token."""
_BLOCK = 16
"""Tokens of keys and values that vLLM hands out at once, about."""
_ABORT_S = 1.0
"""Longest wait for the last words of a rollout that is cancelled."""
_SWAP_S = 300.0
"""Longest pause, load and resume of one update; above it the engine counts as dead."""


@dataclass(slots=True)
class _Running:
    """A lease that vLLM works on. It is not forgotten before vLLM has said how it ended."""

    lease: Lease
    began: float
    version: int
    """Served when it was admitted: its prompt's keys are of this version or a later one."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: Finish | None = None
    """Decided here, by a stop string; vLLM then gets an abort."""
    reason: str = ""
    """Why it failed, if it did."""


class VllmEngine:
    """See `Engine`. `slots` is the most that run at once; fewer do while their keys and values would not fit.

    Admission is continuous, evaluations first. Leases wait here and not in vLLM's queue: what waits there would keep
    the salt of an old version. Samples of one prompt share the blocks of its keys and values.
    """

    def __init__(
        self,
        vllm: VllmLoop,
        *,
        model: torch.nn.Module,
        dtype: str,
        slots: int,
        max_model_tokens: int,
        stop: StopMatcher,
        eos_tokens: Iterable[int],
        vocab_size: int,
        keep_kv: bool = False,
    ) -> None:
        """`model`: names and shapes of the parameters a version must have; its values are not read ("meta" will do)."""
        self._model = model
        self._dtype = dtype
        self._slots = slots
        self._max_model_tokens = max_model_tokens
        self._stop = stop
        self._stop_tokens = sorted({token for token in eos_tokens if 0 <= token < vocab_size} | stop.whole())
        self._vocab_size = vocab_size
        self._keep_kv = keep_kv
        self._queues: dict[str, deque[Lease]] = {"eval": deque(), "train": deque()}
        self._running: dict[str, _Running] = {}
        self._cancelled: set[str] = set()
        self._early: list[Chunk] = []
        """Chunks that came while a lease was being cancelled."""
        self._answers = True
        """The last lease that was cancelled had its last words in time, or there was a chunk since."""
        self._names = 0
        self._failed: deque[LeaseError] = deque()
        self._version = -1
        self._tokens_sampled = 0
        self._kv_used = 0
        self._timings: dict[str, float] = {}
        self.read_back = 0
        """Tensors of the last update that were read again where they serve. The others, packed or split, were checked
        when they were loaded."""
        self._weight_file = WeightFile()
        self._vllm = vllm
        self._kv_tokens = vllm.kv_tokens or slots * max_model_tokens

    @property
    def version(self) -> int:
        return self._version

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def idle(self) -> bool:
        return not (self._running or self._failed or any(self._queues.values()))

    @property
    def tokens_sampled(self) -> int:
        return self._tokens_sampled

    @property
    def steps_sampled(self) -> None:
        return None

    @property
    def timings(self) -> Mapping[str, float]:
        return self._timings

    def submit(self, lease: Lease) -> None:
        check_lease(lease, self._max_model_tokens, self._vocab_size)
        self._queues[lease.kind].append(lease)

    def cancel(self, lease: LeaseRef) -> Partial | None:
        queue = self._queues[lease.kind]
        self._queues[lease.kind] = deque(held for held in queue if ref_of(held) != lease)
        for name, running in list(self._running.items()):
            if ref_of(running.lease) == lease:
                return self._abandon(name, running)
        return None

    def _abandon(self, name: str, running: _Running) -> Partial | None:
        """Which versions sampled what there is of it is in its last chunk, which an abort brings at once."""
        # One that did not answer in time is not waited for again: a daemon that leaves has a hundred of these to say.
        self._answers = self._answers and self._vllm.end(name, _ABORT_S)
        if not self._answers:
            self._vllm.abort(name)
            self._cancelled.add(name)
        spans: tuple[Span, ...] = ()
        for chunk in self._vllm.take():
            if chunk.request != name:
                self._early.append(chunk)
            elif running.finish is None and not running.reason:
                self._extend(running, chunk)
                spans = chunk.spans or spans
        self._drop(name)
        if not running.tokens:
            return None
        response, logprobs = np.asarray(running.tokens, np.int32), np.asarray(running.logprobs, np.float32)
        return Partial(running.lease, response, logprobs, tuple(one for one in spans if one.start < len(response)))

    def poll(self) -> list[Sample]:
        if self._failed:
            raise self._failed.popleft()
        self._admit()
        if self._running:
            self._vllm.wait(_POLL_S)
        return self._collect()

    def apply(self, version: int, tensors: Mapping[str, torch.Tensor]) -> str:
        if self._running and version <= self._version:
            raise EngineError(f"expected a version above {self._version} while sequences run, found {version}")
        began = time.monotonic()
        given = match_tensors(self._model, tensors)
        for name, tensor in given.items():
            if str(tensor.dtype) != f"torch.{self._dtype}":
                raise EngineError(
                    f"tensor {name!r}: expected the engine's {self._dtype}, found {tensor.dtype}; start the daemon "
                    f"with --dtype {str(tensor.dtype).removeprefix('torch.')}"
                )
        # All that can be done while sampling goes on comes before the pause.
        update, digest = self._weight_file.write(given)
        written = time.monotonic()
        try:
            paused, swapped = self._vllm.call(self._swap(update, version), _SWAP_S, f"serving version {version}")
        finally:
            self._weight_file.remove()
        self._version = version
        self._timings = {
            "transfer_s": written - began,
            "pause_s": time.monotonic() - written,
            "drain_s": paused,
            "load_s": swapped,
        }
        return digest

    async def _swap(self, update: Mapping[str, Any], version: int) -> tuple[float, float]:
        """Seconds until the engine stood still, and until the weights were in place. An error leaves it paused."""
        llm, began = self._vllm.llm, time.monotonic()
        # Said every time: `clear_cache` decides whether running requests keep keys of the old weights.
        await llm.pause_generation(mode="keep", clear_cache=not self._keep_kv)
        paused = time.monotonic()
        await shim.update_weights(llm, update, str(version))
        self._compare(update["checksums"], version)
        loaded = time.monotonic()
        await llm.resume_generation()
        return paused - began, loaded - paused

    def _compare(self, checksums: Mapping[str, int], version: int) -> None:
        """Before anything is sampled: EngineError, with the tensor's name, where a worker serves something else."""
        workers = self._weight_file.served()
        if not workers:
            raise EngineError(
                f"expected each worker of vLLM to say what it serves as version {version}, found none did"
            )
        for served in workers:
            for name, found in served.items():
                if found != checksums[name]:
                    raise EngineError(
                        f"tensor {name!r} of version {version}: expected checksum {checksums[name]:08x}, the engine "
                        f"serves {found:08x}; it stays paused"
                    )
        self.read_back = min(map(len, workers))

    def progress(self) -> list[Progress]:
        running = [
            Progress(ref_of(one.lease), len(one.lease.prompt) // 4 * bool(one.tokens) + len(one.tokens), queued=False)
            for one in self._running.values()
        ]
        return running + [Progress(ref_of(lease), 0, queued=True) for queue in self._queues.values() for lease in queue]

    def close(self) -> None:
        self._queues = {kind: deque() for kind in self._queues}
        self._running.clear()
        self._failed.clear()
        self._vllm.close()
        self._weight_file.remove()

    def _admit(self) -> None:
        for queue in self._queues.values():
            while queue and len(self._running) < self._slots and self._fits(queue[0]):
                self._begin(queue.popleft())

    def _fits(self, lease: Lease) -> bool:
        """Whether the prompt fits, with a block for each rollout to grow into and a sixteenth of all to spare.

        Should they grow further, vLLM takes the last admitted out for a while; nothing is lost but time.
        """
        needed = self._kv_used + len(lease.prompt) // 4 + _BLOCK * (len(self._running) + 1)
        return not self._running or needed <= self._kv_tokens * 15 // 16

    def _begin(self, lease: Lease) -> None:
        self._names += 1
        name = f"{lease.kind}-{lease.rollout}-{lease.attempt}-{self._names}"
        prompt = as_int32(lease.prompt).tolist()
        params = shim.make_sampling(
            temperature=lease.sampling.temperature,
            seed=lease.seed,
            max_tokens=lease.sampling.max_new_tokens,
            stop_tokens=self._stop_tokens,
        )
        self._running[name] = _Running(lease, time.monotonic(), self._version)
        self._kv_used += len(prompt)
        self._vllm.submit(name, shim.make_prompt(prompt, self._salt()), params)

    def _salt(self) -> str:
        """Prefixes computed by other weights are never reused, whatever becomes of the cache."""
        return f"v{self._version}"

    def _drop(self, name: str) -> _Running:
        running = self._running.pop(name)
        self._kv_used -= len(running.lease.prompt) // 4 + len(running.tokens)
        return running

    def _collect(self) -> list[Sample]:
        done = []
        chunks, self._early = [*self._early, *self._vllm.take()], []
        self._answers = self._answers or bool(chunks)
        for chunk in chunks:
            running = self._running.get(chunk.request)
            if running is None:
                self._stray(chunk)
                continue
            if running.finish is None and not running.reason:
                self._extend(running, chunk)
            if chunk.finish is not None:
                sample = self._end(chunk)
                done += [] if sample is None else [sample]
        if self._vllm.dead:
            raise EngineError(f"vLLM died ({self._vllm.dead}); {len(self._running)} rollouts were running")
        return done

    def _stray(self, chunk: Chunk) -> None:
        """Of a cancelled lease. An abort that came before vLLM knew the request was not heard: say it again."""
        if chunk.finish is not None:
            self._cancelled.discard(chunk.request)
        elif chunk.request in self._cancelled:
            self._vllm.abort(chunk.request)

    def _extend(self, running: _Running, chunk: Chunk) -> None:
        """Take the tokens up to the first that ends the response."""
        for token, logprob in zip(chunk.tokens, chunk.logprobs, strict=True):
            running.tokens.append(token)
            running.logprobs.append(logprob)
            self._tokens_sampled += 1
            self._kv_used += 1
            if not math.isfinite(logprob):
                at = len(running.tokens) - 1
                running.reason = f"logits are not finite at response token {at} (version {self._version})"
            elif self._stop.candidate(token) and self._stop.completed(np.asarray(running.tokens, np.int32)):
                running.finish = "stop"
            else:
                continue
            if chunk.finish is None:
                self._vllm.abort(chunk.request)
            return

    def _end(self, chunk: Chunk) -> Sample | None:
        running = self._drop(chunk.request)
        finish = running.finish or (chunk.finish if chunk.finish in ("stop", "length") else None)
        if running.reason or finish is None or not running.tokens or not chunk.spans:
            reason = running.reason or (
                f"vLLM ended it as {chunk.finish!r} after {len(running.tokens)} tokens {chunk.error}".rstrip()
            )
            self._failed.append(LeaseError(ref_of(running.lease), reason))
            return None
        return Sample(
            lease=running.lease,
            response=np.asarray(running.tokens, np.int32),
            logprobs=np.asarray(running.logprobs, np.float32),
            spans=tuple(span for span in chunk.spans if span.start < len(running.tokens)),
            finish=finish,  # type: ignore[arg-type]
            generate_s=time.monotonic() - running.began,
            kv_version=min(running.version, chunk.spans[0].version) if self._keep_kv else None,
        )
