"""The broker and its client over loopback, with generators that answer from the seed."""

from __future__ import annotations

import dataclasses
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq
from broker_fakes import HELDOUT, VOCAB, FakeGenerator, make_broker, small_config

from orz_async.broker import wire
from orz_async.broker.client import BrokerClient
from orz_async.broker.messages import Hello, LeaseRef, Leave, Progress, Published, Status, Welcome
from orz_async.broker.server import Broker, ResumePoint
from orz_async.config import JournalConfig, WeightsConfig
from orz_async.errors import ConfigError, PeerLostError, PortError, WireError
from orz_async.observe.events import EventLog
from orz_async.records import Trajectory

Connect = Callable[[str], zmq.Socket[bytes]]


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


@pytest.fixture
def hostile() -> Iterator[Callable[[str], zmq.Socket[bytes]]]:
    """Sockets that speak whatever a test wants."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()

    opened = []

    def connect(address: str) -> zmq.Socket[bytes]:
        peer = context.socket(zmq.DEALER)
        peer.connect(address)
        opened.append(peer)
        return peer

    yield connect
    context.destroy(linger=0)


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


def crash(broker: Broker) -> None:
    """End the broker's thread between two turns: no goodbye, nothing flushed that was not flushed before."""
    broker._call(lambda: setattr(broker._service, "_stopping", True))
    broker.close(finished=False, reason="")


def test_restart_from_a_checkpoint_repeats_the_batches_taken_since(brokers: Callable[..., Broker]) -> None:
    fields = {"bind": f"tcp://127.0.0.1:{free_port()}", "max_lag": 2, "window": 1}
    broker = brokers(**fields)
    broker.published(0)
    with FakeGenerator(broker.address, "a") as a, FakeGenerator(broker.address, "b") as b:
        batches = run_steps(broker, 0, 2)
        resume = ResumePoint(broker.snapshot(), 2)
        batches += run_steps(broker, 2, 4)
        a.mute = b.mute = True
        granted = broker.funnel()["granted"]
        crash(broker)

        broker = brokers(resume, epoch=2, **fields)
        broker.published(2)
        # The first step repeats without any generator's help; then the learner dies again.
        assert broker.take(2) == batches[2]
        broker.published(3)
        crash(broker)

        broker = brokers(resume, epoch=3, **fields)
        broker.published(2)
        assert run_steps(broker, 2, 4) == batches[2:]
        a.mute = b.mute = False
        batches += run_steps(broker, 4, 6)
        funnel = broker.funnel()
        broker.close(finished=True, reason="done")
        wait_until(lambda: a.bye is not None and b.bye is not None)
    assert sorted(t.rollout for batch in batches for t in batch) == list(range(24))
    assert all(step - t.version_first <= 2 for step, batch in enumerate(batches) for t in batch)
    expired = funnel["expired"]
    assert isinstance(expired, dict) and isinstance(granted, int)
    assert funnel["trained"] == 24 and funnel["in_flight"] == 0
    assert funnel["granted"] == 24 + sum(expired.values())
    assert {epoch for epoch, _ in a.grants + b.grants} >= {1, 3}


def test_restart_without_a_checkpoint_replays_the_journal_from_the_start(brokers: Callable[..., Broker]) -> None:
    fields = {"bind": f"tcp://127.0.0.1:{free_port()}", "max_lag": 0}
    broker = brokers(**fields)
    broker.published(0)
    with FakeGenerator(broker.address, "a") as a:
        batches = run_steps(broker, 0, 2)
        crash(broker)
        broker = brokers(epoch=2, **fields)
        broker.published(0)
        assert run_steps(broker, 0, 2) == batches
        batches += run_steps(broker, 2, 6)
        broker.close(finished=True, reason="done")
        wait_until(lambda: a.bye is not None)
    assert [t.rollout for batch in batches for t in batch] == list(range(24))


