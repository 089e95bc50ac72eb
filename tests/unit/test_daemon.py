"""The generator's loop, driven step by step with a clock that moves when the loop waits."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import generator_support
import numpy as np
import pytest
import torch

from orz_async.broker.messages import (
    Ack,
    Bye,
    Cancel,
    Failure,
    Grant,
    Hello,
    LeaseRef,
    Leave,
    Nack,
    Progress,
    Published,
    Result,
    Status,
    ToBroker,
    ToGenerator,
    Welcome,
)
from orz_async.errors import EngineError, Interrupted, PeerLostError, WireError
from orz_async.generator.daemon import Daemon, State
from orz_async.generator.engine import LeaseError, Partial, Sample, ref_of
from orz_async.generator.incoming import EVAL_PIN_S
from orz_async.generator.ports import GradeKey, Serving
from orz_async.generator.workload import RESEND_S
from orz_async.observe.events import EventLog
from orz_async.records import Finish, Lease, Span
from orz_async.reward.grade import Verdict
from orz_async.weights.protocol import Snapshot

HEARTBEAT_S = 0.5
WELCOME = Welcome("run", "model", ("</answer>",), "tcp://weights", 0, HEARTBEAT_S, 80)


class FakeClient:
    """A broker that says what the test puts in `inbox`. Waiting moves the clock."""

    def __init__(self) -> None:
        self.hello = Hello("g0", "fake", 4, 0, 1)
        self.epoch = 1
        self.now = 100.0
        self.inbox: list[ToGenerator] = []
        self.sent: list[ToBroker] = []
        self.timeouts: list[float] = []
        self.on_poll: Callable[[], None] = lambda: None
        self.is_closed = False

    @property
    def waiting_since(self) -> float:
        return self.now

    def poll(self, timeout_s: float) -> list[ToGenerator]:
        self.on_poll()
        self.timeouts.append(timeout_s)
        messages, self.inbox = self.inbox, []
        if not messages:
            self.now += timeout_s
        return messages

    def send(self, message: ToBroker) -> bool:
        self.sent.append(message)
        return True

    def close(self) -> None:
        self.is_closed = True


class FakeEngine:
    """Two slots. Each poll samples token 7 for both; a response ends at its limit; token 13 in a prompt breaks it."""

    def __init__(self) -> None:
        self.version = -1
        self.applied: list[int] = []
        self.vocab_size = 48
        self.tokens_sampled = self.steps_sampled = 0
        self.timings = {"load_s": 0.25}
        self.leases: dict[LeaseRef, Lease] = {}
        self.spans: dict[LeaseRef, list[Span]] = {}
        self.tokens: dict[LeaseRef, int] = {}
        self.is_closed = False

    @property
    def idle(self) -> bool:
        return not self.leases

    def submit(self, one: Lease) -> None:
        if not one.prompt:
            raise LeaseError(ref_of(one), "no prompt")
        self.leases[ref_of(one)], self.tokens[ref_of(one)] = one, 0

    def cancel(self, ref: LeaseRef) -> Partial | None:
        one, count = self.leases.pop(ref, None), self.tokens.pop(ref, 0)
        if one is None or not count:
            return None
        return Partial(one, np.full(count, 7, np.int32), np.full(count, -1, np.float32), tuple(self.spans[ref]))

    def running(self) -> list[LeaseRef]:
        return list(self.leases)[:2]

    def poll(self) -> list[Sample]:
        done = []
        self.steps_sampled += bool(self.leases)
        for ref in self.running():
            one = self.leases[ref]
            if 13 in np.frombuffer(one.prompt, np.int32):
                del self.leases[ref]
                raise LeaseError(ref, "logits are not finite")
            spans = self.spans.setdefault(ref, [])
            if not spans or spans[-1].version != self.version:
                spans.append(Span(self.version, self.tokens[ref]))
            self.tokens[ref] += 1
            self.tokens_sampled += 1
            if (count := self.tokens[ref]) == one.sampling.max_new_tokens:
                del self.leases[ref]
                logprobs = np.full(count, -1, np.float32)
                done.append(Sample(one, np.full(count, 7, np.int32), logprobs, tuple(spans), "length", 1.0))
        return done

    def apply(self, version: int, tensors: Mapping[str, Any]) -> str:
        self.version = version
        self.applied.append(version)
        return str(tensors["digest"])

    def progress(self) -> list[Progress]:
        running = self.running()
        return [Progress(ref, self.tokens[ref], ref not in running) for ref in self.leases]

    def close(self) -> None:
        self.is_closed = True


class FakeFetcher:
    def __init__(self, address: str, epoch: int) -> None:
        self.address, self.epoch = address, epoch
        self.wanted: list[int] = []
        self.told: list[tuple[int, str, tuple[str, ...]]] = []
        self.ready: deque[Snapshot] = deque()
        self.is_closed = False

    def want(self, version: int, digest: str = "", sources: Sequence[str] = ()) -> None:
        if version not in self.wanted:
            self.wanted.append(version)
        self.told.append((version, digest, tuple(sources)))

    def poll(self) -> Snapshot | None:
        return self.ready.popleft() if self.ready else None

    def arrive(self, version: int, served: str = "d") -> None:
        """`served`: the digest that the engine will report."""
        tensors: dict[str, Any] = {"digest": served}
        snapshot = Snapshot(version=version, epoch=self.epoch, tensors=tensors, digest="d", bytes=8, fetch_s=0.1)
        self.ready.append(snapshot)

    def waiting_for(self) -> str:
        return ""

    def close(self) -> None:
        self.is_closed = True


class FakeGrader:
    """Every response is correct and its verdict is its text. One a poll; with `is_slow`, none."""

    def __init__(self) -> None:
        self.submitted: list[tuple[GradeKey, str, str, Finish]] = []
        self.waiting: list[tuple[GradeKey, Any]] = []
        self.is_slow = False
        self.is_closed = False

    @property
    def pending(self) -> int:
        return len(self.waiting)

    def submit(self, key: GradeKey, response: str, answer: str, finish: Finish) -> None:
        self.submitted.append((key, response, answer, finish))
        self.waiting.append((key, Verdict(1.0, response)))  # type: ignore[arg-type]

    def poll(self) -> Iterable[tuple[GradeKey, Verdict]]:
        return [self.waiting.pop(0)] if self.waiting and not self.is_slow else []

    def close(self) -> None:
        self.is_closed = True


class Noted(EventLog):
    def emit(self, kind: str, **fields: Any) -> None:
        self.seen = [*getattr(self, "seen", ()), (kind, fields)]


class Rig:
    """A daemon with everything around it faked."""

    def __init__(self, *, drain_s: float = 30.0) -> None:
        self.client = FakeClient()
        self.engines: list[FakeEngine] = []
        self.fetchers: list[FakeFetcher] = []
        self.grader = FakeGrader()
        self.events = Noted(None, "a test")
        self.admitted: list[tuple[str, ...]] = []
        self.daemon = Daemon(
            client=self.client,
            make_serving=self._make_serving,
            make_fetcher=self._make_fetcher,
            grader=self.grader,
            slots=4,
            events=self.events,
            drain_s=drain_s,
            admit=self.admitted.append,
            clock=lambda: self.client.now,
        )

    def _make_serving(self, _welcome: Welcome) -> Serving:
        self.engines.append(FakeEngine())
        return Serving(self.engines[-1], lambda response: f"{len(response)} tokens")

    def _make_fetcher(self, welcome: Welcome, epoch: int) -> FakeFetcher:
        self.fetchers.append(FakeFetcher(welcome.weights_address, epoch))
        return self.fetchers[-1]

    @property
    def engine(self) -> FakeEngine:
        return self.engines[-1]

    @property
    def fetcher(self) -> FakeFetcher:
        return self.fetchers[-1]

    def say(self, *messages: ToGenerator, steps: int = 1) -> list[ToBroker]:
        """The broker says this; returns the daemon's answers during the next steps."""
        self.client.inbox.extend(messages)
        self.client.sent.clear()
        for _ in range(steps):
            self.daemon.step()
        return list(self.client.sent)

    def serve(self, version: int = 0) -> list[ToBroker]:
        """Welcome, and the weights of this version arrive."""
        self.say(replace_welcome(version=version))
        self.fetcher.arrive(version)
        return self.say()

    def until_status(self) -> Status:
        """The next heartbeat."""
        for _ in range(1000):
            for message in self.say():
                if isinstance(message, Status):
                    return message
        raise AssertionError("no Status came")


