"""The stream over real sockets on loopback, and over a network that cuts, damages, delays and goes silent."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq
from weights_support import Named, Proxy, Recorder, assert_same_bits, changed, model, no_leaks, until

from orz_async.errors import ConfigError, PeerLostError, PortError, WireError
from orz_async.weights.address import CurveKeys
from orz_async.weights.manifest import Limits
from orz_async.weights.protocol import Snapshot
from orz_async.weights.relay import Relay
from orz_async.weights.snapshot import State, capture, digest_of, state_digest
from orz_async.weights.stream import StreamFetcher, StreamPublisher
from orz_async.weights.wire import Message, Pull, Waiting, Want, decode, encode

pytestmark = pytest.mark.usefixtures("no_leaks")
__all__ = ["no_leaks"]  # a fixture

LOOPBACK = "tcp://127.0.0.1:0"
EPOCH = 3


class House:
    """Opens the ends of streams; the fixture closes them."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.events = Recorder()

    def publisher(self, bind: str = LOOPBACK, **options: Any) -> StreamPublisher:
        options.setdefault("chunk_bytes", 64 << 10)
        options.setdefault("history", 4)
        return self._stack.enter_context(closing(StreamPublisher(bind, EPOCH, self.events, **options)))

    def fetcher(self, address: str | list[str], epoch: int = EPOCH, **options: Any) -> StreamFetcher:
        options.setdefault("stall_s", 0.5)
        return self._stack.enter_context(closing(StreamFetcher(address, epoch, self.events, **options)))

    def relay(self, upstream: str) -> Relay:
        return self._stack.enter_context(closing(Relay(upstream, LOOPBACK, EPOCH, self.events, stall_s=0.5)))

    def proxy(self, target: str) -> Proxy:
        return self._stack.enter_context(closing(Proxy(target)))

    def reasons(self, kind: str) -> list[str]:
        return [str(fields.get("reason", "")) for name, fields in self.events.events if name == kind]


@pytest.fixture
def house(no_leaks: None) -> Iterator[House]:
    with ExitStack() as stack:
        yield House(stack)


def arrive(fetcher: StreamFetcher | Relay, version: int, timeout_s: float = 30.0) -> Snapshot:
    fetcher.want(version)
    snapshot = until(fetcher.poll, timeout_s)
    assert snapshot is not None, fetcher.waiting_for()
    return snapshot


def publish(publisher: StreamPublisher, version: int, named: Named) -> int:
    return publisher.publish(version, named.items()).bytes


def test_every_bit_arrives_and_the_digest_is_that_of_what_is_served(house: House) -> None:
    publisher = house.publisher()
    report = publisher.publish(0, model().items())
    snapshot = arrive(house.fetcher(publisher.address), 0)
    assert_same_bits(snapshot.tensors, model())
    assert (snapshot.version, snapshot.epoch, snapshot.base_version) == (0, EPOCH, -1)
    assert snapshot.digest == report.digest == state_digest(model())
    assert snapshot.bytes == report.bytes == sum(tensor.nbytes for tensor in model().values())


def test_what_is_published_is_what_it_was_at_that_moment(house: House) -> None:
    publisher = house.publisher()
    named = model()
    publish(publisher, 0, named)
    for tensor in named.values():
        tensor.zero_()  # the optimizer goes on
    assert_same_bits(arrive(house.fetcher(publisher.address), 0).tensors, model())


def test_versions_follow_as_deltas_and_a_late_joiner_gets_everything(house: House) -> None:
    publisher = house.publisher()
    steady, versions = house.fetcher(publisher.address), [model()]
    full = publish(publisher, 0, versions[0])
    arrive(steady, 0)
    for version in range(1, 5):
        versions.append(changed(versions[-1], version))
        publish(publisher, version, versions[-1])
        snapshot = arrive(steady, version)
        assert (snapshot.version, snapshot.base_version) == (version, version - 1)
        assert snapshot.bytes < 0.15 * full
        assert_same_bits(snapshot.tensors, versions[-1])
        assert snapshot.digest == state_digest(versions[-1])
    late = arrive(house.fetcher(publisher.address), 2)
    assert (late.version, late.base_version, late.bytes) == (4, -1, full)
    assert_same_bits(late.tensors, versions[4])


