"""What the learner waits for, in one line: how much, from whom, since when."""

from __future__ import annotations

from collections import Counter

from orz_async.broker.ledger import Ledger
from orz_async.broker.rollouts import State

_NAMES = 4
"""Generators named; the rest are counted."""


def waiting_line(ledger: Ledger, quiet_s: float) -> str:
    if ledger.wanted is None:
        return "nothing"
    book = ledger.book
    size = ledger.config.rollouts_per_step
    missing = max(size - book.num_ready, 0)
    holders: Counter[str] = Counter()
    ungranted = 0
    oldest = ledger.wanted - ledger.config.window
    for rollout in book.rollouts.values():
        if rollout.state is State.HELD and rollout.number // size <= oldest:
            holders[rollout.generator] += 1
        elif rollout.state is State.LOST and rollout.number // size <= oldest:
            ungranted += 1
    ungranted += max(0, (oldest + 1) * size - book.next_rollout)
    parts = [f"{count} from {name}" for name, count in holders.most_common(_NAMES)]
    if len(holders) > _NAMES:
        parts.append(f"{sum(holders.values()) - sum(c for _, c in holders.most_common(_NAMES))} from others")
    if ungranted:
        parts.append(f"{ungranted} granted to nobody ({_why(ledger, oldest)})")
    what = "; ".join(parts) or f"{missing} rollouts of later steps"
    return f"step {ledger.wanted} waits for rollouts: {what}; no progress for {quiet_s:.1f} s"


def _why(ledger: Ledger, nominal: int) -> str:
    floor = max(0, nominal - ledger.config.head_start)
    peers = ledger.peers.values()
    if not peers:
        return "no generator is connected"
    if all(peer.version < floor for peer in peers):
        return f"no generator serves version {floor} yet"
    return "all generators are busy"
