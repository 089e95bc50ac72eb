"""The fetcher's decisions in virtual time: what it asks, keeps, gives up and says, without a socket or a clock."""

from __future__ import annotations

import msgspec
import pytest
from weights_support import Named, assert_same_bits, changed, model

from orz_async.errors import PeerLostError, WireError
from orz_async.weights.download import ASK_AGAIN_S, CREDITS, MAX_DAMAGED, Action, Download, Phase, Reopen
from orz_async.weights.manifest import Limits
from orz_async.weights.payload import Payload, full_payload
from orz_async.weights.shelf import Shelf
from orz_async.weights.snapshot import capture
from orz_async.weights.wire import Chunk, Gone, Pull, Waiting, Want

STALL_S, GIVE_UP_S = 5.0, 60.0


def download(*addresses: str) -> Download:
    return Download(addresses or ("tcp://a",), limits=Limits(), stall_s=STALL_S, give_up_s=GIVE_UP_S)


def payload(version: int, named: Named | None = None) -> Payload:
    return full_payload(capture(version, (named or model(version)).items()), chunk_bytes=20_000)


def serve(machine: Download, source: Payload, actions: list[Action], now: float, chunks: int = 10**9) -> list[Action]:
    """Answer pulls in order until `chunks` of them are answered; the actions left over."""
    actions = list(actions)
    while actions and chunks:
        pull = actions.pop(0)
        assert isinstance(pull, Pull)
        actions += machine.handle(source.chunk(pull.index), now)
        chunks -= 1
    return actions


def test_from_want_to_done() -> None:
    machine, source = download(), payload(0)
    assert machine.want(0, 1.0) == [Want(0, -1, "")]
    assert machine.phase is Phase.ASKING
    assert machine.handle(Waiting(-1), 2.0) == []
    pulls = machine.handle(source.manifest, 3.0)
    assert pulls == [Pull(0, "", index) for index in range(CREDITS)]
    assert serve(machine, source, pulls, 4.0) == []
    assert machine.phase is Phase.IDLE
    assert machine.done == source.manifest
    assert machine.base is not None
    assert_same_bits(machine.base.tensors, model(0))
    assert machine.want(0, 5.0) == []  # it is held
    assert machine.want(1, 5.0) == [Want(1, 0, machine.base.digest)]


def test_open_requests_never_exceed_the_credits() -> None:
    machine, source = download(), payload(0)
    machine.want(0, 0.0)
    pulls = machine.handle(source.manifest, 0.0)
    asked = len(pulls)
    for received in range(source.manifest.num_chunks):
        assert asked - received <= CREDITS
        asked += len(machine.handle(source.chunk(received), 0.0))
    assert asked == source.manifest.num_chunks


def test_the_same_manifest_again_asks_for_nothing() -> None:
    machine, source = download(), payload(0)
    machine.want(0, 0.0)
    machine.handle(source.manifest, 0.0)
    assert machine.handle(source.manifest, 0.0) == []


def test_a_version_that_is_not_there_is_asked_for_again_but_not_in_a_hurry() -> None:
    machine = download()
    machine.want(3, 0.0)
    asked = 0
    for tick in range(100):
        now = tick * 0.1
        asked += len(machine.tick(now))
        machine.handle(Waiting(2), now)
    assert asked == pytest.approx(10 / ASK_AGAIN_S, abs=2)
    assert machine.waiting_for(10.0) == (
        "waiting for weights version 3 from tcp://a for 10.0 s, last heard of 0.1 s ago; tcp://a has version 2"
    )


def test_a_newer_version_takes_the_place_of_one_in_the_middle() -> None:
    machine, first, second = download(), payload(1), payload(2)
    machine.want(1, 0.0)
    rest = serve(machine, first, machine.handle(first.manifest, 0.0), 0.0, chunks=3)
    assert machine.want(2, 1.0) == [Want(2, -1, "")]
    assert machine.handle(first.chunk(3), 1.0) != []  # goes on until there is something better
    pulls = machine.handle(second.manifest, 1.0)
    assert pulls[0] == Pull(2, "", 0)
    late = rest[0]
    assert isinstance(late, Pull)
    assert machine.handle(first.chunk(late.index), 1.0) == []  # of the abandoned one, still on its way
    serve(machine, second, pulls, 1.0)
    assert machine.done == second.manifest
    assert machine.base is not None
    assert_same_bits(machine.base.tensors, model(2))


