"""Counts for itself what the ledger promises, from entries and results alone, and objects where a promise is broken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from orz_async.broker.book import Book
from orz_async.broker.messages import LeaseRef
from orz_async.broker.transitions import Accepted, Ended, Entry, Granted, LedgerConfig, Restarted, Taken
from orz_async.records import Span


class Violation(Exception):
    """A promise is broken; the text says which, and where."""


def require(holds: bool, promise: str) -> None:
    if not holds:
        raise Violation(promise)


class Oracle:
    """Attempts by rollout: HELD -> accepted or ended, one at a time; batches by step; what the weights have seen."""

    def __init__(self, config: LedgerConfig, *, remember: bool) -> None:
        """`remember`: keep what restarts are judged by; without it a long run needs little memory."""
        self.config = config
        self.remember = remember
        self.weights: list[tuple[int, ...]] = []
        """Batches the living weights have learned from."""
        self.lag_tokens: Counter[int] = Counter()
        self.ended: Counter[str] = Counter()
        self.trained_lengths: list[int] = []
        self.restarts = 0
        self.newest = 0
        self._begin()

    def _begin(self) -> None:
        self.attempt: dict[int, int] = {}
        """Newest attempt of every rollout that was granted and is not trained."""
        self.held: dict[int, str] = {}
        self.accepted: set[int] = set()
        self.decided: dict[int, tuple[int, ...]] = {}
        self.granted = 0
        self.num_ended = 0
        self.trained_bits = bytearray(self.config.total_steps * self.config.rollouts_per_step)

    # What the ledger decides.

    def entry(self, entry: Entry) -> None:
        if isinstance(entry, Granted):
            for terms in entry.terms:
                number = terms.rollout
                require(0 <= number < len(self.trained_bits), f"rollout {number} was granted beyond the last step")
                require(number not in self.held, f"rollout {number} was granted while {self.held.get(number)} holds it")
                require(number not in self.accepted, f"rollout {number} was granted although it is accepted")
                require(terms.attempt == self.attempt.get(number, -1) + 1, f"attempt {terms.attempt} of {number} again")
                require(not self.trained_bits[number], f"rollout {number} was granted although it is trained")
                self.attempt[number] = terms.attempt
                self.held[number] = entry.generator
            self.granted += len(entry.terms)
        elif isinstance(entry, Accepted):
            self._close(entry.lease, entry.generator, "accepted")
            self.accepted.add(entry.lease.rollout)
        elif isinstance(entry, Ended):
            self._close(entry.lease, entry.generator, "ended")
            self.num_ended += 1
            self.ended["quarantined" if entry.quarantined else entry.cause] += 1
        elif isinstance(entry, Taken):
            self._taken(entry)
        elif isinstance(entry, Restarted):
            self.num_ended += len(self.held)
            self.ended["learner_restart"] += len(self.held)
            self.held.clear()

    def _close(self, ref: LeaseRef, generator: str, how: str) -> None:
        number = ref.rollout
        holder = self.held.pop(number, None)
        require(holder == generator, f"attempt {ref.attempt} of {number} {how} for {generator}, but {holder} holds it")
        require(self.attempt[number] == ref.attempt, f"attempt {ref.attempt} of {number} {how}, but it is not the last")

    def _taken(self, taken: Taken) -> None:
        known = self.decided.setdefault(taken.step, taken.rollouts)
        require(known == taken.rollouts, f"the batch of step {taken.step} was composed anew after a restart")
        size = self.config.rollouts_per_step
        require(len(set(taken.rollouts)) == size, f"step {taken.step} has {len(set(taken.rollouts))} rollouts")
        for number in taken.rollouts:
            require(number in self.accepted, f"step {taken.step} takes rollout {number}, which nobody delivered")

    # What happens to the weights.

    def trained(self, taken: Taken, batch: list[tuple[int, tuple[Span, ...]]]) -> None:
        step, most = taken.step, self.config.max_lag
        require(step == len(self.weights), f"step {step} follows {len(self.weights)} steps")
        for number, (length, spans) in zip(taken.rollouts, batch, strict=True):
            require(not self.trained_bits[number], f"rollout {number} is trained a second time, in step {step}")
            self.trained_bits[number] = 1
            oldest = spans[0].version
            require(
                0 <= step - oldest <= most,
                f"step {step} trains on a token of version {oldest}: lag {step - oldest}, {most} allowed",
            )
            end = length
            for version, start in reversed([(span.version, span.start) for span in spans]):
                self.lag_tokens[step - version] += end - start
                end = start
            self.trained_lengths.append(length)
        self.weights.append(taken.rollouts)

    def published(self, version: int, book: Book) -> None:
        self.newest = max(self.newest, version)
        head_start, size = self.config.head_start, self.config.rollouts_per_step
        require(book.next_rollout <= (self.newest + head_start + 1) * size, "rollouts were admitted too early")
        if version == self.newest:
            require(
                len(book.rollouts) <= (head_start + 1) * size,
                f"{len(book.rollouts)} slots are in use, {(head_start + 1) * size} exist",
            )
        if not self.remember:
            for number in self.weights[-1] if self.weights else ():
                self.attempt.pop(number, None)
                self.accepted.discard(number)
            return
        missing = [n for n in range(book.next_rollout) if not self.trained_bits[n] and n not in book.rollouts]
        require(not missing, f"rollouts {missing[:5]} are lost")

    def restarted(self, journal: Iterable[Entry], version: int) -> None:
        """The learner stands at `version` again; of the decisions made since only the journal is left."""
        self.restarts += 1
        ended, weights, newest = self.ended, self.weights[:version], self.newest
        self._begin()
        self.ended = Counter()
        for entry in journal:
            self.entry(entry)
        self.ended, self.weights, self.newest = ended, weights, newest
        for batch in weights:
            for number in batch:
                self.trained_bits[number] = 1
        # Lags and lengths of steps that are trained again count again, but only there.
        size = self.config.rollouts_per_step
        del self.trained_lengths[version * size :]

    def finished(self, book: Book) -> None:
        """The last step has published: nothing may be open any more."""
        total = self.config.total_steps * self.config.rollouts_per_step
        require(sum(self.trained_bits) == total, f"{total - sum(self.trained_bits)} rollouts were never trained")
        counts = book.counts
        require(not self.held and not book.rollouts, f"{len(self.held)} leases are open after the last step")
        require(counts.in_flight == 0, f"the funnel has {counts.in_flight} in flight after the last step")
        require(
            counts.granted == self.granted, f"{self.granted} attempts were granted, the funnel has {counts.granted}"
        )
        ended = counts.quarantined + sum(counts.expired.values())
        require(ended == self.num_ended, f"{self.num_ended} attempts ended early, the funnel has {ended}")
        require(counts.trained == total, f"{total} rollouts were trained, the funnel has {counts.trained}")
