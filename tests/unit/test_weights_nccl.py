"""The nccl transport over gloo on this machine's CPU: the same code but for the backend, with receivers that die."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import torch
from weights_support import Named, Recorder, assert_same_bits, libuv, model, no_leaks, until

from orz_async.errors import ConfigError, PeerLostError, PortError, WireError
from orz_async.weights import group as groups
from orz_async.weights.manifest import Limits
from orz_async.weights.nccl_fetcher import NcclFetcher
from orz_async.weights.nccl_publisher import NcclPublisher
from orz_async.weights.protocol import Snapshot
from orz_async.weights.snapshot import State, capture, digest_of, state_digest

pytestmark = pytest.mark.usefixtures("no_leaks")
__all__ = ["libuv", "no_leaks"]  # fixtures

LOOPBACK = "nccl://127.0.0.1:0"
EPOCH = 3
RECEIVER = """
import sys, time
sys.path.insert(0, "tests/unit")
from weights_support import Recorder
from orz_async.weights.nccl_fetcher import NcclFetcher
fetcher = NcclFetcher(sys.argv[1], 3, Recorder(), deadline_s=float(sys.argv[2]))
fetcher.want(0)
while True:
    if (snapshot := fetcher.poll()) is not None:
        print(snapshot.version, snapshot.digest, flush=True)
        fetcher.want(snapshot.version + 1)
    time.sleep(0.005)
"""


class House:
    """Opens the ends of groups; the fixture closes them."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.events = Recorder()

    def publisher(self, bind: str = LOOPBACK, **options: Any) -> NcclPublisher:
        options.setdefault("deadline_s", 20.0)
        return self._stack.enter_context(closing(NcclPublisher(bind, EPOCH, self.events, **options)))

    def fetcher(self, address: str, epoch: int = EPOCH, **options: Any) -> NcclFetcher:
        options.setdefault("deadline_s", 20.0)
        return self._stack.enter_context(closing(NcclFetcher(address, epoch, self.events, **options)))

    def process(self, address: str, deadline_s: float = 20.0) -> subprocess.Popen[str]:
        """A receiver that follows every version."""
        process = subprocess.Popen(
            [sys.executable, "-c", RECEIVER, address, str(deadline_s)],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            text=True,
        )

        def end() -> None:
            process.kill()
            process.communicate()

        self._stack.callback(end)
        return process

    def expelled(self) -> list[dict[str, Any]]:
        return [fields for kind, fields in self.events.events if kind == "weights_expelled"]


@pytest.fixture
def house(no_leaks: None) -> Iterator[House]:
    with ExitStack() as stack:
        yield House(stack)


def arrive(fetcher: NcclFetcher, version: int) -> Snapshot:
    fetcher.want(version)
    snapshot = until(fetcher.poll, 60)
    assert snapshot is not None, fetcher.waiting_for()
    return snapshot


def large(seed: int) -> Named:
    """More than the buffers of a socket hold, so that a receiver that does not read is noticed."""
    return {"w": torch.randn(16 << 20, generator=torch.Generator().manual_seed(seed))}


def test_every_bit_arrives_and_a_late_joiner_gets_the_newest(house: House) -> None:
    publisher = house.publisher()
    early = house.fetcher(publisher.address)
    early.want(0)  # before there is one
    for version in range(3):
        report = publisher.publish(version, model(version).items())
        snapshot = arrive(early, version)
        assert_same_bits(snapshot.tensors, model(version))
        assert (snapshot.version, snapshot.epoch, snapshot.base_version) == (version, EPOCH, -1)
        assert snapshot.digest == report.digest == state_digest(model(version))
        assert [spec.name for spec in snapshot.specs] == list(model())
    late = arrive(house.fetcher(publisher.address), 1)
    assert late.version == 2
    assert_same_bits(late.tensors, model(2))
    assert publisher.bytes_sent == 4 * report.bytes
    assert not house.expelled()


def test_what_is_published_is_what_it_was_at_that_moment(house: House) -> None:
    publisher = house.publisher()
    named = model()
    publisher.publish(0, named.items())
    for tensor in named.values():
        tensor.zero_()  # the optimizer goes on
    assert_same_bits(arrive(house.fetcher(publisher.address), 0).tensors, model())


def test_versions_nobody_wanted_are_not_queued(house: House) -> None:
    publisher = house.publisher()
    fetcher = house.fetcher(publisher.address)
    publisher.publish(0, model().items())
    arrive(fetcher, 0)
    for version in range(1, 5):
        publisher.publish(version, model(version).items())
    snapshot = arrive(fetcher, 2)
    assert snapshot.version == 4
    assert publisher.bytes_sent == 2 * snapshot.bytes


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_receiver_that_dies_or_freezes_is_expelled_while_the_rest_go_on(house: House, how: signal.Signals) -> None:
    publisher = house.publisher(deadline_s=4.0)
    steady = house.fetcher(publisher.address)
    victim = house.process(publisher.address, deadline_s=4.0)
    publisher.publish(0, large(0).items())
    arrive(steady, 0)
    assert victim.stdout is not None
    assert victim.stdout.readline().split()[0] == "0"
    # Its wish for version 1 is with the learner before it is struck: the transfer finds it gone.
    assert until(lambda: {groups.peek(publisher._store, f"member/{i}/want") for i in (1, 2)} == {"0", "1"})
    victim.send_signal(how)
    for version in (1, 2, 3):
        publisher.publish(version, large(version).items())
        snapshot = arrive(steady, version)
        assert_same_bits(snapshot.tensors, large(version))
    assert until(house.expelled)
    [expelled] = house.expelled()
    assert expelled["held"] == 0
    assert expelled["member"].endswith(f":{victim.pid}")
    if how == signal.SIGSTOP:  # it lives after all: joins anew and gets the newest
        victim.send_signal(signal.SIGCONT)
        assert victim.stdout.readline().split() == ["3", state_digest(large(3))]