def test_a_version_wanted_meanwhile_is_asked_for_at_the_end() -> None:
    machine, first = download(), payload(1)
    machine.want(1, 0.0)
    pulls = machine.handle(first.manifest, 0.0)
    machine.want(2, 0.0)
    assert machine.handle(Waiting(1), 0.0) == []
    actions = serve(machine, first, pulls[:], 0.0, chunks=first.manifest.num_chunks)
    assert machine.base is not None
    assert actions == [Want(2, 1, machine.base.digest)]
    stale = payload(2).manifest  # the answer to the Want of before, which named no base, is welcome too
    assert machine.handle(stale, 0.0)[0] == Pull(2, "", 0)


def test_an_answer_for_a_base_of_before_is_ignored() -> None:
    shelf = Shelf(chunk_bytes=20_000, history=2)
    versions = [model(), changed(model(), 1), changed(changed(model(), 1), 2)]
    machine = download()
    for version, named in enumerate(versions):
        shelf.put(capture(version, named.items()), 0.0)
        while shelf.busy:
            shelf.work(0.0)
        if version < 2:
            source = full_payload(capture(version, named.items()))
            machine.want(version, 0.0)
            serve(machine, source, machine.handle(source.manifest, 0.0), 0.0)
    machine.want(2, 0.0)
    digest = capture(0, versions[0].items()).digest
    shelf.payload_for(digest, 0.0)
    while shelf.busy:
        shelf.work(0.0)
    merged = shelf.payload_for(digest, 0.0)
    assert merged is not None
    assert merged.manifest.base_version == 0
    assert machine.handle(merged.manifest, 0.0) == []
    assert machine.phase is Phase.ASKING


def test_silence_closes_rests_longer_each_time_and_resumes_where_it_stopped() -> None:
    machine, source = download(), payload(0)
    machine.want(0, 0.0)
    serve(machine, source, machine.handle(source.manifest, 0.0), 0.0, chunks=5)
    now, rests = 0.0, []
    for _ in range(4):
        now += STALL_S + 0.01
        assert machine.tick(now) == [Reopen.CLOSE]
        assert machine.phase is Phase.RESTING
        assert machine.handle(source.chunk(5), now) == []
        start = now
        while not (actions := machine.tick(now)):
            now += 0.01
        rests.append(now - start)
        assert actions == [Reopen.OPEN, Want(0, -1, "")]
    assert rests == pytest.approx([0.1, 0.2, 0.4, 0.8], abs=0.02)
    pulls = machine.handle(source.manifest, now)
    assert pulls[0] == Pull(0, "", 5)  # what came before the cut is not fetched again
    serve(machine, source, pulls, now)
    assert machine.done == source.manifest


def test_silence_for_too_long_is_an_error_that_says_what_was_awaited() -> None:
    machine = download()
    machine.want(7, 0.0)
    now = 0.0
    with pytest.raises(
        PeerLostError, match=r"waiting for weights version 7 from tcp://a for 60\.\d s.* gave up after 60"
    ):
        while now < 100:
            machine.tick(now)
            now += 0.05


def test_another_address_is_tried_when_one_is_silent_or_falls_behind() -> None:
    machine = download("tcp://relay", "tcp://learner")
    machine.want(1, 0.0)
    now = 0.0
    while now < STALL_S + 0.5:
        machine.tick(now)
        machine.handle(Waiting(0), now)  # alive, but its own source is gone
        now += 0.05
    assert machine.peer == "tcp://learner"


