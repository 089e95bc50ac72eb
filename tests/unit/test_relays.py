"""Relays: who fetches from whom, what the learner pays, and what happens when one dies, freezes or lies."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import torch
import zmq
from hypothesis import given
from hypothesis import strategies as st
from weights_support import Recorder, assert_same_bits, changed, model, no_leaks, until

from orz_async.broker import wire
from orz_async.broker.messages import Published, Welcome
from orz_async.broker.relays import FANOUT, MAX_ADDRESS, MAX_READERS, MAX_SOURCES, is_relay_address, routes
from orz_async.errors import ConfigError, WireError
from orz_async.keys.curve import Admitted
from orz_async.weights.address import CurveKeys, join_key
from orz_async.weights.download import RELAY_PATIENCE_S, SHUN_S, Download, Phase, Reopen
from orz_async.weights.manifest import Limits
from orz_async.weights.payload import full_payload
from orz_async.weights.protocol import Snapshot
from orz_async.weights.relay import Relay
from orz_async.weights.snapshot import capture, state_digest
from orz_async.weights.stream import StreamFetcher, StreamPublisher
from orz_async.weights.transport import relay_address
from orz_async.weights.wire import Waiting, Want

__all__ = ["no_leaks"]  # a fixture

LOOPBACK, EPOCH, STALL_S = "tcp://127.0.0.1:0", 3, 5.0
LEARNER, RELAY, OTHER = "tcp://learner:1", "tcp://relay:1", "tcp://other:1"


# Who fetches from whom.


@given(st.lists(st.booleans(), max_size=40))
def test_the_tree_reaches_everyone_and_costs_the_learner_one(relaying: list[bool]) -> None:
    names = [f"g{index}" for index in range(len(relaying))]
    relays = {name: f"tcp://{name}:1" for name, does in zip(names, relaying, strict=True) if does}
    found = routes(relays, names, LEARNER)
    assert found.keys() == set(names)
    for name, sources in found.items():
        assert sources[-1] == LEARNER
        assert len(set(sources)) == len(sources)
        assert relays.get(name) not in sources  # no circle: whoever is on the way has a shorter way
    direct = [name for name, sources in found.items() if sources == (LEARNER,)]
    assert len(direct) == (1 if relays else len(names))
    order = list(relays)
    for parent in order:
        children = [name for name in order if found[name][0] == relays[parent]]
        assert len(children) <= FANOUT
    assert max((len(sources) for sources in found.values()), default=1) <= len(relays).bit_length() + 1


@pytest.mark.parametrize(
    ("address", "sound"),
    [
        ("tcp://10.0.0.2:5601", True),
        ("ipc:///tmp/relay", True),
        ("", False),
        ("tcp://a:1,tcp://b:2", False),
        ("tcp://a b:1", False),
        ("file:///etc", False),
        ("tcp://" + "a" * 200, False),
        ("tcp://10.0.0.2:5601|" + "k" * 40, False),
    ],
)
def test_what_a_generator_may_call_its_relay(address: str, sound: bool) -> None:
    assert is_relay_address(address) is sound


def test_the_longest_announcement_fits_into_its_frame() -> None:
    source = f"tcp://{'a' * (MAX_ADDRESS - 6)}|{'k' * 40}"
    assert is_relay_address(source, keyed=True)
    sources, readers = (source,) * (MAX_SOURCES + 1), ("k" * 40,) * MAX_READERS
    published = Published(1, "d" * 64, sources, readers)
    welcome = Welcome("r" * 100, "m" * 4000, ("s" * 1000,) * 8, ",".join(sources), 1, 1.0, 1, "d" * 64, readers)
    for message in (published, welcome):
        frame = wire.encode(message, run=wire.ANY_RUN, epoch=1, sequence=1)
        assert wire.decode_to_generator(frame)[1] == message


def test_a_relay_has_its_port_before_it_opens() -> None:
    assert relay_address("") == ""
    assert relay_address("tcp://10.0.0.2:5601") == "tcp://10.0.0.2:5601"
    assert relay_address(LOOPBACK) != LOOPBACK
    assert relay_address(LOOPBACK).startswith("tcp://127.0.0.1:")
    with pytest.raises(ConfigError, match="expected an address of this machine to relay weights on"):
        relay_address("tcp://192.0.2.1:0")
    with pytest.raises(ConfigError, match="expected a weights address"):
        relay_address("udp://x")
    for wildcard in ("tcp://0.0.0.0:5601", "tcp://*:0", "tcp://[::]:0"):
        with pytest.raises(ConfigError, match="at which others reach this machine"):
            relay_address(wildcard)


# What a fetcher makes of it, in virtual time.


def download(*addresses: str) -> Download:
    return Download(addresses, limits=Limits(), stall_s=STALL_S, give_up_s=600.0)


def test_a_route_moves_an_idle_fetcher_and_leaves_a_transfer_alone() -> None:
    machine, source = download(LEARNER), full_payload(capture(0, model().items()), chunk_bytes=20_000)
    assert machine.route((), 0.0) == machine.route((LEARNER,), 0.0) == []
    assert machine.route((RELAY, LEARNER), 0.0) == [Reopen.MOVE]
    assert machine.peer == RELAY
    machine.want(0, 0.0)
    assert machine.route((OTHER, LEARNER), 1.0) == [Reopen.MOVE, Want(0, -1, "")]
    machine.handle(source.manifest, 2.0)
    assert machine.phase is Phase.FETCHING
    assert machine.route((RELAY, OTHER, LEARNER), 3.0) == []
    assert machine.peer == OTHER


def test_a_relay_is_believed_only_what_the_learner_has_said() -> None:
    machine, source = download(RELAY, LEARNER), full_payload(capture(1, model().items()), chunk_bytes=20_000)
    machine.digests.learn(0, "00000000")
    machine.want(1, 0.0)
    assert machine.handle(source.manifest, 0.0) == []  # nothing is known of version 1 yet
    assert machine.phase is Phase.ASKING
    machine.digests.learn(1, source.manifest.digest)
    assert machine.handle(source.manifest, 0.0) != []
    assert machine.phase is Phase.FETCHING


def test_a_relay_with_another_digest_is_never_asked_again() -> None:
    machine, source = download(RELAY, LEARNER), full_payload(capture(0, model().items()), chunk_bytes=20_000)
    machine.digests.learn(0, "0badc0de")
    machine.want(0, 0.0)
    assert machine.handle(source.manifest, 0.0) == [Reopen.CLOSE]
    assert "relay tcp://relay:1: tcp://relay:1 offers version 0 with digest" in machine.note
    assert machine.tick(1.0)[0] is Reopen.OPEN
    assert machine.peer == LEARNER
    machine.route((RELAY, LEARNER), 2.0)
    machine.route((RELAY, LEARNER), 1e9)
    assert machine.peer == LEARNER
    with pytest.raises(WireError, match="the learner published '0badc0de'"):  # of the learner itself it is an error
        machine.handle(source.manifest, 2.0)


def test_a_relay_that_is_still_receiving_is_waited_for_but_not_for_ever() -> None:
    machine = download(RELAY, LEARNER)
    machine.want(1, 0.0)
    now, progress = 0.0, 0
    while machine.peer == RELAY and now < 1000:
        machine.tick(now)
        progress += 1
        machine.handle(Waiting(0, progress), now)
        now += 0.5
    assert RELAY_PATIENCE_S <= now <= RELAY_PATIENCE_S + 2 * STALL_S


def test_a_silent_relay_is_shunned_for_a_while() -> None:
    machine = download(RELAY, LEARNER)
    machine.want(0, 0.0)
    machine.tick(STALL_S + 0.1)
    assert machine.peer == LEARNER
    machine.route((RELAY, LEARNER), 10.0)
    assert machine.peer == LEARNER
    machine.phase = Phase.IDLE
    assert machine.route((RELAY, LEARNER), SHUN_S + 10) == [Reopen.MOVE]
    assert machine.peer == RELAY


# Over sockets.


class House:
    """Opens the ends of streams; the fixture closes them."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack = stack
        self.events = Recorder()

    def publisher(self) -> StreamPublisher:
        publisher = StreamPublisher(LOOPBACK, EPOCH, self.events, chunk_bytes=64 << 10, history=4)
        return self.stack.enter_context(closing(publisher))

    def relay(
        self,
        sources: tuple[str, ...],
        bind: str = LOOPBACK,
        keys: CurveKeys | None = None,
        serve_keys: CurveKeys | None = None,
    ) -> Relay:
        relay = Relay(sources, bind, EPOCH, self.events, keys=keys, serve_keys=serve_keys, stall_s=2.0)
        return self.stack.enter_context(closing(relay))

    def fetcher(self, *sources: str, keys: CurveKeys | None = None) -> StreamFetcher:
        return self.stack.enter_context(closing(StreamFetcher(sources, EPOCH, self.events, keys=keys, stall_s=0.5)))

    def reconnections(self) -> list[str]:
        return [fields["reason"] for kind, fields in self.events.events if kind == "weights_reconnect"]


