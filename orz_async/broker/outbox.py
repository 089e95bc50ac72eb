"""What the broker has decided to say, held back until the journal has it: first on paper, then in the world."""

from __future__ import annotations

from collections import deque

from orz_async.broker.journal import Journal
from orz_async.broker.leases import LeaseMaker
from orz_async.broker.messages import Ack, Cancel, Grant, Nack
from orz_async.broker.switchboard import Switchboard
from orz_async.broker.transitions import Terms

_GRANT_BYTES = 4 << 20
"""Prompts of one Grant frame; more leases than that go out in several."""


class Outbox:
    def __init__(self, switchboard: Switchboard, leases: LeaseMaker, journal: Journal) -> None:
        self.switchboard = switchboard
        self.leases = leases
        self.journal = journal
        self._messages: list[tuple[str, Nack | Cancel]] = []
        self._grants: dict[str, list[Terms]] = {}
        self._acks: deque[tuple[int, str, Ack]] = deque()
        """(journal index that must be durable, generator, acknowledgement)."""

    def say(self, generator: str, message: Ack | Nack | Cancel) -> None:
        if isinstance(message, Ack):
            self._acks.append((self.journal.next_index, generator, message))
        else:
            self._messages.append((generator, message))

    def lend(self, generator: str, terms: tuple[Terms, ...]) -> None:
        self._grants.setdefault(generator, []).extend(terms)

    def flush(self, now: float) -> None:
        """Write the journal, then send; acknowledgements wait until the journal is durable up to their record."""
        self.journal.write(now)
        for generator, message in self._messages:
            self.switchboard.send(generator, message, now)
        self._messages.clear()
        while self._acks and self._acks[0][0] <= self.journal.durable:
            _, generator, ack = self._acks.popleft()
            self.switchboard.send(generator, ack, now)
        for generator, terms in self._grants.items():
            self._send_leases(generator, terms, now)
        self._grants.clear()

    def finish(self, now: float) -> None:
        """Nothing is held back any longer."""
        self.journal.write(now)
        self.journal.sync()
        self.flush(now)

    def _send_leases(self, generator: str, terms: list[Terms], now: float) -> None:
        leases = []
        size = 0
        for term in terms:
            lease = self.leases.lease(term)
            leases.append(lease)
            size += len(lease.prompt) + len(lease.answer) + 200
            if size >= _GRANT_BYTES:
                self.switchboard.send(generator, Grant(tuple(leases)), now)
                leases, size = [], 0
        if leases:
            self.switchboard.send(generator, Grant(tuple(leases)), now)