def test_a_publisher_that_still_prepares_the_difference_is_not_left() -> None:
    machine = download("tcp://relay", "tcp://learner")
    machine.want(1, 0.0)
    for tick in range(300):
        machine.tick(tick * 0.1)
        machine.handle(Waiting(1), tick * 0.1)
    assert machine.peer == "tcp://relay"


def test_a_lost_chunk_is_asked_for_again() -> None:
    machine, source = download(), payload(0)
    machine.want(0, 0.0)
    machine.handle(source.manifest, 0.0)
    machine.handle(source.chunk(0), 0.0)
    assert machine.handle(source.chunk(2), 0.0) == [Want(0, -1, "")]
    assert machine.handle(source.manifest, 0.0)[0] == Pull(0, "", 1)
    assert machine.handle(source.chunk(0), 0.0) == []  # a second time


def test_a_new_connection_is_asked_for_what_the_old_one_owed() -> None:
    machine, source = download(), payload(0)
    assert machine.reconnected(0.0) == []
    machine.want(0, 0.0)
    assert machine.reconnected(0.0) == [Want(0, -1, "")]
    serve(machine, source, machine.handle(source.manifest, 0.0), 0.0, chunks=4)
    assert machine.reconnected(0.0) == [Want(0, -1, "")]
    assert machine.handle(source.manifest, 0.0)[0] == Pull(0, "", 4)


def test_gone_asks_for_what_there_is() -> None:
    machine, first, second = download(), payload(1), payload(5)
    machine.want(1, 0.0)
    serve(machine, first, machine.handle(first.manifest, 0.0), 0.0, chunks=2)
    assert machine.handle(Gone(1), 0.0) == [Want(1, -1, "")]
    serve(machine, second, machine.handle(second.manifest, 0.0), 0.0)
    assert machine.base is not None
    assert machine.base.version == 5


def test_damage_behind_intact_frames_starts_over_with_everything_and_ends_with_a_name() -> None:
    machine, source = download(), payload(1)
    machine.want(1, 0.0)

    def attempt() -> list[Action]:
        assert machine.handle(source.manifest, 0.0)[0] == Pull(1, "", 0)
        for index in range(source.manifest.num_chunks):
            zeros = memoryview(bytes(source.manifest.chunk_length(index)))
            actions = machine.handle(Chunk(1, "", index, zeros), 0.0)
            if actions and not isinstance(actions[0], Pull):
                return actions
        raise AssertionError("zeros were taken for weights")

    for _ in range(MAX_DAMAGED - 1):
        assert attempt() == [Want(1, -1, "")]
    with pytest.raises(
        WireError, match=r"tensor 'embed\.weight' of version 1: expected checksum.*3 transfers in a row"
    ):
        attempt()


def test_after_damage_nothing_is_built_on_the_base_either() -> None:
    machine, first = download(), payload(0)
    machine.want(0, 0.0)
    serve(machine, first, machine.handle(first.manifest, 0.0), 0.0)
    assert machine.want(1, 0.0) != [Want(1, -1, "")]
    second = payload(1)
    machine.handle(second.manifest, 0.0)
    actions: list[Action] = []
    for index in range(second.manifest.num_chunks):
        actions += machine.handle(Chunk(1, "", index, memoryview(bytes(second.manifest.chunk_length(index)))), 0.0)
    assert actions[-1] == Want(1, -1, "")


def test_a_manifest_over_the_limits_ends_it() -> None:
    machine = Download(("tcp://a",), limits=Limits(max_bytes=1000), stall_s=STALL_S, give_up_s=GIVE_UP_S)
    machine.want(0, 0.0)
    with pytest.raises(WireError, match="over the limit of 1000 bytes"):
        machine.handle(payload(0).manifest, 0.0)


def test_what_was_not_asked_for_is_ignored() -> None:
    machine, source = download(), payload(0)
    for message in (source.manifest, source.chunk(0), Gone(0), Waiting(3)):
        assert machine.handle(message, 0.0) == []
    machine.want(0, 0.0)
    assert machine.handle(source.chunk(0), 0.0) == []
    older = msgspec.structs.replace(source.manifest, version=-1)
    assert machine.handle(older, 0.0) == []
