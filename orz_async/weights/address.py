"""Where weights may be offered: loopback to anyone on this machine, elsewhere only to holders of keys."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import zmq
from zmq.utils import z85

from orz_async.errors import ConfigError, PortError


@dataclass(frozen=True, kw_only=True, slots=True)
class CurveKeys:
    """One side's CURVE keys, Z85 text as bytes."""

    public: bytes
    secret: bytes = field(repr=False)
    server: bytes = b""
    """Fetcher: the publisher's public key."""
    allowed: frozenset[bytes] = frozenset()
    """Publisher: public keys of the fetchers that may connect."""


def is_loopback(address: str) -> bool:
    parts = urlsplit(address)
    if parts.scheme in ("ipc", "inproc"):
        return True
    host = (parts.hostname or "").strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bind(socket: zmq.Socket[bytes], address: str, keys: CurveKeys | None) -> str:
    """Bind and return the actual address. Raises ConfigError or PortError."""
    if keys is None and not is_loopback(address):
        raise ConfigError(
            f"expected a loopback address to offer weights on, got {address}: "
            "anyone who reaches another one could read them; give keys or use tcp://127.0.0.1:0"
        )
    try:
        socket.bind(address)
    except zmq.ZMQError as error:
        raise PortError(f"cannot offer weights on {address}: {error.strerror}; choose another port or 0") from error
    return socket.getsockopt_string(zmq.LAST_ENDPOINT)


def secure_server(socket: zmq.Socket[bytes], keys: CurveKeys) -> None:
    socket.curve_publickey, socket.curve_secretkey = keys.public, keys.secret
    socket.curve_server = True


def secure_client(socket: zmq.Socket[bytes], keys: CurveKeys) -> None:
    socket.curve_publickey, socket.curve_secretkey = keys.public, keys.secret
    socket.curve_serverkey = keys.server


class Gatekeeper:
    """Answers ZeroMQ's authentication requests (RFC 27) of one context from a fixed list of keys."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], allowed: Iterable[bytes]) -> None:
        self._allowed = frozenset(z85.decode(key) for key in allowed)
        self.socket: zmq.Socket[bytes] = context.socket(zmq.REP)
        self.socket.linger = 0
        self.socket.bind("inproc://zeromq.zap.01")

    def answer(self) -> None:
        """Handle one request that is ready on `socket`."""
        frames = self.socket.recv_multipart()
        version, request = frames[0], frames[1]
        mechanism, credentials = frames[5], frames[6:]
        allowed = version == b"1.0" and mechanism == b"CURVE" and credentials and credentials[0] in self._allowed
        code, text = (b"200", b"OK") if allowed else (b"400", b"key is not on the list")
        self.socket.send_multipart([b"1.0", request, code, text, b"", b""])

    def close(self) -> None:
        self.socket.close()