def test_a_fetcher_that_fell_behind_gets_one_merged_delta(house: House) -> None:
    publisher = house.publisher()
    fetcher, versions = house.fetcher(publisher.address), [model()]
    full = publish(publisher, 0, versions[0])
    arrive(fetcher, 0)
    for version in range(1, 4):
        versions.append(changed(versions[-1], version))
        publish(publisher, version, versions[-1])
        until(lambda: publisher._handover is None and not publisher._shelf.busy)
    snapshot = arrive(fetcher, 3)
    assert (snapshot.version, snapshot.base_version) == (3, 0)
    assert snapshot.bytes < 0.3 * full
    assert_same_bits(snapshot.tensors, versions[3])


def test_a_version_wanted_early_arrives_when_it_is_published(house: House) -> None:
    publisher = house.publisher()
    fetcher = house.fetcher(publisher.address, stall_s=5.0)
    fetcher.want(0)
    assert until(lambda: "has version -1" in fetcher.waiting_for())
    assert fetcher.poll() is None
    publish(publisher, 0, model())
    started = time.monotonic()
    assert until(fetcher.poll) is not None
    assert time.monotonic() - started < 0.9  # told at once, not when it asks again


def test_a_damaged_chunk_is_seen_and_only_the_rest_is_fetched_again(house: House) -> None:
    publisher = house.publisher()
    full = publish(publisher, 0, model())
    proxy = house.proxy(publisher.address)
    proxy.flip_at = full // 2
    snapshot = arrive(house.fetcher(proxy.address), 0)
    assert_same_bits(snapshot.tensors, model())
    assert proxy.flip_at is None
    assert proxy.connections == 2
    assert len(house.reasons("weights_reconnect")) == 1
    assert proxy.to_client < 1.9 * full


@pytest.mark.parametrize("delta", [False, True])
def test_a_cut_connection_resumes_without_fetching_twice(house: House, delta: bool) -> None:
    publisher = house.publisher(chunk_bytes=4 << 10)
    proxy = house.proxy(publisher.address)
    fetcher = house.fetcher(proxy.address, stall_s=60)  # it does not take silence to notice
    named, base = model(scale=4), 0
    size = publish(publisher, 0, named)
    if delta:
        arrive(fetcher, 0)
        named, base = changed(named, 1), proxy.to_client
        publish(publisher, 1, named)
        size = size // 20
    proxy.cut_after = base + size // 2
    snapshot = arrive(fetcher, int(delta))
    assert_same_bits(snapshot.tensors, named)
    assert proxy.cut_after is None
    assert proxy.connections == 2
    assert (snapshot.base_version == 0) is delta
    # Chunks of 4 KiB; what was in flight at the cut (credits and socket buffers) and the second manifest come again.
    assert fetcher.received_bytes < base + 1.1 * snapshot.bytes + 20 * (4 << 10)


def test_a_silent_publisher_is_left_and_found_again(house: House) -> None:
    publisher = house.publisher()
    publish(publisher, 0, model())
    proxy = house.proxy(publisher.address)
    proxy.mute = True
    fetcher = house.fetcher(proxy.address, stall_s=0.2)
    fetcher.want(0)
    assert until(lambda: proxy.connections >= 2)
    assert "sent nothing new for 0.2 s" in fetcher.waiting_for()
    proxy.mute = False
    assert until(fetcher.poll) is not None


