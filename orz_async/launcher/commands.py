"""The command line and environment of every process of a run. Pure: `--dry-run` prints what this returns."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from orz_async.config import Config
from orz_async.config_toml import to_toml
from orz_async.launcher.plan import describe


@dataclass(frozen=True, slots=True)
class Command:
    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    """Added to the launcher's own environment."""

    def __str__(self) -> str:
        return shlex.join([*(f"{name}={value}" for name, value in self.env.items()), *self.argv])


@dataclass(frozen=True, slots=True)
class Commands:
    """What a supervisor starts."""

    learner: Command
    ranks: int
    generators: tuple[Command, ...]
    """They read the learner's address from the folder of the run, where it appears once the learner listens."""


def threads(count: int) -> dict[str, str]:
    # Every numeric library sizes its own pool at import: processes that each take all cores slow each other down.
    pools = {name: str(count) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    return pools | {"TOKENIZERS_PARALLELISM": "false"}


def learner(config: Config, ranks: int) -> Command:
    # --standalone: a rendezvous port of its own, so that two runs on one machine do not meet.
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    argv += ["-m", "orz_async.learner", str(Path(config.run_dir) / "config.toml")]
    return Command("learner", tuple(argv), threads(config.learner.threads))


def generator(config: Config, index: int) -> Command:
    settings = config.generator
    options = {
        "--run-dir": config.run_dir,
        "--name": f"g{index}",
        "--engine": settings.engine,
        "--slots": settings.slots,
        "--queue": settings.queue,
        "--threads": settings.threads,
        "--device": settings.device,
        "--verifiers": settings.verifiers,
        "--reconnect-s": settings.reconnect_s,
    }
    if settings.engine == "vllm":
        options |= {
            "--tensor-parallel": settings.tensor_parallel,
            "--data-parallel": settings.data_parallel,
            "--kv-gb": settings.kv_gb,
        }
    argv = [settings.python or sys.executable, "-m", "orz_async.generator"]
    argv += [str(word) for option in options.items() for word in option]
    if settings.keep_kv:
        argv.append("--keep-kv")
    if config.weights.relays:
        argv += ["--relay", "tcp://127.0.0.1:0"]
    argv += [word for option in settings.vllm for word in ("--vllm", option)]
    return Command(f"generator-g{index}", tuple(argv), threads(settings.threads))


def commands(config: Config, ranks: int) -> Commands:
    daemons = tuple(generator(config, index) for index in range(config.generator.count))
    return Commands(learner(config, ranks), ranks, daemons)


def dry_run(config: Config, ranks: int) -> str:
    """The resolved configuration and what would be started. The whole is TOML: it can be saved and run."""
    all_of_it = commands(config, ranks)
    lines = [f"# {command}" for command in (all_of_it.learner, *all_of_it.generators)]
    needs = [f"# {line}" for line in describe(config, ranks)]
    return "\n".join([to_toml(config), *needs, "# Would start:", *lines])
