"""A TCP proxy that can be told to misbehave. Its event loop runs in a thread of the harness."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Callable

FAULTS = ("delay", "drop", "reset", "blackhole", "flip")


class Proxy:
    """Listens on a port of its own; `upstream` says where to connect to whenever somebody connects.

    `fault` may be set at any time: "" passes everything on.
    """

    def __init__(self, upstream: Callable[[], str], seed: int, rate: float = 0.25) -> None:
        self.fault = ""
        self.injected: Counter[str] = Counter()
        """Chunks delayed, dropped, flipped or swallowed; connections reset."""
        self._upstream = upstream
        self._rate = rate
        self._rng = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: list[asyncio.Task[None]] = []
        self.port = 0
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)
        self._thread.start()
        assert self._ready.wait(30)

    @property
    def address(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._accept, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        self._loop.run_until_complete(asyncio.sleep(0.2))  # who is being accepted is accepted
        server.close()
        for writer in self._writers:
            writer.transport.abort()
        self._loop.run_until_complete(asyncio.sleep(1.0))  # delays end, transports close, in the loop
        self._loop.close()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        self._tasks.append(self._loop.create_task(self._serve(reader, writer)))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        both = [writer]
        try:
            host, _, port = self._upstream().removeprefix("tcp://").rpartition(":")
            upstream_reader, upstream_writer = await asyncio.open_connection(host, int(port))
            both.append(upstream_writer)
            self._writers.append(upstream_writer)
            ends = tuple(both)
            pumps = [self._pump(reader, upstream_writer, ends), self._pump(upstream_reader, writer, ends)]
            await asyncio.gather(*pumps)
        except (OSError, ValueError):
            pass  # no learner listens
        finally:
            for one in both:
                one.transport.abort()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, both: tuple[asyncio.StreamWriter, ...]
    ) -> None:
        try:
            while data := await reader.read(1 << 16):
                forwarded = await self._meddle(data, both)
                if forwarded:
                    writer.write(forwarded)
                    await writer.drain()
        except OSError:
            pass
        finally:
            for one in both:
                one.transport.abort()

    async def _meddle(self, data: bytes, both: tuple[asyncio.StreamWriter, ...]) -> bytes:
        fault = self.fault
        if not fault or (fault != "blackhole" and self._rng.random() > self._rate):
            return data
        self.injected[fault] += 1
        match fault:
            case "delay":
                await asyncio.sleep(self._rng.uniform(0.05, 0.6))
            case "drop" | "blackhole":
                return b""
            case "reset":
                for one in both:
                    one.transport.abort()
                return b""
            case "flip":
                place = self._rng.randrange(len(data))
                return data[:place] + bytes([data[place] ^ 1 << self._rng.randrange(8)]) + data[place + 1 :]
        return data
