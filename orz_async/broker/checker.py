"""Is what a journal says what the ledger promises? A second reading of the entries that shares no code with the ledger.

The ledger decides and `frontier.replay` repeats its decisions; both could be wrong in the same way. This one only knows
the rules: an attempt begins with its grant, goes to one generator, ends once; a batch holds B accepted rollouts, each
in one batch only; a step is taken again only after a restart, with the same rollouts; no token is older than S.
Memory: the rollouts that are granted and not taken, and the numbers of each batch.
"""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass, field

from orz_async.broker.messages import LeaseRef
from orz_async.broker.segments import Record
from orz_async.broker.transitions import Ended, Granted, Restarted, Taken, Terms
from orz_async.records import Trajectory

MAX_FINDINGS = 1000


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the run promised."""

    rollouts_per_step: int
    """B."""
    max_lag: int
    """S."""
    window: int
    """W."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that does not hold."""

    problem: str
    rollout: int | None = None
    record: int | None = None
    """Index of the journal record where it shows."""

    def __str__(self) -> str:
        where = "" if self.record is None else f"record {self.record}: "
        who = "" if self.rollout is None else f"rollout {self.rollout}: "
        return f"{where}{who}{self.problem}"


@dataclass(slots=True)
class Open:
    """A rollout between its first grant and its batch."""

    attempt: int
    generator: str
    """Holder of the attempt; empty when nobody holds one."""
    floor: int
    tokens: tuple[tuple[int, int], ...] = ()
    """(version, tokens) of the accepted trajectory; empty while there is none."""


@dataclass(slots=True)
class Batch:
    rollouts: array[int]
    tokens_by_lag: Counter[int]
    whole: bool = True
    """Every trajectory of it is in the journal; retention may have deleted some."""


