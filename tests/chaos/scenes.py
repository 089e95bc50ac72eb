"""What does not fit into the storm: a launcher that dies, a disk that fills up, a journal whose old files go."""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from orz_async.errors import ExitCode
from tests.chaos.folder import LAUNCHER, LEARNER, Folder, Kill, Process

PATIENCE_S = 180.0


def wait(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.1)
    raise AssertionError(f"{what} did not come true within {PATIENCE_S:g} s")


def ended(folder: Folder, process: Process, *expected: int) -> int:
    code = int(process.popen.wait(PATIENCE_S))
    folder.processes.remove(process)
    assert code in expected, f"{process.name} ended with {code}:\n{folder.log(process.name, 30)}"
    return code


def retention(root: Path, base: Path, _: int, say: Callable[[str], None]) -> Folder:
    """The journal may have 24 kB: old files go, in the middle of which the learner is killed; then it goes on."""
    folder = Folder(
        root / "retention",
        base,
        overrides=("--steps", "60", "--journal.segment-mb", "8", "--journal.max-mb", "24", "--checkpoint.keep", "1"),
        victim=("--kilobytes",),
    )
    with closing(folder):
        learner = folder.learner(die="journal-retention:1")
        address = wait(folder.address, "the learner's address")
        generators = [folder.lean(f"lean-{i}", address, "--delay-s", "0.02", "0.1") for i in range(2)]
        ended(folder, learner, -9)
        folder.kills.append(Kill(LEARNER, "learner", time.time(), "journal-retention"))
        learner = folder.learner(die="journal-segment:3")
        if ended(folder, learner, -9, 0):
            folder.kills.append(Kill(LEARNER, "learner", time.time(), "journal-segment"))
            ended(folder, folder.learner(), 0)
        for generator in generators:
            ended(folder, generator, 0)
    return folder


@contextmanager
def small_disk(folder: Path) -> Iterator[Callable[[], None]]:
    """A disk of 344 kB, and how it becomes larger. Where mounting is not permitted: a limit on the size of files."""
    folder.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=344k", "tmpfs", str(folder)], check=False).returncode
    if mounted:
        raise OSError("mounting a tmpfs is not permitted here")
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True) and None
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def full_disk(root: Path, base: Path, _: int, say: Callable[[str], None]) -> Folder:
    """The journal lies on a small tmpfs: the learner ends with the code for it, and goes on when there is space."""
    folder = Folder(
        root / "full-disk",
        base,
        overrides=("--steps", "80", "--journal.min-free-mb", "300", "--checkpoint.every", "10"),
        victim=("--kilobytes",),
    )
    try:
        disk = small_disk(folder.path / "journal")
        enlarge = disk.__enter__()
    except OSError as error:
        say(f"full disk: {error}; left out (tests/unit/test_journal.py does it with RLIMIT_FSIZE)")
        return retention(root / "instead", base, 0, say)
    try:
        with closing(folder):
            learner = folder.learner()
            address = wait(folder.address, "the learner's address")
            generators = [folder.lean(f"lean-{i}", address, "--delay-s", "0.02", "0.1") for i in range(2)]
            ended(folder, learner, int(ExitCode.DISK))
            said = folder.log("learner", 8)
            assert "free space, then resume" in said, said
            ended(folder, folder.learner(), int(ExitCode.DISK))  # nothing has changed: refused again, at once
            steps = folder.steps()
            enlarge()
            ended(folder, folder.learner(), 0)
            for generator in generators:
                ended(folder, generator, 0)
            say(f"full disk: exit code {int(ExitCode.DISK)} after {steps} steps, and at the next start; then enlarged")
        journal = folder.path / "journal"
        kept = [(path.name, path.read_bytes()) for path in journal.iterdir()]
    finally:
        disk.__exit__(None, None, None)
    for name, data in kept:  # verified after the disk is gone
        (journal / name).write_bytes(data)
    return folder


def family(folder: Folder) -> list[int]:
    """Processes that have this run in their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder.path).encode() in entry.read_bytes() and int(entry.parent.name) != os.getpid():
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return found


def _moved(folder: Folder, process: Process, before: int) -> bool:
    return folder.steps() > before or not process.alive


def launcher(root: Path, base: Path, kills: int, say: Callable[[str], None]) -> Folder:
    """`orz run`, killed with all that it started still at work; the same command continues."""
    folder = Folder(root / "launcher", base, overrides=("--steps", str(6 + 4 * kills), "--generator.count", "1"))
    rng = random.Random(0)
    with closing(folder):
        for kill in range(kills + 1):
            process = folder.start(LAUNCHER, "orz", "orz_async.cli", "run", *folder.settings)
            if kill == kills:
                ended(folder, process, 0)
                break
            wait(partial(_moved, folder, process, folder.steps()), "a step")
            time.sleep(rng.uniform(0.0, 1.0))
            if not process.alive:
                ended(folder, process, 0)
                break
            folder.kill(process)
            wait(lambda: not family(folder), "the end of everything that the killed launcher had started")
            say(f"launcher: killed after {folder.steps()} steps, and nothing outlived it")
    return folder
