"""What generators say, checked, becomes events of the ledger. Who sends too much nonsense is shown the door."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple, Protocol

import msgspec

from orz_async.broker import wire
from orz_async.broker.leases import LeaseMaker
from orz_async.broker.ledger import Ledger
from orz_async.broker.messages import (
    Bye,
    Failure,
    Hello,
    LeaseRef,
    Leave,
    Observe,
    Published,
    Report,
    Result,
    Status,
    ToBroker,
    Welcome,
)
from orz_async.broker.overtime import owner_of
from orz_async.broker.relays import WeightRoutes, is_relay_address
from orz_async.broker.standing import MAX_REJECTIONS, Standings
from orz_async.broker.switchboard import Arrived, Connection, Switchboard
from orz_async.broker.transitions import Event, Failed, Finished, Heartbeat, Joined, Left
from orz_async.broker.validate import problem_of, problem_of_status
from orz_async.errors import WireError
from orz_async.keys.roster import Member, Roster
from orz_async.observe.events import EventLog
from orz_async.records import Trajectory
from orz_async.weights.address import split_key

MAX_NAME = 64
MAX_NAMES = 1000
"""Refusals reported; who invents names faster than that is not worth the disk."""
MAX_REASON = 200
"""Characters of a peer's reason that are kept."""
MAX_DAEMONS = 256
"""Daemons that may share one key at once."""


class Received(NamedTuple):
    """A result as it arrived."""

    trajectory: Trajectory
    encoded: memoryview | None
    """The same as MessagePack, inside the frame; None if it has to be encoded."""


class Ledgerward(Protocol):
    """Where events go."""

    announced: int

    def apply(self, event: Event, result: Received | None = None) -> None: ...

    def report(self) -> Report: ...


