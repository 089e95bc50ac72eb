"""What generators say, checked, becomes events of the ledger. Who sends too much nonsense is shown the door."""

from __future__ import annotations

from typing import Protocol

import msgspec

from orz_async.broker import wire
from orz_async.broker.leases import LeaseMaker
from orz_async.broker.ledger import Ledger
from orz_async.broker.messages import Bye, Failure, Hello, LeaseRef, Leave, Published, Result, Status, ToBroker, Welcome
from orz_async.broker.relays import WeightRoutes, is_relay_address
from orz_async.broker.switchboard import Connection, Switchboard
from orz_async.broker.transitions import Event, Failed, Finished, Heartbeat, Joined, Left
from orz_async.broker.validate import problem_of
from orz_async.errors import WireError
from orz_async.observe.events import EventLog
from orz_async.records import Trajectory

MAX_REJECTIONS = 16
"""Bad frames and refused results, less the accepted ones, after which a generator is no longer heard."""
MAX_NAME = 64
MAX_NAMES = 1000
"""Refusals reported; who invents names faster than that is not worth the disk."""
MAX_REASON = 200
"""Characters of a peer's reason that are kept."""


class Ledgerward(Protocol):
    """Where events go."""

    announced: int

    def apply(self, event: Event, trajectory: Trajectory | None = None) -> None: ...


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
    ) -> None:
        self.ledger = ledger
        self.leases = leases
        self.switchboard = switchboard
        self.events = events
        self.vocab_size = vocab_size
        self.welcome = welcome
        self.routes = WeightRoutes(welcome.weights_address, switchboard, ledger)
        self.refused: dict[str, str] = {}
        """Generators that are no longer heard, and why."""
        self._turned_away: set[str] = set()
        """Names whose refusal has been reported."""
        self.stray_frames = 0
        """Bad frames on connections that never said Hello."""

    def receive(self, identity: bytes, parts: list[bytes], to: Ledgerward, now: float) -> bool:
        """Handle one frame. True if it proves progress: a token more or a result that counts."""
        connection = self.switchboard.by_identity.get(identity)
        try:
            if len(parts) != 1:
                raise WireError(f"a message has one frame, this one has {len(parts)}")
            header, message = wire.decode_to_broker(parts[0])
        except WireError as error:
            self._bad_frame(identity, connection, error, to)
            return False
        if isinstance(message, Hello):
            self._hello(identity, header, message, to, now)
            return False
        # A frame of an earlier epoch, of a replaced connection or repeated by a middle box is not for us.
        if connection is None or header.run != self.switchboard.run or header.epoch != self.switchboard.epoch:
            return False
        if header.sequence <= connection.received:
            return False
        connection.received = header.sequence
        connection.heard = now
        if connection.name not in self.ledger.peers:
            self.events.emit("joined", generator=connection.name, reason="it speaks again")
            to.apply(Joined(connection.name, 0))
        return self._hear(connection, message, to, now)

    def _hear(self, connection: Connection, message: ToBroker, to: Ledgerward, now: float) -> bool:
        name = connection.name
        match message:
            case Status():
                peer = self.ledger.peers[name]
                grew = peer.grew
                slots = min(max(message.slots, 0), wire.MAX_SLOTS)
                to.apply(Heartbeat(name, slots, message.version, message.progress))
                return peer.grew > grew
            case Result():
                return self._result(connection, message.trajectory, to, now)
            case Failure():
                to.apply(Failed(name, message.lease, message.reason[:MAX_REASON], message.returned))
            case Leave():
                to.apply(Left(name, message.reason[:MAX_REASON]))
                self.switchboard.send_to(connection.identity, Bye("as you wish", finished=False))
                self.switchboard.disconnect(connection)
        return False

    def _hello(self, identity: bytes, header: wire.Header, hello: Hello, to: Ledgerward, now: float) -> None:
        if reason := self._refusal(identity, header, hello, to, now):
            if len(self._turned_away) < MAX_NAMES and hello.name[:MAX_NAME] not in self._turned_away:
                self._turned_away.add(hello.name[:MAX_NAME])
                self.events.emit("refused", generator=hello.name[:MAX_NAME], reason=reason)
            self.switchboard.send_to(identity, Bye(reason, finished=False))
            return
        if not is_relay_address(hello.relay):
            hello = msgspec.structs.replace(hello, relay="")
        connection = Connection(identity, hello, since=now, heard=now, sent=now, received=header.sequence)
        old = self.switchboard.by_name.get(hello.name)
        if old is not None:
            connection.rejections = old.rejections
        self.switchboard.connect(connection)
        self.greet(connection)
        slots = min(max(hello.slots, 0), wire.MAX_SLOTS)
        self.events.emit(
            "joined",
            generator=hello.name,
            engine=hello.engine[:MAX_NAME],
            slots=slots,
            pid=hello.pid,
            relay=hello.relay,
        )
        to.apply(Joined(hello.name, slots))

    def _refusal(self, identity: bytes, header: wire.Header, hello: Hello, to: Ledgerward, now: float) -> str:
        """Why this generator cannot serve this run, or nothing."""
        if header.run not in (self.switchboard.run, wire.ANY_RUN):
            return f"this is run {self.welcome.run_id}, the generator served another one; restart it without that state"
        if not 0 < len(hello.name) <= MAX_NAME or not hello.name.isprintable():
            return f"a generator's name has 1 to {MAX_NAME} printable characters, got {hello.name[:MAX_NAME]!r}"
        if hello.name in self.refused:
            return self.refused[hello.name]
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
        self.switchboard.send_to(connection.identity, self.routes.welcome(self.welcome, connection.name))

    def _result(self, connection: Connection, trajectory: Trajectory, to: Ledgerward, now: float) -> bool:
        ref = LeaseRef(trajectory.kind, trajectory.rollout, trajectory.attempt)
        terms = self.ledger.terms(connection.name, ref)
        if terms is None:
            to.apply(Finished(connection.name, ref, version_first=-1))
            if not self.ledger.was_granted(ref):
                self._penalise(connection, "a result without a lease", to)
            return False
        book = self.ledger.book
        problem = problem_of(
            trajectory,
            self.leases.lease(terms),
            generator=connection.name,
            vocab_size=self.vocab_size,
            # Between the end of a step and its announcement a generator may serve the new weights already.
            published=book.version + bool(book.taken),
        )
        if problem is not None:
            to.apply(Finished(connection.name, ref, -1, problem))
            self._penalise(connection, problem, to)
            return False
        to.apply(Finished(connection.name, ref, trajectory.version_first), trajectory)
        connection.rejections = max(0, connection.rejections - 1)
        connection.count_tokens(trajectory.num_response_tokens, now)
        return True

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
        connection.rejections += 1
        if connection.rejections < MAX_REJECTIONS:
            return False
        reason = f"{connection.rejections} rejections, the last one: {problem}"
        self.refused[connection.name] = reason
        self.switchboard.send_to(connection.identity, Bye(reason, finished=False))
        to.apply(Left(connection.name, reason))
        self.switchboard.disconnect(connection)
        return True
