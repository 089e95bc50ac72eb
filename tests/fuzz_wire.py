"""Mutated frames through the broker's ears: decode, validation, ledger. `python -m tests.fuzz_wire 1000000 --seed 0`.

A frame of a living conversation (the corpus is made anew from it every so often: a dozen frames of a few hundred
bytes) is damaged as bytes or as MessagePack values, most often given a good checksum again, and handed to the real
`Reception` in front of a real `Ledger`. Whatever it is, nothing may be raised, what is accepted must be what a lease
asked for, the ledger's account must add up, and memory must stay bounded: for a frame while it is looked at, and in
total. The same seed gives the same frames.
"""

from __future__ import annotations

import argparse
import random
import struct
import sys
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
import zmq

from orz_async.broker import wire
from orz_async.broker.leases import LeaseMaker, ledger_config
from orz_async.broker.ledger import Ledger
from orz_async.broker.messages import (
    Failure,
    Hello,
    LeaseRef,
    Leave,
    Observe,
    Progress,
    Published,
    Report,
    Result,
    Status,
    ToGenerator,
    Welcome,
)
from orz_async.broker.reception import Received, Reception
from orz_async.broker.standing import Standings
from orz_async.broker.switchboard import Arrived, Switchboard
from orz_async.broker.transitions import Accepted, Ended, Event, Publish, Take, Taken, Tick
from orz_async.config import BrokerConfig, Config, EvalConfig, SamplingConfig
from orz_async.crc import crc32c
from orz_async.observe.events import EventLog
from orz_async.records import Lease, Prompt, Span, Trajectory, as_float32, as_int32, float32_bytes, int32_bytes

VOCAB, LONGEST = 50, 8
RSS_GROWTH = 64 << 20
"""Bytes by which the process may grow after the warm-up."""
FRAME_FACTOR, FRAME_BASE = 64, 256 << 10
"""Bytes allocated while one frame is looked at: at most this many times its length, and so much."""
WARM_UP = 5_000
_HEADER = struct.Struct("<4sHH16sIQI")
_BOMBS = [bytes.fromhex(text) for text in ("dd7fffffff", "dfffffffff", "c6ffffffff", "dbffffffff", "c9ffffffff00")]
_BYTES = [0x00, 0x01, 0x7F, 0x80, 0x90, 0x9F, 0xC0, 0xC1, 0xC4, 0xCA, 0xCF, 0xD3, 0xDC, 0xE0, 0xFF]
_FLOATS = [struct.pack("<f", x) for x in (float("nan"), float("inf"), float("-inf"), 1e38, 1e-45, 0.5)]
_VALUES: list[object] = [
    *(-1, 0, 1, 2, 7, 8, 255, 8192, 8193, 2**31, 2**63 - 1, 2**64 - 1, -(2**63)),
    *(
        float("nan"),
        float("inf"),
        -0.0,
        1.5,
        1e308,
        True,
        None,
        "",
        "x" * 65,
        "\x00",
        "\u202e",
        "eval",
        "train",
        "stop",
    ),
    *(b"", b"\x00" * 4, b"\xff" * 4, b"abc", b"\x00" * 400, [], [[]], {}, {"a": 1}, [0, 0], [[0, 0], [0, 0]]),
]


class Prompts:
    def prompt(self, index: int) -> Prompt:
        return Prompt(f"p{index % 10}", int32_bytes([index % 10, 1]), "4")


class Deaf(Switchboard):
    """Speaks to nobody, but encodes what it would say."""

    def send_to(self, identity: bytes, message: ToGenerator) -> bool:
        wire.encode(message, run=self.run, epoch=self.epoch, sequence=1)
        return True