def replace_welcome(**changes: Any) -> Welcome:
    return Welcome(**{name: getattr(WELCOME, name) for name in WELCOME.__struct_fields__} | changes)


def lease(rollout: int, **options: Any) -> Lease:
    return generator_support.lease(rollout, **{"prompt": [1, 2, 3]} | options)


def of(kind: type, messages: Iterable[ToBroker]) -> list[Any]:
    return [message for message in messages if isinstance(message, kind)]


def ref(rollout: int) -> LeaseRef:
    return LeaseRef("train", rollout, 0)


def test_a_lease_becomes_a_result_with_all_that_its_lease_asked_for() -> None:
    rig = Rig()
    first = rig.say(WELCOME)
    assert of(Status, first) == [Status(4, -1, ())] and rig.fetcher.wanted == [0]
    assert rig.client.hello.vocab_size == 48
    rig.fetcher.arrive(0)
    assert of(Status, rig.say()) == [Status(4, 0, ())]
    one = lease(5, new=3)
    assert not of(Result, rig.say(Grant((one,)), steps=2))
    (result,) = of(Result, rig.say())
    trajectory = result.trajectory
    assert (trajectory.kind, trajectory.rollout, trajectory.attempt) == ("train", 5, 0)
    assert (trajectory.prompt_id, trajectory.prompt, trajectory.sample) == (one.prompt_id, one.prompt, one.sample)
    assert trajectory.response == np.full(3, 7, "<i4").tobytes()
    assert trajectory.logprobs == np.full(3, -1, "<f4").tobytes()
    assert (trajectory.reward, trajectory.verdict, trajectory.finish) == (1.0, "3 tokens", "length")
    assert (trajectory.spans, trajectory.generator, trajectory.generate_s) == ((Span(0, 0),), "g0", 1.0)
    assert rig.grader.submitted == [((1, ref(5)), "3 tokens", "", "length")]


