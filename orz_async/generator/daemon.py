"""The loop of a generator: leases in, scored trajectories out, weights swapped in between."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum, auto

import msgspec

from orz_async.broker.messages import (
    Ack,
    Bye,
    Cancel,
    Failure,
    Grant,
    Leave,
    Nack,
    Published,
    Status,
    ToGenerator,
    Welcome,
)
from orz_async.errors import EngineError, Interrupted, OrzError, PeerLostError, WireError
from orz_async.generator.engine import ref_of
from orz_async.generator.incoming import IncomingWeights
from orz_async.generator.meter import Meter
from orz_async.generator.ports import Client, Grader, MakeFetcher, MakeServing, Serving
from orz_async.generator.workload import Workload
from orz_async.observe.events import IDLE_PREFIX, EventLog, Timeline
from orz_async.observe.process import dump_stacks
from orz_async.weights.protocol import Snapshot
from orz_async.weights.snapshot import blame

log = logging.getLogger(__name__)

_SOON_S = 0.002
"""Longest sleep while weights or a verdict are on their way: they do not wake the poll."""
_JOINING_S = 0.1
"""The same while nothing but a Welcome is expected, so that a signal is seen."""
_SAME_REQUEST_S = 0.5
"""Signals closer than this are one: `timeout` and some shells send theirs to a process and to its group."""
_SAID_S = 30.0
"""A wait that lasts this long is said in the log, and again each time it has doubled."""
_SILENT_HEARTBEATS = 3
"""After so many without a word the generator is said to wait for the learner, not for leases."""


class State(Enum):
    """Moves: JOINING -> SERVING on Welcome; these two -> DRAINING on a signal; any -> LEFT on Bye or when drained."""

    JOINING = auto()
    SERVING = auto()
    DRAINING = auto()
    LEFT = auto()


class Daemon:
    """One generator.

    consumes   leases (client), weights (fetcher)      produces   results and progress (client)
    waits for  messages, in `client.poll`, when the engine is idle: until the next heartbeat at most, and the client
               raises PeerLostError when the learner stays away; everything else is asked without waiting
    holds      each result until it is acked; it is sent again after a while and after every reconnection
    ends       with Bye, or drained after a signal: no new leases, what runs is finished within `drain_s`, the rest is
               handed back. A second signal hands back at once. An error says Leave and is raised.

    A Welcome with another learner epoch voids all work: that learner knows nothing of it.
    """

    def __init__(
        self,
        *,
        client: Client,
        make_serving: MakeServing,
        make_fetcher: MakeFetcher,
        grader: Grader,
        slots: int,
        events: EventLog,
        drain_s: float = 30.0,
        admit: Callable[[tuple[str, ...]], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`slots` counts all leases held at once, those queued in the engine and those being graded included.

        admit: told the public keys of those who may read from this daemon's relay, whenever the broker names them.
        """
        self._client = client
        self._make_serving = make_serving
        self._make_fetcher = make_fetcher
        self._grader = grader
        self._slots = slots
        self._events = events
        self._drain_s = drain_s
        self._admit = admit
        self._clock = clock
        self._timeline = Timeline(events, "generator", clock)
        self._meter = Meter(events, clock)
        self._work = Workload(client, grader, events, self._timeline, clock)
        self._state = State.JOINING
        self._welcome: Welcome | None = None
        self._epoch = -1
        self._weights: IncomingWeights | None = None
        """There from the first Welcome on, as the engine is."""
        self._waits = ""
        self._waits_since = self._waits_said = 0.0
        self._status_due = 0.0
        self._drain_until = 0.0
        self._stop_requests = 0
        self._stop_requested = float("-inf")

    @property
    def state(self) -> State:
        return self._state

    def request_stop(self) -> None:
        """What a signal does: drain; the second time, leave at once."""
        now = self._clock()
        if now - self._stop_requested >= _SAME_REQUEST_S:
            self._stop_requests += 1
        self._stop_requested = now

    def run(self) -> None:
        self._timeline.start()
        with self._signals_request_stop():
            try:
                while self._state is not State.LEFT:
                    self.step()
            except OrzError as error:
                if isinstance(error, (PeerLostError, EngineError)):
                    dump_stacks(error)
                if self._state is not State.LEFT:
                    # Silence would tell the broker too, but later: this way the leases are granted again at once.
                    self._client.send(Leave(str(error)))
                raise
            finally:
                self.close()

    def step(self) -> None:
        """One turn of the loop."""
        self._receive()
        if self._weights is not None:
            self._swap_weights(self._weights)
            if self._work.is_generating:
                self._work.generate()
            self._work.send_results()
            self._report(self._weights)
        if self._stop_requests:
            self._drain()

    def close(self) -> None:
        if self._weights is not None:
            self._weights.close()
        if self._work.serving is not None:
            self._work.serving.engine.close()
        self._grader.close()
        self._client.close()
        self._timeline.close()

    # Messages.

    def _receive(self) -> None:
        state, timeout_s = self._pause()
        self._timeline.enter(state)
        self._say_wait(state)
        for message in self._client.poll(timeout_s):
            self._handle(message)

    def _say_wait(self, state: str) -> None:
        """One line about a wait that lasts: what is awaited, from whom, since when. Its bound is in the client."""
        now = self._clock()
        if state != self._waits or not state.startswith(IDLE_PREFIX):
            self._waits, self._waits_since, self._waits_said = state, now, now + _SAID_S
        elif now >= self._waits_said:
            self._waits_said = now + (now - self._waits_since)
            what = state.removeprefix(IDLE_PREFIX)
            heard = f"the learner was last heard {now - self._client.waiting_since:.1f} s ago"
            line = f"waiting for {what} from the learner for {now - self._waits_since:.0f} s; {heard}"
            if what == "weights" and self._weights is not None:
                line = f"{self._weights.waiting_for()}; {heard}"
            log.warning(line)

    def _pause(self) -> tuple[str, float]:
        """What this process waits for or does while it polls for messages, and for how long it may."""
        if self._weights is None or self._welcome is None:
            return "wait_learner", _JOINING_S
        now = self._clock()
        until_status = max(0.0, self._status_due - now)
        if self._work.is_generating:
            return "generate", 0.0
        if self._work.is_grading:
            return "grade", min(until_status, _SOON_S)
        if now - self._client.waiting_since > _SILENT_HEARTBEATS * self._welcome.heartbeat_s:
            return "wait_learner", until_status
        if self._weights.is_behind:
            return "wait_weights", min(until_status, _SOON_S)
        return "wait_leases", until_status

    def _handle(self, message: ToGenerator) -> None:
        match message:
            case Welcome():
                self._join(message)
            case Grant(leases):
                for lease in leases:
                    if self._state is State.SERVING:
                        self._work.accept(lease)
                    else:
                        self._client.send(Failure(ref_of(lease), "the generator drains", returned=True))
                if self._weights is not None:
                    self._work.start(self._weights.served)
            case Ack(lease):
                self._work.forget(lease)
            case Nack(lease, reason):
                self._events.emit("nack", lease=lease, reason=reason)
                self._work.forget(lease, lost="refused by the broker")
            case Cancel(leases):
                for ref in leases:
                    self._work.forget(ref, lost="cancelled by the broker")
            case Published(version, digest, sources, readers):
                if sources:
                    self._admit(readers)
                if self._weights is not None:
                    self._weights.want(version, digest, sources)
            case Bye(reason, finished):
                if not finished:
                    raise WireError(f"the broker refuses this generator: {reason}")
                self._state = State.LEFT

    def _join(self, welcome: Welcome) -> None:
        """Begin the epoch, or, in a known one, repeat what the broker may have missed."""
        self._admit(welcome.readers)
        if self._weights is None or self._client.epoch != self._epoch or self._is_changed(welcome, "run_id"):
            self._begin_epoch(welcome)
        else:
            self._weights.want(welcome.version, welcome.digest, tuple(welcome.weights_address.split(",")))
            self._work.repeat_results()
        self._welcome = welcome
        self._status_due = self._clock()
        if self._state is State.JOINING:
            self._state = State.SERVING

    def _is_changed(self, welcome: Welcome, *names: str) -> bool:
        return self._welcome is None or any(getattr(self._welcome, name) != getattr(welcome, name) for name in names)

    def _begin_epoch(self, welcome: Welcome) -> None:
        if self._weights is not None:
            self._weights.close()
        self._epoch = self._client.epoch
        self._work.void(self._epoch)
        if self._is_changed(welcome, "model_path", "stop", "max_model_tokens"):
            with self._timeline.state("load"):
                self._work.serving = self._load(welcome)
        self._weights = IncomingWeights(self._make_fetcher(welcome, self._epoch), self._clock)
        self._weights.want(welcome.version, welcome.digest)

    def _load(self, welcome: Welcome) -> Serving:
        if self._work.serving is not None:
            self._work.serving.engine.close()
        serving = self._make_serving(welcome)
        # From now on the broker compares the vocabulary before it welcomes.
        self._client.hello = msgspec.structs.replace(self._client.hello, vocab_size=serving.engine.vocab_size)
        return serving

    def _swap_weights(self, weights: IncomingWeights) -> None:
        snapshot = weights.take(is_evaluating=self._work.is_evaluating)
        if snapshot is None:
            return
        with self._timeline.state("swap"):
            self._apply(snapshot)
        weights.served = snapshot.version
        self._work.start(snapshot.version)
        self._status_due = self._clock()

    def _apply(self, snapshot: Snapshot) -> None:
        assert self._work.serving is not None
        began = self._clock()
        digest = self._work.serving.engine.apply(snapshot.version, snapshot.tensors)
        self._events.emit(
            "weights",
            version=snapshot.version,
            bytes=snapshot.bytes,
            source=snapshot.source,
            base_version=snapshot.base_version,
            fetch_s=snapshot.fetch_s,
            swap_s=self._clock() - began,
            **self._work.serving.engine.timings,
            checksum_ok=digest == snapshot.digest,
        )
        if digest != snapshot.digest:
            raise EngineError(
                f"weights of version {snapshot.version} have the digest {snapshot.digest}, the engine serves {digest}: "
                f"{blame(snapshot)}"
            )

    def _report(self, weights: IncomingWeights) -> None:
        assert self._welcome is not None and self._work.serving is not None
        now = self._clock()
        if now >= self._status_due:
            self._status_due = now + self._welcome.heartbeat_s
            slots = self._slots if self._state is State.SERVING else 0
            self._client.send(Status(slots, weights.served, self._work.progress()))
        self._meter.report(weights.served, self._work.serving.engine, self._work.rollouts)

    # The end.

    def _drain(self) -> None:
        if self._state is State.LEFT:
            return
        now = self._clock()
        if self._state is not State.DRAINING:
            self._state, self._drain_until = State.DRAINING, now + self._drain_s
            self._status_due = now
            self._work.hand_back_queued("the generator drains")
        is_hurried = self._stop_requests > 1
        if is_hurried or not len(self._work) or now >= self._drain_until:
            self._work.hand_back_all("the generator leaves")
            self._client.send(Leave("stopped by a signal"))
            self._state = State.LEFT
        if is_hurried:
            raise Interrupted("stopped by a second signal before the running rollouts were finished; they are returned")

    @contextmanager
    def _signals_request_stop(self) -> Iterator[None]:
        def stop(_number: int, _frame: object) -> None:
            self.request_stop()

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
