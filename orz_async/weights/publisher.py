"""The serving half of the stream: one thread, one ROUTER socket, payloads that many fetchers read at their own pace."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import zmq

from orz_async.errors import OrzError, WireError
from orz_async.weights import address as addresses
from orz_async.weights.payload import CHUNK_BYTES
from orz_async.weights.protocol import EventSink, PublishReport
from orz_async.weights.shelf import Shelf
from orz_async.weights.snapshot import State, capture
from orz_async.weights.wire import REQUEST_BYTES, Gone, OtherEpoch, Pull, Reply, Waiting, Want, decode, encode
from orz_async.weights.worker import Worker

if TYPE_CHECKING:
    from torch import Tensor

SEND_QUEUE = 8
"""Frames queued for one fetcher. An honest one has fewer open requests; what a dishonest one asks beyond is dropped."""
WANT_LIFE_S = 10.0
"""A Want not repeated for this long is forgotten; fetchers repeat it every second."""
MAX_WANTS = 10_000
_TICK_MS = 500


@dataclass(slots=True)
class Traffic:
    """Counters of one publisher."""

    bytes_sent: int = 0
    rejected: int = 0
    """Frames that were not sound requests."""
    dropped: int = 0
    """Replies to fetchers that are gone or asked for more than their share."""


class StreamPublisher:
    """Offers the newest version to any number of fetchers.

    consumes  versions from `publish`, requests from fetchers      waits for  either, at most half a second
    produces  one reply to each request                             waits for  nothing: a full queue drops the reply
    ends      with `close`, which the owner calls

    `publish` hands a copied version to the thread through one place that only the newest occupies; everything else
    belongs to the thread.
    """

    def __init__(
        self,
        bind: str,
        epoch: int,
        events: EventSink,
        *,
        keys: addresses.CurveKeys | None = None,
        chunk_bytes: int = CHUNK_BYTES,
        history: int = 8,
        on_want: Callable[[int], None] | None = None,
        progress: Callable[[], int] = lambda: 0,
    ) -> None:
        """Binds at once. history: versions back that a delta may start from; 0 always sends everything.

        on_want: called from the thread with each version that was asked for and is not here.
        progress: changes while such a version is on its way.
        """
        self._epoch, self._on_want, self._progress = epoch, on_want, progress
        self._shelf = Shelf(chunk_bytes=chunk_bytes, history=history)
        self.traffic = Traffic()
        self._wants: dict[bytes, tuple[Want, float]] = {}
        self._handover: State | None = None
        self._lock = threading.Lock()
        self._version = -1
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._gate: addresses.Gatekeeper | None = None
        self._allowed: Container[bytes] | None = None
        self._socket = self._context.socket(zmq.ROUTER)
        try:
            self._configure(keys)
            self.address = addresses.bind(self._socket, bind, keys)
        except OrzError:
            self._release()
            raise
        self._worker = Worker(f"weights-publisher-{epoch}", self._serve, self._release, events)
        self._worker.start()

    def _configure(self, keys: addresses.CurveKeys | None) -> None:
        self._socket.linger = 0
        self._socket.sndhwm = SEND_QUEUE
        self._socket.rcvhwm = 64
        self._socket.maxmsgsize = REQUEST_BYTES
        self._socket.router_mandatory = 1
        self._socket.heartbeat_ivl = 2000
        self._socket.heartbeat_timeout = 10000
        if keys is not None:
            addresses.secure_server(self._socket, keys)
            self._allowed = keys.allowed
            self._gate = addresses.Gatekeeper(self._context, keys.allowed)

    def publish(self, version: int, named: Iterable[tuple[str, Tensor]]) -> PublishReport:
        """Copy the tensors and offer them as `version`, which must be newer than the last one."""
        self._worker.check()
        if version <= self._version:
            raise ValueError(f"expected a version newer than {self._version}, got {version}")
        started = time.monotonic()
        state = capture(version, named)
        self.offer(state)
        seconds = time.monotonic() - started
        return PublishReport(version=version, bytes=state.num_bytes, seconds=seconds, digest=state.digest)

    def offer(self, state: State) -> None:
        """Serve a state that nobody will write to any more, without copying it."""
        with self._lock:
            self._handover = state
        self._version = state.version
        self._worker.wake()

    def close(self) -> None:
        """End the thread and close the sockets. Fetchers in the middle of a transfer lose it."""
        self._worker.close()

    def _release(self) -> None:
        self._socket.close()
        if self._gate is not None:
            self._gate.close()
        self._context.term()

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._worker.wake_fd, zmq.POLLIN)
        if self._gate is not None:
            poller.register(self._gate.socket, zmq.POLLIN)
        while not self._worker.closing:
            ready = dict(poller.poll(0 if self._shelf.busy else _TICK_MS))
            now = time.monotonic()
            if self._worker.wake_fd in ready:
                self._worker.drain()
            if self._gate is not None and self._gate.socket in ready:
                self._gate.answer()
            if self._socket in ready:
                self._receive(now)
            if self._shelf.busy:
                self._shelf.work(now)
            self._take_handover(now)
            self._answer_wants(now)
            self._shelf.retire(now)

    def _take_handover(self, now: float) -> None:
        if self._handover is None or not self._shelf.can_put:
            return
        with self._lock:
            state, self._handover = self._handover, None
        assert state is not None
        self._shelf.put(state, now)

    def _receive(self, now: float) -> None:
        peer, *frames = self._socket.recv_multipart(copy=False)
        if self._allowed is not None and str(frames[-1].get("User-Id")).encode() not in self._allowed:
            self.traffic.rejected += 1  # its key was taken off the list after it had come in
            return
        self._hear(peer.bytes, [frame.bytes for frame in frames], now)

    def _hear(self, peer: bytes, frames: list[bytes], now: float) -> None:
        try:
            if len(frames) != 1:
                raise WireError(f"expected one frame a message, got {len(frames)}")
            message = decode(frames[0], self._epoch)
        except OtherEpoch:
            # Stamped with our epoch: that is the answer.
            self._send(peer, Waiting(self._shelf.newest_version, self._progress()))
            return
        except WireError:
            self.traffic.rejected += 1
            return
        if isinstance(message, Want) and (peer in self._wants or len(self._wants) < MAX_WANTS):
            self._wants[peer] = (message, now)
            if not self._answer(peer, message, now):
                self._send(peer, Waiting(self._shelf.newest_version, self._progress()))
                if self._on_want is not None and message.min_version > self._shelf.newest_version:
                    self._on_want(message.min_version)
        elif isinstance(message, Pull):
            self._pull(peer, message, now)
        else:
            self.traffic.rejected += 1

    def _pull(self, peer: bytes, pull: Pull, now: float) -> None:
        payload = self._shelf.find(pull.version, pull.base_digest, now)
        if payload is None:
            self._send(peer, Gone(pull.version))
        elif 0 <= pull.index < payload.manifest.num_chunks:
            self._send(peer, payload.chunk(pull.index))
        else:
            self.traffic.rejected += 1

    def _answer(self, peer: bytes, want: Want, now: float) -> bool:
        if self._shelf.newest_version < want.min_version or self._shelf.newest_version < 0:
            return False
        payload = self._shelf.payload_for(want.base_digest, now)
        if payload is None:
            return False
        self._wants.pop(peer, None)
        self._send(peer, payload.manifest)
        return True

    def _answer_wants(self, now: float) -> None:
        """Answer every Want that can be answered by now; forget those whose sender has gone quiet."""
        for peer, (want, since) in list(self._wants.items()):
            if not self._answer(peer, want, now) and now - since > WANT_LIFE_S:
                del self._wants[peer]

    def _send(self, peer: bytes, reply: Reply) -> None:
        frame = encode(reply, self._epoch)
        try:
            self._socket.send_multipart([peer, frame], zmq.DONTWAIT)
        except zmq.ZMQError as error:
            if error.errno not in (errno.EAGAIN, errno.EHOSTUNREACH):
                raise
            self.traffic.dropped += 1
            return
        self.traffic.bytes_sent += len(frame)
