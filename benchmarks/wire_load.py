"""Generators without an engine, many in one process: every lease is answered at once with a long trajectory.

`python -m benchmarks.wire_load ADDRESS COUNT SLOTS TOKENS VOCAB [KEY]` runs until the broker says goodbye. The response
and its log-probs are made once, so that what is measured is the broker and the wire.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import zmq

from orz_async.broker import wire
from orz_async.broker.messages import Bye, Grant, Hello, Published, Result, Status, ToBroker, Welcome
from orz_async.keys.curve import secure_client
from orz_async.keys.files import read_key
from orz_async.records import Lease, Span, Trajectory, float32_bytes, int32_bytes

_STATUS_S = 0.25


class Sample:
    """What every generator answers."""

    def __init__(self, tokens: int, vocab_size: int) -> None:
        rng = np.random.default_rng(0)
        self.response = int32_bytes(rng.integers(0, vocab_size, tokens))
        self.logprobs = float32_bytes(-rng.random(tokens))

    def trajectory(self, lease: Lease, name: str, version: int) -> Trajectory:
        return Trajectory(
            kind=lease.kind,
            rollout=lease.rollout,
            attempt=lease.attempt,
            prompt_id=lease.prompt_id,
            sample=lease.sample,
            prompt=lease.prompt,
            response=self.response,
            logprobs=self.logprobs,
            spans=(Span(version, 0),),
            reward=1.0,
            finish="length",
            verdict="correct",
            generator=name,
            generate_s=1.0,
        )


class Peer:
    """One connection; keeps what it could not send."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str, name: str, slots: int, key: str) -> None:
        self.name, self.slots, self.version = name, slots, -1
        self.socket = context.socket(zmq.DEALER)
        self.socket.linger = 0
        if key:
            secure_client(self.socket, read_key(Path(key)).keys)
        self.socket.connect(address)
        self.run, self.epoch, self.sequence = wire.ANY_RUN, 0, 0
        self.waiting: list[Lease] = []
        self.send(Hello(name, "load", slots, 0, 1))

    def send(self, message: ToBroker) -> None:
        self.sequence += 1
        frame = wire.encode(message, run=self.run, epoch=self.epoch, sequence=self.sequence)
        self.socket.send(frame, copy=False)

    def status(self) -> None:
        if self.version >= 0:
            self.send(Status(self.slots, self.version, ()))

    def turn(self, sample: Sample) -> bool:
        """Handle what has arrived; False after a Bye."""
        while True:
            try:
                frame = self.socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return True
            header, message = wire.decode_to_generator(frame)
            match message:
                case Welcome():
                    self.run, self.epoch, self.version = header.run, header.epoch, message.version
                    self.status()
                case Published():
                    if message.version > self.version:
                        self.version = message.version
                        self.status()
                case Grant():
                    for lease in message.leases:
                        self.send(Result(sample.trajectory(lease, self.name, max(self.version, lease.version_floor))))
                case Bye():
                    return False


def main(address: str, count: int, slots: int, tokens: int, vocab_size: int, key: str = "") -> None:
    sample = Sample(tokens, vocab_size)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    poller = zmq.Poller()
    prefix = "load." if key else ""
    peers = {}
    for i in range(count):
        peer = Peer(context, address, f"{prefix}{i}", slots, key)
        peers[peer.socket] = peer
        poller.register(peer.socket, zmq.POLLIN)
    beat = 0.0
    while peers:
        for socket, _ in poller.poll(100):
            if not peers[socket].turn(sample):
                poller.unregister(socket)
                peers.pop(socket).socket.close(0)
        if (now := time.monotonic()) >= beat:
            beat = now + _STATUS_S
            for peer in peers.values():
                peer.status()
    context.term()


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[2:6]]
    main(sys.argv[1], numbers[0], numbers[1], numbers[2], numbers[3], *sys.argv[6:])