def test_a_result_is_repeated_until_it_is_acked() -> None:
    rig = Rig()
    rig.serve()
    (result,) = of(Result, rig.say(Grant((lease(5, new=1),))))
    began = rig.client.now
    while not (again := of(Result, rig.say())):
        assert rig.client.now < began + 2 * RESEND_S
    assert again == [result] and rig.client.now >= began + RESEND_S
    # A new connection to the same learner.
    assert of(Result, rig.say(WELCOME)) == [result]
    assert rig.until_status().progress[0].lease == ref(5)
    rig.say(Ack(ref(5)))
    assert rig.until_status().progress == ()
    rig.client.now += 3 * RESEND_S
    assert not of(Result, rig.say(WELCOME, steps=3))


def test_a_refused_result_is_forgotten() -> None:
    rig = Rig()
    rig.serve()
    rig.say(Grant((lease(5, new=1),)))
    rig.say(Nack(ref(5), "not wanted"))
    rig.client.now += 3 * RESEND_S
    assert not of(Result, rig.say(steps=3))


def test_a_repeated_grant_changes_nothing() -> None:
    rig = Rig()
    rig.serve()
    one = lease(5, new=3)
    rig.say(Grant((one,)))
    rig.say(Grant((one,)))
    assert rig.engine.tokens[ref(5)] == 2
    assert len(of(Result, rig.say(Grant((one,)), steps=4))) == 1
    # Granted once more: the result was lost on its way.
    assert len(of(Result, rig.say(Grant((one,)), steps=4))) == 1
    assert rig.engine.idle


def test_cancelled_leases_leave_engine_grader_and_status() -> None:
    rig = Rig()
    rig.serve()
    rig.grader.is_slow = True
    rig.say(Grant((lease(1, new=1), lease(2, new=50))))
    rig.say(Cancel((ref(1), ref(2), ref(3))))
    rig.grader.is_slow = False
    assert rig.engine.idle
    assert not of(Result, rig.say(steps=3))
    assert rig.until_status().progress == ()


