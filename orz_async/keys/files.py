"""A key pair as a file that nobody but its owner can read."""

from __future__ import annotations

import os
import re
import secrets
import stat
from pathlib import Path
from typing import Literal

import msgspec
import zmq

from orz_async.errors import ConfigError, DiskError
from orz_async.keys.curve import CurveKeys

Role = Literal["generator", "observer"]
"""generator: gets leases and weights. observer: reads the status of a run and nothing else."""

_NAME = re.compile(r"[A-Za-z0-9_-]{1,32}")
_MAX_FILE = 1 << 20


class KeyFile(msgspec.Struct, frozen=True, kw_only=True):
    """What `NAME.key` and `server.key` hold. Keys are Z85 text (RFC 32)."""

    name: str
    role: Role | Literal["server"]
    public: str
    secret: str
    server: str
    """Public key of the learner that the pair is for; of a server key its own."""

    @property
    def keys(self) -> CurveKeys:
        return CurveKeys(public=self.public.encode(), secret=self.secret.encode(), server=self.server.encode())


def check_name(name: str) -> str:
    if not _NAME.fullmatch(name) or name == "server":
        raise ConfigError(
            f"expected a name of 1 to 32 letters, digits, _ or - for a key, found {name!r}; "
            "a daemon may add a suffix to it with --name NAME.SUFFIX, and `server` is the learner's own"
        )
    return name


def new_pair() -> tuple[str, str]:
    """(public, secret)."""
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


def refuse_others(path: Path) -> None:
    """ConfigError unless the file or folder is ours and closed to everybody else."""
    try:
        info = path.stat()
    except OSError as error:
        raise ConfigError(f"expected a key at {path}, found: {error.strerror}; make one with `orz keys new`") from error
    mode = "700" if stat.S_ISDIR(info.st_mode) else "600"
    if info.st_uid != os.geteuid():
        raise ConfigError(f"expected {path} to belong to the user who runs this, found user id {info.st_uid}")
    if info.st_mode & 0o077:
        raise ConfigError(
            f"expected {path} to be closed to other users, found mode {stat.S_IMODE(info.st_mode):o}; "
            f"chmod {mode} {path}, and make new keys if somebody may have read it"
        )


def read_private(path: Path) -> bytes:
    """The bytes of a file that only we can read."""
    refuse_others(path)
    with path.open("rb") as file:
        data = file.read(_MAX_FILE + 1)
    if len(data) > _MAX_FILE:
        raise ConfigError(f"expected at most {_MAX_FILE} bytes in {path}; it is not a file of `orz keys`")
    return data


def read_key(path: Path) -> KeyFile:
    data = read_private(path)
    try:
        key = msgspec.json.decode(data, type=KeyFile)
    except msgspec.DecodeError as error:
        raise ConfigError(f"expected a key file of `orz keys new` at {path}, found: {error}") from error
    for text in (key.public, key.secret, key.server):
        if len(text) != 40 or not text.isascii():
            raise ConfigError(f"expected keys of 40 characters in {path}; make it anew with `orz keys rotate`")
    return key


def write_private(path: Path, data: bytes) -> None:
    """Replace the file at once: whoever reads it sees the old or the new one, whole, and it is never open to others."""
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)
        except OSError:
            fresh.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise DiskError(f"expected to write {path}, found: {error.strerror}; nothing was changed") from error


def write_key(path: Path, key: KeyFile) -> None:
    write_private(path, msgspec.json.format(msgspec.json.encode(key)) + b"\n")