def test_one_that_announces_itself_and_does_not_come_holds_up_nobody(house: House) -> None:
    publisher = house.publisher(deadline_s=2.0)
    ghost = groups.join(publisher.address)
    ghost.add("members", 1)
    publisher.publish(0, model().items())
    assert_same_bits(arrive(house.fetcher(publisher.address), 0).tensors, model())
    assert until(house.expelled)
    assert "member 1 did not come to its group" in house.expelled()[0]["reason"]


def test_damage_is_named_refused_and_ends_the_fetcher_in_the_end(house: House) -> None:
    publisher = house.publisher()
    state = capture(0, model().items())
    with publisher._changed:
        publisher._newest = State(0, digest_of(state.specs), state.specs, {**state.tensors, "scale": torch.tensor(9.0)})
    fetcher = house.fetcher(publisher.address)
    fetcher.want(0)
    with pytest.raises(WireError, match=r"tensor 'scale' of version 0: expected checksum"):
        until(fetcher.poll)
    assert until(lambda: len(house.expelled()) == 3)
    assert "refused: tensor 'scale' of version 0" in house.expelled()[0]["reason"]


def test_other_weights_than_the_learner_announced_are_refused(house: House) -> None:
    publisher = house.publisher()
    publisher.publish(0, model().items())
    fetcher = house.fetcher(publisher.address)
    fetcher.want(0, digest="0badc0de")
    with pytest.raises(WireError, match="the learner published '0badc0de'"):
        until(fetcher.poll)


def test_a_manifest_over_the_limits_is_refused_before_memory_is_taken(house: House) -> None:
    publisher = house.publisher()
    publisher.publish(0, model().items())
    fetcher = house.fetcher(publisher.address, limits=Limits(max_bytes=1000))
    fetcher.want(0)
    with pytest.raises(WireError, match="over the limit of 1000 bytes"):
        until(fetcher.poll)


def test_a_learner_that_is_not_there_is_waited_for_and_then_given_up(house: House) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    fetcher = house.fetcher(f"nccl://127.0.0.1:{port}", give_up_s=0.5)
    fetcher.want(0)
    assert "waiting for weights version 0" in fetcher.waiting_for()
    with pytest.raises(PeerLostError, match="gave up after"):
        until(fetcher.poll)


def test_another_epoch_is_not_mistaken_for_this_one(house: House) -> None:
    publisher = house.publisher()
    publisher.publish(0, model().items())
    fetcher = house.fetcher(publisher.address, epoch=EPOCH + 1)
    fetcher.want(0)
    assert until(lambda: "expected a learner of epoch 4" in fetcher.waiting_for())
    assert fetcher.poll() is None


def test_both_sides_need_the_same_kind_of_device(house: House) -> None:
    publisher = house.publisher()
    fetcher = house.fetcher(publisher.address, device="cuda:0")
    fetcher.want(0)
    with pytest.raises(ConfigError, match="the learner sends weights with gloo, this engine's device is cuda:0"):
        until(fetcher.poll)


def test_where_it_listens(house: House) -> None:
    publisher = house.publisher()
    port = int(publisher.address.rpartition(":")[2])
    with pytest.raises(OSError, match="refused"):  # loopback means this address, not every one of this machine
        socket.create_connection(("127.0.0.2", port), timeout=5).close()
    with pytest.raises(PortError, match="cannot offer weights on"):
        house.publisher(publisher.address)
    with pytest.raises(ConfigError, match="expected nccl://HOST:PORT"):
        house.publisher("nccl://nowhere")


def test_versions_only_grow_and_closing_ends_a_transfer_in_progress(house: House) -> None:
    publisher = house.publisher(deadline_s=3.0)
    with pytest.raises(ValueError, match="expected a version newer than 5, got 5"):
        for _ in range(2):
            publisher.publish(5, model().items())
    victim = house.process(publisher.address, deadline_s=3.0)
    assert victim.stdout is not None
    victim.stdout.readline()
    assert until(lambda: groups.peek(publisher._store, "member/1/want") == "6")
    victim.send_signal(signal.SIGSTOP)
    publisher.publish(6, large(0).items())
    assert until(lambda: groups.peek(publisher._store, "member/1/go/2"))  # begun
    publisher.close()  # within the deadline of one operation
    assert not house.expelled()
