"""Errors a user can act on, each with the exit code its process ends with.

A message has three parts: what was expected, what was found, what to do.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every process of this package. Launchers, Slurm and Kubernetes may rely on them."""

    OK = 0
    INTERNAL = 1  # a bug of ours: the traceback is printed
    CONFIG = 2  # bad option, recipe or TOML file
    DATA = 3  # unreadable or malformed prompts
    MODEL = 4  # unusable model directory or weights
    WIRE = 5  # a peer speaks another protocol version or another run
    PORT = 6  # the address to listen on is taken or refused
    PEER = 7  # a peer stayed away longer than the bound on that wait
    NUMERIC = 8  # a loss, gradient or weight is not finite
    DISK = 9  # no space, or a write failed
    CHECKPOINT = 10  # no checkpoint can be loaded
    ENGINE = 11  # the inference engine died
    BROKEN = 12  # a run does not keep what the ledger promises: orz verify
    MEMORY = 13  # the device has too little memory for a microbatch
    INTERRUPTED = 130  # stopped by a signal before the run was complete, state saved


class OrzError(Exception):
    """Base of all errors that are explained to the user instead of printed as a traceback."""

    exit_code: ExitCode = ExitCode.INTERNAL


class ConfigError(OrzError):
    exit_code = ExitCode.CONFIG


class DataError(OrzError):
    exit_code = ExitCode.DATA


class ModelError(OrzError):
    exit_code = ExitCode.MODEL


class WireError(OrzError):
    exit_code = ExitCode.WIRE


class PortError(OrzError):
    exit_code = ExitCode.PORT


class PeerLostError(OrzError):
    exit_code = ExitCode.PEER


class NumericError(OrzError):
    exit_code = ExitCode.NUMERIC


class DiskError(OrzError):
    exit_code = ExitCode.DISK


class CheckpointError(OrzError):
    exit_code = ExitCode.CHECKPOINT


class EngineError(OrzError):
    exit_code = ExitCode.ENGINE


class BrokenPromiseError(OrzError):
    exit_code = ExitCode.BROKEN


class OutOfMemoryError(OrzError):
    exit_code = ExitCode.MEMORY


class Interrupted(OrzError):
    exit_code = ExitCode.INTERRUPTED
