"""Where weights may be offered: loopback to anyone on this machine, elsewhere only to holders of keys."""

from __future__ import annotations

import zmq

from orz_async.errors import ConfigError, PortError
from orz_async.keys.curve import CurveKeys, Gatekeeper, is_loopback, secure_client, secure_server

__all__ = ["CurveKeys", "Gatekeeper", "bind", "is_loopback", "secure_client", "secure_server"]


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
