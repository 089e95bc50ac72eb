"""The list of allowed keys as a running process sees it: read again when it changes."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec

from orz_async.errors import ConfigError
from orz_async.keys.files import Role, read_private

LIST = "allowed.json"
REFRESH_S = 0.5
"""A change of the list takes effect within this time and one heartbeat."""
MAX_KEYS = 4096


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One allowed key. A rotated name has two for a while."""

    name: str
    role: Role
    public: str
    made: str
    """Date and time, UTC."""
    until: float | None = None
    """Unix time at which a rotated key ends."""


class AllowList(msgspec.Struct, frozen=True, kw_only=True):
    layout: int = 1
    members: tuple[Member, ...] = ()


def read_list(folder: Path) -> AllowList:
    """ConfigError if it cannot be understood: then nobody new is let in."""
    path = folder / LIST
    if not path.exists():
        return AllowList()
    try:
        found = msgspec.json.decode(read_private(path), type=AllowList)
    except msgspec.DecodeError as error:
        raise ConfigError(f"expected a list of `orz keys` at {path}, found: {error}") from error
    if found.layout != 1 or len(found.members) > MAX_KEYS:
        raise ConfigError(f"expected layout 1 and at most {MAX_KEYS} keys in {path}; use the release that wrote it")
    return found


class Generators:
    """`key in generators`: allowed, and not only to observe."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster

    def __contains__(self, key: object) -> bool:
        member = self._roster.find(key) if isinstance(key, bytes) else None
        return member is not None and member.role == "generator"


class Roster:
    """Who may enter, by public key. `key in roster` and `find` look at the file again when it has changed.

    A list that cannot be read any more leaves the last good one in force and says so in `problem`: a damaged file must
    neither stop a run nor open it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problem = ""
        self._members: dict[bytes, Member] = {}
        self._stamp: tuple[int, int, int] | None = None
        self._checked = 0.0
        self._load(read_list(folder))
        self._stamp = self._stat()

    def __contains__(self, key: object) -> bool:
        return isinstance(key, bytes) and self.find(key) is not None

    def find(self, key: bytes) -> Member | None:
        """The member with this public key, if it is allowed at this moment."""
        if key not in self._members or time.monotonic() - self._checked >= REFRESH_S:
            self.refresh()  # an unknown key may have been put on the list just now
        member = self._members.get(key)
        if member is None or (member.until is not None and time.time() >= member.until):
            return None
        return member

    def generators(self) -> Generators:
        """The part of the list that may fetch weights."""
        return Generators(self)

    def keys_of(self, name: str) -> list[str]:
        """The public keys that this name may use at this moment."""
        return [key.decode() for key, member in sorted(self._members.items()) if member.name == name and key in self]

    def knows(self, name: str) -> bool:
        """Whether this name has any key that is allowed: if so, a key that ended was rotated, else revoked."""
        return any(member.name == name and self.find(key) is not None for key, member in list(self._members.items()))

    def refresh(self) -> None:
        self._checked = time.monotonic()
        stamp = self._stat()
        if stamp == self._stamp:
            return
        try:
            self._load(read_list(self.folder))
        except (ConfigError, OSError) as error:
            self.problem = str(error)
            return
        self.problem, self._stamp = "", stamp

    def _load(self, found: AllowList) -> None:
        self._members = {member.public.encode(): member for member in found.members}

    def _stat(self) -> tuple[int, int, int] | None:
        try:
            info = (self.folder / LIST).stat()
        except OSError:
            return None
        return info.st_mtime_ns, info.st_ino, info.st_size
