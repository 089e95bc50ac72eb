"""The edge of every process: typed exits, a stack dump on demand, and no life beyond the launcher's."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import msgspec

from orz_async.errors import ExitCode, OrzError

EXIT_DIR = "ORZ_EXIT_DIR"
"""Environment: where a process leaves <process>.exit.json. torchrun turns every exit code into 1, so the launcher reads
the true one here; a process killed by a signal leaves no record, which is how the two are told apart."""
LAUNCHER = "ORZ_LAUNCHER"
"""Environment: pid of the launcher that must not be outlived."""

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


class ExitRecord(msgspec.Struct, frozen=True):
    """How a process ended, in its own words."""

    process: str
    code: int
    message: str
    """What the user is told; empty after a normal end."""


def die_with_parent() -> None:
    """Ask the kernel to SIGKILL this process when the thread that started it ends. Linux only; elsewhere nothing.

    SIGKILL and not SIGTERM, because an orphan that hangs while it drains would hold the port and the GPU for ever, and
    a killed learner loses nothing that its journal and checkpoints do not hold.
    """
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _bind_to_launcher() -> None:
    # The launcher sets this for its direct children at fork. A torchrun worker is a grandchild: when the launcher dies,
    # torchrun dies, and the worker follows only because it asked for it here.
    launcher = os.environ.get(LAUNCHER, "")
    if launcher.isdigit():
        die_with_parent()
        try:
            os.kill(int(launcher), 0)
        except ProcessLookupError:
            os._exit(ExitCode.INTERRUPTED)  # it died before the request above: nobody is left to tell


def dump_stacks(error: OrzError) -> None:
    """Where a wait was given up, and what every thread did at that moment, into the process's log.

    For ends that nobody at the keyboard has caused: call it before anything is closed.
    """
    print(f"{type(error).__name__}: where it was raised, then what every thread does", file=sys.stderr)
    traceback.print_exception(error)
    sys.stderr.flush()
    with contextlib.suppress(OSError):  # stderr may be closed
        faulthandler.dump_traceback(file=2, all_threads=True)


def explain(process: str, error: OrzError) -> str:
    """The message on stderr: who, which exit code, then what was expected, what was found, what to do."""
    return f"{process}: {type(error).__name__} (exit {int(error.exit_code)})\n  {error}"


def _outcome(fn: Callable[[], int | None], process: str) -> ExitRecord:
    try:
        return ExitRecord(process, int(fn() or 0), "")
    except OrzError as error:
        message, code = explain(process, error), int(error.exit_code)
    except KeyboardInterrupt:
        message, code = f"{process}: interrupted", int(ExitCode.INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output went away (`orz summary RUN | head`). Nothing more can be printed, at exit neither.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitRecord(process, 128 + signal.SIGPIPE, "output closed")
    except SystemExit as error:  # --help and --version of argument parsers
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        return ExitRecord(process, code, "")
    except Exception as error:  # the process edge: a bug of ours becomes exit code 1 with its traceback
        traceback.print_exc()
        message, code = f"{process}: {type(error).__name__}: {error} (a bug; its traceback is above)", 1
    print(message, file=sys.stderr)
    return ExitRecord(process, code, message)


def run_main(fn: Callable[[], int | None], *, process: str) -> NoReturn:
    """Run `fn` as the whole life of this process and exit with its code (None is 0).

    An OrzError is explained on stderr and ends with its own code, Ctrl-C with 130, any other exception with its
    traceback and 1. `kill -USR1 PID` prints the stack of every thread to stderr at any time.
    """
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True, chain=False)
    _bind_to_launcher()
    record = _outcome(fn, process)
    if folder := os.environ.get(EXIT_DIR):
        _write_record(Path(folder), record)
    sys.exit(record.code)


def _write_record(folder: Path, record: ExitRecord) -> None:
    path = folder / f"{record.process}.exit.json"
    fresh = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        fresh.write_bytes(msgspec.json.encode(record))
        fresh.replace(path)
    except OSError as error:  # a full disk must not hide the exit code
        print(f"{record.process}: no exit record written: {error}", file=sys.stderr)


def record_paths(folder: Path, name: str) -> list[Path]:
    """Of the process `name` and of its ranks name-0, name-1, ...; oldest first."""
    paths = [*folder.glob(f"{name}.exit.json"), *folder.glob(f"{name}-[0-9]*.exit.json")]
    return sorted(paths, key=lambda path: path.stat().st_mtime_ns)


def read_records(folder: Path, name: str) -> list[ExitRecord]:
    """How the process `name`, or its ranks, ended; oldest first."""
    found = []
    for path in record_paths(folder, name):
        try:
            found.append(msgspec.json.decode(path.read_bytes(), type=ExitRecord))
        except (OSError, msgspec.DecodeError) as error:
            print(f"unreadable exit record {path.name}: {error}", file=sys.stderr)
    return found
