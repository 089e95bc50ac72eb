"""Which rollouts a generator is lent next: evaluations first, then lost rollouts, then new ones, each oldest first."""

from __future__ import annotations

from heapq import heappop, heappush

from orz_async.broker.book import Book
from orz_async.broker.evaluations import Evaluations
from orz_async.broker.rollouts import Peer, Rollout


class Lender:
    """Chooses within three limits: the generator's credit, its serving version, and for a while its fair share.

    When versions are published, lease numbers become grantable in bulk. If the first generator to report could take
    all it has room for, the others would starve whenever there are fewer rollouts than room (always at S = 0). So until
    `fair_until` a generator holds at most its part of all rollouts held or grantable, by slots, rounded up; the parts
    add up to everything. After that whoever asks gets, so a generator that is late with its weights delays nobody.
    """

    def __init__(self, book: Book, evals: Evaluations, peers: dict[str, Peer]) -> None:
        self.book = book
        self.evals = evals
        self.peers = peers
        self.num_held = 0
        self.num_slots = 0
        """Over all generators."""
        self.fair_until = 0.0
        self.stirred = False
        """Rollouts became grantable that a generator without news of its own could take."""

    @property
    def num_grantable(self) -> int:
        return len(self.evals.lost) + self.book.num_grantable

    def resize(self, peer: Peer, slots: int) -> None:
        self.num_slots += slots - peer.slots
        peer.slots = slots

    def remove(self, peer: Peer) -> None:
        self.resize(peer, 0)
        del self.peers[peer.name]

    def choose(self, peer: Peer, now: float) -> list[Rollout]:
        """Take rollouts off the queues for this generator; the caller grants them."""
        room = peer.slots - len(peer.held)
        # It may have fetched weights that are not announced yet, and it may claim anything.
        served = min(peer.version, self.book.version)
        if room <= 0 or served < 0 or not (self.evals.lost or self.book.has_work(served)):
            return []  # for thousands of generators the usual case
        if now < self.fair_until:
            total = self.num_held + self.num_grantable
            room = min(room, -(-total * peer.slots // self.num_slots) - len(peer.held))
        chosen: list[Rollout] = []
        for lost, rollouts in ((self.evals.lost, self.evals.rollouts), (self.book.lost, self.book.rollouts)):
            avoided: list[Rollout] = []
            # Floors rise with numbers, so the first one out of reach ends the search.
            while lost and len(chosen) < room and rollouts[lost[0]].floor <= served:
                rollout = rollouts[heappop(lost)]
                (avoided if self._avoids(rollout, peer, now) else chosen).append(rollout)
            for rollout in avoided:
                heappush(lost, rollout.number)
        limit = self.book.limit
        while len(chosen) < room and (number := self.book.next_rollout) < limit and self.book.floor(number) <= served:
            chosen.append(self.book.admit())
        self.num_held += len(chosen)
        return chosen

    def _avoids(self, rollout: Rollout, peer: Peer, now: float) -> bool:
        """A rollout goes first to another generator than the one that lost it, for lease_s if there is another."""
        recent = now < rollout.lost_at + self.book.config.lease_s
        return rollout.generator == peer.name and recent and self.num_slots > peer.slots
