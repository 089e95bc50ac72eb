"""What the tests of the weight transports share: states with awkward bits, a bad network, and a leak check."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from orz_async.weights import group

T = TypeVar("T")
Named = dict[str, torch.Tensor]


class Recorder:
    """An event log in a list."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def emit(self, kind: str, **fields: Any) -> None:
        self.events.append((kind, fields))


@pytest.fixture(scope="module", autouse=True)
def libuv() -> None:
    """torch's store keeps one pipe for the life of the process; it is no leak of a test."""
    store, _ = group.listen("nccl://127.0.0.1:0", 0, "gloo")
    del store


@pytest.fixture
def no_leaks() -> Iterator[None]:
    """Whatever a test opens is closed when it ends: threads and file descriptors, sockets among them."""
    threads, descriptors = set(threading.enumerate()), num_descriptors()
    yield
    until(lambda: set(threading.enumerate()) <= threads and num_descriptors() <= descriptors)
    assert set(threading.enumerate()) <= threads
    assert num_descriptors() <= descriptors


def num_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def until(condition: Callable[[], T], timeout_s: float = 30.0) -> T:
    """The first true value of `condition`, or the last one."""
    end = time.monotonic() + timeout_s
    while not (value := condition()) and time.monotonic() < end:
        time.sleep(0.002)
    return value


def awkward(dtype: torch.dtype, count: int = 1000, seed: int = 0) -> torch.Tensor:
    """Random bits: NaN payloads, infinities, denormals and both zeros are among them."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.empty((), dtype=dtype).element_size()
    bits = torch.randint(0, 256, (count * size,), dtype=torch.uint8, generator=generator)
    values = bits.view(dtype)
    values[:4] = torch.tensor([-0.0, float("nan"), float("inf"), 0.0], dtype=dtype)
    return values


def model(seed: int = 0, scale: int = 1) -> Named:
    """Every dtype family, a scalar, an empty tensor, and sizes around the segment and chunk bounds."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "embed.weight": torch.randn(512 * scale, 128, generator=generator),
        "layer.0.weight": awkward(torch.bfloat16, 64 * 1024 * scale, seed).reshape(64 * scale, 1024),
        "layer.0.bias": awkward(torch.float16, 1001, seed),
        "layer.1.weight": awkward(torch.float32, 8192, seed).reshape(64, 128),
        "scale": torch.tensor(1.5 + seed),
        "nothing": torch.empty(0, 4),
        "steps": torch.tensor([seed, 2**40], dtype=torch.int64),
    }


def changed(named: Named, seed: int, fraction: float = 0.02) -> Named:
    """The same tensors with some words replaced by others."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, tensor in named.items():
        copy = tensor.clone()
        if tensor.is_floating_point() and tensor.numel() > 16:
            words = copy.view(-1).view(torch.int16 if tensor.element_size() == 2 else torch.int32)
            where = torch.rand(words.shape, generator=generator) < fraction
            words[where] ^= torch.randint(1, 1 << 10, (int(where.sum()),), generator=generator, dtype=words.dtype)
        result[name] = copy
    return result


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same_bits(found: Named, expected: Named) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(found[name]) == bits(tensor), name


class Proxy:
    """A TCP hop that can be slow, cut, mute, or flip one bit. It begins transparent."""

    def __init__(self, target: str) -> None:
        self._target = ("127.0.0.1", int(target.rsplit(":", 1)[1]))
        self.cut_after: int | None = None
        """Bytes towards the client after which the connection is closed, once."""
        self.flip_at: int | None = None
        """Position in the stream towards the client of a byte that is damaged, once."""
        self.mute = False
        """Connections stay open and carry nothing."""
        self.bytes_per_s = 0
        self.to_client = 0
        self.connections = 0
        self._closing = False
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(0.05)
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while not self._closing:
            with contextlib.suppress(TimeoutError):
                client, _ = self._listener.accept()
                self.connections += 1
                try:
                    server = socket.create_connection(self._target)
                except OSError:
                    client.close()
                    continue
                self._sockets += [client, server]
                for source, sink, down in ((client, server, False), (server, client, True)):
                    source.settimeout(0.05)
                    thread = threading.Thread(target=self._pump, args=(source, sink, down), daemon=True)
                    self._threads.append(thread)
                    thread.start()

    def _pump(self, source: socket.socket, sink: socket.socket, down: bool) -> None:
        with contextlib.suppress(OSError):
            while not self._closing:
                try:
                    data = bytearray(source.recv(16384))
                except TimeoutError:
                    continue
                if not data:
                    break
                if down and not self._spoil(data):
                    break
                if not self.mute:
                    sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _spoil(self, data: bytearray) -> bool:
        before, self.to_client = self.to_client, self.to_client + len(data)
        if self.bytes_per_s:
            time.sleep(len(data) / self.bytes_per_s)
        if self.flip_at is not None and before <= self.flip_at < self.to_client:
            data[self.flip_at - before] ^= 0x10
            self.flip_at = None
        if self.cut_after is not None and self.to_client > self.cut_after:
            self.cut_after = None
            return False
        return True

    def close(self) -> None:
        self._closing = True
        for thread in list(self._threads):
            thread.join()
        for end in [self._listener, *self._sockets]:
            end.close()