def test_no_publisher_for_too_long_ends_the_fetcher_with_a_sentence(house: House) -> None:
    with closing(house.publisher()) as gone:
        address = gone.address
    fetcher = house.fetcher(address, stall_s=0.1, give_up_s=0.5)
    fetcher.want(4)
    with pytest.raises(PeerLostError, match=f"waiting for weights version 4 from {address} for .* gave up"):
        until(fetcher.poll)


SERVE = """
import sys
from orz_async.weights.stream import StreamPublisher
sys.path.insert(0, "tests/unit")
from weights_support import Recorder, model
publisher = StreamPublisher("tcp://127.0.0.1:0", 3, Recorder(), chunk_bytes=65536)
publisher.publish(0, model(scale=8).items())
print(publisher.address, flush=True)
sys.stdin.read()
"""


def test_a_killed_publisher_is_taken_up_again_in_its_next_life(house: House) -> None:
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    proxy = house.proxy(address)
    proxy.bytes_per_s = 4 << 20  # so that the kill falls into the middle
    fetcher = house.fetcher(proxy.address)
    fetcher.want(0)
    until(lambda: proxy.to_client > 300_000)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert fetcher.poll() is None
    received = fetcher.received_bytes
    assert received > 0
    publish(house.publisher(address), 0, model(scale=8))
    proxy.bytes_per_s = 0
    snapshot = until(fetcher.poll)
    assert snapshot is not None, fetcher.waiting_for()
    assert_same_bits(snapshot.tensors, model(scale=8))
    assert fetcher.received_bytes < 1.1 * snapshot.bytes + 10 * 65536


def test_a_superseded_version_is_abandoned(house: House) -> None:
    publisher = house.publisher()
    old, new = model(scale=8), model(1, scale=8)
    full = publish(publisher, 0, old)
    proxy = house.proxy(publisher.address)
    proxy.bytes_per_s = 4 << 20
    fetcher = house.fetcher(proxy.address)
    fetcher.want(0)
    until(lambda: proxy.to_client > 300_000)
    publish(publisher, 1, new)
    proxy.bytes_per_s = 0
    snapshot = arrive(fetcher, 1)
    assert snapshot.version == 1
    assert_same_bits(snapshot.tensors, new)
    assert fetcher.poll() is None
    assert fetcher.received_bytes < 1.9 * full


def test_one_that_does_not_read_holds_up_nobody_and_no_memory(house: House) -> None:
    publisher = house.publisher()
    named = {"w": torch.randn(4 << 20)}
    full = publish(publisher, 0, named)
    with zmq.Context() as context, context.socket(zmq.DEALER) as lazy:
        lazy.linger, lazy.rcvhwm = 0, 1
        lazy.connect(publisher.address)
        lazy.send(encode(Want(0, -1, ""), EPOCH))
        for index in range(250):  # 16 MB, and never reads one
            lazy.send(encode(Pull(0, "", index), EPOCH))
        until(lambda: publisher.traffic.dropped > 0)
        started = time.monotonic()
        snapshot = arrive(house.fetcher(publisher.address), 0)
        assert time.monotonic() - started < 3.0
        assert_same_bits(snapshot.tensors, named)
        assert publisher.traffic.dropped > 0
        assert publisher.traffic.bytes_sent < 1.9 * full  # most of what it asked for was dropped, not queued


def test_two_fetchers_at_different_paces_each_get_everything(house: House) -> None:
    publisher = house.publisher()
    named = model(scale=4)
    full = publish(publisher, 0, named)
    proxy = house.proxy(publisher.address)
    proxy.bytes_per_s = full  # a second for one of them
    slow, quick = house.fetcher(proxy.address, stall_s=2.0), house.fetcher(publisher.address)
    slow.want(0)
    assert until(lambda: "chunks here" in slow.waiting_for())
    assert_same_bits(arrive(quick, 0).tensors, named)
    assert slow.poll() is None
    publish(publisher, 1, changed(named, 1))  # the slow one finishes what it reads
    snapshot = until(slow.poll)
    assert snapshot is not None
    assert snapshot.version == 0
    assert_same_bits(snapshot.tensors, named)


