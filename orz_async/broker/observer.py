"""Observer: reads the status of a run and can do nothing else. One question, one answer, each wait bounded."""

from __future__ import annotations

import time

import zmq

from orz_async.broker import wire
from orz_async.broker.messages import Bye, Observe, Report
from orz_async.errors import PeerLostError, WireError
from orz_async.keys.curve import CurveKeys, secure_client


class Observer:
    def __init__(self, address: str, keys: CurveKeys | None = None) -> None:
        """keys: of an observer, if the run has keys."""
        self.address = address
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.maxmsgsize = wire.MAX_TO_GENERATOR
        if keys is not None:
            secure_client(self._socket, keys)
        self._socket.connect(address)

    def ask(self, timeout_s: float = 5.0) -> Report:
        """PeerLostError if nobody answers in time, WireError if we may not ask."""
        self._socket.send(wire.encode(Observe(), run=wire.ANY_RUN, epoch=0, sequence=0), zmq.NOBLOCK)
        until = time.monotonic() + timeout_s
        while self._socket.poll(max(0, int(1000 * (until - time.monotonic())))):
            _, message = wire.decode_to_generator(self._socket.recv())
            if isinstance(message, Report):
                return message
            if isinstance(message, Bye):
                raise WireError(f"expected the status of the run at {self.address}, found: {message.reason}")
        raise PeerLostError(
            f"expected the status of the run at {self.address} within {timeout_s:g} s, heard nothing; "
            "is the learner running, and does it allow this key?"
        )

    def close(self) -> None:
        self._socket.close(0)
        self._context.term()
