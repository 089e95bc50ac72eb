"""The ROUTER socket and who is behind each of its connections. Frames in, messages out; no meaning."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple
from urllib.parse import urlsplit

import zmq

from orz_async.broker import wire
from orz_async.broker.messages import Bye, Hello, ToGenerator
from orz_async.errors import ConfigError, PortError
from orz_async.keys.curve import CurveKeys, Gatekeeper, is_loopback, secure_server

_RATE_S = 10.0
"""Time constant of a generator's tokens/s."""


@dataclass(slots=True, eq=False)
class Connection:
    """One TCP connection of a generator, from its Hello on."""

    identity: bytes
    hello: Hello
    since: float
    heard: float
    sent: float
    received: int = 0
    """Sequence number of the last frame."""
    version: int = -1
    slots: int = 0
    key: bytes = b""
    """Public key that its frames must come with; empty without keys."""
    tokens: int = 0
    """Of accepted results."""
    _rate: float = 0.0
    _rated: float = field(default=0.0)
    owner: str = ""
    """Whose standing it shares: the name of its key, or without keys its own."""

    @property
    def name(self) -> str:
        return self.hello.name

    def count_tokens(self, tokens: int, now: float) -> None:
        self._rate = self.rate(now) + tokens / _RATE_S
        self._rated = now
        self.tokens += tokens

    def rate(self, now: float) -> float:
        """Tokens per second of accepted results, exponentially averaged."""
        return self._rate * math.exp((self._rated - now) / _RATE_S)


class Arrived(NamedTuple):
    """One message as it came, not looked into."""

    identity: bytes
    """Of the connection, chosen by ZeroMQ."""
    frames: int
    frame: memoryview
    """The first one."""
    key: bytes
    """Public key of the sender, proven by the handshake; empty without keys."""


def check_bind(address: str, keyed: bool) -> None:
    """Only loopback without keys: anyone who reaches the port could feed the learner."""
    parts = urlsplit(address)
    if parts.scheme != "tcp" or not parts.hostname:
        raise ConfigError(f"broker.bind must look like tcp://127.0.0.1:PORT, got {address!r}")
    if not keyed and not is_loopback(address):
        raise ConfigError(
            f"broker.bind = {address!r} would let anyone in who reaches this machine; set broker.keys to a folder made "
            "by `orz keys new NAME`, or bind tcp://127.0.0.1:PORT"
        )


class Switchboard:
    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        run_id: str,
        epoch: int,
        max_model_tokens: int,
        keys: CurveKeys | None = None,
    ) -> None:
        self.run = wire.run_hash(run_id)
        self.epoch = epoch
        self.by_identity: dict[bytes, Connection] = {}
        self.by_name: dict[str, Connection] = {}
        self.broken: list[str] = []
        """Generators whose connection turned out to be closed, until the service has dealt with it."""
        self.unsent = 0
        """Frames a full or closed connection did not take. The protocol repeats what matters."""
        self._sequence = 0
        self._keyed = keys is not None
        # Before the socket listens: without a gatekeeper ZeroMQ lets every key in.
        self.gate = Gatekeeper(context, keys.allowed) if keys is not None else None
        self.socket = context.socket(zmq.ROUTER)
        options = {
            zmq.ROUTER_MANDATORY: 1,
            zmq.LINGER: 1000,
            zmq.IMMEDIATE: 1,
            zmq.SNDHWM: 4096,
            zmq.RCVHWM: 256,
            zmq.MAXMSGSIZE: wire.frame_limit(max_model_tokens),
            zmq.HANDSHAKE_IVL: 5000,
            zmq.TCP_KEEPALIVE: 1,
            zmq.TCP_KEEPALIVE_IDLE: 30,
            zmq.TCP_KEEPALIVE_INTVL: 10,
            zmq.TCP_KEEPALIVE_CNT: 3,
        }
        for option, value in options.items():
            self.socket.setsockopt(option, value)
        if keys is not None:
            secure_server(self.socket, keys)

    def bind(self, address: str, last: str = "") -> str:
        """Listen there; with port 0 at the `last` address if it is free, where generators wait for a new learner."""
        host = address.removesuffix(":0")
        if host != address and last.startswith(f"{host}:"):
            with suppress(zmq.ZMQError):
                self.socket.bind(last)
                return last
        try:
            self.socket.bind(address)
        except zmq.ZMQError as error:
            self.close(linger_ms=0)
            raise PortError(
                f"expected to listen on broker.bind = {address}, found: {error.strerror}; "
                "stop the process that holds the port or use port 0 for a free one"
            ) from error
        return self.socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def arrived(self, most: int) -> Iterator[Arrived]:
        """The messages that have arrived, at most so many. A frame is valid as long as somebody holds it."""
        receive = self.socket.recv
        for _ in range(most):
            try:
                identity = receive(zmq.NOBLOCK)
            except zmq.Again:
                return
            # A multipart message arrives whole, so its other frames are there. Not copied: a result is long.
            frame = receive(copy=False)
            count, rest = 1, frame
            while rest.more:
                count, rest = count + 1, receive(copy=False)
            yield Arrived(identity, count, frame.buffer, self._key_of(frame))

    def _key_of(self, frame: zmq.Frame) -> bytes:
        if not self._keyed:
            return b""
        return str(frame.get("User-Id")).encode()

    def connect(self, connection: Connection) -> None:
        if old := self.by_name.pop(connection.name, None):
            self.by_identity.pop(old.identity, None)
        self.by_identity[connection.identity] = self.by_name[connection.name] = connection

    def disconnect(self, connection: Connection) -> None:
        self.by_identity.pop(connection.identity, None)
        if self.by_name.get(connection.name) is connection:
            del self.by_name[connection.name]

    def send(self, name: str, message: ToGenerator, now: float) -> None:
        connection = self.by_name.get(name)
        if connection is None:
            self.unsent += 1
        elif self.send_to(connection.identity, message):
            connection.sent = now
        elif connection.identity not in self.by_identity:
            self.broken.append(name)

    def send_to(self, identity: bytes, message: ToGenerator) -> bool:
        """False if the connection is full or gone; if it is gone it is forgotten."""
        self._sequence += 1
        frame = wire.encode(message, run=self.run, epoch=self.epoch, sequence=self._sequence)
        try:
            self.socket.send_multipart([identity, frame], zmq.NOBLOCK)
        except zmq.Again:
            self.unsent += 1
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self.unsent += 1
            if connection := self.by_identity.get(identity):
                self.disconnect(connection)
            return False
        return True

    def say_goodbye(self, bye: Bye, patience_s: float) -> None:
        """Send Bye to all, and read what they still send until they have hung up.

        Closing a TCP connection that has unread data resets it, and the reset destroys a Bye on its way.
        """
        for identity in list(self.by_identity):
            self.send_to(identity, bye)
        deadline = time.monotonic() + patience_s
        while self.by_identity and time.monotonic() < deadline:
            self.socket.poll(10)
            for _ in self.arrived(1000):
                pass
            for identity in list(self.by_identity):
                # A probe that finds the connection closed forgets it.
                self.send_to(identity, bye)

    def close(self, linger_ms: int | None = None) -> None:
        self.socket.close(linger_ms)
        if self.gate is not None:
            self.gate.close()
