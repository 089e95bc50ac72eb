"""A broker with keys, over real sockets: who gets in, as whom, and how somebody is put out again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq
from broker_fakes import VOCAB, FakeGenerator, answer, make_broker, small_config

from orz_async.broker import wire
from orz_async.broker.client import BrokerClient
from orz_async.broker.messages import (
    Bye,
    Failure,
    Hello,
    Leave,
    Nack,
    Observe,
    Published,
    Result,
    Status,
    ToGenerator,
    Welcome,
)
from orz_async.broker.observer import Observer
from orz_async.broker.server import Broker
from orz_async.broker.standing import FREE_DEBT
from orz_async.errors import PeerLostError, WireError
from orz_async.keys.curve import CurveKeys, secure_client
from orz_async.keys.files import new_pair, read_key
from orz_async.keys.ring import Keyring
from orz_async.observe.events import EventLog
from orz_async.records import Lease, Sampling, int32_bytes


@pytest.fixture
def ring(tmp_path: Path) -> Keyring:
    return Keyring(tmp_path / "keys")


@pytest.fixture
def broker(tmp_path: Path, ring: Keyring) -> Iterator[Broker]:
    broker = make_broker(tmp_path, small_config(max_lag=1, keys=str(ring.folder)))
    broker.start()
    broker.published(0)
    yield broker
    broker.close(finished=False, reason="the test ends")


@pytest.fixture
def raw() -> Iterator[Callable[..., zmq.Socket[bytes]]]:
    """Sockets that speak whatever a test wants."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    opened = []

    def connect(address: str, keys: CurveKeys | None = None, identity: bytes = b"") -> zmq.Socket[bytes]:
        peer = context.socket(zmq.DEALER)
        if identity:
            peer.routing_id = identity
        if keys is not None:
            secure_client(peer, keys)
        peer.connect(address)
        opened.append(peer)
        return peer

    yield connect
    context.destroy(linger=0)


def client(broker: Broker, name: str, keys: CurveKeys | None, reconnect_s: float = 20.0) -> BrokerClient:
    hello = Hello(name, "fake", 4, VOCAB, 7)
    asked = None if keys is None else lambda: keys
    return BrokerClient(broker.address, hello, reconnect_s=reconnect_s, events=EventLog.disabled(), keys=asked)


def generator(broker: Broker, name: str, keys: CurveKeys, pid: int = 1) -> FakeGenerator:
    fake = FakeGenerator(broker.address, name, pid=pid)
    fake.client._keys = lambda: keys
    return fake


def say(peer: zmq.Socket[bytes], message: wire.Message, sequence: int = 1) -> None:
    run = wire.ANY_RUN if isinstance(message, Hello | Observe) else wire.run_hash("run-a")
    peer.send(wire.encode(message, run=run, epoch=1, sequence=sequence))


def hear(peer: zmq.Socket[bytes], kind: type[ToGenerator], seconds: float = 30.0) -> ToGenerator:
    end = time.monotonic() + seconds
    while peer.poll(max(0, int(1000 * (end - time.monotonic())))):
        _, message = wire.decode_to_generator(peer.recv())
        if isinstance(message, kind):
            return message
    raise AssertionError(f"no {kind} in time")


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.01)


def keys_of(ring: Keyring, name: str, role: str = "generator") -> CurveKeys:
    return read_key(ring.new(name, role)).keys  # type: ignore[arg-type]


def names(broker: Broker) -> set[object]:
    return {line["name"] for line in broker.generators()}


def test_a_run_with_keys(broker: Broker, ring: Keyring) -> None:
    with generator(broker, "a", keys_of(ring, "a")) as a, generator(broker, "b", keys_of(ring, "b")) as b:
        until(lambda: names(broker) == {"a", "b"})
        for step in range(6):
            assert len(broker.take(step)) == 4
            broker.published(step + 1)
        broker.close(finished=True, reason="done")
        until(lambda: a.bye is not None and b.bye is not None)
    assert a.bye is not None and a.bye.finished


def test_an_unknown_key_is_told_so(broker: Broker, ring: Keyring) -> None:
    public, secret = (text.encode() for text in new_pair())
    stranger = client(broker, "a", CurveKeys(public=public, secret=secret, server=ring.server.public.encode()))
    with pytest.raises(WireError, match="the learner does not allow this key"):
        for _ in range(1000):
            stranger.poll(0.1)
    assert names(broker) == set()
    gate = broker._service.switchboard.gate
    assert gate is not None and gate.refused >= 5


