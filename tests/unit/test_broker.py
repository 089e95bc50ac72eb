"""The broker and its client over loopback, with generators that answer from the seed."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from broker_fakes import HELDOUT, VOCAB, FakeGenerator, make_broker, small_config
from orz_async.broker import wire
from orz_async.broker.messages import Hello, Published, Welcome
from orz_async.broker.server import Broker, ResumePoint
from orz_async.errors import ConfigError, PeerLostError, PortError, WireError
from orz_async.records import Trajectory


@pytest.fixture
def brokers(tmp_path: Path) -> Iterator[Callable[..., Broker]]:
    opened = []

    def start(resume: ResumePoint | None = None, epoch: int = 1, **fields: object) -> Broker:
        broker = make_broker(tmp_path, small_config(**fields), epoch=epoch, start=resume)
        opened.append(broker)
        broker.start()
        return broker

    yield start
    for broker in opened:
        broker.close(finished=False, reason="the test ends")
    assert not [thread for thread in threading.enumerate() if thread.name == "broker"]


def wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.005)


def run_steps(broker: Broker, first: int, last: int) -> list[list[Trajectory]]:
    batches = []
    for step in range(first, last):
        batches.append(broker.take(step))
        broker.published(step + 1)
    return batches


def test_run_with_two_generators(brokers: Callable[..., Broker]) -> None:
    broker = brokers(max_lag=1)
    broker.evaluate(0)
    broker.published(0)
    with FakeGenerator(broker.address, "a") as a, FakeGenerator(broker.address, "b") as b:
        evaluation = broker.evaluation(0, timeout_s=5)
        batches = run_steps(broker, 0, 6)
        assert {g["name"] for g in broker.generators()} == {"a", "b"}
        funnel = broker.funnel()
        broker.close(finished=True, reason="done")
        wait_until(lambda: a.bye is not None and b.bye is not None)
    assert [t.prompt_id for t in evaluation] == [p.prompt_id for p in HELDOUT]
    for step, batch in enumerate(batches):
        assert [t.rollout for t in batch] == list(range(4 * step, 4 * step + 4))
        assert [t.sample for t in batch] == [0, 1, 0, 1]
        assert len({t.prompt_id for t in batch}) == 2
        assert all(step - t.version_first <= 1 for t in batch)
    assert funnel == {"granted": 24, "trained": 24, "expired": {}, "quarantined": 0, "in_flight": 0}
    assert a.bye is not None and a.bye.finished


def test_synchronous_run_grants_in_rollout_order_and_only_the_present_version(brokers: Callable[..., Broker]) -> None:
    broker = brokers(max_lag=0)
    broker.published(0)
    with FakeGenerator(broker.address, "a") as a:
        batches = run_steps(broker, 0, 6)
        broker.close(finished=True, reason="done")
        wait_until(lambda: a.bye is not None)
    assert [ref.rollout for _, ref in a.grants] == list(range(24))
    for step, batch in enumerate(batches):
        assert {t.version_first for t in batch} == {step}


def test_dead_generator_loses_its_leases_to_another(brokers: Callable[..., Broker]) -> None:
    broker = brokers(max_lag=0)
    broker.published(0)
    dead = FakeGenerator(broker.address, "dead")
    dead.mute = True
    while not dead.leases:
        dead.turn()
    dead.client.close()
    with FakeGenerator(broker.address, "alive") as alive:
        batches = run_steps(broker, 0, 6)
        funnel = broker.funnel()
        broker.close(finished=True, reason="done")
        wait_until(lambda: alive.bye is not None)
    assert [t.rollout for batch in batches for t in batch] == list(range(24))
    assert funnel["granted"] == 24 + len(dead.grants)
    assert funnel["expired"] == {"silent": len(dead.grants)}
    assert {t.attempt for t in batches[0]} >= {1}


def test_reconnection_keeps_leases_and_loses_no_result(brokers: Callable[..., Broker]) -> None:
    broker = brokers(max_lag=0)
    broker.published(0)
    a = FakeGenerator(broker.address, "a")
    a.mute = True
    while len(a.leases) < 4:
        a.turn()
    before = dict(a.leases)
    a.client._lose("the test pulls the plug")
    forgotten = next(iter(before))
    del a.leases[forgotten]
    wait_until(lambda: a.turn() is None and forgotten in a.leases)
    assert a.leases.keys() == before.keys()
    a.mute = False
    with a:
        batch = broker.take(0)
        assert [t.attempt for t in batch] == [0, 0, 0, 0]
        assert broker.funnel()["granted"] == 4


def test_a_new_epoch_voids_leases_and_the_run_goes_on(brokers: Callable[..., Broker]) -> None:
    port = free_port()
    broker = brokers(max_lag=1, bind=f"tcp://127.0.0.1:{port}")
    broker.published(0)
    with FakeGenerator(broker.address, "a") as a:
        run_steps(broker, 0, 2)
        resume = ResumePoint(broker.snapshot(), 2)
        a.mute = True
        broker.take(2)
        broker.published(3)
        wait_until(lambda: len(a.leases) > 0)
        broker.close(finished=False, reason="")
        assert a.bye is None or not a.bye.finished


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_nobody_comes(brokers: Callable[..., Broker]) -> None:
    broker = brokers(wait_generators_s=0.2)
    broker.published(0)
    with pytest.raises(PeerLostError, match="no generator is connected"):
        broker.take(0)


def test_wrong_vocabulary_is_refused(brokers: Callable[..., Broker]) -> None:
    broker = brokers()
    a = FakeGenerator(broker.address, "a", vocab_size=VOCAB + 1)
    wait_until(lambda: a.turn() is None and a.bye is not None)
    assert a.bye is not None and not a.bye.finished and "vocabulary of 50" in a.bye.reason
    a.client.close()


def test_beyond_loopback_is_refused(tmp_path: Path) -> None:
    for bind in ("tcp://0.0.0.0:5555", "tcp://*:5555", "tcp://10.0.0.1:0"):
        with pytest.raises(ConfigError, match="beyond this machine"):
            make_broker(tmp_path, small_config(bind=bind))
    with pytest.raises(ConfigError, match="must look like"):
        make_broker(tmp_path, small_config(bind="ipc:///tmp/x"))


def test_port_in_use(brokers: Callable[..., Broker]) -> None:
    taken = brokers().address
    with pytest.raises(PortError, match="Address already in use"):
        brokers(bind=taken)
