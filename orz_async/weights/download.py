"""What a fetcher does next, as a state machine without sockets or clock: messages and moments in, actions out."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto

from orz_async.errors import PeerLostError, WireError
from orz_async.weights.assembly import Assembly, DamagedTransfer
from orz_async.weights.digests import Digests
from orz_async.weights.manifest import Limits, check
from orz_async.weights.snapshot import State
from orz_async.weights.wire import Chunk, Gone, Manifest, Message, Pull, Waiting, Want

CREDITS = 4
"""Chunks asked for and not yet received."""
ASK_AGAIN_S = 1.0
MAX_DAMAGED = 3
"""Complete transfers with a wrong checksum in a row before giving up."""
BACKOFF_S = (0.1, 5.0)
"""First and longest rest between two connections."""
SHUN_S = 60.0
"""A relay that was silent is not gone back to for so long, while another address is known; one that lied, never."""
RELAY_PATIENCE_S = 60.0
"""A relay that says it is still receiving is waited for so long."""


class Phase(Enum):
    """Moved by Download alone.

    IDLE ──want──► ASKING ──Manifest──► FETCHING ──last chunk──► IDLE, or ASKING if a newer one is wanted
    FETCHING ──newer Manifest──► FETCHING      what there was of the older version is abandoned
    FETCHING ──Gone, gap, cut, damage──► ASKING     an equal manifest goes on where it stopped
    ASKING, FETCHING ──silence──► RESTING ──backoff──► ASKING
    """

    IDLE = auto()
    ASKING = auto()
    FETCHING = auto()
    RESTING = auto()


class Reopen(Enum):
    CLOSE = auto()
    OPEN = auto()
    MOVE = auto()
    """Close one connection and open another: nothing went wrong."""


Action = Want | Pull | Reopen


class Download:
    """Every method that takes `now` returns the actions to carry out in order."""

    def __init__(self, addresses: Sequence[str], *, limits: Limits, stall_s: float, give_up_s: float) -> None:
        self.peer = addresses[0]
        """Whom the connection is to. The last address is the learner's own, the others are relays."""
        self._addresses, self._limits = tuple(addresses), limits
        self.digests = Digests()
        self.progress = 0
        """Grows with each chunk that arrives here or, as far as it says so, at the peer."""
        self._stall_s, self._give_up_s = stall_s, give_up_s
        self.phase = Phase.IDLE
        self.base: State | None = None
        self.done: Manifest | None = None
        """Of the version that `base` became last; the owner takes it and sets it to None."""
        self.since = 0.0
        """Start of the wait for what is wanted now."""
        self.started = 0.0
        """When the first chunk of the present or last transfer was asked for."""
        self.note = ""
        """What last went wrong on the way, "" after progress."""
        self._wanted = -1
        self._assembly: Assembly | None = None
        self._next_pull = 0
        self._damaged = 0
        self._rests = 0  # since the last sign of life
        self._shunned: dict[str, float] = {}  # until when
        self._peer_progress = 0
        self._heard = self._asked = self._moved = self._rest_until = self._met = 0.0

    @property
    def _at_source(self) -> bool:
        return self.peer == self._addresses[-1]

    def route(self, addresses: Sequence[str], now: float) -> list[Action]:
        """Fetch from these from now on, best first, the learner last. A transfer under way from one of them goes on."""
        if not addresses:
            return []
        self._addresses = tuple(addresses)
        best = next((one for one in addresses if self._shunned.get(one, now) <= now), addresses[-1])
        if self.peer == best or (self.phase is Phase.FETCHING and self.peer in addresses):
            return []
        self.peer, self._met = best, now
        if self.phase is Phase.RESTING:
            return []
        if self.phase is Phase.IDLE:
            return [Reopen.MOVE]
        self.phase, self._moved = Phase.ASKING, now
        return [Reopen.MOVE, self._ask(now)]

    def _turn_away(self, now: float, until: float) -> None:
        """The next address that is not shunned; where all are, the learner."""
        if len(self._addresses) == 1:
            return
        if not self._at_source:
            self._shunned[self.peer] = until
        at = self._addresses.index(self.peer) if self.peer in self._addresses else -1
        order = (*self._addresses[at + 1 :], *self._addresses[: max(at, 0)])
        self.peer = next((one for one in order if self._shunned.get(one, now) <= now), self._addresses[-1])

    def waiting_for(self, now: float) -> str:
        """One line: what is awaited, from whom, since when."""
        assembly = self._assembly
        if self.phase is Phase.IDLE:
            return "no newer weights are wanted"
        progress = f" ({assembly.next_chunk} of {assembly.manifest.num_chunks} chunks here)" if assembly else ""
        note = f"; {self.note}" if self.note else ""
        return (
            f"waiting for weights version {self._wanted}{progress} from {self.peer} for {now - self.since:.1f} s, "
            f"last heard of {now - self._heard:.1f} s ago{note}"
        )

    def want(self, version: int, now: float) -> list[Action]:
        held = -1 if self.base is None else self.base.version
        if version <= max(self._wanted, held):
            return []
        self._wanted = version
        if self.phase is Phase.IDLE:
            self.phase = Phase.ASKING
            self.since = self._heard = self._moved = self._met = now
        return [] if self.phase is Phase.RESTING else [self._ask(now)]

    def tick(self, now: float) -> list[Action]:
        """Time has passed: ask again, or change the connection. Raises PeerLostError after `give_up_s`."""
        if self.phase is Phase.IDLE:
            return []
        if now - self._heard > self._give_up_s:
            raise PeerLostError(f"{self.waiting_for(now)}; gave up after {self._give_up_s:.0f} s without an answer")
        if self.phase is Phase.RESTING:
            return self._reopen(now) if now >= self._rest_until else []
        # A relay that answers but lost its own source must not hold up those who know another address.
        stuck = self.phase is Phase.ASKING and len(self._addresses) > 1
        quiet_since = self._moved if stuck else max(self._heard, self._moved)
        if now - quiet_since > self._stall_s:
            return self.rest(now, f"{self.peer} sent nothing new for {self._stall_s:g} s")
        unanswered = self.phase is Phase.ASKING or (self._assembly and self._assembly.manifest.version < self._wanted)
        return [self._ask(now)] if unanswered and now - self._asked > ASK_AGAIN_S else []

    def rest(self, now: float, reason: str) -> list[Action]:
        """Close the connection and wait a little, then turn to the next address; what has arrived is kept."""
        self.note = reason
        if self.phase in (Phase.IDLE, Phase.RESTING):
            return []
        self._turn_away(now, now + SHUN_S)
        self.phase = Phase.RESTING
        first, longest = BACKOFF_S
        self._rest_until = now + min(longest, first * 2**self._rests)
        self._rests = min(self._rests + 1, 16)
        return [Reopen.CLOSE]

    def reconnected(self, now: float) -> list[Action]:
        """The connection is a new one: nothing that was asked on the old one will be answered."""
        if self.phase in (Phase.IDLE, Phase.RESTING):
            return []
        self.phase, self.note = Phase.ASKING, f"the connection to {self.peer} was cut"
        return [self._ask(now)]

    def handle(self, message: Message, now: float) -> list[Action]:
        """A sound frame of this epoch arrived. Raises WireError for what trying again cannot repair."""
        if self.phase in (Phase.IDLE, Phase.RESTING):
            return []
        self._heard = now
        try:
            return self._handle(message, now)
        except WireError as error:
            if self._at_source:
                raise
            return self._distrust(str(error), now)

    def _distrust(self, reason: str, now: float) -> list[Action]:
        """A relay sent what the learner cannot have sent: it is never asked again, and nothing of it is kept."""
        self._assembly = None
        self._shunned[self.peer] = float("inf")
        told = self.peer
        actions = self.rest(now, f"relay {told}: {reason}")
        self._shunned[told] = float("inf")
        return actions

    def _wait_on(self, waiting: Waiting, now: float) -> None:
        preparing = waiting.newest >= self._wanted
        receiving = waiting.progress != self._peer_progress and now - self._met < RELAY_PATIENCE_S
        self.note = f"{self.peer} {'prepares' if preparing else 'has'} version {waiting.newest}"
        if preparing or receiving:
            self._moved = now
        if waiting.progress != self._peer_progress:
            self._peer_progress = waiting.progress
            self.progress += 1

    def _handle(self, message: Message, now: float) -> list[Action]:
        if isinstance(message, Waiting):
            self._wait_on(message, now)
        elif isinstance(message, Manifest):
            return self._start(message, now)
        elif isinstance(message, Chunk) and self.phase is Phase.FETCHING:
            return self._chunk(message, now)
        elif isinstance(message, Gone) and self.phase is Phase.FETCHING:
            self.note = f"{self.peer} no longer has version {message.version}"
            self.phase = Phase.ASKING
            return [self._ask(now)]
        return []

    def _ask(self, now: float) -> Want:
        self._asked = now
        base = self.base
        return Want(self._wanted, -1, "") if base is None else Want(self._wanted, base.version, base.digest)

    def _reopen(self, now: float) -> list[Action]:
        self._moved = self._met = now
        self.phase = Phase.ASKING
        return [Reopen.OPEN, self._ask(now)]

    def _start(self, manifest: Manifest, now: float) -> list[Action]:
        held_version, held_digest = (-1, "") if self.base is None else (self.base.version, self.base.digest)
        outdated = manifest.version <= held_version or manifest.base_digest not in ("", held_digest)
        current = self._assembly.manifest if self._assembly is not None else None
        if self.phase is Phase.FETCHING and current is not None:
            outdated = outdated or manifest.version <= current.version
        if outdated:
            return []  # it answers what was asked before the last version was complete
        if not self._at_source and self.digests and self.digests.get(manifest.version) is None:
            self.note = f"{self.peer} has version {manifest.version}, of which the learner has not spoken yet"
            return []
        self.digests.require(manifest.version, manifest.digest, self.peer)
        if manifest != current:
            check(manifest, limits=self._limits)
            self.started = now
            self._assembly = None  # frees what an abandoned version took before the next one takes its own
            try:
                self._assembly = Assembly(manifest, self.base)
            except DamagedTransfer as error:
                return self._repeat(error, now)
        assert self._assembly is not None
        self.phase = Phase.FETCHING
        self._moved, self._rests = now, 0
        self._next_pull = self._assembly.next_chunk
        return self._finish(now) if self._assembly.complete else self._pull()

    def _chunk(self, chunk: Chunk, now: float) -> list[Action]:
        assembly = self._assembly
        assert assembly is not None
        manifest = assembly.manifest
        if (chunk.version, chunk.base_digest) != (manifest.version, manifest.base_digest):
            return []
        if chunk.index < assembly.next_chunk:
            return []
        if chunk.index > assembly.next_chunk:
            self.phase = Phase.ASKING
            self.note = f"chunk {assembly.next_chunk} was lost"
            return [self._ask(now)]
        try:
            assembly.feed(chunk.data)
        except DamagedTransfer as error:
            return self._repeat(error, now)
        self._moved, self._rests, self.note = now, 0, ""
        self.progress += 1
        return self._finish(now) if assembly.complete else self._pull()

    def _pull(self) -> list[Action]:
        assembly = self._assembly
        assert assembly is not None
        manifest = assembly.manifest
        end = min(assembly.next_chunk + CREDITS, manifest.num_chunks)
        start, self._next_pull = self._next_pull, max(self._next_pull, end)
        return [Pull(manifest.version, manifest.base_digest, index) for index in range(start, end)]

    def _finish(self, now: float) -> list[Action]:
        assert self._assembly is not None
        self.base, self.done = self._assembly.state(), self._assembly.manifest
        self._assembly, self._damaged, self.note = None, 0, ""
        if self.base.version >= self._wanted:
            self.phase = Phase.IDLE
            return []
        self.phase = Phase.ASKING
        return [self._ask(now)]

    def _repeat(self, error: DamagedTransfer, now: float) -> list[Action]:
        """Start over with everything: neither what arrived nor what it was to build on can be trusted."""
        if not self._at_source:
            self.base = None
            return self._distrust(str(error), now)
        self._damaged += 1
        if self._damaged >= MAX_DAMAGED:
            raise WireError(f"{error}; {self._damaged} transfers in a row from {self.peer} were damaged") from error
        self._assembly = self.base = None
        self.phase, self.note = Phase.ASKING, str(error)
        return [self._ask(now)]
