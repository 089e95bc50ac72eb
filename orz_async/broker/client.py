"""BrokerClient: the generator's end of the conversation, non-blocking, for one thread.

A socket lives as long as one TCP connection: it never reconnects by itself, so that every connection begins with a
Hello and the broker never hears a stranger.

    CLOSED   --backoff over-->  CONNECTING  --handshake done, Hello sent-->  GREETING  --Welcome-->  SERVING
    any but CLOSED  --connection lost, damaged frame, silence-->  CLOSED;   any  --Bye, close()-->  ENDED
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import Enum, auto

import msgspec
import zmq
from zmq.utils.monitor import parse_monitor_message

from orz_async.broker import wire
from orz_async.broker.messages import Bye, Hello, Leave, Published, ToBroker, ToGenerator, Welcome
from orz_async.errors import PeerLostError, WireError
from orz_async.keys.curve import CurveKeys, secure_client
from orz_async.observe.events import EventLog

_BACKOFF_S = (0.1, 2.0)
"""First and longest wait before another connection attempt."""
_GREETING_S = 5.0
"""Patience for a connection and for the broker's answer to Hello."""
_PATIENT_REFUSALS = 5
"""A key may be put on the list a moment after its daemon was started."""
_SILENT_HEARTBEATS = 3
_LEAST_SILENCE_S = 3.0
"""A learner that writes a checkpoint to a slow disk is not dead; a closed connection is noticed at once anyway."""
_LOST = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | zmq.EVENT_CONNECT_RETRIED | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
_LOST |= zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH


def weights_at(address: str, broker: str) -> str:
    """A learner that listens on every interface is found where its broker was found."""
    scheme, _, rest = address.partition("://")
    host, _, port = rest.rpartition(":")
    if scheme != "tcp" or host not in ("0.0.0.0", "*", "[::]"):
        return address
    return f"tcp://{broker.partition('://')[2].rpartition(':')[0]}:{port}"


class Phase(Enum):
    CLOSED = auto()
    CONNECTING = auto()
    GREETING = auto()
    SERVING = auto()
    ENDED = auto()


