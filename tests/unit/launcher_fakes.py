"""Small stand-ins for torchrun, learner and generator, and a launcher around them: real processes, real signals.

`python launcher_fakes.py ROLE RUN_DIR [...]` is one of them. A behaviour is a word; see the functions.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from orz_async.errors import ConfigError, Interrupted, NumericError
from orz_async.observe.events import EventLog
from orz_async.observe.process import run_main

asked: list[int] = []


def lives(run: Path, name: str) -> int:
    """How often this process was started, this time included."""
    with (run / f"lives-{name}").open("a+") as file:
        file.write("x")
        file.flush()
        return file.tell()


def wait(condition: str, path: Path | None = None) -> None:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        if path is not None and path.exists():
            return
        if asked:  # as the learner does: a wait ends with a signal, a step does not
            if path is not None:
                raise Interrupted("saved")
            return
        time.sleep(0.01)
    raise TimeoutError(condition)


def listen(run: Path) -> None:
    fresh = run / "address.tmp"
    fresh.write_text(f"tcp://127.0.0.1:{os.getpid()}")
    fresh.replace(run / "address")


def learner(run: Path, behaviour: str) -> int:
    """finish | freeze-once | typed | bug | die-once | die-then-typed | die-always | die-stepping | drain | stubborn |
    stubborn-with-helper | early-typed"""
    life = lives(run, "learner")
    if behaviour == "early-typed":
        raise ConfigError("expected a model, found none; run `orz make-base`")
    events = EventLog(run / "events" / "learner-0.jsonl", "learner-0")
    events.emit("run", run_id="r", resumed_step=life - 1, epoch=life)
    listen(run)
    wait("a generator", run / "working-g0")
    if behaviour == "freeze-once" and life == 1:
        (run / "working-g0").unlink()
        os.kill(os.getpid(), signal.SIGSTOP)
    if behaviour == "typed" or (behaviour == "die-then-typed" and life == 2):
        raise NumericError("expected a finite loss, found nan; lower learner.lr")
    if behaviour == "bug":
        raise ZeroDivisionError("a mistake of ours")
    if behaviour == "die-stepping":
        events.emit("step", step=life - 1, version=life, tokens_trained=1)
    if behaviour in ("die-always", "die-stepping") or (behaviour in ("die-once", "die-then-typed") and life == 1):
        if behaviour in ("die-once", "die-then-typed"):
            (run / "working-g0").unlink()  # the next life waits for a generator that found it
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "drain" or behaviour.startswith("stubborn"):
        (run / "learner-waits").touch()
        wait("a signal to drain")
        while behaviour.startswith("stubborn"):
            time.sleep(1)
        time.sleep(0.3)
        (run / "saved").touch()
        raise Interrupted("saved")
    events.emit("step", step=life - 1, version=life, tokens_trained=1)
    return 0


def generator(run: Path, behaviour: str, name: str) -> int:
    """serve | die-once | die-always | refuse | leave | stubborn"""
    life = lives(run, name)
    if behaviour == "refuse":
        raise ConfigError("expected a model, found none; run `orz make-base`")
    if behaviour == "die-always" or (behaviour == "die-once" and life == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    wait("an address", run / "address")
    (run / f"address-{name}").write_text((run / "address").read_text())
    (run / f"working-{name}").touch()
    if behaviour == "leave":
        return 0
    wait("a signal to leave")
    while behaviour == "stubborn":
        time.sleep(1)
    (run / f"left-{name}").touch()
    return 0


def torchrun(arguments: list[str]) -> int:
    """A parent between launcher and learner: the worker in a session of its own, exit code 1 for every failure."""
    if "stubborn-with-helper" in arguments:  # it asked nobody to end it, like a worker that still imports torch
        sleep = [sys.executable, "-c", "import time; time.sleep(60)", "helper", *arguments]
        subprocess.Popen(sleep, start_new_session=True)
    worker = subprocess.Popen([sys.executable, __file__, "learner", *arguments], start_new_session=True)
    code = worker.wait()
    if code:
        print(f"E0101 00:00:00.0 1 torch/distributed/elastic/x.py] failed\nRoot Cause\n  exitcode  : {code} (pid: 1)")
    return int(code != 0)


def launcher(run: Path, learner_is: str, generator_is: str, count: int, limits: str) -> int:
    """Supervise the fakes; prints `outcome CODE MESSAGE` at the end."""
    import msgspec

    from orz_async.config import Config
    from orz_async.launcher.commands import Command, Commands
    from orz_async.launcher.limits import Limits
    from orz_async.launcher.supervisor import Supervisor
    from orz_async.observe.live import View

    class Watched(View):
        """Reads the events at every look, not only when it shows something."""

        def update(self, *, force: bool = False) -> None:
            self.read()
            super().update(force=force)

    (run / "events").mkdir(parents=True, exist_ok=True)
    me = [sys.executable, __file__]
    if learner_is.startswith("real-torchrun-"):
        learner_is = learner_is.removeprefix("real-torchrun-")
        argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", __file__]
        argv += ["learner", str(run), learner_is]
    else:
        argv = [*me, "torchrun", str(run), learner_is]
    env = {"OMP_NUM_THREADS": "1"}
    generators = tuple(
        Command(f"generator-g{i}", (*me, "generator", str(run), generator_is, f"g{i}"), env) for i in range(count)
    )
    commands = Commands(Command("learner", tuple(argv), env), 1, generators)
    supervisor = Supervisor(commands, run, Watched(run, Config()), msgspec.json.decode(limits, type=Limits))
    outcome = supervisor.run()
    print(f"outcome {outcome.code} {outcome.message}", flush=True)
    return outcome.code


def main() -> int:
    role, run, *rest = sys.argv[1:]
    if role == "launcher":
        return launcher(Path(run), rest[0], rest[1], int(rest[2]), rest[3])
    if role == "torchrun":
        return torchrun([run, *rest])

    def ask(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    signal.signal(signal.SIGTERM, ask)
    return learner(Path(run), rest[0]) if role == "learner" else generator(Path(run), rest[0], rest[1])


if __name__ == "__main__":
    role = sys.argv[1]
    if role == "torchrun":
        sys.exit(main())
    name = {"learner": "learner-0", "launcher": "launcher"}.get(role, f"generator-{sys.argv[-1]}")
    run_main(main, process=name)
