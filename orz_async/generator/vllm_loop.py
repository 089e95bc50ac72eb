"""vLLM's asyncio engine in a thread of its own, behind calls that never wait for longer than they say."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from orz_async.errors import EngineError
from orz_async.generator import vllm_shim as shim
from orz_async.generator.vllm_labels import Labels
from orz_async.records import Span

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Chunk:
    """News of one request: tokens since the last chunk, and in the last one how it ended."""

    request: str
    tokens: list[int]
    logprobs: list[float]
    finish: str | None = None
    """"stop", "length", "abort" or "error" once it has ended."""
    spans: tuple[Span, ...] = ()
    """The versions of all its tokens, as the engine labelled them; there when it has ended."""
    error: str = ""


class VllmLoop:
    """One `AsyncLLM` and its event loop.

    consumes   prompts with sampling parameters        produces   chunks of tokens, read with `take`
    waits for  the engine to start (`start_s`), a call to return (`seconds`), chunks (`wait`)
    ends       with `close`. When a process of the engine dies, `dead` says so within a second and nothing else comes.
    """

    def __init__(self, engine_args: Any, start_s: float = 600.0) -> None:
        self._chunks: deque[Chunk] = deque()
        self._news = threading.Event()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._closed = False
        self._llm: Any = None
        self._loop = asyncio.new_event_loop()
        self.dead = ""
        """Why the engine can do no more; empty while it can."""
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()
        try:
            self.call(self._start(engine_args), start_s, "starting the engine")
        except EngineError:
            self.close()
            raise
        self.kv_tokens: int = shim.kv_tokens(self._llm)

    @property
    def llm(self) -> Any:
        return self._llm

    async def _start(self, engine_args: Any) -> None:
        from vllm.v1.engine.async_llm import AsyncLLM

        # Here, in the thread that lives as long as the engine: its processes end with the thread that started them.
        self._llm = AsyncLLM.from_engine_args(engine_args)
        self._labels = Labels(self._llm)

    def call(self, work: Coroutine[Any, Any, T], seconds: float, what: str) -> T:
        """Run a coroutine in the loop. EngineError if it fails or takes longer than so many seconds."""
        future: Future[T] = asyncio.run_coroutine_threadsafe(self._watched(work), self._loop)
        try:
            return future.result(seconds)
        except TimeoutError as error:
            future.cancel()
            raise EngineError(f"expected vLLM to finish {what} within {seconds:g} s, found it still busy") from error
        except EngineError:
            raise
        # A process edge: whatever a process of vLLM raised comes out here, as any class of exception.
        except Exception as error:
            raise EngineError(f"vLLM failed while {what}: {_words(error)}") from error

    async def _watched(self, work: Coroutine[Any, Any, T]) -> T:
        """Give up when the engine dies meanwhile: a call to a dead process is never answered."""
        task = asyncio.ensure_future(work)
        while not task.done():
            await asyncio.wait([task], timeout=0.25)
            if not task.done() and self._llm is not None and self._llm.errored:
                task.cancel()
                self._died("a process of the engine ended")
                raise EngineError(f"vLLM died: {self.dead}")
        return task.result()

    def submit(self, request: str, prompt: Any, params: Any) -> None:
        self._loop.call_soon_threadsafe(self._begin, request, prompt, params)

    def _begin(self, request: str, prompt: Any, params: Any) -> None:
        self._tasks[request] = self._loop.create_task(self._consume(request, prompt, params))

    def abort(self, request: str) -> None:
        """Stop sampling it; its last chunk still comes, with what was sampled until then."""
        asyncio.run_coroutine_threadsafe(self._abort(request), self._loop)

    def end(self, request: str, seconds: float) -> bool:
        """Abort it and wait for its last chunk, for so long at most; False if that did not come."""
        ending = asyncio.run_coroutine_threadsafe(self._end(request, seconds), self._loop)
        with contextlib.suppress(TimeoutError):
            return ending.result(2 * seconds)
        return False

    async def _end(self, request: str, seconds: float) -> bool:
        until = self._loop.time() + seconds
        while (task := self._tasks.get(request)) is not None:
            if self.dead or self._loop.time() > until:
                return False
            # Again and again: one that came before vLLM knew the request was not heard.
            await self._llm.abort(request)
            await asyncio.wait([task], timeout=0.02)
        return True

    async def _abort(self, request: str) -> None:
        if request in self._tasks and not self.dead:
            await self._llm.abort(request)

    async def _consume(self, request: str, prompt: Any, params: Any) -> None:
        try:
            async for output in self._llm.generate(prompt, params, request):
                one = output.outputs[0]
                spans = self._labels.of(request, one) if one.finish_reason is not None else ()
                tokens, logprobs = list(one.token_ids), list(one.logprobs.logprobs) if one.logprobs is not None else []
                # Before 0.32 the end of an aborted request, without a token, brings all log-probs once more.
                self._put(Chunk(request, tokens, logprobs[: len(tokens)], one.finish_reason, spans))
        except asyncio.CancelledError:
            raise
        # A process edge: an engine that died and a request it refuses both come out here, as any class of exception.
        except Exception as error:
            if self._llm.errored:
                self._died(_words(error))
            else:
                self._put(Chunk(request, [], [], "error", error=_words(error)))
        finally:
            self._tasks.pop(request, None)
            self._labels.forget(request)

    def _put(self, chunk: Chunk) -> None:
        self._chunks.append(chunk)
        self._news.set()

    def _died(self, why: str) -> None:
        self.dead = self.dead or why
        self._news.set()

    def wait(self, seconds: float) -> None:
        """Until there is a chunk or the engine is dead, for so long at most."""
        self._news.wait(seconds)

    def take(self) -> list[Chunk]:
        """Every chunk that has come."""
        self._news.clear()
        chunks = []
        while self._chunks:
            chunks.append(self._chunks.popleft())
        return chunks

    def close(self) -> None:
        """End the engine's processes. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._llm is not None:
            self._llm.shutdown(timeout=2.0)
        self._loop.call_soon_threadsafe(self._stop)
        self._thread.join(10.0)
        self._llm = None  # its finalizer must not run when the interpreter is half gone

    def _stop(self) -> None:
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.call_soon(self._loop.stop)


def _words(error: BaseException) -> str:
    """The error in one line, with what caused it."""
    cause = error.__cause__
    said = f"{type(error).__name__}: {error}".strip().splitlines()
    return said[0] + (f" ({type(cause).__name__}: {cause})" if cause is not None else "")
