"""The folder of keys on the learner's machine, and what `orz keys` does to it.

    KEYS/              mode 0700
      server.key       the learner's pair                     all files mode 0600
      allowed.json     who may connect, and as what
      NAME.key         the pair of NAME with the learner's public key: to be moved to the machine that uses it

Changes are serialised by a lock and each file is replaced at once, so a running broker never reads half a change.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from orz_async.errors import ConfigError, DiskError
from orz_async.keys.curve import CurveKeys
from orz_async.keys.files import KeyFile, Role, check_name, new_pair, read_key, refuse_others, write_key, write_private
from orz_async.keys.roster import LIST, MAX_KEYS, AllowList, Member, Roster, read_list

SERVER = "server"
LOCAL = "local"
"""Name of the key that `orz run` gives to the generators of its own machine."""


_LOCK_S = 10.0


class Keyring:
    def __init__(self, folder: Path) -> None:
        """Opens or makes the folder and the learner's pair. ConfigError if others may read what is there."""
        self.folder = folder
        if not folder.exists():
            try:
                folder.mkdir(mode=0o700, parents=True)
                folder.chmod(0o700)
            except OSError as error:
                raise DiskError(f"expected to make the folder of keys {folder}, found: {error.strerror}") from error
        refuse_others(folder)
        with self._locked():
            if not self.path_of(SERVER).exists():
                self._make_server()
        self.server = read_key(self.path_of(SERVER))

    def path_of(self, name: str) -> Path:
        return self.folder / f"{name}.key"

    def server_keys(self) -> tuple[CurveKeys, Roster]:
        """What a learner listens with: its pair, and the live list of who may connect."""
        roster = Roster(self.folder)
        pair = self.server.keys
        return CurveKeys(public=pair.public, secret=pair.secret, allowed=roster), roster

    def new(self, name: str, role: Role) -> Path:
        """Make a pair and allow it. Returns its file."""
        check_name(name)
        with self._locked():
            members = read_list(self.folder).members
            if any(member.name == name for member in members):
                raise ConfigError(f"expected a new name, found a key {name!r} already; revoke or rotate it")
            if len(members) >= MAX_KEYS:
                raise ConfigError(f"expected at most {MAX_KEYS} keys, found {len(members)}; revoke some")
            return self._issue(name, role, members)

    def ensure(self, name: str) -> Path:
        """The file of a generator's key, made if there is none."""
        if not any(member.name == name for member in self.members()) or not self.path_of(name).exists():
            self.revoke(name, missing_ok=True)
            return self.new(name, "generator")
        return self.path_of(name)

    def members(self) -> tuple[Member, ...]:
        return read_list(self.folder).members

    def revoke(self, name: str, *, missing_ok: bool = False) -> None:
        """Take every key of this name off the list; a running broker shuts it out within a second or two."""
        with self._locked():
            members = read_list(self.folder).members
            kept = tuple(member for member in members if member.name != name)
            if len(kept) == len(members) and not missing_ok:
                known = ", ".join(sorted({member.name for member in members})) or "none"
                raise ConfigError(f"expected the name of an allowed key, found {name!r}; there are: {known}")
            self._write(kept)
            self.path_of(check_name(name)).unlink(missing_ok=True)

    def rotate(self, name: str, grace_s: float) -> Path:
        """A new pair under the same name and role. The old one is allowed for `grace_s` more seconds."""
        with self._locked():
            if name == SERVER:
                return self._rotate_server()
            members = read_list(self.folder).members
            held = [member for member in members if member.name == name]
            if not held:
                raise ConfigError(f"expected the name of an allowed key, found {name!r}; see `orz keys list`")
            now = time.time()
            kept = [member for member in members if member.name != name]
            for member in held:
                until = now + grace_s if member.until is None else min(member.until, now + grace_s)
                if until > now:
                    kept.append(msgspec.structs.replace(member, until=until))
            return self._issue(name, held[-1].role, tuple(kept))

    def _issue(self, name: str, role: Role, members: tuple[Member, ...]) -> Path:
        public, secret = new_pair()
        path = self.path_of(name)
        server = read_key(self.path_of(SERVER)).public
        write_key(path, KeyFile(name=name, role=role, public=public, secret=secret, server=server))
        made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._write((*members, Member(name=name, role=role, public=public, made=made)))
        return path

    def _make_server(self) -> Path:
        public, secret = new_pair()
        path = self.path_of(SERVER)
        write_key(path, KeyFile(name=SERVER, role="server", public=public, secret=secret, server=public))
        return path

    def _rotate_server(self) -> Path:
        """A learner that runs keeps the old pair until it is started again; key files made here follow at once."""
        path = self._make_server()
        server = read_key(path).public
        for file in self.folder.glob("*.key"):
            if file != path:
                write_key(file, msgspec.structs.replace(read_key(file), server=server))
        self.server = read_key(path)
        return path

    def _write(self, members: tuple[Member, ...]) -> None:
        now = time.time()
        live = tuple(member for member in members if member.until is None or member.until > now)
        write_private(self.folder / LIST, msgspec.json.format(msgspec.json.encode(AllowList(members=live))) + b"\n")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            until = time.monotonic() + _LOCK_S
            while not _try_lock(descriptor):
                if time.monotonic() > until:
                    raise ConfigError(f"another `orz keys` has {self.folder} for over {_LOCK_S} s; try again")
                time.sleep(0.01)
            yield
        finally:
            os.close(descriptor)


def server_keys(folder: str) -> tuple[CurveKeys | None, Roster | None]:
    """What a learner listens with, by its setting broker.keys; nothing without keys."""
    return Keyring(Path(folder)).server_keys() if folder else (None, None)


def weights_keys(folder: str) -> CurveKeys | None:
    """What a learner offers weights with: generators may read them, observers may not.

    Also makes the key of the generators on this machine, so that it is there before they look for it.
    """
    if not folder:
        return None
    ring = Keyring(Path(folder))
    ring.ensure(LOCAL)
    pair = ring.server.keys
    return CurveKeys(public=pair.public, secret=pair.secret, allowed=Roster(ring.folder).generators())


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
