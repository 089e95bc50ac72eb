"""One run under all faults at once: generators and learner killed, processes frozen, the wire cut, delayed and flipped.

The storm ends when the learner has died at every named point and enough processes were killed, or when time is up. Then
everything is made whole, the run is given some more steps, and it must finish.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence

from tests.chaos.folder import DAEMON, LEAN, LEARNER, Folder, Kill, Process
from tests.chaos.proxy import FAULTS, Proxy

NUM_LEAN = 5
LIFE_S = 120.0
"""A learner that has not reached its point by then is killed where it is."""
HEARTBEAT_S = 0.2
FINISH_S = 240.0
MORE_STEPS = 12
AT_RANDOM = "at random"


class Storm:
    def __init__(
        self,
        folder: Folder,
        *,
        points: Sequence[str],
        random_deaths: int,
        kills: int,
        seconds: float,
        kill_every_s: float,
        daemons: int,
        seed: int,
        say: Callable[[str], None],
    ) -> None:
        self.folder = folder
        self.rng = random.Random(seed)
        self.plan = [*points, *[AT_RANDOM] * random_deaths]
        self.kills, self.daemons, self.kill_every_s, self.say = kills, daemons, kill_every_s, say
        self.until = time.monotonic() + seconds
        self.frozen: Counter[str] = Counter()
        self.shown_the_door = 0
        self._named = 0
        self._next_kill = self._next_freeze = self._next_fault = self._next_word = time.monotonic() + 2.0
        self._learner: Process | None = None
        self._learner_until = 0.0
        self._fate = Kill(LEARNER, "learner", 0.0)
        self._daemon_kill = time.monotonic() + 25.0
        weights = folder.path / "weights-address"
        self.wire = Proxy(folder.address, seed)
        self.weights = Proxy(lambda: weights.read_text(), seed + 1, rate=0.05)
        folder.victim = (*folder.victim, "--weights-via", f"{weights}@{self.weights.address}")

    # The storm.

    def run(self) -> None:
        try:
            while not self.is_over():
                self.turn()
                time.sleep(0.05)
            self.calm()
        finally:
            self.wire.close()
            self.weights.close()

    def is_over(self) -> bool:
        # The last planned death is over, and not only begun.
        done = not self.plan and (self._learner is None or not self._learner_until)
        return (done and len(self.folder.kills) >= self.kills) or time.monotonic() >= self.until

    def turn(self) -> None:
        now = time.monotonic()
        self.reap()
        self.keep_learner(now)
        self.keep_generators()
        if now >= self._next_kill:
            self._next_kill = now + self.rng.expovariate(1 / self.kill_every_s)
            self.kill_one()
        if now >= self._daemon_kill:
            self._daemon_kill = now + self.rng.uniform(8, 16)
            if known := [d for d in self.folder.those(DAEMON) if d.stopped or self.serves(d)]:
                self.folder.kill(self.rng.choice(known))
        if now >= self._next_freeze:
            self._next_freeze = now + self.rng.uniform(2, 5)
            self.freeze()
        self.wake(now)
        if now >= self._next_fault:
            self._next_fault = now + 3.0
            self.wire.fault = self.rng.choice(["", *FAULTS])
            self.weights.fault = self.rng.choice(["", *FAULTS])
        if now >= self._next_word:
            self._next_word = now + 15.0
            left = f"{len(self.plan)} deaths of the learner to come, {self.until - now:.0f} s at most"
            self.say(f"storm: {len(self.folder.kills)} kills, step {self.folder.steps()}, {left}")

    def reap(self) -> None:
        for process in self.folder.reap():
            if process is self._learner:
                self._learner = None
                if process.popen.returncode == -signal.SIGKILL:
                    self._fate.t = time.time()
                    self.folder.kills.append(self._fate)
                    self.folder.ends[f"{LEARNER} -9"] -= 1
                else:
                    self.say(f"the learner ended with {process.popen.returncode}:\n{self.folder.log('learner')}")
            elif process.popen.returncode == 5:
                self.shown_the_door += 1

    def keep_learner(self, now: float) -> None:
        if self._learner is not None:
            if self._learner_until and now >= self._learner_until:
                learner, self._learner = self._learner, None
                if self._fate.point != AT_RANDOM:
                    self.say(f"{self._fate.point} was not reached in {LIFE_S:g} s")
                self.folder.kill(learner)
            return
        if not self.plan and len(self.folder.kills) >= self.kills:
            return  # it is over
        planned = self.plan.pop(0) if self.plan else ""
        armed = "" if planned == AT_RANDOM else planned
        self._learner = self.folder.learner("--steps", "1000000", die=armed)
        self._fate = Kill(LEARNER, "learner", 0.0, armed.partition(":")[0] or AT_RANDOM)
        life_s = LIFE_S if armed else self.rng.uniform(6.0, 25.0)
        self._learner_until = now + life_s if planned else 0.0

    def keep_generators(self) -> None:
        address = self.folder.address()
        if not address:
            return
        for kind, number in ((LEAN, NUM_LEAN), (DAEMON, self.daemons)):
            while len(self.folder.those(kind)) < number:
                self._named += 1
                # Three of five, and every other daemon, live behind the proxy.
                through = self.wire.address if self._named % 5 < 3 else address
                if kind == DAEMON:
                    self.folder.daemon(f"daemon-{self._named}", through)
                else:
                    self.folder.lean(f"lean-{self._named}", through, *self.poison())

    def poison(self) -> tuple[str, ...]:
        """Every twelfth lean generator returns what nobody may train on."""
        kinds = ("nan-reward", "nan-logprob", "inf-reward", "inf-logprob")
        return ("--poison", kinds[self._named // 12 % 4]) if self._named % 12 == 0 else ()

    def serves(self, process: Process) -> bool:
        """A daemon that has come so far as to have weights: before, little can be lost with it."""
        return any(
            event["kind"] == "weights" and event["t"] > process.born
            for event in self.folder.events(f"generator-{process.name}")
        )

    def kill_one(self) -> None:
        # One that the broker knows: else nothing is lost with it. A frozen one dies too, and its place is taken.
        known = {event["generator"] for event in self.folder.events("broker") if event["kind"] == "joined"}
        lean = self.folder.those(LEAN)
        ripe = [p for p in lean if p.name in known]
        if not ripe and self.rng.random() < 0.5:  # while no learner listens some die on their way to it
            ripe = [p for p in lean if time.time() - p.born > 0.6]
        if ripe:
            self.folder.kill(self.rng.choice(ripe))

    def freeze(self) -> None:
        both = (*self.folder.those(LEAN), *[d for d in self.folder.those(DAEMON) if self.serves(d)])
        awake = [p for p in both if not p.wakes and not p.stopped]
        if not awake or sum(p.stopped for p in self.folder.processes) >= 2:
            return
        process = self.rng.choice(awake)
        span = self.rng.choice(["one heartbeat", "ten heartbeats", "for ever"])
        self.frozen[span] += 1
        os.kill(process.popen.pid, signal.SIGSTOP)
        if span == "for ever":
            process.stopped = True
        else:
            process.wakes = time.monotonic() + HEARTBEAT_S * (1 if span == "one heartbeat" else 10)

    def wake(self, now: float) -> None:
        for process in self.folder.processes:
            if process.wakes and now >= process.wakes and process.alive:
                process.wakes = 0.0
                os.kill(process.popen.pid, signal.SIGCONT)

    # After it.

    def calm(self) -> None:
        """No more faults; the run gets a last life with an end, and has to reach it."""
        self.wire.fault = self.weights.fault = ""
        for process in self.folder.processes:
            if process.alive:
                os.kill(process.popen.pid, signal.SIGCONT)
        for learner in self.folder.those(LEARNER):
            self.folder.kill(learner)
        steps = self.folder.steps() + MORE_STEPS
        self.say(f"calm: the run is to finish at step {steps}")
        learner = self.folder.learner("--steps", str(steps))
        deadline = time.monotonic() + FINISH_S
        while learner.alive and time.monotonic() < deadline:
            for process in self.folder.reap():
                if process is learner:
                    break
            if learner.alive:
                self.keep_generators()
            time.sleep(0.1)
        code = learner.popen.poll()
        assert code == 0, f"the run did not finish ({code}):\n{self.folder.log('learner', 40)}"
        self.leave()

    def leave(self) -> None:
        """Generators were told that the run is complete: those that were not poisoned or refused end by themselves."""
        deadline = time.monotonic() + 20.0
        while self.folder.processes and time.monotonic() < deadline:
            self.folder.reap()
            time.sleep(0.1)
