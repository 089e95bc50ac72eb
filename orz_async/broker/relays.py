"""From whom each generator fetches its weights: a tree of those that relay, so that the learner sends to one.

A relay on loopback is known to its own machine only: the learner then sends to one generator of each machine.
"""

from __future__ import annotations

import re

import msgspec

from orz_async.broker.ledger import Ledger
from orz_async.broker.messages import Published, Welcome
from orz_async.broker.switchboard import Connection, Switchboard
from orz_async.weights.address import is_loopback

FANOUT = 2
"""Generators that one relay serves. A version crosses log2(generators) relays, each of which checks it before it passes
it on; more would lengthen each of these hops by one more copy to send."""
MAX_ADDRESS = 200


def is_relay_address(address: str) -> bool:
    return len(address) <= MAX_ADDRESS and re.fullmatch(r"(tcp|ipc)://[^\s,]+", address, re.ASCII) is not None


def routes(relays: dict[str, str], names: list[str], learner: str) -> dict[str, tuple[str, ...]]:
    """Sources of every generator, best first: its parent in the tree, the parent's parent, ..., the learner.

    relays: addresses by name, in the order of joining: the tree is filled level by level. Others hang on its leaves.
    """
    order = list(relays)
    found: dict[str, tuple[str, ...]] = {}
    for index, name in enumerate(order):
        parent = order[(index - 1) // FANOUT] if index else ""
        found[name] = (relays[parent], *found[parent]) if parent else (learner,)
    others = [name for name in names if name not in relays]
    for index, name in enumerate(others):
        parent = order[-1 - index % len(order)] if order else ""
        found[name] = (relays[parent], *found[parent]) if parent else (learner,)
    return found


class WeightRoutes:
    """What generators are told of the weights. Those that the ledger has given up are no relays any more."""

    def __init__(self, learner: str, switchboard: Switchboard, ledger: Ledger) -> None:
        self._learner, self._switchboard, self._ledger = learner, switchboard, ledger
        self.version = -1
        """The newest one that generators know of."""
        self.digest = ""

    def publish(self, version: int, digest: str) -> None:
        self.version, self.digest = version, digest

    def _routes(self, joining: str = "") -> dict[str, tuple[str, ...]]:
        connections = self._switchboard.by_name.values()
        alive = [c for c in connections if c.name in self._ledger.peers or c.name == joining]
        if not self._learner.startswith(("tcp:", "ipc:")) or not any(c.hello.relay for c in alive):
            return {}
        # A tree for each machine with relays on its loopback, and one for everybody else.
        local = {c.hello.host for c in alive if c.hello.relay and is_loopback(c.hello.relay)}
        groups: dict[str, list[Connection]] = {}
        for c in alive:
            is_local = is_loopback(c.hello.relay) if c.hello.relay else c.hello.host in local
            groups.setdefault(f"on {c.hello.host}" if is_local else "", []).append(c)
        found: dict[str, tuple[str, ...]] = {}
        for group in groups.values():
            relays = {c.name: c.hello.relay for c in group if c.hello.relay}
            found |= routes(relays, [c.name for c in group], self._learner)
        return found

    def announcements(self) -> dict[str, Published]:
        """For every connected generator."""
        found = self._routes()
        return {
            name: Published(self.version, self.digest, found.get(name, (self._learner,)))
            for name in self._switchboard.by_name
        }

    def welcome(self, welcome: Welcome, name: str) -> Welcome:
        """`welcome` as it is today for this generator, which may be about to join."""
        sources = self._routes(name).get(name, (self._learner,))
        return msgspec.structs.replace(
            welcome, weights_address=",".join(sources), version=self.version, digest=self.digest
        )
