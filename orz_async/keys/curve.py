"""Keys on sockets: CurveZMQ (RFC 26) encrypts and proves who holds a key, the gatekeeper (RFC 27) lets in or not."""

from __future__ import annotations

import ipaddress
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import zmq
from zmq.utils import z85

from orz_async.errors import WireError


@dataclass(frozen=True, kw_only=True, slots=True)
class CurveKeys:
    """One side's CURVE keys, Z85 text as bytes."""

    public: bytes
    secret: bytes = field(repr=False)
    server: bytes = b""
    """The side that connects: public key of the side that listens."""
    allowed: Container[bytes] = frozenset()
    """The side that listens: public keys that may connect. Asked at every handshake, so it may change meanwhile."""


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach it."""
    parts = urlsplit(address)
    if parts.scheme in ("ipc", "inproc"):
        return True
    host = (parts.hostname or "").strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def secure_server(socket: zmq.Socket[bytes], keys: CurveKeys) -> None:
    """Before bind. Without a `Gatekeeper` in the same context anyone who knows the public key gets in."""
    socket.curve_publickey, socket.curve_secretkey = keys.public, keys.secret
    socket.curve_server = True


def secure_client(socket: zmq.Socket[bytes], keys: CurveKeys) -> None:
    """Before connect."""
    if len(keys.server) != 40:
        raise WireError("expected a key file that names the learner's public key; make one with `orz keys new`")
    socket.curve_publickey, socket.curve_secretkey = keys.public, keys.secret
    socket.curve_serverkey = keys.server


class Admitted:
    """A list of public keys that somebody else decides on, empty until then. `key in admitted`, from any thread."""

    def __init__(self) -> None:
        self._keys: frozenset[bytes] = frozenset()

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def replace(self, keys: Iterable[str]) -> None:
        self._keys = frozenset(key.encode() for key in keys)


class Gatekeeper:
    """Answers ZeroMQ's authentication requests of one context. The User-Id of an admitted peer is its public key.

    Open it before the socket that it guards is bound, and call `answer` from the poll loop that serves that socket.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], allowed: Container[bytes]) -> None:
        self._allowed = allowed
        self.refused = 0
        """Handshakes with keys that are not on the list."""
        self.socket: zmq.Socket[bytes] = context.socket(zmq.REP)
        self.socket.linger = 0
        self.socket.bind("inproc://zeromq.zap.01")

    def answer(self) -> None:
        """Handle one request that is ready on `socket`."""
        frames = self.socket.recv_multipart()
        version, request = frames[0], frames[1]
        mechanism, credentials = frames[5], frames[6:]
        key = z85.encode(credentials[0]) if mechanism == b"CURVE" and credentials else b""
        if version == b"1.0" and key and key in self._allowed:
            reply = [b"200", b"OK", key, b""]
        else:
            self.refused += 1
            reply = [b"400", b"key is not on the list", b"", b""]
        self.socket.send_multipart([b"1.0", request, *reply])

    def close(self) -> None:
        self.socket.close()