class BrokerClient:
    """Each Welcome that `poll` returns marks a new connection (or a damaged frame): send the results again that were
    not acknowledged; do so too for those that wait for long. If `epoch` differs from before, the learner was
    restarted and all earlier leases are void.
    """

    def __init__(
        self,
        address: str,
        hello: Hello,
        *,
        reconnect_s: float,
        events: EventLog,
        keys: Callable[[], CurveKeys] | None = None,
    ) -> None:
        """keys: asked at every connection, so that a rotated key is used at the next one."""
        self.address = address
        self.hello = hello
        self.reconnect_s = reconnect_s
        self.events = events
        self.phase = Phase.CLOSED
        self._keys = keys
        self._refusals = 0
        """Handshakes in a row that ended because of the keys."""
        self._trouble = ""
        self.epoch = 0
        self.run_id = ""
        """Empty until the first Welcome."""
        self.waiting_since = time.monotonic()
        """When the broker was last heard."""
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None
        self._monitor: zmq.Socket[bytes] | None = None
        self._poller = zmq.Poller()
        self._run = wire.ANY_RUN
        self._sequence = 0
        self._heartbeat_s = 0.0
        self._frame_limit = wire.HEADER_BYTES + wire.LIMITS[Hello]
        self._deadline = 0.0
        """Of the present phase; each frame moves it."""
        self._backoff_s = _BACKOFF_S[0]
        self._greeted_at = 0.0
        self._leaving = False

    def poll(self, timeout_s: float) -> list[ToGenerator]:
        """Messages that have arrived; waits for the first at most so long. PeerLostError after `reconnect_s`."""
        # Look before judging silence: the caller may have been away for longer than the broker may be silent.
        if received := self._receive():
            return received
        now = time.monotonic()
        if now - self.waiting_since > self.reconnect_s:
            raise PeerLostError(
                f"expected a broker at {self.address}, heard nothing for {now - self.waiting_since:.0f} s "
                f"(phase {self.phase.name.lower()}{self._trouble}); is the learner running, at the same address?"
            )
        if self.phase is Phase.ENDED:
            return []
        if now >= self._deadline:
            if self.phase is Phase.CLOSED:
                self._open(now)
            else:
                self._lose("silence")
        wait_s = max(0.0, min(timeout_s, self._deadline - now))
        if self._socket is None:
            time.sleep(wait_s)
            return []
        ready = dict(self._poller.poll(int(wait_s * 1000)))
        received = self._receive()
        if self._monitor is not None and self._monitor in ready and self._watch():
            # What arrived before the connection was lost is still there to be read: a last Bye, for one.
            received += self._receive()
            self._lose("the connection was closed")
        return received

    def send(self, message: ToBroker) -> bool:
        """False if there is no connection or it is full; what matters is sent again after the next Welcome."""
        self._leaving = self._leaving or isinstance(message, Leave)
        return self.phase is Phase.SERVING and self._send(message)

    def close(self) -> None:
        """Idempotent. After a Leave, wait for the broker's Bye (a second at most): hanging up on unread data could
        destroy the Leave on its way.
        """
        deadline = time.monotonic() + 1.0
        while self._leaving and self.phase is Phase.SERVING and (wait_s := deadline - time.monotonic()) > 0:
            self.poll(wait_s)
        self._drop_socket(linger_ms=1000)
        self.phase = Phase.ENDED
        if not self._context.closed:
            self._context.term()

    def _open(self, now: float) -> None:
        socket = self._context.socket(zmq.DEALER)
        options = {
            zmq.LINGER: 0,
            zmq.IMMEDIATE: 1,
            zmq.SNDHWM: 1024,
            zmq.RCVHWM: 1024,
            zmq.MAXMSGSIZE: wire.MAX_TO_GENERATOR,
            zmq.HANDSHAKE_IVL: int(_GREETING_S * 1000),
            zmq.CONNECT_TIMEOUT: int(_GREETING_S * 1000),
            zmq.RECONNECT_IVL: -1,
            zmq.TCP_KEEPALIVE: 1,
            zmq.TCP_KEEPALIVE_IDLE: 30,
            zmq.TCP_KEEPALIVE_INTVL: 10,
            zmq.TCP_KEEPALIVE_CNT: 3,
        }
        for option, value in options.items():
            socket.setsockopt(option, value)
        if self._keys is not None:
            secure_client(socket, self._keys())
        self._monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | _LOST)
        self._socket = socket
        self._poller.register(self._monitor, zmq.POLLIN)
        self._poller.register(socket, zmq.POLLIN)
        try:
            socket.connect(self.address)
        except zmq.ZMQError as error:
            self.close()
            raise WireError(f"expected an address like tcp://HOST:PORT, got {self.address!r}: {error}") from error
        self.phase, self._deadline = Phase.CONNECTING, now + _GREETING_S

    def _watch(self) -> bool:
        """React to what happened to the connection; True if it is lost."""
        lost = False
        while self._monitor is not None:
            try:
                event = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))["event"]
            except zmq.Again:
                return lost
            if event & _LOST:
                # Why it was lost may be said after the fact itself.
                self._note_refusal(event)
                lost = True
            elif self.phase is Phase.CONNECTING:
                self._sequence = 0
                self._send(self.hello)
                self._greeted_at = time.monotonic()
                self.phase, self._deadline = Phase.GREETING, self._greeted_at + _GREETING_S
        return lost

    def _note_refusal(self, event: int) -> None:
        """A broker that never lets us in is not a broker that is away."""
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            self._refusals += 1
            self._trouble = ", the learner does not allow this key"
            if self._refusals >= _PATIENT_REFUSALS:
                self.close()
                raise WireError(
                    f"expected to be let in at {self.address}, found that the learner does not allow this key; "
                    "it was revoked or has ended: ask for a new one (`orz keys new` or `orz keys rotate`)"
                )
        elif event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
            wants = "no keys" if self._keys is not None else "a key: give it with --key"
            self._trouble = f", the handshake failed: perhaps the learner expects {wants}"

    def _receive(self) -> list[ToGenerator]:
        received: list[ToGenerator] = []
        while self._socket is not None:
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            try:
                header, message = wire.decode_to_generator(parts[0])
            except wire.VersionError:
                self.close()
                raise
            except WireError as error:
                self._lose(f"a damaged frame ({error})")
                break
            if isinstance(message, Welcome):
                self._welcomed(header, message)
            elif not isinstance(message, Bye) and (self.phase is not Phase.SERVING or header.epoch != self.epoch):
                continue
            self.waiting_since = time.monotonic()
            self._deadline = self.waiting_since + max(_SILENT_HEARTBEATS * self._heartbeat_s, _LEAST_SILENCE_S)
            received.append(self._as_seen_from_here(message))
            if isinstance(message, Bye):
                self._drop_socket(linger_ms=0)
                self.phase = Phase.ENDED
        return received

    def _as_seen_from_here(self, message: ToGenerator) -> ToGenerator:
        match message:
            case Welcome():
                sources = (weights_at(source, self.address) for source in message.weights_address.split(","))
                return msgspec.structs.replace(message, weights_address=",".join(sources))
            case Published():
                sources = (weights_at(source, self.address) for source in message.sources)
                return msgspec.structs.replace(message, sources=tuple(sources))
        return message

    def _welcomed(self, header: wire.Header, welcome: Welcome) -> None:
        self._run, self.epoch, self.run_id = header.run, header.epoch, welcome.run_id
        self._heartbeat_s = welcome.heartbeat_s
        self._frame_limit = wire.frame_limit(welcome.max_model_tokens)
        self._backoff_s = _BACKOFF_S[0]
        self.phase = Phase.SERVING
        self._refusals, self._trouble = 0, ""
        self.events.emit(
            "welcomed",
            epoch=self.epoch,
            run_id=self.run_id,
            version=welcome.version,
            round_trip_s=time.monotonic() - self._greeted_at,  # clocks are aligned by it
        )

    def _send(self, message: ToBroker) -> bool:
        assert self._socket is not None
        self._sequence += 1
        frame = wire.encode(message, run=self._run, epoch=self.epoch, sequence=self._sequence)
        if len(frame) > self._frame_limit:
            raise WireError(
                f"a {type(message).__name__} of {len(frame)} bytes exceeds this run's limit of {self._frame_limit}"
            )
        try:
            self._socket.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def _lose(self, why: str) -> None:
        """Give the connection up and wait before the next one, unless there was a Bye."""
        if self.phase is Phase.ENDED:
            return
        if self.phase is Phase.SERVING:
            self.events.emit("disconnected", address=self.address, reason=why)
        self._drop_socket(linger_ms=0)
        self.phase, self._deadline = Phase.CLOSED, time.monotonic() + self._backoff_s
        self._backoff_s = min(2 * self._backoff_s, _BACKOFF_S[1])

    def _drop_socket(self, linger_ms: int) -> None:
        if self._socket is None:
            return
        self._poller.unregister(self._socket)
        if self._monitor is not None:
            self._poller.unregister(self._monitor)
            self._socket.disable_monitor()
            self._monitor.close(0)
            self._monitor = None
        self._socket.close(linger_ms)
        self._socket = None
