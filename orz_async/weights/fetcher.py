"""The receiving half of the stream: a thread that fetches while the engine goes on generating."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import zmq

from orz_async.errors import WireError
from orz_async.weights import address as addresses
from orz_async.weights.download import Action, Download, Reopen
from orz_async.weights.manifest import Limits
from orz_async.weights.protocol import EventSink, Snapshot
from orz_async.weights.snapshot import State
from orz_async.weights.wire import REPLY_BYTES, OtherEpoch, OtherWireVersion, decode, encode
from orz_async.weights.worker import Worker

_TICK_MS = 100


class StreamFetcher:
    """Fetches the newest version whenever one is wanted.

    consumes  `want`, frames from the publisher     waits for  either, at most a tenth of a second
    produces  verified snapshots for `poll`          waits for  nothing: only the newest is kept
    ends      with `close`, or with an error that `poll` raises: another protocol, a manifest over the limits, damage
              again and again, or no answer for `give_up_s`
    """

    def __init__(
        self,
        address: str | Sequence[str],
        epoch: int,
        events: EventSink,
        *,
        keys: addresses.CurveKeys | Callable[[], addresses.CurveKeys] | None = None,
        limits: Limits | None = None,
        stall_s: float = 5.0,
        give_up_s: float = 600.0,
        on_state: Callable[[State], None] | None = None,
    ) -> None:
        """address: of the publisher; or several sources, best first, relays and at last the publisher they lead to.

        keys: a function is asked at every connection, so that a rotated key is used at the next one.
        on_state: called from the thread with each complete version.
        """
        self._on_state = on_state
        self._epoch, self._events, self._keys = epoch, events, keys
        self._server_keys: dict[str, bytes] = {}
        """Of relays, by address. A public key was told by the broker, so nobody can stand in for that relay."""
        self._download = Download(
            self._addresses_of([address] if isinstance(address, str) else address),
            limits=limits if limits is not None else Limits(),
            stall_s=stall_s,
            give_up_s=give_up_s,
        )
        self.received_bytes = 0
        """Of all frames since the start, resumed and abandoned transfers included."""
        self._wanted = -1  # written by want, read by the thread
        self._news: deque[tuple[int, str, tuple[str, ...]]] = deque(maxlen=16)  # the same; old news is no loss
        self._ready: Snapshot | None = None
        self._lock = threading.Lock()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None
        self._monitor: zmq.Socket[bytes] | None = None
        self._connections = 0  # of this socket
        self._worker = Worker(f"weights-fetcher-{epoch}", self._loop, self._release, events)
        self._worker.start()

    @property
    def progress(self) -> int:
        """Changes while something is on its way here, from the peer or to it."""
        return self._download.progress

    def want(self, version: int, digest: str = "", sources: Sequence[str] = ()) -> None:
        """Fetch the newest version, at least this one. A later call with a newer version supersedes."""
        with self._lock:  # a relay's readers want versions too, from another thread
            self._wanted = max(self._wanted, version)
            self._news.append((version, digest, tuple(sources)))
        self._worker.wake()

    def poll(self) -> Snapshot | None:
        """The newest complete version not handed out yet. Raises what ended the fetcher."""
        with self._lock:
            ready, self._ready = self._ready, None
        if ready is None:
            self._worker.check()
        return ready

    def waiting_for(self) -> str:
        """One line: what is awaited, from whom, since when."""
        return self._download.waiting_for(time.monotonic())

    def close(self) -> None:
        """End the thread and close the socket; an unfinished transfer is dropped."""
        self._worker.close()

    def _release(self) -> None:
        self._disconnect()
        self._context.term()

    def _loop(self) -> None:
        self._connect()
        while not self._worker.closing:
            poller = zmq.Poller()
            poller.register(self._worker.wake_fd, zmq.POLLIN)
            if self._socket is not None and self._monitor is not None:
                poller.register(self._socket, zmq.POLLIN)
                poller.register(self._monitor, zmq.POLLIN)
            ready = dict(poller.poll(_TICK_MS))
            now = time.monotonic()
            if self._worker.wake_fd in ready:
                self._worker.drain()
            self._listen(now)
            self._act(self._download.want(self._wanted, now))
            if self._monitor is not None and self._monitor in ready:
                self._observe(self._monitor, now)
            if self._socket is not None and self._socket in ready:
                self._receive(self._socket, now)
            self._act(self._download.tick(now))

    def _listen(self, now: float) -> None:
        """Take in what `want` was told."""
        while self._news:
            version, digest, sources = self._news.popleft()
            self._download.digests.learn(version, digest)
            peer, known = self._download.peer, self._server_keys
            self._act(self._download.route(self._addresses_of(sources), now))
            if self._download.peer == peer and known.get(peer) != self._server_keys.get(peer) and self._socket:
                # The relay was started anew where it was: this connection would knock with the old key for ever.
                self._disconnect()
                self._connect()
                self._act(self._download.reconnected(now))

    def _addresses_of(self, sources: Sequence[str]) -> list[str]:
        """The addresses of these sources, whose keys are those to use from now on."""
        split = [addresses.split_key(source) for source in sources]
        if split:
            self._server_keys = {address: public for address, public in split if public}
        return [address for address, _ in split]

    def _observe(self, monitor: zmq.Socket[bytes], now: float) -> None:
        """ZeroMQ connects again by itself after a cut, but what was asked on the old connection is lost."""
        monitor.recv_multipart()
        self._connections += 1
        if self._connections > 1:
            self._act(self._download.reconnected(now))

    def _receive(self, socket: zmq.Socket[bytes], now: float) -> None:
        parts = socket.recv_multipart(copy=False)
        self.received_bytes += sum(len(part.buffer) for part in parts)
        try:
            if len(parts) != 1:
                raise WireError(f"expected one frame a message, got {len(parts)}")
            message = decode(parts[0].buffer, self._epoch)
        except OtherWireVersion:
            raise
        except OtherEpoch as error:
            # Silence, as far as this epoch is concerned: the broker's Welcome tells the daemon of the new one.
            self._download.note = str(error)
            return
        except WireError as error:
            self._events.emit("weights_frame_refused", reason=str(error), peer=self._download.peer)
            self._act(self._download.rest(now, str(error)))
            return
        self._act(self._download.handle(message, now))
        self._hand_out()

    def _hand_out(self) -> None:
        manifest, state = self._download.done, self._download.base
        if manifest is None or state is None:
            return
        self._download.done = None
        snapshot = Snapshot(
            version=state.version,
            epoch=self._epoch,
            tensors=dict(state.tensors),
            digest=state.digest,
            bytes=manifest.payload_bytes,
            fetch_s=time.monotonic() - self._download.started,
            base_version=manifest.base_version,
            source=self._download.peer,
            specs=state.specs,
        )
        with self._lock:
            self._ready = snapshot
        if self._on_state is not None:
            self._on_state(state)

    def _act(self, actions: Iterable[Action]) -> None:
        for action in actions:
            if action is Reopen.CLOSE:
                self._disconnect()
                self._events.emit("weights_reconnect", reason=self._download.note, next=self._download.peer)
            elif action is Reopen.OPEN:
                self._connect()
            elif action is Reopen.MOVE:
                self._disconnect()
                self._connect()
            elif self._socket is not None:
                self._send(self._socket, encode(action, self._epoch))

    def _send(self, socket: zmq.Socket[bytes], frame: bytearray) -> None:
        try:
            socket.send(frame, zmq.DONTWAIT)
        except zmq.Again:
            return  # no connection and a full queue: the silence that follows reopens the socket

    def _connect(self) -> None:
        socket = self._context.socket(zmq.DEALER)
        socket.linger = 0
        socket.sndhwm = 64
        socket.rcvhwm = 16
        socket.maxmsgsize = REPLY_BYTES
        socket.heartbeat_ivl = 2000
        socket.heartbeat_timeout = 10000
        if self._keys is not None:
            keys = self._keys() if callable(self._keys) else self._keys
            server = self._server_keys.get(self._download.peer, keys.server)
            addresses.secure_client(socket, dataclasses.replace(keys, server=server))
        self._monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        self._connections = 0
        socket.connect(self._download.peer)
        self._socket = socket

    def _disconnect(self) -> None:
        if self._socket is not None and self._monitor is not None:
            self._socket.disable_monitor()
            self._monitor.close(linger=0)
            self._socket.close()
        self._socket = self._monitor = None
