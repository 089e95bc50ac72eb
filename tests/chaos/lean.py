"""`python -m tests.chaos.lean --connect ADDRESS --name NAME`: a generator that costs a quarter of a second to start.

No torch, no model: it speaks through the real BrokerClient and answers leases with random tokens after a while, partly
under the next version when one is published meanwhile. With --poison its results hold what no learner may train on.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass

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
from orz_async.errors import WireError
from orz_async.observe.events import EventLog
from orz_async.observe.process import run_main
from orz_async.records import Lease, Span, Trajectory, float32_bytes, int32_bytes

POISONS: dict[str, dict[str, object]] = {
    "nan-reward": {"reward": float("nan")},
    "inf-reward": {"reward": float("inf")},
    "nan-logprob": {"logprobs": np.nan},
    "inf-logprob": {"logprobs": -np.inf},
}
RESEND_S = 2.0


@dataclass(slots=True)
class Work:
    lease: Lease
    began: float
    due: float
    version: int


class Lean:
    def __init__(self, address: str, name: str, slots: int, delay_s: tuple[float, float], poison: str) -> None:
        self.client = BrokerClient(
            address, Hello(name, "lean", slots, 0, os.getpid()), reconnect_s=300.0, events=EventLog.disabled()
        )
        self.name, self.slots, self.delay_s = name, slots, delay_s
        self.poison = POISONS.get(poison, {})
        self.rng = np.random.default_rng(os.getpid())
        self.version = self.epoch = -1
        self.heartbeat_s = 0.2
        self.held: dict[LeaseRef, Work] = {}
        self.unacked: dict[LeaseRef, tuple[float, Trajectory]] = {}
        self.status_at = 0.0

    def run(self) -> int:
        while True:
            for message in self.client.poll(0.02):
                if isinstance(message, Bye):
                    self.client.close()
                    if not message.finished:
                        raise WireError(message.reason)
                    return 0
                self.take(message)
            self.work(time.monotonic())

    def take(self, message: ToGenerator) -> None:
        now = time.monotonic()
        match message:
            case Welcome():
                if self.client.epoch != self.epoch:
                    self.epoch = self.client.epoch
                    self.held.clear()
                    self.unacked.clear()
                self.version, self.heartbeat_s, self.status_at = message.version, message.heartbeat_s, 0.0
                self.unacked = {ref: (0.0, result) for ref, (_, result) in self.unacked.items()}
            case Published():
                if message.version > self.version:
                    self.version, self.status_at = message.version, 0.0
            case Grant():
                for lease in message.leases:
                    ref = LeaseRef(lease.kind, lease.rollout, lease.attempt)
                    if ref not in self.unacked:
                        due = now + float(self.rng.uniform(*self.delay_s))
                        self.held.setdefault(ref, Work(lease, now, due, self.version))
            case Ack() | Nack():
                self.unacked.pop(message.lease, None)
            case Cancel():
                for ref in message.leases:
                    self.held.pop(ref, None)
                    self.unacked.pop(ref, None)

    def work(self, now: float) -> None:
        for ref, work in list(self.held.items()):
            if self.version < work.lease.version_floor:
                continue
            # Begun under weights that are too old: it begins with the first ones that are not.
            work.version = max(work.version, work.lease.version_floor)
            if now >= work.due:
                self.unacked[ref] = (0.0, self.answer(work))
                del self.held[ref]
        for ref, (sent, result) in self.unacked.items():
            if now - sent >= RESEND_S and self.client.send(Result(result)):
                self.unacked[ref] = (now, result)
        if now >= self.status_at:
            self.status_at = now + self.heartbeat_s
            progress = [Progress(ref, int(100 * (now - work.began)), False) for ref, work in self.held.items()]
            progress += [Progress(ref, result.num_response_tokens, False) for ref, (_, result) in self.unacked.items()]
            self.client.send(Status(self.slots, self.version, tuple(progress)))

    def answer(self, work: Work) -> Trajectory:
        lease = work.lease
        length = int(self.rng.integers(2, lease.sampling.max_new_tokens))
        spans = [Span(work.version, 0)]
        if self.version > work.version:
            spans.append(Span(self.version, length // 2))
        result = Trajectory(
            kind=lease.kind,
            rollout=lease.rollout,
            attempt=lease.attempt,
            prompt_id=lease.prompt_id,
            sample=lease.sample,
            prompt=lease.prompt,
            response=int32_bytes(self.rng.integers(0, 8, length)),
            logprobs=float32_bytes(-self.rng.uniform(0.5, 3.0, length)),
            spans=tuple(spans),
            reward=float(self.rng.integers(0, 2)),
            finish="stop",
            verdict="correct",
            generator=self.name,
            generate_s=time.monotonic() - work.began,
        )
        bad = dict(self.poison)
        if "logprobs" in bad:
            bad["logprobs"] = float32_bytes(np.full(length, bad["logprobs"]))
        return msgspec.structs.replace(result, **bad)


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--connect", required=True)
    options.add_argument("--name", required=True)
    options.add_argument("--slots", type=int, default=4)
    options.add_argument("--delay-s", type=float, nargs=2, default=(0.2, 0.8))
    options.add_argument("--poison", choices=sorted(POISONS), default="")
    given = options.parse_args()
    lean = Lean(given.connect, given.name, given.slots, tuple(given.delay_s), given.poison)
    run_main(lean.run, process=f"generator-{given.name}")


if __name__ == "__main__":
    main()
