"""A generator's leases on their way through the engine and the grader, until the broker has their results."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from orz_async.broker.messages import Failure, LeaseRef, Progress, Result
from orz_async.generator.engine import LeaseError, Partial, Sample, ref_of
from orz_async.generator.held import HeldLeases, Stage, trajectory
from orz_async.generator.ports import Client, Grader, Serving
from orz_async.observe.events import EventLog, Timeline
from orz_async.records import Lease

RESEND_S = 5.0
"""A result without Ack or Nack for this long is sent again."""


class Workload:
    """What this generator owes the broker.

    A lease leaves by `forget` (acked, refused, cancelled), by a Failure, or with its learner epoch; until then it is
    in every Status. Every method returns at once, but for `generate`, which is one `Engine.poll`.
    """

    def __init__(
        self, client: Client, grader: Grader, events: EventLog, timeline: Timeline, clock: Callable[[], float]
    ) -> None:
        self._client = client
        self._grader = grader
        self._events = events
        self._timeline = timeline
        self._clock = clock
        self._held = HeldLeases()
        self._epoch = -1
        self.serving: Serving | None = None
        self.rollouts = 0
        """Scored since the start."""

    def __len__(self) -> int:
        return len(self._held)

    @property
    def is_generating(self) -> bool:
        return self.serving is not None and not self.serving.engine.idle

    @property
    def is_grading(self) -> bool:
        return self._grader.pending > 0

    @property
    def is_evaluating(self) -> bool:
        return self._held.is_evaluating

    def void(self, epoch: int) -> None:
        """The learner of this epoch knows nothing of the leases here."""
        for ref, _ in self._held:
            self.forget(ref, lost="of another learner epoch")
        self._epoch = epoch

    def accept(self, lease: Lease) -> None:
        """Hold a lease. One that is here already was granted again because the broker has not heard of it since."""
        held = self._held.get(ref_of(lease))
        if held is None:
            self._held.add(lease)
        elif held.stage is Stage.DONE:
            held.sent_at = float("-inf")

    def start(self, version: int) -> None:
        """Give the engine, which serves this version, every lease whose floor that reaches."""
        assert self.serving is not None
        for ref in self._held.at(Stage.EARLY):
            held = self._held[ref]
            if 0 <= held.lease.version_floor <= version:
                held.stage = Stage.ENGINE
                try:
                    self.serving.engine.submit(held.lease)
                except LeaseError as error:
                    self._fail(error)

    def generate(self) -> None:
        assert self.serving is not None
        with self._timeline.state("generate"):
            try:
                samples = self.serving.engine.poll()
            except LeaseError as error:
                self._fail(error)
                return
        with self._timeline.state("grade"):
            for sample in samples:
                self._grade(sample, self.serving)

    def _grade(self, sample: Sample, serving: Serving) -> None:
        ref = ref_of(sample.lease)
        held = self._held[ref]
        held.stage, held.sample = Stage.GRADING, sample
        if sample.kv_version is not None and len(sample.spans) > 1:
            # Per token as runs, like the spans: [first token, versions by which its oldest key is older].
            ages = [(span.start, span.version - sample.kv_version) for span in sample.spans]
            self._events.emit("stale_kv", lease=ref, ages=ages, tokens=int((sample.kv_age_T() > 0).sum()))
        self._grader.submit((self._epoch, ref), serving.decode(sample.response), sample.lease.answer, sample.finish)

    def _fail(self, error: LeaseError) -> None:
        if self._held.drop(error.lease) is None:
            return  # cancelled meanwhile
        self._events.emit("failed", lease=error.lease, reason=error.reason)
        self._client.send(Failure(error.lease, error.reason, returned=False))

    def send_results(self) -> None:
        """Send what has been graded, and again what was sent long ago."""
        for (epoch, ref), verdict in self._grader.poll():
            held = self._held.get(ref)
            if held is None or held.sample is None or epoch != self._epoch:
                continue  # cancelled meanwhile
            held.stage = Stage.DONE
            held.result = trajectory(held.sample, verdict, self._client.hello.name)
            self.rollouts += 1
        now = self._clock()
        for ref in self._held.at(Stage.DONE):
            held = self._held[ref]
            if held.result is not None and now - held.sent_at >= RESEND_S:
                held.sent_at = now
                self._client.send(Result(held.result))

    def repeat_results(self) -> None:
        """Send all results at the next opportunity: the connection is new."""
        for ref in self._held.at(Stage.DONE):
            self._held[ref].sent_at = float("-inf")

    def forget(self, ref: LeaseRef, *, lost: str = "") -> None:
        """lost: why what was sampled of it is of no use; "" where the broker has it."""
        held = self._held.drop(ref)
        if held is None:
            return
        made: Partial | Sample | None = held.sample
        if held.stage is Stage.ENGINE and self.serving is not None:
            made = self.serving.engine.cancel(ref)
        if made is not None and lost:
            versions = [(span.start, span.version) for span in made.spans]
            self._events.emit("abandoned", lease=ref, tokens=len(made.response), versions=versions, reason=lost)

    def hand_back_queued(self, reason: str) -> None:
        """Return the leases of which no token was sampled."""
        queued = [] if self.serving is None else [one.lease for one in self.serving.engine.progress() if one.queued]
        self._hand_back(self._held.at(Stage.EARLY) + queued, reason)

    def hand_back_all(self, reason: str) -> None:
        """Return what is not done and send what is a last time."""
        self._hand_back([ref for ref, held in self._held if held.stage is not Stage.DONE], reason)
        for _, held in self._held:
            if held.result is not None:
                self._client.send(Result(held.result))

    def _hand_back(self, leases: Iterable[LeaseRef], reason: str) -> None:
        for ref in leases:
            self.forget(ref, lost=reason)
            self._client.send(Failure(ref, reason, returned=True))

    def progress(self) -> tuple[Progress, ...]:
        """Of every lease held."""
        return self._held.progress(() if self.serving is None else self.serving.engine.progress())
