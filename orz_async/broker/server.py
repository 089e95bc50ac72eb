"""Broker: what the learner calls. Its thread owns the sockets and the ledger; calls are handed over and waited for."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import zmq

from orz_async.broker.journal import Journal
from orz_async.broker.leases import LeaseMaker, PromptSource, ledger_config
from orz_async.broker.ledger import Ledger
from orz_async.broker.messages import Welcome
from orz_async.broker.outbox import Outbox
from orz_async.broker.reception import Reception
from orz_async.broker.recovery import Recovered, ResumePoint, recover
from orz_async.broker.service import Service
from orz_async.broker.shelf import Shelf
from orz_async.broker.switchboard import Switchboard, check_bind
from orz_async.broker.wire import run_hash
from orz_async.config import Config
from orz_async.errors import ConfigError, DiskError, PeerLostError, PortError
from orz_async.keys.ring import server_keys
from orz_async.observe.events import EventLog
from orz_async.records import Prompt, Trajectory

__all__ = ["Broker", "PromptSource", "ResumePoint"]

T = TypeVar("T")

_CALL_S = 300.0
"""Patience with the broker's own thread: it answers in milliseconds, unless its disk hangs."""


class _ClosedError(RuntimeError):
    """A call to a broker that does not run."""


class Broker:
    """Lends rollouts to generators and hands complete batches to the learner.

    The order of calls in a step t: take(t), train, evaluate(t + 1) if due, published(t + 1). Evaluations asked for
    before the publication are lent before the training rollouts that it admits.
    """

    def __init__(
        self,
        *,
        config: Config,
        run_dir: Path,
        run_id: str,
        epoch: int,
        prompts: PromptSource,
        heldout: list[Prompt],
        weights_address: str,
        model_path: str,
        vocab_size: int,
        events: EventLog,
        start: ResumePoint | None,
    ) -> None:
        check_bind(config.broker.bind, keyed=bool(config.broker.keys))
        self._config = config
        self._run_dir = run_dir
        self._run_id = run_id
        self._epoch = epoch
        self._vocab_size = vocab_size
        self._events = events
        self._start = start
        self._leases = LeaseMaker(config, prompts, heldout)
        self._ledger_config = ledger_config(config, len(heldout))
        self._welcome = Welcome(
            run_id=run_id,
            model_path=model_path,
            stop=config.sampling.stop,
            weights_address=weights_address,
            version=-1,
            heartbeat_s=config.broker.heartbeat_s,
            max_model_tokens=config.data.max_prompt_tokens + config.sampling.max_new_tokens,
            deadline_s=config.weights.deadline_s,
        )
        self.address = ""
        """Where generators connect, once started."""
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        """Of the inbox: a call and its wakeup belong together."""
        self._closed = True
        self._failure: BaseException | None = None

    def start(self) -> None:
        """Recover, bind and begin to serve. PortError if the address is taken, DiskError if the journal is unusable."""
        recovered = self._recover()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            keys, self._roster = server_keys(self._config.broker.keys)
            switchboard = Switchboard(self._context, self._run_id, self._epoch, self._welcome.max_model_tokens, keys)
            last = self._run_dir / "address"
            self.address = switchboard.bind(self._config.broker.bind, last.read_text() if last.is_file() else "")
        except (PortError, ConfigError):
            self._context.term()
            self._journal.close()
            raise
        self._service = self._assemble(switchboard, recovered)
        self._bell = self._context.socket(zmq.PAIR)
        self._bell.bind("inproc://inbox")
        self._thread = threading.Thread(target=self._serve, name="broker", daemon=True)
        self._closed = False
        self._thread.start()

    def _assemble(self, switchboard: Switchboard, recovered: Recovered) -> Service:
        ledger = Ledger(self._ledger_config, self._leases.prompt_id, recovered.book)
        reception = Reception(
            ledger,
            self._leases,
            switchboard,
            self._events,
            vocab_size=self._vocab_size,
            welcome=self._welcome,
            roster=self._roster,
        )
        outbox = Outbox(switchboard, self._leases, self._journal)
        return Service(ledger, switchboard, reception, outbox, Shelf(recovered.stored), self._events)

    def _recover(self) -> Recovered:
        """The ledger of the last process, if there was one; its end is written down before anything else happens."""
        folder = self._run_dir / "journal"
        recovered = recover(folder, self._start, self._epoch, self._ledger_config, self._leases.prompt_id)
        self._journal = Journal(folder, run_hash(self._run_id), self._config.journal)
        self._journal.open(recovered.next_record, keep_from=recovered.oldest_record)
        self._journal.append(recovered.restarted)
        self._journal.write(time.monotonic())
        for rollout, cause in recovered.ended:
            self._events.emit("expired", lease=rollout.ref, generator=rollout.generator, cause=cause)
        return recovered

    def _serve(self) -> None:
        wakeup = self._context.socket(zmq.PAIR)
        wakeup.connect("inproc://inbox")
        try:
            self._service.run(wakeup)
        except BaseException as error:
            # The thread's edge: the error continues in the learner's thread, at its next call or the one it waits in.
            self._failure = error
        finally:
            with self._lock:
                self._closed = True
            self._service.fail(self._failure or _ClosedError("the broker is closed"))
            wakeup.close(0)
            self._service.switchboard.close()
            try:
                self._journal.close()
            except DiskError as error:
                self._failure = self._failure or error

    def _call(self, function: Callable[[], T]) -> T:
        answer: Future[Any] = Future()
        with self._lock:
            if self._closed:
                raise self._failure or _ClosedError("the broker is not running")
            self._service.inbox.put((function, answer))
            self._bell.send(b"")
        try:
            result: T = answer.result(timeout=_CALL_S)
        except TimeoutError:
            raise DiskError(
                f"expected the broker's thread to answer, found it busy for {_CALL_S:g} s; is the disk of "
                f"{self._run_dir}/journal still there? Resume when it is"
            ) from None
        return result

    def take(self, step: int) -> list[Trajectory]:
        """The B rollouts of this step, by number. Waits as long as generators make progress, else PeerLostError."""
        delivery = self._call(lambda: self._service.take(step))
        patience = self._config.broker.wait_generators_s
        while True:
            quiet = time.monotonic() - self._service.last_progress
            try:
                batch = delivery.result(timeout=max(patience - quiet, 0.0) + 0.01)
                break
            except TimeoutError:
                if time.monotonic() - self._service.last_progress >= patience:
                    raise PeerLostError(
                        f"expected rollouts within broker.wait_generators_s = {patience} s, found: "
                        f"{self.waiting_for()}; start generators with --connect {self.address}"
                    ) from None
        _check_lag(batch, step, self._config.broker.max_lag)
        return sorted(batch, key=lambda trajectory: trajectory.rollout)

    def published(self, version: int, digest: str = "") -> None:
        """Generators can fetch this version, which has this digest; the slots of the step that made it are free."""
        self._call(lambda: self._service.publish(version, digest))

    def evaluate(self, version: int) -> None:
        """Have the held-out prompts sampled by this version or a newer one. Call it before published(version)."""
        self._call(lambda: self._service.evaluate(version))

    def evaluation_ready(self, version: int) -> bool:
        return self._call(lambda: self._service.evaluation_complete(version))

    def evaluation(self, version: int, timeout_s: float) -> list[Trajectory]:
        """The trajectories of an evaluation, once; PeerLostError if they do not come in time."""
        finished = self._call(lambda: self._service.expect_evaluation(version))
        try:
            return finished.result(timeout=timeout_s)
        except TimeoutError:
            raise PeerLostError(
                f"expected the evaluation of version {version} within {timeout_s} s; "
                f"found {self._call(lambda: self._service.evaluation_line(version))}"
            ) from None

    def snapshot(self) -> bytes:
        """The ledger as it is, for the checkpoint with the weights of the present version."""
        return self._call(self._service.snapshot)

    def tighten(self, by: int) -> None:
        """Grant new rollouts as if max_lag were this much smaller. What was granted before keeps its own bound."""
        self._call(lambda: self._service.tighten(by))

    def checkpointed(self, oldest_version: int) -> None:
        """A checkpoint is committed and older ones are pruned; the oldest one kept has weights of this version.

        Journal files that no checkpoint needs may be deleted from now on if journal.max_mb is exceeded.
        """
        self._call(lambda: self._service.checkpointed(oldest_version))

    def funnel(self) -> dict[str, object]:
        return self._call(self._service.ledger.book.counts.funnel)

    def waiting_for(self) -> str:
        """What a blocked take() waits for, from whom, since when."""
        return self._call(self._service.waiting_for)

    def generators(self) -> list[dict[str, object]]:
        """Name, engine, slots, version, outstanding, tokens_s and silent_s of each connected generator."""
        return self._call(self._service.generators)

    def close(self, finished: bool, reason: str) -> None:
        """Say goodbye to every generator (finished: the run is complete) and end. A second call does nothing."""
        if self._thread is None:
            return
        try:
            if not self._closed:
                with contextlib.suppress(_ClosedError):  # its thread may end by itself in between
                    self._call(lambda: self._service.stop(finished, reason))
        finally:
            self._thread.join(timeout=_CALL_S)
            hangs, self._thread = self._thread.is_alive(), None
            if not hangs:  # else its sockets are still open, and ending the context would wait for them for ever
                self._bell.close(0)
                self._context.term()


def _check_lag(batch: list[Trajectory], step: int, max_lag: int) -> None:
    """The ledger's arithmetic promises this; a batch beyond the bound is a bug, never something to filter."""
    for trajectory in batch:
        lag = step - trajectory.version_first
        if lag > max_lag:
            raise RuntimeError(
                f"stale batch: rollout {trajectory.rollout} has tokens of version {trajectory.version_first}, "
                f"lag {lag} at step {step}, the bound is {max_lag}"
            )
