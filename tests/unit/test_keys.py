"""Keys on disk: closed to others, replaced at once, and a list that a running process follows."""

from __future__ import annotations

import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orz_async import cli_keys
from orz_async.broker.client import weights_at
from orz_async.errors import ConfigError
from orz_async.generator.__main__ import key_of, name_with_key, parser
from orz_async.keys import roster as rosters
from orz_async.keys.files import read_key
from orz_async.keys.ring import LOCAL, Keyring, weights_keys
from orz_async.keys.roster import Roster, read_list


@pytest.fixture
def ring(tmp_path: Path) -> Keyring:
    return Keyring(tmp_path / "keys")


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(rosters, "REFRESH_S", 0.0)
    yield


def test_files_are_closed_to_others_and_whole(ring: Keyring) -> None:
    path = ring.new("node1", "generator")
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (ring.folder, *ring.folder.iterdir())}
    assert modes.pop("keys") == 0o700
    assert modes == dict.fromkeys(("server.key", "allowed.json", "node1.key", "lock"), 0o600)
    key = read_key(path)
    assert key.server == read_key(ring.path_of("server")).public and key.secret not in repr(key.keys)
    assert key.public.encode() in Roster(ring.folder)


@pytest.mark.parametrize("name", ["server.key", "node1.key", "allowed.json", ""])
def test_what_others_may_read_is_refused(ring: Keyring, name: str) -> None:
    ring.new("node1", "generator")
    (ring.folder / name).chmod(0o750 if not name else 0o640)
    with pytest.raises(ConfigError, match=f"closed to other users, found mode {'750' if not name else '640'}; chmod"):
        Keyring(ring.folder)
        read_list(ring.folder)
        read_key(ring.folder / name)


@pytest.mark.parametrize("name", ["", "server", "a b", "../a", "a.b", "x" * 33])
def test_bad_names(ring: Keyring, name: str) -> None:
    with pytest.raises(ConfigError, match="expected a name of 1 to 32"):
        ring.new(name, "generator")


def test_a_name_is_given_once(ring: Keyring) -> None:
    ring.new("a", "generator")
    with pytest.raises(ConfigError, match="found a key 'a' already"):
        ring.new("a", "observer")


def test_a_running_roster_follows_the_list(ring: Keyring) -> None:
    roster = Roster(ring.folder)
    a = read_key(ring.new("a", "generator")).public.encode()
    b = read_key(ring.new("b", "observer")).public.encode()
    assert a in roster and b in roster
    assert a in roster.generators() and b not in roster.generators()
    ring.revoke("a")
    assert a not in roster and b in roster and not roster.knows("a")
    assert not ring.path_of("a").exists()
    with pytest.raises(ConfigError, match=r"found 'a'; there are: b"):
        ring.revoke("a")


def test_a_damaged_list_neither_opens_nor_stops_a_run(ring: Keyring) -> None:
    a = read_key(ring.new("a", "generator")).public.encode()
    roster = Roster(ring.folder)
    whole = (ring.folder / "allowed.json").read_bytes()
    (ring.folder / "allowed.json").write_bytes(whole[:-20])
    assert a in roster and "expected a list of `orz keys`" in roster.problem
    with pytest.raises(ConfigError, match="expected a list"):
        Roster(ring.folder)
    (ring.folder / "allowed.json").write_bytes(whole)
    assert a in roster and not roster.problem


def test_rotation_overlaps_and_ends(ring: Keyring) -> None:
    old = read_key(ring.new("a", "generator")).public.encode()
    roster = Roster(ring.folder)
    new = read_key(ring.rotate("a", 3600)).public.encode()
    assert old != new and old in roster and new in roster
    newest = read_key(ring.rotate("a", 0.2)).public.encode()
    assert newest in roster
    end = time.monotonic() + 10
    while old in roster or new in roster:
        assert time.monotonic() < end
        time.sleep(0.02)
    assert newest in roster and roster.knows("a")
    ring.new("b", "generator")  # any change forgets what has ended
    assert [member.name for member in ring.members()] == ["a", "b"]


def test_rotating_the_learners_key_renews_the_files_here(ring: Keyring) -> None:
    path = ring.new("a", "generator")
    before = read_key(path)
    ring.rotate("server", 0)
    after = read_key(path)
    assert after.server == ring.server.public != before.server
    assert after.public == before.public


def test_the_machine_of_the_learner_gets_a_key_by_itself(tmp_path: Path) -> None:
    assert weights_keys("") is None
    folder = tmp_path / "keys"
    keys = weights_keys(str(folder))
    assert keys is not None
    local = read_key(folder / f"{LOCAL}.key")
    assert local.public.encode() in keys.allowed
    weights_keys(str(folder))
    assert read_key(folder / f"{LOCAL}.key") == local
    (tmp_path / "config.toml").write_text(f'[broker]\nkeys = "{folder}"\n')
    assert key_of(parser().parse_args(["--run-dir", str(tmp_path)])) == folder / f"{LOCAL}.key"
    assert key_of(parser().parse_args(["--connect", "tcp://h:1"])) is None
    assert name_with_key("g0", local) == "local.g0"
    assert name_with_key("local", local) == "local" and name_with_key("g0", None) == "g0"


def test_weights_of_a_learner_on_every_interface() -> None:
    assert weights_at("tcp://0.0.0.0:7", "tcp://head:5") == "tcp://head:7"
    assert weights_at("tcp://10.0.0.1:7", "tcp://head:5") == "tcp://10.0.0.1:7"
    assert weights_at("file:///x", "tcp://head:5") == "file:///x"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "k")
    with pytest.raises(ConfigError, match="found no"):
        cli_keys.run(["--keys", folder, "list"])
    cli_keys.run(["--keys", folder, "new", "node1"])
    cli_keys.run(["--keys", folder, "new", "watch", "--role", "observer"])
    cli_keys.run(["--keys", folder, "rotate", "node1", "--grace-s", "60"])
    cli_keys.run(["--keys", folder, "revoke", "watch"])
    capsys.readouterr()
    cli_keys.run(["--keys", folder, "list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["node1", "generator"]] * 2
    assert lines[1].endswith(" s") and not lines[2].endswith(" s")
    with pytest.raises(ConfigError, match="grace-s of at least 0"):
        cli_keys.run(["--keys", folder, "rotate", "node1", "--grace-s", "-1"])