class Reception:
    def __init__(
        self,
        ledger: Ledger,
        leases: LeaseMaker,
        switchboard: Switchboard,
        events: EventLog,
        *,
        vocab_size: int,
        welcome: Welcome,
        roster: Roster | None = None,
    ) -> None:
        self.ledger = ledger
        self.leases = leases
        self.switchboard = switchboard
        self.events = events
        self.vocab_size = vocab_size
        self.welcome = welcome
        self.longest = leases.sampling["train"].max_new_tokens
        self.roster = roster
        """Who may speak here; None without keys."""
        self.standings = Standings()
        self.routes = WeightRoutes(welcome.weights_address, switchboard, ledger, roster)
        self._turned_away: set[str] = set()
        """Names whose refusal has been reported."""
        self.stray_frames = 0
        """Bad frames on connections that never said Hello."""
        self.shut_out = 0
        """Frames of keys that were revoked or have ended, or that came over a connection of another key."""
        self._joined_at: dict[str, float] = {}

    def receive(self, arrived: Arrived, to: Ledgerward, now: float) -> bool:
        """Handle one message. True if it proves progress: a token more or a result that counts."""
        identity = arrived.identity
        connection = self.switchboard.by_identity.get(identity)
        member = None
        if self.roster is not None:
            member = self.roster.find(arrived.key)
            if member is None or (connection is not None and connection.key != arrived.key):
                self.shut_out += 1
                if connection is not None and connection.key == arrived.key:
                    self._expel(connection, to)
                return False
        try:
            if arrived.frames != 1:
                raise WireError(f"a message has one frame, this one has {arrived.frames}")
            header, message = wire.decode_to_broker(arrived.frame)
        except WireError as error:
            self._bad_frame(identity, connection, error, to)
            return False
        if isinstance(message, Observe):
            self._observe(identity, member, to)
        elif member is not None and member.role == "observer":
            self.switchboard.send_to(identity, Bye("an observer's key reads the status, it gets no leases", False))
        elif isinstance(message, Hello):
            self._hello(arrived, member, header, message, to, now)
        # A frame of an earlier epoch, of a replaced connection or repeated by a middle box is not for us.
        elif (
            connection is not None
            and header.run == self.switchboard.run
            and header.epoch == self.switchboard.epoch
            and header.sequence > connection.received
        ):
            connection.received = header.sequence
            connection.heard = now
            if connection.name not in self.ledger.peers:
                self._announce(connection, now, reason="it speaks again")
                to.apply(Joined(connection.name, 0))
            return self._hear(connection, message, arrived.frame, to, now)
        return False

    def sweep(self, to: Ledgerward) -> None:
        """Expel the connections of keys that are no longer allowed, also those that say nothing."""
        if self.roster is not None:
            self.roster.refresh()
            for connection in list(self.switchboard.by_identity.values()):
                if self.roster.find(connection.key) is None:
                    self._expel(connection, to)
            self.routes.tell_relays()

    def _expel(self, connection: Connection, to: Ledgerward) -> None:
        """Silence makes the daemon of a rotated key connect again, with the new one; that of a revoked key is told."""
        assert self.roster is not None
        self.switchboard.disconnect(connection)
        if self.roster.knows(connection.owner):
            return
        reason = f"the key {connection.owner!r} was revoked"
        self.switchboard.send_to(connection.identity, Bye(reason, finished=False))
        to.apply(Left(connection.name, reason))

    def _observe(self, identity: bytes, member: Member | None, to: Ledgerward) -> None:
        if member is None or member.role == "observer":
            self.switchboard.send_to(identity, to.report())
        else:
            self.shut_out += 1

    def _hear(self, connection: Connection, message: ToBroker, frame: memoryview, to: Ledgerward, now: float) -> bool:
        name = connection.name
        match message:
            case Status():
                if problem := problem_of_status(message, self._newest, self.longest):
                    self._penalise(connection, problem, to)
                    return False
                peer = self.ledger.peers[name]
                grew = peer.grew
                connection.slots = message.slots
                slots = self.standings[connection.owner].credit(message.slots, now)
                to.apply(Heartbeat(name, slots, message.version, message.progress))
                return peer.grew > grew
            case Result():
                encoded = wire.trajectory_bytes(frame)
                return self._result(connection, Received(message.trajectory, encoded), to, now)
            case Failure():
                to.apply(Failed(name, message.lease, message.reason[:MAX_REASON], message.returned))
            case Leave():
                to.apply(Left(name, message.reason[:MAX_REASON]))
                self.switchboard.send_to(connection.identity, Bye("as you wish", finished=False))
                self.switchboard.disconnect(connection)
        return False

    def _hello(
        self, arrived: Arrived, member: Member | None, header: wire.Header, hello: Hello, to: Ledgerward, now: float
    ) -> None:
        identity = arrived.identity
        owner = hello.name[:MAX_NAME] if member is None else member.name
        refusal = self._refusal_of_name(hello.name, member) or self.standings[owner].refused
        if reason := refusal or self._refusal(identity, header, hello, to, now):
            if len(self._turned_away) < MAX_NAMES and hello.name[:MAX_NAME] not in self._turned_away:
                self._turned_away.add(hello.name[:MAX_NAME])
                self.events.emit("refused", generator=hello.name[:MAX_NAME], reason=reason)
            self.switchboard.send_to(identity, Bye(reason, finished=False))
            return
        before = self.switchboard.by_identity.get(identity)
        if before is not None and before.name != hello.name:
            # One connection is one generator: names it has had must not pile up.
            self.switchboard.disconnect(before)
            to.apply(Left(before.name, f"it calls itself {hello.name!r} now"))
        if not is_relay_address(hello.relay, keyed=member is not None):
            hello = msgspec.structs.replace(hello, relay="")
        hello = msgspec.structs.replace(hello, host=hello.host[:MAX_NAME])
        connection = Connection(identity, hello, since=now, heard=now, sent=now, received=header.sequence)
        connection.key, connection.owner = arrived.key, owner
        self.switchboard.connect(connection)
        self.greet(connection)
        connection.slots = min(max(hello.slots, 0), wire.MAX_SLOTS)
        slots = self.standings[owner].credit(connection.slots, now)
        about = {"engine": hello.engine[:MAX_NAME], "slots": slots, "pid": hello.pid}
        about["relay"] = split_key(hello.relay)[0]
        self._announce(connection, now, **about)
        to.apply(Joined(hello.name, slots))

    def _announce(self, connection: Connection, now: float, **fields: object) -> None:
        """One line in the event log, unless the same name had one just now: Hellos must not fill the disk."""
        if len(self._joined_at) > MAX_NAMES:
            self._joined_at.clear()
        if now - self._joined_at.get(connection.name, -1e9) >= self.welcome.heartbeat_s:
            self._joined_at[connection.name] = now
            self.events.emit("joined", generator=connection.name, **fields)

    def _refusal_of_name(self, name: str, member: Member | None) -> str:
        """Whoever holds a key has its name, or that and a suffix: NAME.SUFFIX tells its daemons apart."""
        if not 0 < len(name) <= MAX_NAME or not name.isprintable():
            return f"a generator's name has 1 to {MAX_NAME} printable characters, got {name[:MAX_NAME]!r}"
        if member is None:
            return ""
        if name != member.name and not name.startswith(f"{member.name}."):
            return f"the key is {member.name!r}, the generator calls itself {name!r}; leave --name out"
        daemons = Counter(connection.owner for connection in self.switchboard.by_name.values())
        if name not in self.switchboard.by_name and daemons[member.name] >= MAX_DAEMONS:
            return f"{MAX_DAEMONS} daemons share the key {member.name!r} already; make another one with `orz keys new`"
        return ""

    def _refusal(self, identity: bytes, header: wire.Header, hello: Hello, to: Ledgerward, now: float) -> str:
        """Why this generator cannot serve this run, or nothing."""
        if header.run not in (self.switchboard.run, wire.ANY_RUN):
            return f"this is run {self.welcome.run_id}, the generator served another one; restart it without that state"
        # 0: a daemon that learns the model from Welcome; it checks the vocabulary itself and says it next time.
        if hello.vocab_size not in (0, self.vocab_size):
            return (
                f"the run's model has a vocabulary of {self.vocab_size}, the generator's has {hello.vocab_size}; "
                f"start it with the model {self.welcome.model_path}"
            )
        old = self.switchboard.by_name.get(hello.name)
        recently = 2 * self.welcome.heartbeat_s
        if old is not None and old.identity != identity and old.hello.pid != hello.pid and now - old.heard < recently:
            # Probing a connection that its dead process has closed fails at once and forgets it.
            self.switchboard.send_to(old.identity, Published(to.announced))
            if old.identity in self.switchboard.by_identity:
                return f"the name {hello.name!r} is in use by process {old.hello.pid}; choose another --name"
        return ""

    def greet(self, connection: Connection) -> None:
        # First those it may fetch from: they must know its key before it knocks.
        self.routes.tell_relays(connection.name)
        self.switchboard.send_to(connection.identity, self.routes.welcome(self.welcome, connection.name))

    @property
    def _newest(self) -> int:
        """The newest version that any generator can serve."""
        # Between the end of a step and its announcement a generator may serve the new weights already.
        return self.ledger.book.version + bool(self.ledger.book.taken)

    def _result(self, connection: Connection, received: Received, to: Ledgerward, now: float) -> bool:
        trajectory = received.trajectory
        ref = LeaseRef(trajectory.kind, trajectory.rollout, trajectory.attempt)
        terms = self.ledger.terms(connection.name, ref)
        if terms is None:
            to.apply(Finished(connection.name, ref, version_first=-1))
            if not self.ledger.was_granted(ref):
                self._penalise(connection, "a result without a lease", to)
            return False
        problem = problem_of(
            trajectory,
            self.leases.lease(terms),
            generator=connection.name,
            vocab_size=self.vocab_size,
            published=self._newest,
        )
        if problem is not None:
            to.apply(Finished(connection.name, ref, -1, problem))
            self._penalise(connection, problem, to)
            return False
        to.apply(Finished(connection.name, ref, trajectory.version_first), received)
        self.standings[connection.owner].earn(now)
        connection.count_tokens(trajectory.num_response_tokens, now)
        return True

    def wasted(self, generator: str, now: float) -> None:
        """A lease of this generator ended without a result."""
        connection = self.switchboard.by_name.get(generator)
        owner = connection.owner if connection is not None else self._owner_of(generator)
        standing = self.standings[owner]
        standing.waste(now)
        if connection is not None:
            self.ledger.curb(generator, standing.credit(connection.slots, now))

    def _owner_of(self, generator: str) -> str:
        return generator if self.roster is None else owner_of(generator)

    def _bad_frame(self, identity: bytes, connection: Connection | None, error: WireError, to: Ledgerward) -> None:
        if connection is None:
            self.stray_frames += 1
            if isinstance(error, wire.VersionError):
                self.switchboard.send_to(identity, Bye(str(error), finished=False))
            return
        problem = str(error)
        self.events.emit("bad_frame", generator=connection.name, reason=problem)
        # A damaged result would be missed for ever: after a Welcome the generator repeats what was not acknowledged.
        if not self._penalise(connection, problem, to):
            self.greet(connection)

    def _penalise(self, connection: Connection, problem: str, to: Ledgerward) -> bool:
        """Count a rejection; True if that was one too many."""
        standing = self.standings[connection.owner]
        standing.rejections += 1
        if standing.rejections < MAX_REJECTIONS:
            return False
        reason = f"{standing.rejections} rejections, the last one: {problem}"
        standing.refused = reason
        self.switchboard.send_to(connection.identity, Bye(reason, finished=False))
        to.apply(Left(connection.name, reason))
        self.switchboard.disconnect(connection)
        return True
