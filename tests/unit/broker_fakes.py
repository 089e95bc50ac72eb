"""Stand-ins for the broker's neighbours: prompts, a learner's configuration, a generator that answers from the seed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from orz_async.broker.client import BrokerClient
from orz_async.broker.messages import (
    Ack,
    Bye,
    Cancel,
    Grant,
    Hello,
    LeaseRef,
    Nack,
    Progress,
    Published,
    Result,
    Status,
    ToGenerator,
    Welcome,
)
from orz_async.broker.server import Broker, ResumePoint
from orz_async.config import BrokerConfig, Config, DataConfig, EvalConfig, SamplingConfig
from orz_async.keys.curve import CurveKeys
from orz_async.observe.events import EventLog
from orz_async.records import Lease, Prompt, Span, Trajectory, float32_bytes, int32_bytes

VOCAB = 50
HELDOUT = [Prompt(f"held{i}", int32_bytes([i, 1]), str(i)) for i in range(3)]


class CountingPrompts:
    """Prompt i is i, in epochs of ten."""

    def prompt(self, index: int) -> Prompt:
        return Prompt(f"p{index % 10}", int32_bytes([index % 10, 1, 2]), str(index % 10))


def small_config(**broker: object) -> Config:
    fields = {"prompts_per_step": 2, "samples_per_prompt": 2, "heartbeat_s": 0.05, "lease_s": 1.0} | broker
    return Config(
        steps=6,
        data=DataConfig(max_prompt_tokens=16),
        sampling=SamplingConfig(max_new_tokens=8),
        broker=BrokerConfig(**fields),  # type: ignore[arg-type]
        eval=EvalConfig(prompts=3, every=2),
    )


def make_broker(run_dir: Path, config: Config, *, epoch: int = 1, start: ResumePoint | None = None) -> Broker:
    return Broker(
        config=config,
        run_dir=run_dir,
        run_id="run-a",
        epoch=epoch,
        prompts=CountingPrompts(),
        heldout=HELDOUT,
        weights_address="tcp://127.0.0.1:1",
        model_path="model",
        vocab_size=VOCAB,
        events=EventLog.disabled(),
        start=start,
    )


def answer(lease: Lease, name: str, version: int) -> Trajectory:
    """A valid trajectory that is a function of the lease's seed."""
    rng = np.random.default_rng(lease.seed)
    length = int(rng.integers(1, lease.sampling.max_new_tokens))
    return Trajectory(
        kind=lease.kind,
        rollout=lease.rollout,
        attempt=lease.attempt,
        prompt_id=lease.prompt_id,
        sample=lease.sample,
        prompt=lease.prompt,
        response=int32_bytes(rng.integers(0, VOCAB, length)),
        logprobs=float32_bytes(-rng.random(length)),
        spans=(Span(version, 0),),
        reward=float(rng.integers(0, 2)),
        finish="stop",
        verdict="correct",
        generator=name,
        generate_s=0.1,
    )


class FakeGenerator:
    """Answers each lease on the next turn, with the newest version it heard of. Runs in a thread, or turn by turn."""

    def __init__(
        self,
        address: str,
        name: str,
        slots: int = 8,
        *,
        vocab_size: int = VOCAB,
        pid: int = 1,
        relay: str = "",
        host: str = "here",
        keys: Callable[[], CurveKeys] | None = None,
    ) -> None:
        hello = Hello(name, "fake", slots, vocab_size, pid, relay, host)
        self.client = BrokerClient(address, hello, reconnect_s=20.0, events=EventLog.disabled(), keys=keys)
        self.name = name
        self.slots = slots
        self.version = -1
        self.leases: dict[LeaseRef, Lease] = {}
        self.unacked: dict[LeaseRef, Trajectory] = {}
        self.seen: list[ToGenerator] = []
        self.grants: list[tuple[int, LeaseRef]] = []
        """(epoch, lease) of every lease ever received."""
        self.bye: Bye | None = None
        self.mute = False
        """Alive, but produces nothing."""
        self.poison: dict[str, object] = {}
        """Fields that every result gets instead of the right ones."""
        self.epoch = 0
        self._status_at = 0.0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> FakeGenerator:
        self._thread = threading.Thread(target=self._run, name=self.name)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set() and self.bye is None:
            self.turn()
        self.client.close()

    def turn(self, timeout_s: float = 0.01) -> None:
        for message in self.client.poll(timeout_s):
            self.seen.append(message)
            self._take(message)
        if not self.mute:
            for ref, lease in list(self.leases.items()):
                if self.version >= lease.version_floor:
                    result = answer(lease, self.name, self.version)
                    self.unacked[ref] = msgspec.structs.replace(result, **self.poison)
                    self.client.send(Result(self.unacked[ref]))
                    del self.leases[ref]
        if time.monotonic() >= self._status_at:
            self.status()

    def status(self) -> None:
        held = [*self.leases, *self.unacked]
        self.client.send(Status(self.slots, self.version, tuple(Progress(ref, 0, False) for ref in held)))
        self._status_at = time.monotonic() + 0.05

    def _take(self, message: ToGenerator) -> None:
        match message:
            case Welcome():
                if self.client.epoch != self.epoch:
                    self.leases.clear()
                    self.unacked.clear()
                self.epoch, self.version = self.client.epoch, message.version
                self.status()
                for trajectory in self.unacked.values():
                    self.client.send(Result(trajectory))
            case Published():
                if message.version > self.version:
                    self.version = message.version
                    self.status()
            case Grant():
                for lease in message.leases:
                    ref = LeaseRef(lease.kind, lease.rollout, lease.attempt)
                    self.grants.append((self.epoch, ref))
                    if ref not in self.unacked:
                        self.leases[ref] = lease
            case Ack() | Nack():
                self.unacked.pop(message.lease, None)
            case Cancel():
                for ref in message.leases:
                    self.leases.pop(ref, None)
                    self.unacked.pop(ref, None)
            case Bye():
                self.bye = message