def test_a_plain_peer_gets_nothing(broker: Broker, raw: Callable[..., zmq.Socket[bytes]]) -> None:
    plain = raw(broker.address)
    say(plain, Hello("a", "fake", 4, VOCAB, 7))
    lost = client(broker, "a", None, reconnect_s=60)
    until(lambda: lost.poll(0.1) == [] and "expects a key" in lost._trouble, 30)
    lost.reconnect_s = 0
    with pytest.raises(PeerLostError, match="give it with --key"):
        lost.poll(0.1)
    lost.close()
    assert not plain.poll(0)
    assert names(broker) == set()


def test_a_wrong_idea_of_the_learners_key_gets_nothing(broker: Broker, ring: Keyring) -> None:
    right = keys_of(ring, "a")
    wrong = CurveKeys(public=right.public, secret=right.secret, server=new_pair()[0].encode())
    lost = client(broker, "a", wrong, reconnect_s=1.5)
    with pytest.raises(PeerLostError):
        for _ in range(1000):
            lost.poll(0.1)
    lost.close()
    assert names(broker) == set()


def test_a_revoked_key_is_shut_out_of_a_running_broker(broker: Broker, ring: Keyring) -> None:
    a = generator(broker, "a", keys_of(ring, "a"))
    a.mute = True
    while len(a.leases) < 4:
        a.turn()
    with generator(broker, "b", keys_of(ring, "b")):
        ring.revoke("a")
        with pytest.raises(WireError, match="does not allow this key"):
            # It is told; one that does not listen and connects again is not let in.
            until(lambda: a.turn() is None and a.bye is not None)
            assert a.bye is not None and a.bye.reason == "the key 'a' was revoked"
            a.client.close()
            a.client = client(broker, "a", a.client._keys() if a.client._keys else None)
            until(lambda: a.turn() is None and False)
        batch = broker.take(0)
    assert {t.generator for t in batch} == {"b"}
    assert broker.funnel()["expired"] == {"left": len(a.grants)}
    assert names(broker) <= {"b"}


def test_frames_of_a_revoked_key_change_nothing(
    broker: Broker, ring: Keyring, raw: Callable[..., zmq.Socket[bytes]]
) -> None:
    """A hostile peer ignores the Bye and keeps its connection, which ZeroMQ cannot close."""
    peer = raw(broker.address, keys_of(ring, "a"))
    say(peer, Hello("a", "fake", 4, VOCAB, 7))
    hear(peer, Welcome)
    ring.revoke("a")
    hear(peer, Bye)
    before = broker.funnel()
    for sequence in range(2, 20):
        say(peer, Hello("a", "fake", 4, VOCAB, 7), sequence)
        say(peer, Status(4, 0, ()), sequence)
    until(lambda: broker._service.reception.shut_out >= 36)
    assert broker.funnel() == before and names(broker) == set() and not broker._service.ledger.peers


def test_a_rotation_does_not_stop_the_run(broker: Broker, ring: Keyring) -> None:
    path = ring.new("a", "generator")
    fake = FakeGenerator(broker.address, "a")
    fake.client._keys = lambda: read_key(path).keys
    old = read_key(path).keys
    with fake:
        assert len(broker.take(0)) == 4
        ring.rotate("a", 0.0)
        broker.published(1)
        assert len(broker.take(1)) == 4
        broker.published(2)
        until(lambda: {c.key for c in broker._service.switchboard.by_identity.values()} == {read_key(path).keys.public})
        assert len(broker.take(2)) == 4
    assert fake.bye is None and old.public != read_key(path).keys.public


def test_daemons_of_one_key(broker: Broker, ring: Keyring) -> None:
    keys = keys_of(ring, "a")
    with generator(broker, "a.0", keys), generator(broker, "a.1", keys, pid=2):
        until(lambda: names(broker) == {"a.0", "a.1"})
        with generator(broker, "a.1", keys, pid=3) as third:
            until(lambda: third.bye is not None)
        assert third.bye is not None and "in use by process 2; choose another --name" in third.bye.reason
        with generator(broker, "other", keys, pid=4) as liar:
            until(lambda: liar.bye is not None)
        assert liar.bye is not None and "the key is 'a', the generator calls itself 'other'" in liar.bye.reason