def test_a_lost_journal_costs_samples_but_not_the_run(brokers: Callable[..., Broker], tmp_path: Path) -> None:
    fields = {"bind": f"tcp://127.0.0.1:{free_port()}", "max_lag": 1}
    broker = brokers(**fields)
    broker.published(0)
    with FakeGenerator(broker.address, "a") as a:
        run_steps(broker, 0, 2)
        wait_until(lambda: broker._call(lambda: broker._service.ledger.book.num_ready) == 8)
        resume = ResumePoint(broker.snapshot(), 2)
        crash(broker)
        shutil.rmtree(tmp_path / "journal")
        broker = brokers(resume, epoch=2, **fields)
        assert broker.funnel()["expired"] == {"journal_lost": 8}
        broker.published(2)
        batches = run_steps(broker, 2, 6)
        broker.close(finished=True, reason="done")
        wait_until(lambda: a.bye is not None)
    assert [t.rollout for batch in batches for t in batch] == list(range(8, 24))
    assert {t.attempt for t in batches[0]} == {1}


def test_acknowledgements_wait_for_the_disk(tmp_path: Path) -> None:
    config = dataclasses.replace(small_config(max_lag=0), journal=JournalConfig(fsync="interval", interval_s=3600.0))
    broker = make_broker(tmp_path, config)
    broker.start()
    broker.published(0)
    a = FakeGenerator(broker.address, "a")
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        a.turn()
    # The first sync is due at once and may cover some; whatever it did not cover is kept by the generator.
    journaled = broker._call(lambda: broker._journal.next_index)
    durable = broker._call(lambda: broker._journal.durable)
    assert (len(a.unacked) > 0) == (durable < journaled)
    assert len(broker.take(0)) == 4
    broker.snapshot()
    wait_until(lambda: a.turn() is None and not a.unacked)
    with a:
        broker.close(finished=True, reason="done")


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


def test_a_vocabulary_not_known_yet_is_welcome(brokers: Callable[..., Broker]) -> None:
    broker = brokers()
    a = FakeGenerator(broker.address, "a", vocab_size=0)
    wait_until(lambda: a.turn() is None and a.client.run_id != "" and a.client.epoch > 0)
    assert a.bye is None
    a.client.close()


def test_beyond_loopback_is_refused(tmp_path: Path) -> None:
    for bind in ("tcp://0.0.0.0:5555", "tcp://*:5555", "tcp://10.0.0.1:0"):
        with pytest.raises(ConfigError, match="who reaches this machine"):
            make_broker(tmp_path, small_config(bind=bind))
    with pytest.raises(ConfigError, match="must look like"):
        make_broker(tmp_path, small_config(bind="ipc:///tmp/x"))


def test_port_in_use(brokers: Callable[..., Broker]) -> None:
    taken = brokers().address
    with pytest.raises(PortError, match="Address already in use"):
        brokers(bind=taken)


def test_garbage_blocks_nobody_and_its_sender_is_shown_the_door(
    brokers: Callable[..., Broker], hostile: Connect
) -> None:
    broker = brokers(max_lag=0)
    broker.published(0)
    peer = hostile(broker.address)
    with FakeGenerator(broker.address, "a") as a:
        for _ in range(50):
            peer.send(b"not a frame")
            peer.send_multipart([b"many", b"parts"])
        hello = Hello("evil", "fake", 8, VOCAB, 2)
        peer.send(wire.encode(hello, run=wire.ANY_RUN, epoch=0, sequence=1))
        for _ in range(40):
            peer.send(b"ORZ1" + bytes(100))
        batches = run_steps(broker, 0, 6)
        assert len(batches) == 6
        wait_until(lambda: [g["name"] for g in broker.generators()] == ["a"])
        broker.close(finished=True, reason="done")
        wait_until(lambda: a.bye is not None)


def test_poisoned_results_cost_their_sender_its_leases(brokers: Callable[..., Broker]) -> None:
    broker = brokers(max_lag=0)
    broker.published(0)
    evil = FakeGenerator(broker.address, "evil")
    evil.poison = {"reward": float("nan")}
    wait_until(lambda: evil.turn() is None and evil.bye is not None)
    assert evil.bye is not None and "16 rejections, the last one: reward nan" in evil.bye.reason
    evil.client.close()
    again = FakeGenerator(broker.address, "evil")
    wait_until(lambda: again.turn() is None and again.bye is not None)
    again.client.close()
    with FakeGenerator(broker.address, "a") as a:
        batches = run_steps(broker, 0, 6)
        broker.close(finished=True, reason="done")
        wait_until(lambda: a.bye is not None)
    assert [t.rollout for batch in batches for t in batch] == list(range(24))
    assert {t.generator for batch in batches for t in batch} == {"a"}