@dataclass(slots=True)
class Checker:
    """Feed it every record in order, then read `findings`, the counts, `batches` and `open`."""

    bounds: Bounds
    partial: bool = False
    """The journal's beginning was deleted by retention: what it says of rollouts granted before cannot be checked."""
    findings: list[Finding] = field(default_factory=list)
    granted: int = 0
    expired: Counter[str] = field(default_factory=Counter)
    quarantined: int = 0
    accepted: int = 0
    evaluated: int = 0
    lives: int = 0
    open: dict[int, Open] = field(default_factory=dict)
    batches: dict[int, Batch] = field(default_factory=dict)
    _next: int = 0
    """First grants are in the order of numbers: the next one is of this rollout."""
    _sure: bool = False
    """A first grant was seen. Before that, in a partial journal, only a bound below is known of `_next`."""
    _last_step: int | None = None
    _restarted: bool = False
    """A learner began since the last batch: an earlier step may be taken again."""
    _revoked: dict[int, int] = field(default_factory=dict)
    """Taken rollouts whose trajectories a restart did not find: step by number."""
    _index: int = 0

    def feed(self, index: int, record: Record) -> None:
        self._index = index
        match record:
            case Granted():
                for terms in record.terms:
                    self._grant(record.generator, terms)
            case Trajectory():
                if record.kind == "train":
                    self._accept(record)
                else:
                    self.evaluated += 1
            case Ended():
                self._end(record)
            case Taken():
                self._take(record)
            case Restarted():
                self._restart(record)

    def find(self, problem: str, rollout: int | None = None) -> None:
        if len(self.findings) < MAX_FINDINGS:
            self.findings.append(Finding(problem, rollout, self._index))

    def _grant(self, generator: str, terms: Terms) -> None:
        number = terms.rollout
        known = self.open.get(number)
        self.granted += 1
        if known is None and number in self._revoked:
            known = Open(terms.attempt - 1, "", terms.version_floor)
        if known is None and (number >= self._next or not self.partial):
            if number != self._next and (self._sure or not self.partial):
                why = "it was trained already" if number < self._next else f"rollout {self._next} was never granted"
                self.find(f"attempt {terms.attempt} was granted, but {why}", number)
            if terms.attempt and not self.partial:
                self.find(f"the first grant is attempt {terms.attempt}", number)
        elif known is not None and known.tokens:
            self.find(f"attempt {terms.attempt} was granted after attempt {known.attempt} was accepted", number)
        elif known is not None and known.generator:
            self.find(f"attempt {terms.attempt} was granted while {known.generator} held {known.attempt}", number)
        elif known is not None and terms.attempt != known.attempt + 1:
            self.find(f"attempt {terms.attempt} follows attempt {known.attempt}", number)
        nominal = number // self.bounds.rollouts_per_step
        floor = max(0, nominal - (self.bounds.max_lag - self.bounds.window))
        if terms.version_floor != floor:
            self.find(f"granted with version floor {terms.version_floor}, the bound needs {floor}", number)
        self._next = max(self._next, number + 1)
        self._sure |= not terms.attempt
        self.open[number] = Open(terms.attempt, generator, floor)

    def _held(self, ref: LeaseRef, generator: str, what: str) -> Open | None:
        """The rollout, if this attempt of it is held by this generator."""
        rollout = self.open.get(ref.rollout)
        if rollout is None:
            if not self.partial or (self._sure and ref.rollout >= self._next):
                known = self.step_of(ref.rollout)
                why = "no grant is in the journal" if known is None else f"it was taken by step {known}"
                self.find(f"attempt {ref.attempt} was {what}, but {why}", ref.rollout)
            return None
        if rollout.tokens:
            self.find(f"attempt {ref.attempt} was {what} after attempt {rollout.attempt} was accepted", ref.rollout)
            return None
        if rollout.attempt != ref.attempt or rollout.generator != generator:
            holder = f"{rollout.generator} holds attempt {rollout.attempt}" if rollout.generator else "nobody holds it"
            self.find(f"attempt {ref.attempt} was {what} by {generator}, but {holder}", ref.rollout)
            return None
        return rollout

    def _accept(self, trajectory: Trajectory) -> None:
        ref = LeaseRef("train", trajectory.rollout, trajectory.attempt)
        rollout = self._held(ref, trajectory.generator, "accepted")
        if rollout is None:
            return
        self.accepted += 1
        ends = [*(span.start for span in trajectory.spans[1:]), trajectory.num_response_tokens]
        tokens = tuple((span.version, end - span.start) for span, end in zip(trajectory.spans, ends, strict=True))
        rollout.generator, rollout.tokens = "", tokens
        if trajectory.version_first < rollout.floor:
            found = f"sampled by version {trajectory.version_first}, its lease's floor was {rollout.floor}"
            self.find(found, trajectory.rollout)

    def _end(self, ended: Ended) -> None:
        rollout = self._held(ended.lease, ended.generator, f"ended ({ended.cause})")
        if rollout is not None:
            rollout.generator = ""
            self._count_end(ended.cause, quarantined=bool(ended.quarantined))

    def _count_end(self, cause: str, *, quarantined: bool = False) -> None:
        if quarantined:
            self.quarantined += 1
        else:
            self.expired[cause] += 1

    def _take(self, taken: Taken) -> None:
        step, last, again = taken.step, self._last_step, self._restarted
        self._restarted, self._last_step = False, step
        if last is not None and step <= last and not again:
            self.find(f"step {step} was taken twice without a restart: trained twice", taken.rollouts[0])
            return
        expected = 0 if last is None else last + 1
        if step != expected and not (again and step < expected) and not (self.partial and last is None):
            self.find(f"step {step} was taken where step {expected} was due")
        if step in self.batches:
            self._take_again(taken)
            return
        if len(taken.rollouts) != self.bounds.rollouts_per_step:
            self.find(f"step {step} has {len(taken.rollouts)} rollouts, B is {self.bounds.rollouts_per_step}")
        self.batches[step] = Batch(array("q", taken.rollouts), Counter())
        for number in taken.rollouts:
            self._train(number, step)

    def _take_again(self, taken: Taken) -> None:
        before = self.batches[taken.step].rollouts
        if before != array("q", taken.rollouts):
            changed = sorted(set(before) ^ set(taken.rollouts))
            first = changed[0] if changed else taken.rollouts[0]
            self.find(f"step {taken.step} has other rollouts after the restart than before it", first)
        for number in taken.rollouts:
            if self._revoked.pop(number, None) is not None:
                self._train(number, taken.step)

    def _train(self, number: int, step: int) -> None:
        rollout = self.open.pop(number, None)
        if rollout is None or not rollout.tokens:
            earlier = self.step_of(number, below=step)
            if earlier is not None:
                self.find(f"trained twice: by step {earlier} and by step {step}", number)
            elif rollout is not None or not self.partial:
                self.find(f"trained by step {step}, but no accepted trajectory of it is in the journal", number)
            self.batches[step].whole = False
            return
        for version, tokens in rollout.tokens:
            lag = step - version
            self.batches[step].tokens_by_lag[lag] += tokens
            if not 0 <= lag <= self.bounds.max_lag:
                bound = self.bounds.max_lag
                self.find(
                    f"{tokens} tokens of version {version} trained by step {step}: lag {lag}, S is {bound}", number
                )

    def _restart(self, restarted: Restarted) -> None:
        self.lives += 1
        self._restarted = True
        for rollout in self.open.values():
            if rollout.generator:
                rollout.generator = ""
                self._count_end("learner_restart")
        for number in restarted.lost:
            self._count_end("journal_lost")
            rollout_or_none = self.open.get(number)
            if rollout_or_none is not None:
                rollout_or_none.tokens = ()
            elif (step := self.step_of(number)) is not None:
                self._revoked[number] = step

    def step_of(self, number: int, below: int | None = None) -> int | None:
        """The step that took this rollout. Slow: for findings only."""
        for step, batch in self.batches.items():
            if (below is None or step != below) and number in batch.rollouts:
                return step
        return None
