"""When a lease or a generator is overdue. Times move while we wait, so a heap entry is only a promise to look again."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heappop, heappush

from orz_async.broker.rollouts import Peer, Rollout, State


class Alarms:
    """Renewing a lease or hearing a generator costs nothing here; each is looked at once per lease_s."""

    def __init__(self, peers: dict[str, Peer], lease_s: float) -> None:
        self._peers = peers
        self._lease_s = lease_s
        self._leases: list[tuple[float, int, int, Rollout]] = []
        """Heap of (due, serial, attempt, rollout); the serial settles ties."""
        self._silences: list[tuple[float, str]] = []
        self._serial = 0

    def watch(self, rollout: Rollout) -> None:
        self._push(rollout.deadline, rollout)

    def watch_peer(self, peer: Peer) -> None:
        """Look at this generator when its patience is over; replaces an earlier promise."""
        peer.alarm = peer.seen + peer.patience
        heappush(self._silences, (peer.alarm, peer.name))

    def overdue(self, now: float) -> Iterator[Rollout]:
        """Held rollouts whose lease ran out. A queued one lives as long as its generator makes progress elsewhere."""
        while self._leases and self._leases[0][0] <= now:
            _, _, attempt, rollout = heappop(self._leases)
            if rollout.state is not State.HELD or rollout.attempt != attempt:
                continue
            due = rollout.deadline
            if rollout.queued:
                due = max(due, self._peers[rollout.generator].grew + self._lease_s)
            if due > now:
                self._push(due, rollout)
            else:
                yield rollout

    def silent(self, now: float) -> Iterator[Peer]:
        while self._silences and self._silences[0][0] <= now:
            due, name = heappop(self._silences)
            peer = self._peers.get(name)
            if peer is None or peer.alarm != due:
                continue
            if peer.seen + peer.patience > now:
                self.watch_peer(peer)
            else:
                yield peer

    def _push(self, due: float, rollout: Rollout) -> None:
        self._serial += 1
        heappush(self._leases, (due, self._serial, rollout.attempt, rollout))