@pytest.fixture
def house(no_leaks: None) -> Iterator[House]:
    with ExitStack() as stack:
        yield House(stack)


def got(fetcher: StreamFetcher | Relay) -> Snapshot:
    snapshot = until(fetcher.poll, 60)
    assert snapshot is not None, fetcher.waiting_for()
    return snapshot


def test_eight_generators_in_the_tree_cost_the_learner_as_much_as_one(house: House) -> None:
    """From the first snapshot on, all joining at once, and over deltas."""
    publisher = house.publisher()
    addresses = {f"g{index}": relay_address(LOOPBACK) for index in range(8)}
    found = routes(addresses, list(addresses), publisher.address)
    relays = [house.relay(found[name], addresses[name]) for name in addresses]
    named = model(scale=8)
    for version in range(3):
        named = changed(named, version)
        before = publisher.traffic.bytes_sent
        digest = state_digest(named)
        for index, relay in enumerate(relays):  # every second one is told before there is anything
            if index % 2:
                relay.want(version, digest, found[f"g{index}"])
        publisher.publish(version, named.items())
        for index, relay in enumerate(relays):
            relay.want(version, digest, found[f"g{index}"])
        snapshots = [got(relay) for relay in relays]
        for snapshot in snapshots:
            assert (snapshot.version, snapshot.digest) == (version, digest)
            assert_same_bits(snapshot.tensors, named)
            assert snapshot.base_version == version - 1
        assert publisher.traffic.bytes_sent - before <= 1.2 * snapshots[0].bytes
    assert not house.reconnections()


