"""What a generator has earned: rejections that lead to the door, and a debt of wasted leases that shrinks its credit.

Kept by owner: with keys that is the key, whatever names its daemons take, without keys the generator's name. A new
connection, and with keys a new name, therefore starts with the old standing.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_REJECTIONS = 16
"""Bad frames and refused results, less the accepted ones, after which an owner is no longer heard."""
FREE_DEBT = 256
"""Wasted leases that cost nothing: a daemon that is killed or restarted loses what it holds once."""
MAX_DEBT = FREE_DEBT + 1024
MAX_OWNERS = 10_000
"""Names without keys can be invented; the oldest ones are forgotten."""


@dataclass(slots=True)
class Standing:
    rejections: int = 0
    refused: str = ""
    """Why it is no longer heard."""
    _debt: float = 0.0
    _since: float = 0.0

    def debt(self, now: float) -> float:
        """Wasted leases, less one for every second since."""
        return max(0.0, self._debt - (now - self._since))

    def waste(self, now: float) -> None:
        """A lease ended without a result."""
        self._debt, self._since = min(self.debt(now) + 1, MAX_DEBT), now

    def earn(self, now: float) -> None:
        """A result was accepted."""
        self.rejections = max(0, self.rejections - 1)
        self._debt, self._since = max(0.0, self.debt(now) - 2), now

    def credit(self, slots: int, now: float) -> int:
        """Leases it may hold of the `slots` that it declares."""
        return max(0, slots - int(max(0.0, self.debt(now) - FREE_DEBT)))


class Standings:
    def __init__(self) -> None:
        self._by_owner: dict[str, Standing] = {}

    def __getitem__(self, owner: str) -> Standing:
        standing = self._by_owner.get(owner)
        if standing is None:
            if len(self._by_owner) >= MAX_OWNERS:
                del self._by_owner[next(iter(self._by_owner))]
            standing = self._by_owner[owner] = Standing()
        return standing
