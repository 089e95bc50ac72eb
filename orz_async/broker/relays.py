"""From whom each generator fetches its weights: a tree of those that relay, so that the learner sends to one.

A relay on loopback is known to its own machine only: the learner then sends to one generator of each machine.

With keys a relay listens with a key pair of its own, made when its daemon starts. Its Hello, which comes over a
connection that proved a key of the list, names the public half, and the broker names it to those who are to fetch
there; to the relay it names their keys, and only these get in: a revoked key leaves the tree, and is shut out.
"""

from __future__ import annotations

import re

import msgspec

from orz_async.broker.ledger import Ledger
from orz_async.broker.messages import Published, Welcome
from orz_async.broker.switchboard import Connection, Switchboard
from orz_async.keys.roster import Roster
from orz_async.weights.address import is_loopback, split_key

FANOUT = 2
"""Generators that one relay serves. A version crosses log2(generators) relays, each of which checks it before it passes
it on; more would lengthen each of these hops by one more copy to send."""
MAX_ADDRESS = 200
MAX_SOURCES = 32
"""Relays on the way to the learner that a generator is told of, the nearest; a tree of a billion is not deeper."""
MAX_READERS = 1024
"""Keys that one relay lets in; whoever has another one turns to its next source."""
_KEY = re.compile(rb"[0-9a-zA-Z.:+=^!/*?&<>()\[\]{}@%$#-]{40}")
"""Z85 (RFC 32)."""


def is_relay_address(source: str, *, keyed: bool = False) -> bool:
    """Whether a generator may call its relay so: an address, with keys and only then followed by a public key."""
    address, key = split_key(source)
    if len(address) > MAX_ADDRESS or re.fullmatch(r"(tcp|ipc)://[^\s,|]+", address, re.ASCII) is None:
        return False
    return _KEY.fullmatch(key) is not None if keyed else "|" not in source


def _is_local(relay: str) -> bool:
    return is_loopback(split_key(relay)[0])


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

    def __init__(self, learner: str, switchboard: Switchboard, ledger: Ledger, roster: Roster | None = None) -> None:
        self._learner, self._switchboard, self._ledger, self._roster = learner, switchboard, ledger, roster
        self.version = -1
        """The newest one that generators know of."""
        self.digest = ""
        self._told: dict[str, tuple[str, ...]] = {}
        """Readers of each relay, as it knows them."""

    def publish(self, version: int, digest: str) -> None:
        self.version, self.digest = version, digest

    def _routes(self, joining: str = "") -> dict[str, tuple[str, ...]]:
        connections = self._switchboard.by_name.values()
        alive = [c for c in connections if c.name in self._ledger.peers or c.name == joining]
        if not self._learner.startswith(("tcp:", "ipc:")) or not any(c.hello.relay for c in alive):
            return {}
        # A tree for each machine with relays on its loopback, and one for everybody else.
        local = {c.hello.host for c in alive if c.hello.relay and _is_local(c.hello.relay)}
        groups: dict[str, list[Connection]] = {}
        for c in alive:
            is_local = _is_local(c.hello.relay) if c.hello.relay else c.hello.host in local
            groups.setdefault(f"on {c.hello.host}" if is_local else "", []).append(c)
        found: dict[str, tuple[str, ...]] = {}
        for group in groups.values():
            relays = {c.name: c.hello.relay for c in group if c.hello.relay}
            for name, sources in routes(relays, [c.name for c in group], self._learner).items():
                found[name] = (*sources[:-1][:MAX_SOURCES], sources[-1])
        return found

    def _readers(self, found: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        """With keys, by the name of each relay: the public keys of all who may be told to fetch from it."""
        if self._roster is None:
            return {}
        owners: dict[str, set[str]] = {}
        for name, sources in found.items():
            for source in sources[:-1]:
                owners.setdefault(source, set()).add(self._switchboard.by_name[name].owner)
        readers = {}
        for c in self._switchboard.by_name.values():
            if c.hello.relay:  # all keys of a name: one that is being rotated has two for a while
                keys = [key for owner in sorted(owners.get(c.hello.relay, ())) for key in self._roster.keys_of(owner)]
                readers[c.name] = tuple(keys[:MAX_READERS])
        return readers

    def announcements(self, joining: str = "") -> dict[str, Published]:
        """For every connected generator."""
        found = self._routes(joining)
        readers = self._readers(found)
        return {
            name: Published(self.version, self.digest, found.get(name, (self._learner,)), readers.get(name, ()))
            for name in self._switchboard.by_name
        }

    def tell_relays(self, joining: str = "") -> None:
        """Say at once who may read from a relay where that has changed. A frame that is lost comes again when quiet."""
        if self._roster is None or not any(c.hello.relay for c in self._switchboard.by_name.values()):
            return
        announced = self.announcements(joining)
        changed = [name for name, one in announced.items() if self._told.get(name, ()) != one.readers]
        self._told = {name: one.readers for name, one in announced.items() if one.readers}
        for name in changed:
            self._switchboard.send_to(self._switchboard.by_name[name].identity, announced[name])

    def welcome(self, welcome: Welcome, name: str) -> Welcome:
        """`welcome` as it is today for this generator, which may be about to join."""
        found = self._routes(name)
        sources = found.get(name, (self._learner,))
        readers = self._readers(found).get(name, ())
        return msgspec.structs.replace(
            welcome, weights_address=",".join(sources), version=self.version, digest=self.digest, readers=readers
        )