def test_a_relay_that_lies_is_noticed_and_routed_around(house: House) -> None:
    publisher, liar = house.publisher(), house.publisher()
    reader = house.fetcher(liar.address, publisher.address)
    for version in range(2):
        truth = model(version)
        liar.publish(version, model(version + 7).items())  # consistent in itself: every checksum of it is right
        publisher.publish(version, truth.items())
        reader.want(version, state_digest(truth), (liar.address, publisher.address))
        assert_same_bits(got(reader).tensors, truth)
    [reason] = house.reconnections()
    assert f"relay {liar.address}" in reason
    assert "the learner published" in reason


def test_a_relay_whose_memory_is_damaged_is_routed_around(house: House) -> None:
    publisher, damaged = house.publisher(), house.publisher()
    state = capture(0, model().items())
    state.tensors["scale"] = torch.tensor(9.0)  # after the checksums were taken
    damaged.offer(state)
    publisher.publish(0, model().items())
    reader = house.fetcher(damaged.address, publisher.address)
    reader.want(0, state.digest)
    assert_same_bits(got(reader).tensors, model())
    [reason] = house.reconnections()
    assert f"relay {damaged.address}: tensor 'scale' of version 0: expected checksum" in reason


class KeyedHouse:
    """A learner whose list has a and b; a relays, for those that it is told."""

    def __init__(self, house: House) -> None:
        self.house, self.admitted = house, Admitted()
        server, self.a, self.b, self.foe = (pair() for _ in range(4))
        self.a, self.b, self.foe = (
            dataclasses.replace(one, server=server.public) for one in (self.a, self.b, self.foe)
        )
        allowed = frozenset([self.a.public, self.b.public])
        self.publisher = house.stack.enter_context(
            closing(StreamPublisher(LOOPBACK, EPOCH, house.events, keys=dataclasses.replace(server, allowed=allowed)))
        )
        self.named = model()
        self.publisher.publish(0, self.named.items())
        self.address = relay_address(LOOPBACK)
        self.relay, self.source = self.start_relay()

    def start_relay(self) -> tuple[Relay, str]:
        """With a key pair of its own, as each daemon that starts."""
        own = dataclasses.replace(pair(), allowed=self.admitted)
        relay = self.house.relay((self.publisher.address,), self.address, keys=self.a, serve_keys=own)
        relay.want(0, state_digest(self.named))
        assert got(relay).version == 0
        return relay, join_key(self.address, own.public)

    def publish(self, version: int) -> str:
        self.named = changed(self.named, version)
        self.publisher.publish(version, self.named.items())
        return state_digest(self.named)