def test_eight_fetchers_behind_a_relay_cost_the_publisher_as_much_as_one(house: House) -> None:
    publisher = house.publisher()
    versions = [model(scale=4), changed(model(scale=4), 1)]
    relay = house.relay(publisher.address)
    readers = [house.fetcher([relay.address, publisher.address], stall_s=5.0) for _ in range(7)]
    for version, named in enumerate(versions):
        before = publisher.traffic.bytes_sent, relay.traffic.bytes_sent
        publish(publisher, version, named)
        for reader in readers:  # the relay's owner asks for nothing: it fetches what its readers want
            reader.want(version)
        for reader in readers:
            snapshot = until(reader.poll)
            assert snapshot is not None, reader.waiting_for()
            assert (snapshot.version, snapshot.base_version) == (version, version - 1)
            assert_same_bits(snapshot.tensors, named)
        own = until(relay.poll)
        assert own is not None
        assert_same_bits(own.tensors, named)
        assert publisher.traffic.bytes_sent - before[0] < 1.2 * own.bytes
        assert relay.traffic.bytes_sent - before[1] > 7 * own.bytes


def test_without_its_relay_a_fetcher_turns_to_the_publisher(house: House) -> None:
    publisher = house.publisher()
    named = model()
    publish(publisher, 0, named)
    relay = house.relay(publisher.address)
    reader = house.fetcher([relay.address, publisher.address], stall_s=0.3)
    arrive(reader, 0)
    relay.close()
    publish(publisher, 1, changed(named, 1))
    snapshot = arrive(reader, 1)
    assert (snapshot.version, snapshot.base_version) == (1, 0)


def test_a_reader_that_asks_a_relay_for_the_impossible_holds_up_nobody(house: House) -> None:
    publisher = house.publisher()
    publish(publisher, 0, model())
    relay = house.relay(publisher.address)
    house.fetcher(relay.address).want(1 << 40)
    for version in (0, 1):
        if version:
            publish(publisher, version, model(version))
        assert arrive(relay, version).version == version


def test_a_chain_of_relays(house: House) -> None:
    publisher = house.publisher()
    far = house.relay(house.relay(publisher.address).address)
    for version in (0, 1):
        publish(publisher, version, model(version))
        assert_same_bits(arrive(far, version).tensors, model(version))


def test_a_hostile_manifest_ends_the_fetcher_with_the_reason(house: House) -> None:
    publisher = house.publisher()
    publish(publisher, 0, model())
    fetcher = house.fetcher(publisher.address, limits=Limits(max_bytes=1000))
    fetcher.want(0)
    with pytest.raises(WireError, match="over the limit of 1000 bytes"):
        until(fetcher.poll)


def test_a_publisher_whose_memory_is_damaged_cannot_pass_it_on(house: House) -> None:
    publisher = house.publisher()
    state = capture(0, model().items())
    publisher.offer(State(0, digest_of(state.specs), state.specs, {**state.tensors, "scale": torch.tensor(9.0)}))
    fetcher = house.fetcher(publisher.address)
    fetcher.want(0)
    with pytest.raises(WireError, match=r"tensor 'scale' of version 0: expected checksum .* 3 transfers in a row"):
        until(fetcher.poll)


def test_another_epoch_is_not_mistaken_for_this_one(house: House) -> None:
    publisher = house.publisher()
    publish(publisher, 0, model())
    fetcher = house.fetcher(publisher.address, epoch=EPOCH + 1, stall_s=5.0)
    fetcher.want(0)
    assert until(lambda: "expected a frame of learner epoch 4, got epoch 3" in fetcher.waiting_for())
    assert fetcher.poll() is None


def receive(peer: zmq.Socket[bytes]) -> Message:
    assert peer.poll(10_000), "expected a reply within 10 s"
    return decode(peer.recv(), EPOCH)


