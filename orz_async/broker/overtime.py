"""Which leases hold up a step for longer than anyone needs: a bound on what a generator can delay by pretending.

A lease lives as long as it makes progress, and progress is what its holder says. One that reports a token every now and
then would hold a step that waits for it (W = 0) for max_new_tokens times lease_s. So while the learner waits, a lease
of the awaited step that another generator could take is lent again once its age exceeds

    max(lease_s, overtime * D) * 2 ** k,      D: median over the other generators of the longest time that each needed
                                              k: times this rollout was lent again for this reason

Nothing else happens to its holder, which may only be slow: it keeps its other leases and its place, and the prompt is
not blamed. Because the patience doubles, a rollout that takes a slow generator time T is taken from it at most
log2(T / lease_s) times. D is a median, so a minority cannot move it: with less than half of the generators hostile, the
expected delay of a step is a small multiple of overtime * D.
"""

from __future__ import annotations

import statistics

from orz_async.broker.book import Book
from orz_async.broker.rollouts import Peer, Rollout, State

_FORGET = 0.9
"""A generator's longest time fades by this factor with each result."""
_MOST_DOUBLINGS = 20


def owner_of(generator: str) -> str:
    """Daemons that share a key are called KEY.SUFFIX."""
    return generator.partition(".")[0]


class Overtime:
    def __init__(self, book: Book, peers: dict[str, Peer]) -> None:
        self._book = book
        self._peers = peers
        self._due = 0.0

    def accepted(self, peer: Peer, rollout: Rollout, now: float) -> None:
        """Remember how long this generator needs."""
        peer.longest = max(now - rollout.granted_at, _FORGET * peer.longest)

    def late(self, step: int, now: float) -> list[Rollout]:
        """Held rollouts that `step` waits for and that should be lent to somebody else. Looks a few times a lease_s."""
        config = self._book.config
        if config.overtime <= 0 or now < self._due:
            return []
        self._due = now + config.lease_s / 8
        size = config.rollouts_per_step
        first = (step - config.window) * size
        found = []
        for number in range(max(0, first), max(0, first + size)):
            rollout = self._book.rollouts.get(number)
            if rollout is None or rollout.state is not State.HELD or now - rollout.granted_at <= config.lease_s:
                continue
            patience = self._patience(rollout)
            if patience is not None and now - rollout.granted_at > patience:
                found.append(rollout)
        return found

    def _patience(self, rollout: Rollout) -> float | None:
        """None if nobody else could take it, or nobody else has shown yet how long it takes."""
        others = [peer for name, peer in self._peers.items() if name != rollout.generator]
        times = [peer.longest for peer in others if peer.longest > 0]
        idle = any(len(peer.held) < peer.slots and peer.version >= rollout.floor for peer in others)
        if not times or not idle:
            return None
        config = self._book.config
        doubled = 2.0 ** min(rollout.overtimes, _MOST_DOUBLINGS)
        return max(config.lease_s, config.overtime * statistics.median(times)) * doubled