def test_penalties_follow_the_key_and_not_the_name(broker: Broker, ring: Keyring) -> None:
    keys = keys_of(ring, "a")
    first = generator(broker, "a.0", keys)
    first.poison = {"reward": 7.0}
    with first:
        until(lambda: first.bye is not None)
    with generator(broker, "a.1", keys, pid=2) as second:
        until(lambda: second.bye is not None)
    assert first.bye is not None and "16 rejections" in first.bye.reason
    assert second.bye is not None and "16 rejections" in second.bye.reason


def test_handing_back_everything_for_ever_ends_at_the_credit(broker: Broker, ring: Keyring) -> None:
    """Otherwise a generator could fill the journal with grants and returns."""
    vandal = generator(broker, "a", keys_of(ring, "a"))
    vandal.mute = True
    count, last, end = 0, time.monotonic(), time.monotonic() + 60
    while count <= FREE_DEBT + 60 and not (count >= FREE_DEBT and time.monotonic() - last > 0.5):
        assert time.monotonic() < end
        vandal.turn()
        for ref in list(vandal.leases):
            vandal.client.send(Failure(ref, "no thanks", returned=True))
            del vandal.leases[ref]
        if len(vandal.grants) > count:
            count, last = len(vandal.grants), time.monotonic()
    vandal.client.close()
    assert FREE_DEBT <= count <= FREE_DEBT + 60
    with generator(broker, "b", keys_of(ring, "b")):
        assert {t.generator for t in broker.take(0)} == {"b"}


def test_nobody_can_speak_for_another(broker: Broker, ring: Keyring, raw: Callable[..., zmq.Socket[bytes]]) -> None:
    """With a key of its own, a peer takes another's name, lease, result, and even its identity on the socket."""
    victim = generator(broker, "victim", keys_of(ring, "victim"))
    victim.mute = True
    while len(victim.leases) < 4:
        victim.turn()
    identity = next(iter(broker._service.switchboard.by_identity))
    keys = keys_of(ring, "thief")
    thief = raw(broker.address, keys)
    say(thief, Hello("victim", "fake", 4, VOCAB, 7))
    bye = hear(thief, Bye)
    assert isinstance(bye, Bye) and "the key is 'thief'" in bye.reason
    say(thief, Hello("thief", "fake", 0, VOCAB, 7))
    hear(thief, Welcome)
    for sequence, lease in enumerate(victim.leases.values(), start=2):
        say(thief, Result(answer(lease, "victim", 0)), sequence)
        nack = hear(thief, Nack)
        assert isinstance(nack, Nack) and nack.lease.rollout == lease.rollout
    say(thief, Leave("as the victim"), 1)
    # The identity of a connection is no proof: frames must come with the key that said Hello on it.
    twin = raw(broker.address, keys, identity=b"twin")
    say(twin, Hello("thief", "fake", 0, VOCAB, 7))
    connection = broker._service.switchboard.by_identity[identity]
    assert connection.key == victim.client._keys().public  # type: ignore[misc]
    broker._call(lambda: setattr(connection, "identity", b"twin"))
    broker._call(lambda: broker._service.switchboard.by_identity.__setitem__(b"twin", connection))
    shut_out = broker._service.reception.shut_out
    say(twin, Leave("as the victim"), 1000)
    until(lambda: broker._service.reception.shut_out > shut_out)
    assert broker.funnel()["expired"] == {}
    broker._call(lambda: setattr(connection, "identity", identity))
    victim.mute = False
    with victim:
        assert {(t.generator, t.attempt) for t in broker.take(0)} == {("victim", 0)}