def test_a_peer_that_never_reads_does_not_block_the_broker(brokers: Callable[..., Broker], hostile: Connect) -> None:
    broker = brokers(max_lag=0)
    broker.published(0)
    peer = hostile(broker.address)
    peer.send(wire.encode(Hello("deaf", "fake", 0, VOCAB, 2), run=wire.ANY_RUN, epoch=0, sequence=1))
    ref = LeaseRef("train", 0, 7)
    with FakeGenerator(broker.address, "a") as a:
        for sequence in range(2, 20_000):
            # Every Status lists a lease it does not hold: each is answered by a Cancel nobody reads.
            status = Status(0, 0, (Progress(ref, 1, False),))
            peer.send(wire.encode(status, run=wire.run_hash("run-a"), epoch=1, sequence=sequence))
        assert len(run_steps(broker, 0, 6)) == 6
        broker.close(finished=True, reason="done")
        wait_until(lambda: a.bye is not None)


def test_frames_of_another_run_epoch_or_sequence_change_nothing(
    brokers: Callable[..., Broker], hostile: Connect
) -> None:
    broker = brokers(max_lag=0, lease_s=60.0)
    broker.published(0)
    peer = hostile(broker.address)
    run = wire.run_hash("run-a")
    peer.send(wire.encode(Hello("x", "fake", 4, VOCAB, 2), run=run, epoch=1, sequence=5))
    status = Status(4, 0, ())
    for frame in (
        wire.encode(status, run=wire.run_hash("run-b"), epoch=1, sequence=6),
        wire.encode(status, run=run, epoch=2, sequence=6),
        wire.encode(status, run=run, epoch=1, sequence=5),
    ):
        peer.send(frame)
    welcome, *others = (wire.decode_to_generator(peer.recv())[1] for _ in range(4))
    assert isinstance(welcome, Welcome)
    assert all(isinstance(message, Published) for message in others)
    assert broker.funnel()["granted"] == 0
    peer.send(wire.encode(status, run=run, epoch=1, sequence=6))
    wait_until(lambda: broker.funnel()["granted"] == 4)


def test_a_generator_of_another_run_is_turned_away(brokers: Callable[..., Broker]) -> None:
    broker = brokers()
    a = FakeGenerator(broker.address, "a")
    a.client._run = wire.run_hash("run-b")
    wait_until(lambda: a.turn() is None and a.bye is not None)
    assert a.bye is not None and "this is run run-a" in a.bye.reason
    a.client.close()


def test_a_name_in_use_by_a_living_process_is_refused(brokers: Callable[..., Broker]) -> None:
    broker = brokers()
    with FakeGenerator(broker.address, "a", pid=1) as a:
        wait_until(lambda: a.epoch == 1)
        twin = FakeGenerator(broker.address, "a", pid=2)
        wait_until(lambda: twin.turn() is None and twin.bye is not None)
        assert twin.bye is not None and "in use by process 1; choose another --name" in twin.bye.reason
        twin.client.close()


def test_another_wire_version_ends_the_client_with_advice() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router = context.socket(zmq.ROUTER)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    a = FakeGenerator(f"tcp://127.0.0.1:{port}", "a")
    while not router.poll(10):
        a.turn()
    identity, _ = router.recv_multipart()
    frame = bytearray(wire.encode(Published(0), run=wire.ANY_RUN, epoch=1, sequence=1))
    frame[4] = 9
    router.send_multipart([identity, bytes(frame)])
    with pytest.raises(WireError, match="install the same release"):
        wait_until(lambda: a.turn() is not None)
    a.client.close()
    context.destroy(linger=0)


def test_a_client_without_a_broker_gives_up_after_its_bound() -> None:
    hello = Hello("a", "fake", 1, VOCAB, 1)
    client = BrokerClient(f"tcp://127.0.0.1:{free_port()}", hello, reconnect_s=0.3, events=EventLog.disabled())
    with pytest.raises(PeerLostError, match="heard nothing for"):
        wait_until(lambda: client.poll(0.05) is None)
    client.close()