class Mutator:
    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def damaged(self, frame: bytes, other: bytes) -> bytes:
        rng = self.rng
        head, body = bytearray(frame[: wire.HEADER_BYTES]), frame[wire.HEADER_BYTES :]
        how = rng.random()
        if how < 0.35:
            body = self._bytes(body, other[wire.HEADER_BYTES :])
        elif how < 0.95:
            value = msgspec.msgpack.decode(body)
            for _ in range(rng.randint(1, 3)):
                value = self._fields(value) if rng.random() < 0.9 else self._value(value)
            body = msgspec.msgpack.encode(value)
        if rng.random() < 0.1:
            head[rng.randrange(len(head))] = rng.randrange(256)
        elif rng.random() < 0.9:
            head[36:40] = struct.pack("<I", crc32c(body))
        whole = bytes(head) + body
        return whole[: rng.randrange(len(whole) + 1)] if rng.random() < 0.03 else whole

    def _bytes(self, body: bytes, other: bytes) -> bytes:
        rng, data = self.rng, bytearray(body)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data) + 1)
            end = min(len(data), at + rng.randint(1, 16))
            match rng.randrange(8):
                case 0 if at < len(data):
                    data[at] ^= 1 << rng.randrange(8)
                case 1 if at < len(data):
                    data[at] = rng.choice(_BYTES)
                case 2:
                    del data[at:end]
                case 3:
                    data[at:at] = rng.randbytes(rng.randint(1, 16))
                case 4:
                    data[at:at] = data[at:end] * rng.choice((1, 2, 50))
                case 5:
                    data[at:] = other[rng.randrange(len(other) + 1) :]
                case 6:
                    data[at:end] = rng.choice(_BOMBS)
                case 7:
                    data[at : at + 4] = rng.choice(_FLOATS)
        return bytes(data)

    def _value(self, value: object) -> object:
        """The same structure with one place changed."""
        rng = self.rng
        if isinstance(value, list) and value and rng.random() < 0.95:
            at = rng.randrange(len(value))
            copy = list(value)
            match rng.randrange(20):
                case 0:
                    del copy[at]
                case 1:
                    copy.insert(at, rng.choice(_VALUES))
                case 2:
                    copy[at:at] = [copy[at]] * rng.choice((1, 10, 300))
                case _:
                    copy[at] = self._value(copy[at])
            return copy
        if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.5:
            return max(-(2**63), min(2**64 - 1, value + rng.choice((-1, 1, 2, 1000))))
        if isinstance(value, bytes) and value and rng.random() < 0.7:
            return rng.choice((value * 2, value[:4], value[4:], self._bytes(value, value), self._floats(value)))
        alike = [other for other in _VALUES if type(other) is type(value)]
        return rng.choice(alike if alike and rng.random() < 0.8 else _VALUES)

    def _fields(self, value: object) -> object:
        """Not the name of the message: another one only ends the matter early."""
        if not isinstance(value, list) or len(value) < 2:
            return self._value(value)
        rest = self._value(value[1:])
        return [value[0], *(rest if isinstance(rest, list) else [rest])]

    def _floats(self, value: bytes) -> bytes:
        at = 4 * self.rng.randrange(len(value) // 4 + 1)
        return value[:at] + self.rng.choice(_FLOATS) + value[at + 4 :]


class Fuzz:
    """One conversation that goes wrong all the time."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.mutator = Mutator(self.rng)
        self.outcomes: Counter[str] = Counter()
        self.now = 0.0
        self.announced = 0
        broker = BrokerConfig(
            prompts_per_step=4,
            samples_per_prompt=2,
            max_lag=2,
            window=1,
            lease_s=1.0,
            heartbeat_s=0.25,
        )
        config = Config(
            steps=10**9, broker=broker, sampling=SamplingConfig(max_new_tokens=LONGEST), eval=EvalConfig(every=0)
        )
        self.leases = LeaseMaker(config, Prompts(), [])
        self.ledger = Ledger(ledger_config(config, 0), self.leases.prompt_id)
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.switchboard = Deaf(self.context, "fuzz", 1, 64)
        welcome = Welcome("fuzz", "model", (), "tcp://127.0.0.1:1", 0, 0.5, 64)
        self.reception = Reception(
            self.ledger, self.leases, self.switchboard, EventLog.disabled(), vocab_size=VOCAB, welcome=welcome
        )
        self.sequence = 1
        self.corpus: list[bytes] = []
        self.handle(Publish(0))
        self.handle(Take(0))

    def close(self) -> None:
        self.switchboard.close(0)
        self.context.term()

    # What the reception needs of a service.

    def handle(self, event: Event) -> list[object]:
        actions: list[object] = list(self.ledger.handle(event, self.now))
        for action in list(actions):
            if isinstance(action, Ended) and action.cause == "rejected":
                self.outcomes["refused results"] += 1
            if isinstance(action, Taken):
                self.announced = action.step + 1
                actions += self.handle(Publish(action.step + 1)) + self.handle(Take(action.step + 1))
        return actions

    def apply(self, event: Event, result: Received | None = None) -> None:
        for action in self.handle(event):
            if isinstance(action, Accepted):
                assert result is not None
                self._check_accepted(action, result)
                self.outcomes["accepted results"] += 1

    def report(self) -> Report:
        return Report("fuzz", 0, "", 0, 0, 0, 0, {}, ())

    def _check_accepted(self, accepted: Accepted, result: Received) -> None:
        """By other means than `validate.py`: what counts is finite, in range and of this lease."""
        t = result.trajectory
        tokens, logprobs = as_int32(t.response), as_float32(t.logprobs)
        assert 0 < len(tokens) == len(logprobs) <= LONGEST and tokens.min() >= 0 and tokens.max() < VOCAB
        assert np.isfinite(logprobs).all() and logprobs.max() < 1e-3 and -1 <= t.reward <= 1
        assert (t.kind, t.rollout, t.attempt) == (accepted.lease.kind, accepted.lease.rollout, accepted.lease.attempt)
        assert accepted.version_first == t.spans[0].version <= self.announced
        if result.encoded is not None:
            assert msgspec.msgpack.decode(result.encoded, type=Trajectory) == t

    # Frames.

    def run(self, count: int) -> None:
        for number in range(count):
            if number % 64 == 0 or b"peer" not in self.switchboard.by_identity:
                self._renew()
            self.now += 0.01
            frame = self.rng.choice(self.corpus)
            if self.rng.random() < 0.97:
                frame = self.mutator.damaged(frame, self.rng.choice(self.corpus))
            self._hear(frame)
            if number % 1024 == 0:
                self.handle(Tick())
                counts = self.ledger.book.counts
                held = sum(len(peer.held) for peer in self.ledger.peers.values())
                assert counts.in_flight == held + self.ledger.book.num_ready + len(self.ledger.book.taken), counts

    def _hear(self, frame: bytes) -> None:
        self.sequence += 1
        if len(frame) >= wire.HEADER_BYTES and self.rng.random() < 0.8:
            head = list(_HEADER.unpack_from(frame))
            head[3:6] = self.switchboard.run, 1, self.sequence
            frame = _HEADER.pack(*head) + frame[wire.HEADER_BYTES :]
        before = self._rejections()
        try:
            self.reception.receive(Arrived(b"peer", 1, memoryview(frame), b""), self, self.now)
        except Exception as error:
            # The edge of the fuzzer: the frame is what somebody needs to see.
            raise AssertionError(f"{error!r} after {sum(self.outcomes.values())} frames, at {frame.hex()}") from error
        rejected = self._rejections() > before
        self.outcomes["rejected" if rejected else "handled"] += 1
        if rejected and self.rng.random() < 0.9:
            self.reception.standings = Standings()  # one that is soon shown the door would see little

    def _rejections(self) -> float:
        connection = self.switchboard.by_identity.get(b"peer")
        return float("inf") if connection is None else self.reception.standings[connection.owner].rejections

    def _renew(self) -> None:
        """A peer in good standing that is welcome, and frames that fit the conversation as it is now."""
        self.reception.standings = Standings()
        self._hear_plain(Hello("peer", "fuzz", 8, VOCAB, 1))
        version = self.announced
        self._hear_plain(Status(8, version, ()))
        held = [self.leases.lease(rollout.terms) for rollout in self.ledger.peers["peer"].held.values()]
        refs = [LeaseRef(lease.kind, lease.rollout, lease.attempt) for lease in held]
        status = Status(8, version, tuple(Progress(ref, 1, False) for ref in refs))
        messages: list[wire.Message] = [Hello("peer", "fuzz", 8, VOCAB, 1), status, Leave("bye"), Observe()]
        messages += [status, Published(version), *(Failure(ref, "no", True) for ref in refs[:1])]
        messages += [Result(self._answer(lease)) for lease in held] * 2
        self.corpus = [wire.encode(message, run=self.switchboard.run, epoch=1, sequence=1) for message in messages]

    def _hear_plain(self, message: wire.Message) -> None:
        self.sequence += 1
        frame = wire.encode(message, run=self.switchboard.run, epoch=1, sequence=self.sequence)
        self.reception.receive(Arrived(b"peer", 1, memoryview(frame), b""), self, self.now)

    def _answer(self, lease: Lease) -> Trajectory:
        length = self.rng.randint(1, LONGEST - 1)
        version = max(lease.version_floor, self.announced)
        return Trajectory(
            kind=lease.kind,
            rollout=lease.rollout,
            attempt=lease.attempt,
            prompt_id=lease.prompt_id,
            sample=lease.sample,
            prompt=lease.prompt,
            response=int32_bytes([self.rng.randrange(VOCAB) for _ in range(length)]),
            logprobs=float32_bytes([-self.rng.random() for _ in range(length)]),
            spans=(Span(version, 0),),
            reward=1.0,
            finish="stop",
            verdict="correct",
            generator="peer",
            generate_s=0.1,
        )


def largest_allocation(seed: int, count: int) -> float:
    """Bytes allocated while a frame is looked at, as a share of what it may be: the largest of `count` frames."""
    fuzz = Fuzz(seed)
    fuzz.run(64)
    worst = 0.0
    tracemalloc.start()
    try:
        for number in range(count):
            if number % 64 == 0:
                fuzz._renew()
            frame = fuzz.mutator.damaged(fuzz.rng.choice(fuzz.corpus), fuzz.rng.choice(fuzz.corpus))
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            fuzz._hear(frame)
            peak = tracemalloc.get_traced_memory()[1] - before
            worst = max(worst, peak / (FRAME_FACTOR * len(frame) + FRAME_BASE))
    finally:
        tracemalloc.stop()
        fuzz.close()
    return worst


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz_wire", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("count", nargs="?", type=int, default=1_000_000, help="frames (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    share = largest_allocation(options.seed, min(options.count // 50, 20_000))
    fuzz = Fuzz(options.seed)
    fuzz.run(WARM_UP)
    before, started = resident(), time.monotonic()
    for done in range(0, options.count, 50_000):
        fuzz.run(min(50_000, options.count - done))
        print(f"{min(done + 50_000, options.count):>9,} frames, {dict(fuzz.outcomes)}", flush=True)
    seconds, growth = time.monotonic() - started, resident() - before
    fuzz.close()
    print(
        f"{options.count:,} mutated frames in {seconds:.0f} s ({options.count / seconds:,.0f}/s), seed {options.seed}"
    )
    print(f"memory: grew by {growth / 2**20:.1f} MiB in all, at most {share:.0%} of what one frame may take")
    if growth > RSS_GROWTH or share > 1:
        sys.exit("memory is not bounded")


if __name__ == "__main__":
    main(sys.argv[1:])
