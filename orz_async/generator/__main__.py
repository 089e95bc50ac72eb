"""`python -m orz_async.generator`: one generator daemon."""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import socket
import sys
import time
import tomllib
from functools import partial
from pathlib import Path

from orz_async.broker.client import BrokerClient
from orz_async.broker.messages import Hello
from orz_async.config import GeneratorConfig
from orz_async.errors import ConfigError, ModelError, PeerLostError
from orz_async.generator.daemon import Daemon
from orz_async.generator.ports import GradeKey
from orz_async.generator.serving import make_serving, preload
from orz_async.generator.vllm_options import parse_options
from orz_async.generator.vllm_shim import require_vllm
from orz_async.keys.curve import Admitted, CurveKeys
from orz_async.keys.files import KeyFile, new_pair, read_key
from orz_async.keys.ring import LOCAL
from orz_async.observe.events import EventLog
from orz_async.observe.process import run_main
from orz_async.reward.pool import GraderPool
from orz_async.weights import transport
from orz_async.weights.address import join_key

DESCRIPTION = """\
A generator daemon: samples rollouts for a learner and scores them. Start as many as you like, on any machine that
reaches the learner, at any time; stop them at any time.

  python -m orz_async.generator --connect tcp://127.0.0.1:5555   a learner that says it listens there
  python -m orz_async.generator --run-dir runs/tiny_cpu          a learner on this machine, by the folder of its run
  python -m orz_async.generator --connect tcp://HOST:5555 --key node1.key       a learner on another machine

It fetches the weights from the learner, takes new ones between two tokens, keeps each result until the learner has
stored it, and reconnects by itself when the learner is restarted.
"""
EPILOG = """\
SIGTERM or Ctrl-C: takes no more leases, finishes what runs (at most --drain-s), hands back the rest, exits 0.
A second one hands back everything at once and exits 130. SIGUSR1 prints what every thread does.

exit codes: 0 the run is complete, or drained; 2 a bad option; 4 an unusable model; 5 refused by the learner;
7 the learner stayed away longer than --reconnect-s; 11 the engine failed; 130 stopped before it was done
"""