def test_a_drained_generator_leaves_and_its_leases_go_on(brokers: Callable[..., Broker]) -> None:
    broker = brokers(max_lag=0, lease_s=60.0)
    broker.published(0)
    a = FakeGenerator(broker.address, "a")
    a.mute = True
    while len(a.leases) < 4:
        a.turn()
    assert a.client.send(Leave("stopped by a signal"))
    a.client.close()
    wait_until(lambda: broker.funnel()["expired"] == {"left": 4})
    with FakeGenerator(broker.address, "b"):
        assert [t.attempt for t in broker.take(0)] == [1, 1, 1, 1]


def sources_of(generator: FakeGenerator) -> tuple[str, ...]:
    """What it was told last."""
    told: list[tuple[str, ...]] = []
    for message in list(generator.seen):
        if isinstance(message, Welcome):
            told.append(tuple(message.weights_address.split(",")))
        elif isinstance(message, Published) and message.sources:
            told.append(message.sources)
    return told[-1] if told else ()


def test_relays_are_made_known_and_forgotten_with_the_generator(brokers: Callable[..., Broker]) -> None:
    broker = brokers(max_lag=0)
    learner, one = "tcp://127.0.0.1:1", "tcp://127.0.0.1:2"
    broker.published(0, "feedbeef")
    with FakeGenerator(broker.address, "plain") as plain:
        wait_until(lambda: sources_of(plain) == (learner,))
        with FakeGenerator(broker.address, "first", relay=one) as first:
            wait_until(lambda: sources_of(first) == (learner,) and sources_of(plain) == (one, learner))
            with FakeGenerator(broker.address, "second", relay="not an address") as second:
                wait_until(lambda: sources_of(second) == (one, learner))
                welcome = next(message for message in second.seen if isinstance(message, Welcome))
                assert (welcome.version, welcome.digest) == (0, "feedbeef")
                broker.take(0)
                broker.published(1, "0badcafe")
                announced = Published(1, "0badcafe", (one, learner))
                wait_until(lambda: announced in second.seen and announced in plain.seen)
            with FakeGenerator(broker.address, "elsewhere", relay=one, host="there") as elsewhere:
                # Loopback of another machine leads nowhere: that machine has a tree of its own.
                wait_until(lambda: sources_of(elsewhere) == (learner,))
                broker.take(1)
                broker.published(2, "c0ffee")
                wait_until(lambda: Published(2, "c0ffee", (one, learner)) in plain.seen)
                assert sources_of(elsewhere) == (learner,)
            first.client.send(Leave("enough"))
            wait_until(lambda: sources_of(plain) == (learner,))


def test_a_frozen_relay_is_routed_around_and_other_machines_never_hear_of_it(brokers: Callable[..., Broker]) -> None:
    broker = brokers(max_lag=0)
    learner, one = "tcp://127.0.0.1:1", "tcp://127.0.0.1:2"
    broker.published(0)
    frozen = FakeGenerator(broker.address, "frozen", relay=one)
    while not sources_of(frozen):
        frozen.turn()
    with FakeGenerator(broker.address, "near") as near, FakeGenerator(broker.address, "far", host="there") as far:
        wait_until(lambda: bool(sources_of(near) and sources_of(far)), 30)
        assert sources_of(far) == (learner,)
        assert (one, learner) in [
            tuple(m.weights_address.split(",")) if isinstance(m, Welcome) else m.sources
            for m in list(near.seen)
            if isinstance(m, Welcome | Published)
        ]
        wait_until(lambda: sources_of(near) == (learner,), 30)  # its connection is open, and it says nothing
    frozen.client.close()


def test_an_error_in_the_brokers_thread_reaches_the_learner(brokers: Callable[..., Broker]) -> None:
    broker = brokers()
    with pytest.raises(AssertionError, match="published one is 0"):
        broker.take(3)
    with pytest.raises(AssertionError, match="published one is 0"):
        broker.published(1)


def test_a_welcome_says_how_long_a_transfer_may_stand_still(tmp_path: Path) -> None:
    config = dataclasses.replace(small_config(), weights=WeightsConfig(transport="nccl", deadline_s=3.5))
    broker = make_broker(tmp_path, config)
    broker.start()
    try:
        with FakeGenerator(broker.address, "a") as a:
            wait_until(lambda: any(isinstance(one, Welcome) and one.deadline_s == 3.5 for one in a.seen))
    finally:
        broker.close(finished=True, reason="done")
