"""`orz keys`: who may connect to a learner, from which machine, and as what."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from orz_async.errors import ConfigError
from orz_async.keys.ring import Keyring
from orz_async.keys.roster import read_list

DESCRIPTION = """\
Keys that open a run to other machines. A learner with --broker.keys DIR encrypts every connection and lets in whoever
holds a key on the list in DIR; changes take effect while it runs, within two seconds or so.

  orz keys new node1                     make a key; move DIR/node1.key to that machine and start there
                                           python -m orz_async.generator --connect tcp://HOST:PORT --key node1.key
  orz keys new watch --role observer     a key that reads the status of a run and gets no leases and no weights
  orz keys list                          who may connect
  orz keys revoke node1                  shut it out now
  orz keys rotate node1                  a new key under the same name; the old one is good for another --grace-s
  orz keys rotate server                 a new key of the learner, from its next start on; move the files again

Files have mode 0600 in a folder of mode 0700; anything more open is refused.
"""
DEFAULT = "keys"


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        "orz keys", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument(
        "--keys", type=Path, default=Path(DEFAULT), metavar="DIR", help="folder (default: %(default)s)"
    )
    commands = options.add_subparsers(dest="command", metavar="COMMAND", required=True)
    new = commands.add_parser("new", help="make a key and allow it")
    new.add_argument("name", help="letters, digits, _ and -")
    new.add_argument("--role", choices=("generator", "observer"), default="generator", help="(default: %(default)s)")
    commands.add_parser("list", help="who may connect")
    revoke = commands.add_parser("revoke", help="take a key off the list and shut it out")
    revoke.add_argument("name")
    rotate = commands.add_parser("rotate", help="replace a key without stopping the run")
    rotate.add_argument("name", help="of a key, or `server` for that of the learner")
    rotate.add_argument(
        "--grace-s", type=float, default=86_400.0, help="seconds the old key is still good (default: a day)"
    )
    return options


def run(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    if options.command == "list":
        return _list(options.keys)
    if options.command != "new" and not options.keys.is_dir():
        raise ConfigError(f"expected a folder of keys, found no {options.keys}; name it with --keys DIR")
    ring = Keyring(options.keys)
    if options.command == "new":
        path = ring.new(options.name, options.role)
        print(f"{path}: a key for {options.name} ({options.role}); move it to the machine that uses it, mode 0600")
        print(f"the learner takes it with --broker.keys {options.keys}")
    elif options.command == "revoke":
        ring.revoke(options.name)
        print(f"{options.name} is off the list; a running learner shuts it out within two seconds or so")
    else:
        if options.grace_s < 0:
            raise ConfigError(f"expected --grace-s of at least 0, found {options.grace_s}")
        path = ring.rotate(options.name, options.grace_s)
        if options.name == "server":
            print(f"{path}: a new key of the learner, used from its next start on; move the key files here once more")
        else:
            print(f"{path}: a new key for {options.name}; the old one is good for {options.grace_s:g} s more")
    return 0


def _list(folder: Path) -> int:
    if not folder.is_dir():
        raise ConfigError(f"expected a folder of keys, found no {folder}; make a key with `orz keys new NAME`")
    members = read_list(folder).members
    print(f"{'name':<32} {'role':<10} {'made':<20} {'public key':<40} ends")
    for member in sorted(members, key=lambda member: (member.name, member.made)):
        left = "" if member.until is None else f"in {max(0.0, member.until - time.time()):,.0f} s"
        print(f"{member.name:<32} {member.role:<10} {member.made:<20} {member.public:<40} {left}".rstrip())
    return 0