def pair() -> CurveKeys:
    public, secret = zmq.curve_keypair()
    return CurveKeys(public=public, secret=secret)


def test_with_keys_a_relay_serves_whom_it_is_told_and_a_revoked_key_no_more(house: House) -> None:
    keyed = KeyedHouse(house)
    keyed.admitted.replace([keyed.b.public.decode()])
    reader = house.fetcher(keyed.source, keyed.publisher.address, keys=keyed.b)
    sent = keyed.publisher.traffic.bytes_sent
    reader.want(0, state_digest(keyed.named))
    snapshot = got(reader)
    assert_same_bits(snapshot.tensors, keyed.named)
    assert snapshot.source == keyed.address
    assert keyed.publisher.traffic.bytes_sent == sent, "the learner had nothing to do with it"
    # The connection is open, and the next frame on it is the first of a key that is not on the relay's list any more.
    keyed.admitted.replace([])
    digest, rejected = keyed.publish(1), keyed.relay.traffic.rejected
    reader.want(1, digest)
    assert got(reader).source == keyed.publisher.address
    assert keyed.relay.traffic.rejected > rejected


def test_with_keys_a_stranger_gets_nothing_from_a_relay(house: House) -> None:
    keyed = KeyedHouse(house)
    keyed.admitted.replace([keyed.b.public.decode()])
    plain = house.fetcher(keyed.address)
    # A key of the learner's list that the relay was not told of; one of no list; the right one for another socket.
    others = [house.fetcher(keyed.source, keys=keys) for keys in (keyed.a, keyed.foe)]
    misled = house.fetcher(join_key(keyed.address, pair().public), keys=keyed.b)
    for stranger in (plain, misled, *others):
        stranger.want(0, state_digest(keyed.named))
    reader = house.fetcher(keyed.source, keys=keyed.b)
    reader.want(0, state_digest(keyed.named))
    assert_same_bits(got(reader).tensors, keyed.named)
    until(lambda: all(stranger.waiting_for().find("sent nothing new") > 0 for stranger in (plain, misled, *others)), 60)
    assert all(stranger.poll() is None and not stranger.received_bytes for stranger in (plain, misled, *others))


def test_a_relay_that_starts_anew_at_its_address_is_found_under_its_new_key(house: House) -> None:
    keyed = KeyedHouse(house)
    keyed.admitted.replace([keyed.b.public.decode()])
    reader = house.fetcher(keyed.source, keyed.publisher.address, keys=keyed.b)
    reader.want(0, state_digest(keyed.named))
    assert got(reader).source == keyed.address
    keyed.relay.close()
    relay, source = keyed.start_relay()
    digest = keyed.publish(1)
    relay.want(1, digest)
    got(relay)
    reader.want(1, digest, (source, keyed.publisher.address))
    assert got(reader).source == keyed.address
    assert not house.reconnections()


RELAYING = """
import sys, time
sys.path.insert(0, "tests/unit")
from weights_support import Recorder
from orz_async.weights.relay import Relay
relay = Relay([sys.argv[1]], "tcp://127.0.0.1:0", 3, Recorder())
print(relay.address, flush=True)
while True:
    if relay.poll() is not None:
        print("has it", flush=True)
    time.sleep(0.01)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_relay_that_dies_or_freezes_is_routed_around(house: House, how: signal.Signals) -> None:
    publisher = house.publisher()
    process = subprocess.Popen(
        [sys.executable, "-c", RELAYING, publisher.address],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        reader = house.fetcher(address, publisher.address)
        publisher.publish(0, model().items())
        reader.want(0, state_digest(model()))
        assert_same_bits(got(reader).tensors, model())
        assert process.stdout.readline() == "has it\n"
        before = publisher.traffic.bytes_sent
        process.send_signal(how)
        named = changed(model(), 1)
        publisher.publish(1, named.items())
        reader.want(1, state_digest(named))
        snapshot = got(reader)
        assert_same_bits(snapshot.tensors, named)
        assert snapshot.base_version == 0  # what came through the relay is a base for what comes without it
        assert publisher.traffic.bytes_sent > before
    finally:
        process.kill()
        process.communicate()