def test_what_was_sampled_in_vain_is_written_down() -> None:
    """Of a lease that is cancelled while it runs, while it is graded, before it began; handed back; acknowledged."""
    rig = Rig()
    rig.serve()
    rig.grader.is_slow = True
    rig.say(Grant((lease(1, new=1), lease(2, new=50), lease(3, new=50))), steps=2)
    rig.fetcher.arrive(1)
    rig.say(steps=2)
    rig.say(Cancel((ref(1), ref(2), ref(4))))
    made = rig.engine.tokens[ref(3)]
    rig.daemon.request_stop()
    rig.client.now += 1.0
    rig.daemon.request_stop()
    with pytest.raises(Interrupted):
        rig.say()
    told = [fields for kind, fields in rig.events.seen if kind == "abandoned"]
    assert [(one["lease"].rollout, one["reason"]) for one in told] == [
        (1, "cancelled by the broker"),
        (2, "cancelled by the broker"),
        (3, "the generator leaves"),
    ]
    assert told[0] | {"lease": 0} == {"lease": 0, "tokens": 1, "versions": [(0, 0)], "reason": told[0]["reason"]}
    assert told[1]["tokens"] > 2 and [version for _, version in told[1]["versions"]] == [0, 1]
    assert told[2]["tokens"] >= made > 0


def test_weights_that_are_damaged_between_arrival_and_engine_are_named() -> None:
    from orz_async.weights.snapshot import capture

    rig = Rig()
    rig.serve(version=1)
    state = capture(2, [("a", torch.zeros(2)), ("b", torch.ones(2))])
    state.tensors["b"][1] = 3.0
    tensors: dict[str, Any] = state.tensors | {"digest": "of what the engine serves"}
    rig.fetcher.ready.append(
        Snapshot(version=2, epoch=1, tensors=tensors, digest="d", bytes=8, fetch_s=0.1, specs=state.specs)
    )
    with pytest.raises(EngineError, match=r"tensor 'b' had checksum .* when it arrived and has"):
        rig.say(Published(2))
    assert rig.daemon._weights is not None
    assert rig.daemon._weights.served == 1


def test_where_weights_come_from_is_passed_on_when_it_changes() -> None:
    rig = Rig()
    rig.say(replace_welcome(version=1, digest="a"))
    assert rig.fetcher.told == [(1, "a", ())]
    relayed = ("tcp://relay", "tcp://weights")
    rig.say(Published(1, "a", relayed), Published(1, "a", relayed), Published(2, "b", relayed), Published(2, "b"))
    assert rig.fetcher.told[1:] == [(1, "a", relayed), (2, "b", relayed)]


def test_a_relay_admits_whom_the_broker_names() -> None:
    rig = Rig()
    rig.say(replace_welcome(version=1, readers=("a",)))
    assert rig.admitted == [("a",)]
    sources = ("tcp://weights",)
    rig.say(Published(1, "", sources, ("a", "b")), Published(2), Published(2, "", sources))
    assert rig.admitted[1:] == [("a", "b"), ()]  # where no sources are named, nothing is said of readers either


def test_a_lease_waits_for_the_weights_it_asks_for() -> None:
    rig = Rig()
    rig.serve(version=2)
    rig.say(Grant((lease(1, new=5, floor=3),)), steps=3)
    assert rig.engine.idle
    assert rig.until_status().progress == (Progress(ref(1), 0, queued=True),)
    rig.say(Published(3))
    assert rig.fetcher.wanted == [2, 3]
    rig.fetcher.arrive(3)
    (result,) = of(Result, rig.say(steps=5))
    assert result.trajectory.spans == (Span(3, 0),)


def test_weights_are_swapped_between_steps_and_announced_at_once() -> None:
    rig = Rig()
    rig.serve()
    rig.say(Grant((lease(1, new=4),)), steps=2)
    rig.fetcher.arrive(1)
    assert [status.version for status in of(Status, rig.say())] == [1]
    (result,) = of(Result, rig.say())
    assert result.trajectory.spans == (Span(0, 0), Span(1, 2))
    rig.fetcher.arrive(1)  # the same again
    rig.say()
    assert rig.engine.applied == [0, 1]