def parser() -> argparse.ArgumentParser:
    defaults = GeneratorConfig()
    options = argparse.ArgumentParser(
        prog="python -m orz_async.generator",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    where = options.add_argument_group("which learner")
    where.add_argument("--connect", metavar="ADDRESS", help="tcp://HOST:PORT of the learner; default: RUN_DIR/address")
    where.add_argument("--run-dir", metavar="DIR", help="folder of the run: this daemon's event log goes to DIR/events")
    where.add_argument(
        "--key",
        type=Path,
        metavar="FILE",
        help="NAME.key of `orz keys new`, moved here from the learner; default with --run-dir: the key of this machine",
    )
    where.add_argument("--name", help="unique among the learner's generators; default: a random one")
    where.add_argument(
        "--relay",
        metavar="ADDRESS",
        default="",
        help="pass the weights on to other generators from here, tcp://HOST:PORT; port 0 takes a free one",
    )
    where.add_argument(
        "--reconnect-s", type=float, default=defaults.reconnect_s, help="wait so long for a learner (%(default)s)"
    )
    work = options.add_argument_group("how much at once")
    work.add_argument("--slots", type=int, default=defaults.slots, help="sequences sampled at once (%(default)s)")
    work.add_argument(
        "--queue",
        type=int,
        default=defaults.queue,
        help="leases held beyond the slots, so that a freed slot never waits for the network (%(default)s)",
    )
    work.add_argument(
        "--verifiers", type=int, default=defaults.verifiers, help="answer-comparing processes (%(default)s)"
    )
    work.add_argument("--drain-s", type=float, default=30.0, help="time to finish rollouts after SIGTERM (%(default)s)")
    engine = options.add_argument_group("the engine")
    engine.add_argument("--engine", choices=("transformers", "vllm"), default=defaults.engine, help="(%(default)s)")
    engine.add_argument(
        "--model",
        metavar="DIR",
        help="model directory, if the learner's path means nothing here; its values are replaced",
    )
    engine.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (%(default)s)")
    engine.add_argument("--dtype", default="auto", help="before the learner's weights decide it (%(default)s)")
    engine.add_argument("--threads", type=int, default=defaults.threads, help="CPU threads (%(default)s)")
    engine.add_argument("--prefill-tokens", type=int, default=8192, help="prompt tokens of one forward (%(default)s)")
    engine.add_argument(
        "--keep-kv",
        action="store_true",
        help="keep keys and values of older weights after an update instead of computing them anew",
    )
    options.add_argument("--dry-run", action="store_true", help="check the options, say what they mean, start nothing")
    _add_vllm(options, defaults)
    return options


def _add_vllm(options: argparse.ArgumentParser, defaults: GeneratorConfig) -> None:
    vllm = options.add_argument_group(
        "vLLM only", "It needs an environment of its own: `make vllm-dev` (CPU), or the extra orz_async[vllm] (GPU)."
    )
    vllm.add_argument("--tensor-parallel", type=int, default=1, help="devices that share each layer (%(default)s)")
    vllm.add_argument("--data-parallel", type=int, default=1, help="copies of the model in this daemon (%(default)s)")
    vllm.add_argument("--kv-gb", type=float, default=defaults.kv_gb, help="GiB for the KV cache on CPU (%(default)s)")
    vllm.add_argument(
        "--vllm",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="another engine argument of vLLM, e.g. gpu_memory_utilization=0.8; may be repeated. What would bias the "
        "samples (top_p, quantization, ...) is refused",
    )


def settings_of(options: argparse.Namespace) -> GeneratorConfig:
    """The options, checked by the rules of the configuration."""
    for name in ("threads", "verifiers", "prefill_tokens"):
        if getattr(options, name) < 1:
            raise ConfigError(f"expected --{name.replace('_', '-')} of at least 1, found {getattr(options, name)}")
    return GeneratorConfig(
        engine=options.engine,
        slots=options.slots,
        queue=options.queue,
        threads=options.threads,
        keep_kv=options.keep_kv,
        tensor_parallel=options.tensor_parallel,
        data_parallel=options.data_parallel,
        kv_gb=options.kv_gb,
        vllm=tuple(options.vllm),
        verifiers=options.verifiers,
        reconnect_s=options.reconnect_s,
    )


def address_of(options: argparse.Namespace) -> str:
    """--connect, or what the learner writes to RUN_DIR/address once it listens."""
    if options.connect:
        if not re.fullmatch(r"[a-z]+://\S+", options.connect):
            raise ConfigError(f"expected --connect tcp://HOST:PORT, found {options.connect!r}")
        return str(options.connect)
    if not options.run_dir:
        raise ConfigError("expected --connect tcp://HOST:PORT or --run-dir DIR, found neither; the learner prints both")
    path = Path(options.run_dir) / "address"
    deadline = time.monotonic() + options.reconnect_s
    if not path.is_file():
        print(f"waiting for a learner to write {path}, {options.reconnect_s:g} s at most", file=sys.stderr)
        preload(options.engine)
    while not path.is_file():
        if time.monotonic() > deadline:
            raise PeerLostError(f"expected a learner to write {path} within {options.reconnect_s:g} s; is it running?")
        time.sleep(0.1)
    return path.read_text().strip()


def key_of(options: argparse.Namespace) -> Path | None:
    """--key, or with --run-dir the key that the learner keeps for its own machine if it asks for keys."""
    if options.key is not None or not options.run_dir:
        return options.key if options.key is None else Path(options.key)
    config = Path(options.run_dir) / "config.toml"
    folder = tomllib.loads(config.read_text()).get("broker", {}).get("keys", "") if config.is_file() else ""
    return Path(folder) / f"{LOCAL}.key" if folder else None


def name_with_key(name: str, key: KeyFile | None) -> str:
    """Whoever holds a key has its name; another one becomes a suffix that tells daemons with one key apart."""
    if key is None or name == key.name or name.startswith(f"{key.name}."):
        return name
    return f"{key.name}.{name}"


def model_of(options: argparse.Namespace) -> str:
    """The model directory as far as it is known before the learner names it; empty if it is not."""
    config = Path(options.run_dir or "") / "config.toml"
    if options.model or not options.run_dir or not config.is_file():
        return options.model or ""
    return str(tomllib.loads(config.read_text()).get("model", {}).get("path", ""))


def vocab_size_of(model_path: str) -> int:
    """Of the model in a directory; 0 while none is known: the learner then relies on the check of its weights."""
    if not model_path:
        return 0
    try:
        config = json.loads((Path(model_path) / "config.json").read_text())
        return int(config.get("vocab_size") or config["text_config"]["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"expected a model directory with a vocab_size in its config.json at {model_path}, found: {error!r}; "
            "make the demo's with `orz make-base`, or give another one with --model"
        ) from error


def relay_pair(readers: Admitted) -> CurveKeys:
    """What a relay listens with: a pair for this process alone, vouched for by the connection that names it.

    The daemon's own pair may be rotated while the relay listens, and stays out of a socket that strangers reach.
    """
    public, secret = new_pair()
    return CurveKeys(public=public.encode(), secret=secret.encode(), allowed=readers)


def daemon_of(options: argparse.Namespace, name: str) -> Daemon:
    settings = settings_of(options)
    engine_options = parse_options(settings.vllm)
    if settings.engine == "vllm":
        require_vllm()
    address = address_of(options)
    key = key_of(options)
    keys = None if key is None else lambda: read_key(key).keys
    model_path, slots = model_of(options), settings.slots + settings.queue
    relay, readers = transport.relay_address(options.relay), Admitted()
    relay_keys = relay_pair(readers) if relay and key is not None else None
    source = relay if relay_keys is None else join_key(relay, relay_keys.public)
    called = name_with_key(name, None if key is None else read_key(key))
    hello = Hello(called, settings.engine, slots, vocab_size_of(model_path), os.getpid(), source, socket.gethostname())
    events = EventLog.disabled()
    if options.run_dir:
        events = EventLog(Path(options.run_dir) / "events" / f"generator-{name}.jsonl", f"generator-{name}")
    grader: GraderPool[GradeKey] = GraderPool(settings.verifiers)
    return Daemon(
        client=BrokerClient(address, hello, reconnect_s=settings.reconnect_s, events=events, keys=keys),
        make_serving=partial(
            make_serving,
            settings=settings,
            model_path=options.model or "",
            dtype=options.dtype,
            device=options.device,
            prefill_tokens=options.prefill_tokens,
            options=engine_options,
        ),
        make_fetcher=lambda welcome, epoch: transport.connect(
            welcome.weights_address,
            epoch,
            events,
            keys=keys,
            give_up_s=settings.reconnect_s,
            device=options.device,
            deadline_s=welcome.deadline_s,
            relay=relay,
            relay_keys=relay_keys,
        ),
        grader=grader,
        slots=slots,
        events=events,
        drain_s=options.drain_s,
        admit=readers.replace,
    )


def dry_run(options: argparse.Namespace) -> None:
    settings = settings_of(options)
    where = options.connect or (f"the address in {options.run_dir}/address" if options.run_dir else address_of(options))
    relay = transport.relay_address(options.relay)
    print(f"would connect to {where} and wait {settings.reconnect_s:g} s for it")
    print(f"would sample {settings.slots} sequences at once with {settings.engine} on {options.device}")
    print(f"would pass weights on at {relay}" if relay else "would pass no weights on")


def main(arguments: list[str]) -> None:
    options = parser().parse_args(arguments)
    name = options.name or f"g-{secrets.token_hex(3)}"
    run_main(
        lambda: dry_run(options) if options.dry_run else daemon_of(options, name).run(), process=f"generator-{name}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