def test_noise_is_counted_and_harms_nobody(house: House) -> None:
    publisher = house.publisher()
    publish(publisher, 0, model())
    noise = [
        b"",
        b"ORZW",
        bytes(range(64)),
        bytes(encode(Waiting(0), EPOCH)),
        bytes(encode(Pull(0, "", 1 << 60), EPOCH)),
    ]
    noise.append(bytes(encode(Pull(0, "", -1), EPOCH)))
    with zmq.Context() as context, context.socket(zmq.DEALER) as peer:
        peer.linger = 0
        peer.connect(publisher.address)
        for _ in range(2):  # before the noise and after it
            peer.send(encode(Want(0, -1, ""), EPOCH))
            replies = [receive(peer)]
            while isinstance(replies[-1], Waiting):  # the publisher's thread has not taken the version over yet
                replies.append(receive(peer))
            assert replies[-1].version == 0  # type: ignore[union-attr]
            for frame in noise:
                peer.send(frame)
            peer.send_multipart([b"two", b"frames"])
        assert until(lambda: publisher.traffic.rejected == 2 * (len(noise) + 1))
    assert_same_bits(arrive(house.fetcher(publisher.address), 0).tensors, model())


def test_where_it_may_listen(house: House) -> None:
    with pytest.raises(ConfigError, match=r"expected a loopback address to offer weights on, got tcp://0\.0\.0\.0:0"):
        house.publisher("tcp://0.0.0.0:0")
    publisher = house.publisher()
    with pytest.raises(PortError, match=f"cannot offer weights on {publisher.address}: Address already in use"):
        house.publisher(publisher.address)


def test_with_keys_only_those_on_the_list_get_in(house: House) -> None:
    (public, secret), (friend, friend_secret), (foe, foe_secret) = (zmq.curve_keypair() for _ in range(3))
    publisher = house.publisher(
        "tcp://127.0.0.1:0", keys=CurveKeys(public=public, secret=secret, allowed=frozenset([friend]))
    )
    publish(publisher, 0, model())
    refused = house.fetcher(publisher.address, keys=CurveKeys(public=foe, secret=foe_secret, server=public))
    plain = house.fetcher(publisher.address)
    for fetcher in (refused, plain):
        fetcher.want(0)
    welcome = house.fetcher(publisher.address, keys=CurveKeys(public=friend, secret=friend_secret, server=public))
    assert_same_bits(arrive(welcome, 0).tensors, model())
    assert refused.received_bytes == plain.received_bytes == 0


def test_a_key_taken_off_the_list_gets_no_more_and_a_rotated_one_goes_on(house: House) -> None:
    (public, secret), old, new = (zmq.curve_keypair() for _ in range(3))
    allowed = {old[0]}
    publisher = house.publisher("tcp://127.0.0.1:0", keys=CurveKeys(public=public, secret=secret, allowed=allowed))
    pair = [old]
    fetcher = house.fetcher(
        publisher.address, stall_s=0.3, keys=lambda: CurveKeys(public=pair[0][0], secret=pair[0][1], server=public)
    )
    publish(publisher, 0, model())
    arrive(fetcher, 0)
    allowed.clear()
    publish(publisher, 1, model())
    fetcher.want(1)
    end = time.monotonic() + 30
    while publisher.traffic.rejected == 0:  # its connection is open still, and asks
        assert time.monotonic() < end and fetcher.poll() is None
        time.sleep(0.01)
    allowed.add(new[0])
    pair[0] = new
    assert_same_bits(arrive(fetcher, 1).tensors, model())


def test_versions_only_grow_and_nothing_is_published_after_the_end(house: House) -> None:
    publisher = house.publisher()
    publish(publisher, 5, model())
    with pytest.raises(ValueError, match="expected a version newer than 5, got 5"):
        publish(publisher, 5, model())
    publisher.close()
    publisher.close()
    fetcher = house.fetcher(publisher.address)
    fetcher.want(0)
    fetcher.close()
    fetcher.close()