def test_an_observer_reads_and_does_nothing_else(
    broker: Broker, ring: Keyring, raw: Callable[..., zmq.Socket[bytes]]
) -> None:
    keys = keys_of(ring, "watch", "observer")
    with generator(broker, "a", keys_of(ring, "a")) as a:
        broker.take(0)
        until(lambda: not a.unacked)
        observer = Observer(broker.address, keys)
        report = observer.ask()
        observer.close()
        assert (report.run_id, report.version) == ("run-a", 0)
        assert [(line.name, line.engine) for line in report.generators] == [("a", "fake")]
        funnel = broker.funnel()
        assert (report.granted, report.in_flight) == (funnel["granted"], funnel["in_flight"])
        peer = raw(broker.address, keys)
        lease = answer(_lease_of(a), "a", 0)
        peers = set(broker._service.ledger.peers)
        for message in (Hello("watch", "fake", 4, VOCAB, 7), Status(4, 0, ()), Result(lease), Leave("x")):
            say(peer, message, 5)
            bye = hear(peer, Bye)
            assert isinstance(bye, Bye) and "gets no leases" in bye.reason
        assert broker.funnel() == funnel and set(broker._service.ledger.peers) == peers == {"a"}


def _lease_of(fake: FakeGenerator) -> Lease:
    _, ref = fake.grants[0]
    return Lease(ref.kind, ref.rollout, ref.attempt, "p0", int32_bytes([0, 1, 2]), "0", 0, 1, 0, Sampling(1.0, 8))


def test_a_generators_key_does_not_observe(broker: Broker, ring: Keyring) -> None:
    observer = Observer(broker.address, keys_of(ring, "a"))

    def is_shut_out() -> bool:
        with pytest.raises(PeerLostError, match="does it allow this key"):
            observer.ask(0.3)
        return broker._service.reception.shut_out > 0

    until(is_shut_out)
    observer.close()


def test_without_keys_anyone_on_this_machine_may_look(tmp_path: Path) -> None:
    broker = make_broker(tmp_path, small_config())
    broker.start()
    observer = Observer(broker.address)
    assert observer.ask().generators == ()
    observer.close()
    broker.close(finished=True, reason="done")


RELAY = "tcp://127.0.0.1:5601"


def relaying(broker: Broker, name: str, keys: CurveKeys, relay: str = "", pid: int = 1) -> FakeGenerator:
    return FakeGenerator(broker.address, name, relay=relay, pid=pid, keys=lambda: keys)


def told(fake: FakeGenerator) -> tuple[tuple[str, ...], frozenset[str]]:
    """Sources and readers, as it was told last."""
    for message in reversed(list(fake.seen)):
        if isinstance(message, Welcome):
            return tuple(message.weights_address.split(",")), frozenset(message.readers)
        if isinstance(message, Published) and message.sources:
            return message.sources, frozenset(message.readers)
    return (), frozenset()


def test_a_relay_is_told_whom_it_serves_and_they_the_key_of_its_socket(broker: Broker, ring: Keyring) -> None:
    learner, one = "tcp://127.0.0.1:1", f"{RELAY}|{new_pair()[0]}"
    keys = {name: keys_of(ring, name) for name in ("a", "b", "c")}
    public = {name: pair.public.decode() for name, pair in keys.items()}
    with relaying(broker, "a", keys["a"], one) as a, relaying(broker, "b", keys["b"]) as b:
        until(lambda: told(a) == ((learner,), {public["b"]}) and told(b)[0] == (one, learner))
        # A pair that is being rotated has both its keys for a while, whichever connection they were proven on.
        ring.rotate("b", 3600.0)
        both = {public["b"], read_key(ring.path_of("b")).public}
        until(lambda: told(a)[1] == both)
        with relaying(broker, "c", keys["c"]) as c:
            until(lambda: told(c)[0] == (one, learner))
            # It heard of c before c heard of it: else c would knock in vain.
            assert told(a)[1] == {public["c"], *both}
            ring.revoke("c")
            until(lambda: c.bye is not None and told(a)[1] == both)
        ring.revoke("a")
        until(lambda: a.bye is not None and told(b)[0] == (learner,))


@pytest.mark.parametrize("relay", [RELAY, f"{RELAY}|short", f"{RELAY}|{'~' * 40}", f"tcp://a|b:1|{'a' * 40}"])
def test_a_relay_without_a_proper_key_is_none(broker: Broker, ring: Keyring, relay: str) -> None:
    with relaying(broker, "a", keys_of(ring, "a"), relay) as a, relaying(broker, "b", keys_of(ring, "b")) as b:
        until(lambda: bool(told(a)[0] and told(b)[0]))
        assert told(a) == told(b) == (("tcp://127.0.0.1:1",), frozenset())
