"""Where weights may be offered: loopback to anyone on this machine, elsewhere only to holders of keys.

A source is an address, of a relay with keys followed by | and the public key of its socket.
"""

from __future__ import annotations

import zmq

from orz_async.errors import ConfigError, PortError
from orz_async.keys.curve import CurveKeys, Gatekeeper, is_loopback, secure_client, secure_server

__all__ = ["CurveKeys", "Gatekeeper", "bind", "is_loopback", "join_key", "secure_client", "secure_server", "split_key"]


def join_key(address: str, public: bytes) -> str:
    """The source of a relay whose socket has this public key (Z85, which has no | and no comma)."""
    return f"{address}|{public.decode()}"


def split_key(source: str) -> tuple[str, bytes]:
    """Address and public key; the key is empty where the learner's own, or none, is meant."""
    address, _, public = source.partition("|")
    return address, public.encode()


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
