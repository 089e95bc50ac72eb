"""The command `orz`: one function a subcommand, each importing what it needs when it is called.

Here are those that train or simulate; `cli_setup.py` has those for before the first run, `cli_runs.py` those that look
at one, `cli_keys.py` the keys.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from orz_async.cli_keys import run as keys
from orz_async.cli_runs import evaluate, export, hard, report, summary, top, trace, verify
from orz_async.cli_setup import build_base, doctor, init, make_base
from orz_async.errors import ConfigError
from orz_async.observe.process import run_main
from orz_async.observe.versions import versions

RUN_USAGE = """\
usage: orz run RECIPE_OR_TOML [options] [--setting value]...

Start the learner and the generators of a run on this machine, show them, end them with a summary.
The same command continues a run that was stopped. Ctrl-C saves and stops; a second one leaves at once.

options:
  --dry-run        print the complete configuration as TOML, the files it needs, the memory of each GPU by part and
                   what would be started; start nothing
  --resume         continue the run in run_dir with changed settings, or a finished one with more --steps
  --overwrite      delete the run in run_dir and start anew
  --ranks N        learner processes that torchrun starts (default: the recipe's GPUs for learning, else 1)
  --drain-s S      seconds the learner may take to save after Ctrl-C (default: 300)
  -h, --help       this text and every setting with its meaning
"""

DEMO_USAGE = """\
usage: orz demo [--recipe small_1gpu] [--seed N] [options and settings of orz run]

Make the base model of the recipe (tiny_cpu unless another is named) if it is not there, then run the recipe in
runs/demo, which is overwritten unless --resume is given. small_1gpu is for one GPU; its folders are runs/base-small and
runs/demo-small_1gpu.
"""

REPLAY_USAGE = """\
usage: orz replay RUN [--run-dir NEW] [--setting value]...

Train from the journal of a run, without generators: the same batches in the same order, into a folder of its own
(default: RUN-replay). With the settings of RUN, on CPU, the losses are those of RUN bit for bit, and it says whether
they are; with others (--learner.lr 1e-4) it shows what they would have done with the same rollouts. The same command
continues a replay that was stopped. RUN may still go on: what its journal holds by now is replayed.
"""

USAGE = """\
usage: orz COMMAND [...]

Asynchronous PPO with a critic for reasoning RL.

commands:
  run RECIPE       train: learner, generators, live view, summary (orz run --help lists every setting)
  make-base        make the base model of a recipe and its task; the demo's on CPU in a minute or two
  demo             make-base if needed, then run tiny_cpu (or --recipe small_1gpu) in runs/demo
  init DIR         write a commented recipe and task files for your own problems
  doctor           check the machine and the installation, and say what to do
  summary RUN      compute and print the summary of a run from its event logs
  report RUN...    one HTML page of a run, or of several side by side: curves, lag, time, rollouts
  top RUN          watch a run in the terminal, whoever started it
  verify RUN       recompute from journal and event logs whether the run kept its promises
  replay RUN       train again from the journal of a run, without generators
  trace RUN        the timeline of a run for ui.perfetto.dev
  eval MODEL       score a model on a file of problems: avg@k, pass@k, results per problem
  hard RUN         write the prompts a run rarely solved as training data for a second stage
  export RUN       write the newest checkpoint of a run as a Hugging Face directory
  keys COMMAND     open a run to other machines: make, list, revoke and rotate keys
  plan RECIPE      which split of GPUs and which lag: predicted by simulation (orz plan --run RUN compares)
  sim              the ledger in a simulated world with faults: histories, violations
  version          versions of everything that decides a result

`orz COMMAND --help` says more. Exit codes: 0 done, 1 a bug of ours, 2 configuration, 3 data, 4 model, 5 wire,
6 port, 7 lost peer, 8 not a finite number, 9 disk, 10 checkpoint, 11 engine, 12 broken promise,
13 memory, 130 stopped and saved.
"""


def take_flag(argv: list[str], name: str) -> bool:
    """Remove a flag from argv; dashes and underscores are the same."""
    matching = [word for word in argv if word.replace("_", "-") == name]
    argv[:] = [word for word in argv if word not in matching]
    return bool(matching)


def take_word(argv: list[str], name: str, default: str) -> str:
    """Remove `--name WORD` or `--name=WORD` from argv; "" where no word follows."""
    for i, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if flag.replace("_", "-") != name:
            continue
        found = value if equals else (argv[i + 1] if i + 1 < len(argv) else "")
        del argv[i : i + (1 if equals else 2)]
        return found
    return default


def take_number(argv: list[str], name: str, default: float) -> float:
    """Remove `--name N` or `--name=N` from argv; N must be positive."""
    found = take_word(argv, name, str(default))
    try:
        number = float(found)
    except ValueError:
        number = 0.0
    if not number > 0:
        raise ConfigError(f"expected a positive number for {name}, found {found or 'nothing'}")
    return number


def run(argv: list[str]) -> int:
    from orz_async.cli_config import HELP, parse_config
    from orz_async.recipes import LAYOUTS

    if not HELP.isdisjoint(argv):
        print(RUN_USAGE)
    dry, resume, overwrite = (take_flag(argv, name) for name in ("--dry-run", "--resume", "--overwrite"))
    layout = LAYOUTS.get(argv[0].replace("-", "_")) if argv else None
    ranks = take_number(argv, "--ranks", layout.learner_gpus if layout else 1)
    drain_s = take_number(argv, "--drain-s", 300.0)
    config = parse_config(argv)
    if ranks != int(ranks):
        raise ConfigError(f"expected a whole number for --ranks, found {ranks}")
    if resume and overwrite:
        raise ConfigError("expected --resume or --overwrite, found both; --overwrite deletes what --resume continues")
    if dry:
        from orz_async.launcher.commands import dry_run

        print(dry_run(config, int(ranks)))
        return 0
    from orz_async.launcher.inputs import check_inputs
    from orz_async.launcher.launch import launch
    from orz_async.launcher.limits import Limits
    from orz_async.launcher.run_folder import Mode

    check_inputs(config)
    mode = Mode.OVERWRITE if overwrite else Mode.RESUME if resume else Mode.CONTINUE
    return launch(config, mode=mode, ranks=int(ranks), limits=Limits(drain_s=drain_s))


def replay(argv: list[str]) -> int:
    from orz_async.cli_config import HELP, parse_config

    if not HELP.isdisjoint(argv) or not argv:
        print(REPLAY_USAGE)
        return 0
    source = Path(argv[0])
    if not (source / "config.toml").is_file():
        raise ConfigError(f"expected the folder of a run, found no {source}/config.toml; check the path")
    default = ["--run-dir", f"{source.as_posix().rstrip('/')}-replay"]
    # No generator is there to evaluate with. What comes later on the command line wins.
    config = parse_config([str(source / "config.toml"), *default, *argv[1:], "--eval.every", "0"], prog="orz replay")
    from orz_async.launcher.replay import replay as train

    return train(source, config)


def demo(argv: list[str]) -> int:
    from orz_async.cli_config import HELP, parse_config
    from orz_async.recipes import BASES, RECIPES

    if not HELP.isdisjoint(argv):
        print(DEMO_USAGE)
        return 0
    recipe = take_word(argv, "--recipe", "tiny_cpu").replace("-", "_")
    if recipe not in BASES:
        raise ConfigError(f"expected --recipe to be one of {', '.join(BASES)}, found {recipe!r}")
    words = [recipe, "--run-dir", "runs/demo" if recipe == "tiny_cpu" else f"runs/demo-{recipe}", *argv]
    base = Path(RECIPES[recipe]().model.path).parent
    if "--dry-run" not in argv and not (base / "base.json").exists():
        settings = [word for word in words if word not in ("--resume", "--overwrite")]
        for option in ("--ranks", "--drain-s"):
            take_number(settings, option, 1.0)
        build_base(recipe, parse_config(settings))
    return run([*words, *([] if "--resume" in argv else ["--overwrite"])])


def sim(argv: list[str]) -> int:
    from orz_async.sim.command import sim as simulate

    return simulate(argv)


def plan(argv: list[str]) -> int:
    from orz_async.cli_config import parse_config
    from orz_async.sim.plan_command import plan as make_plan

    return make_plan(argv, lambda words: parse_config(words, prog="orz plan"))


def version(argv: list[str]) -> int:
    argparse.ArgumentParser("orz version", description="Versions for bug reports.").parse_args(argv)
    for name, number in versions().items():
        print(f"{name:12} {number}")
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "run": run,
    "make-base": make_base,
    "demo": demo,
    "init": init,
    "doctor": doctor,
    "summary": summary,
    "report": report,
    "top": top,
    "verify": verify,
    "replay": replay,
    "trace": trace,
    "eval": evaluate,
    "hard": hard,
    "export": export,
    "keys": keys,
    "plan": plan,
    "sim": sim,
    "version": version,
}


def dispatch(argv: Sequence[str]) -> int:
    """Run one subcommand and return its exit code."""
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    command = COMMANDS.get("version" if name == "--version" else name)
    if command is None:
        from orz_async.config_toml import nearest

        raise ConfigError(f"expected a command, found {name!r}; {nearest(name, COMMANDS)}")
    return command(rest)


def main() -> NoReturn:
    run_main(lambda: dispatch(sys.argv[1:]), process="orz")


if __name__ == "__main__":
    main()