def test_other_weights_than_the_learner_s_are_an_error_with_names() -> None:
    rig = Rig()
    rig.say(WELCOME)
    rig.fetcher.arrive(0, served="x")
    with pytest.raises(EngineError, match="version 0 have the digest d, the engine serves x"):
        rig.say()


def test_new_weights_wait_for_an_evaluation_but_not_for_ever() -> None:
    rig = Rig()
    rig.serve()
    rig.say(Grant((lease(1, new=20, kind="eval"), lease(2, new=3))), steps=2)
    rig.fetcher.arrive(1)
    results = of(Result, rig.say(steps=18))
    assert [len(result.trajectory.spans) for result in results] == [1, 1]
    assert rig.engine.version == 0
    assert [status.version for status in of(Status, rig.say())] == [1]
    rig.say(Grant((lease(3, new=100, kind="eval"),)), steps=2)
    rig.fetcher.arrive(2)
    rig.say(steps=2)
    assert rig.engine.version == 1
    rig.client.now += EVAL_PIN_S
    rig.say()
    assert rig.engine.version == 2


def test_another_epoch_voids_all_work() -> None:
    rig = Rig()
    rig.serve(version=7)
    rig.say(Grant((lease(1, new=1), lease(2, new=50, floor=7))))
    rig.grader.is_slow = True
    rig.say(Grant((lease(4, new=1),)))
    old = rig.fetcher
    rig.client.epoch = 2
    sent = rig.say(replace_welcome(version=5, weights_address="tcp://elsewhere"))
    assert rig.engine.idle and old.is_closed and len(rig.engines) == 1
    assert (rig.fetcher.address, rig.fetcher.epoch, rig.fetcher.wanted) == ("tcp://elsewhere", 2, [5])
    assert of(Status, sent) == [Status(4, -1, ())] and not of(Result, sent)
    # The same lease again, in the new epoch: the verdict on the old response must not count for it.
    rig.fetcher.arrive(5)
    rig.say(Grant((lease(4, new=3),)), steps=5)
    assert rig.engine.version == 5 and rig.engine.idle and rig.grader.pending == 2
    rig.grader.is_slow = False
    assert not of(Result, rig.say())
    (result,) = of(Result, rig.say())
    assert (result.trajectory.rollout, result.trajectory.verdict) == (4, "3 tokens")


def test_another_model_gets_another_engine() -> None:
    rig = Rig()
    rig.serve()
    rig.client.epoch = 2
    rig.say(replace_welcome(stop=("User:",)))
    assert len(rig.engines) == 2 and rig.engines[0].is_closed


def test_a_lease_that_fails_is_reported_and_the_others_go_on() -> None:
    rig = Rig()
    rig.serve()
    sent = rig.say(Grant((lease(1, prompt=[]), lease(2, prompt=[13]), lease(3, new=2))), steps=6)
    failures = of(Failure, sent)
    assert [(failure.lease.rollout, failure.returned) for failure in failures] == [(1, False), (2, False)]
    assert failures[1].reason == "logits are not finite"
    assert [result.trajectory.rollout for result in of(Result, sent)] == [3]


def test_draining_returns_what_has_not_begun_and_finishes_the_rest() -> None:
    rig = Rig()
    rig.serve()
    rig.say(Grant(tuple(lease(n, new=6) for n in range(4))), steps=2)
    rig.daemon.request_stop()
    sent = rig.say(steps=2)
    assert [(one.lease.rollout, one.returned) for one in of(Failure, sent)] == [(2, True), (3, True)]
    assert [one.slots for one in of(Status, sent)] == [0]
    assert [one.lease.rollout for one in of(Failure, rig.say(Grant((lease(9),))))] == [9]
    sent = rig.say(steps=3)
    assert [one.trajectory.rollout for one in of(Result, sent)] == [0, 1]
    assert rig.daemon.state is State.DRAINING
    sent = rig.say(Ack(ref(0)), Ack(ref(1)))
    assert of(Leave, sent) and rig.daemon.state is State.LEFT


def test_draining_ends_when_its_time_is_over() -> None:
    rig = Rig(drain_s=3.0)
    rig.serve()
    rig.say(Grant((lease(0, new=1), lease(1, new=500))), steps=2)
    rig.daemon.request_stop()
    rig.say()
    rig.client.now += 3.0
    sent = rig.say()
    # What is done is sent once more, what is not is returned.
    assert [one.trajectory.rollout for one in of(Result, sent)] == [0]
    assert [(one.lease.rollout, one.returned) for one in of(Failure, sent)] == [(1, True)]
    assert isinstance(sent[-1], Leave) and rig.daemon.state is State.LEFT


def test_a_second_signal_leaves_at_once() -> None:
    rig = Rig()
    rig.serve()
    rig.say(Grant((lease(0, new=500), lease(1, new=500), lease(2, new=500))))
    rig.daemon.request_stop()
    rig.daemon.request_stop()  # the same signal, delivered twice
    assert not of(Leave, rig.say())
    rig.client.now += 1.0
    rig.daemon.request_stop()
    with pytest.raises(Interrupted):
        rig.say()
    assert sorted(one.lease.rollout for one in of(Failure, rig.client.sent)) == [0, 1]
    assert isinstance(rig.client.sent[-1], Leave)


def test_signals_drain_and_are_given_back() -> None:
    rig = Rig()
    before = signal.getsignal(signal.SIGTERM)
    rig.client.inbox.append(WELCOME)
    polls = iter(range(100))
    rig.client.on_poll = lambda: signal.raise_signal(signal.SIGTERM) if next(polls) == 3 else None
    rig.daemon.run()
    assert isinstance(rig.client.sent[-1], Leave)
    assert signal.getsignal(signal.SIGTERM) is before
    closed = (rig.client, rig.engine, rig.fetcher, rig.grader)
    assert all(one.is_closed for one in closed)


def test_bye_ends_the_run() -> None:
    rig = Rig()
    rig.client.inbox += [WELCOME, Bye("complete", finished=True)]
    rig.daemon.run()
    assert rig.client.is_closed and rig.daemon.state is State.LEFT
    refused = Rig()
    refused.client.inbox.append(Bye("the name is in use", finished=False))
    with pytest.raises(WireError, match="the name is in use"):
        refused.daemon.run()
    assert refused.client.is_closed


def test_an_error_says_leave_and_is_raised() -> None:
    rig = Rig()
    rig.client.inbox.append(WELCOME)

    def lost() -> None:
        if rig.client.now > 110:
            raise PeerLostError("nobody there")

    rig.client.on_poll = lost
    with pytest.raises(PeerLostError):
        rig.daemon.run()
    assert isinstance(rig.client.sent[-1], Leave) and rig.client.is_closed


def test_a_wait_that_lasts_is_said_each_time_it_has_doubled(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig()
    rig.serve()
    began = rig.client.now
    while rig.client.now < began + 29:
        rig.say()
    assert caplog.text == ""
    while rig.client.now < began + 130:
        rig.say()
    said = [record.getMessage() for record in caplog.records]
    assert [line.rpartition(" for ")[2].partition(" s;")[0] for line in said] == ["30", "60", "120"], said
    assert said[0].startswith("waiting for leases from the learner")


def test_an_idle_generator_sleeps_until_its_heartbeat() -> None:
    rig = Rig()
    rig.serve()
    rig.client.timeouts.clear()
    began = rig.client.now
    while rig.client.now < began + 10:
        rig.say()
    assert len(rig.client.timeouts) <= 1 + 10 / HEARTBEAT_S
    # While it samples it does not wait at all.
    rig.say(Grant((lease(0, new=50),)))
    rig.client.timeouts.clear()
    rig.say(steps=10)
    assert set(rig.client.timeouts) == {0.0}


def test_the_fakes_look_like_what_they_replace() -> None:
    from orz_async.broker.client import BrokerClient
    from orz_async.generator.transformers_engine import TransformersEngine
    from orz_async.reward.pool import GraderPool
    from orz_async.weights.stream import StreamFetcher

    pairs = [
        (FakeClient, BrokerClient),
        (FakeEngine, TransformersEngine),
        (FakeFetcher, StreamFetcher),
        (FakeGrader, GraderPool),
    ]
    for fake, real in pairs:
        methods = {name for name, value in vars(fake).items() if callable(value) and not name.startswith("_")}
        missing = methods - {"arrive", "running"} - set(dir(real))
        assert not missing, f"{real.__name__} has no {missing}"
