"""The command `orz`: one function a subcommand, each importing what it needs when it is called."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from orz_async.errors import ConfigError
from orz_async.observe.process import run_main
from orz_async.observe.progress import Progress
from orz_async.observe.versions import versions

BASE = Path("runs/base")

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
usage: orz demo [--seed N] [options and settings of orz run]

Make the base model in runs/base if it is not there, then run the recipe tiny_cpu in runs/demo, which is overwritten
unless --resume is given.
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
  make-base        make the tiny base model and its task, on CPU in a minute or two
  demo             make-base if needed, then run the recipe tiny_cpu in runs/demo
  summary RUN      compute and print the summary of a run from its event logs
  keys COMMAND     open a run to other machines: make, list, revoke and rotate keys
  verify RUN       recompute from journal and event logs whether the run kept its promises
  replay RUN       train again from the journal of a run, without generators
  eval MODEL       score a model on a file of problems: avg@k, pass@k, results per problem
  hard RUN         write the prompts a run rarely solved as training data for a second stage
  export RUN       write the newest checkpoint of a run as a Hugging Face directory
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


def take_number(argv: list[str], name: str, default: float) -> float:
    """Remove `--name N` or `--name=N` from argv; N must be positive."""
    for i, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if flag.replace("_", "-") != name:
            continue
        found = value if equals else (argv[i + 1] if i + 1 < len(argv) else "")
        del argv[i : i + (1 if equals else 2)]
        try:
            number = float(found)
        except ValueError:
            number = 0.0
        if not number > 0:
            raise ConfigError(f"expected a positive number for {name}, found {found or 'nothing'}")
        return number
    return default


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


def summary(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("orz summary", description="Summary of a run, from its event logs alone.")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("--json", action="store_true", help="print summary.json instead of the table")
    options = parser.parse_args(argv)
    from orz_async.launcher.launch import conclude
    from orz_async.observe.live import new_console

    conclude(options.run, new_console(quiet=options.json))
    if options.json:
        print((options.run / "summary.json").read_text(), end="")
    return 0


def verify(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "orz verify",
        description="Recompute from the journal and the event logs of a run alone that every granted rollout ended "
        "exactly once (trained, expired, quarantined), was trained at most once, and that no token was older than S "
        "when it was trained on. Exits with 12 and names the rollouts where that does not hold.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run; it may still go on")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    options = parser.parse_args(argv)
    from orz_async.broker import verify as verification
    from orz_async.errors import BrokenPromiseError

    result = verification.verify(options.run)
    if options.json:
        print(verification.to_json(result))
    else:
        for name, value in verification.lines(result):
            print(f"{name:10} {value}")
        for note in result.notes[:20]:
            print(f"{'note':10} {note}")
    if result.findings:
        shown = "\n  ".join(str(finding) for finding in result.findings[:20])
        raise BrokenPromiseError(
            f"expected every rollout of {options.run} to end exactly once and within its bound, found "
            f"{len(result.findings)} violations:\n  {shown}"
        )
    if not options.json:
        print("verified: every granted rollout is accounted for, none was trained twice, none beyond S")
    return 0


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


def make_base(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "orz make-base", description="Train the demo's base model from scratch and write it with its problems."
    )
    parser.add_argument("--out", type=Path, default=BASE, help="folder to write (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, text and problems (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="training steps (default: what the recipe tiny_cpu needs)")
    parser.add_argument("--force", action="store_true", help="replace the folder if it exists")
    options = parser.parse_args(argv)
    _make_base(options.out, seed=options.seed, steps=options.steps, force=options.force)
    return 0


def _make_base(out: Path, *, seed: int = 0, steps: int | None = None, force: bool = False) -> None:
    from orz_async.learner import base

    with Progress() as progress:
        number = base.STEPS if steps is None else steps
        report = base.make_base(out, seed=seed, steps=number, force=force, progress=progress)
    heldout = report["heldout"]
    solves = (
        f"{heldout['accuracy']:.0%} of {heldout['samples']} held-out problems, {heldout['length_mean']:.1f} tokens each"
    )
    print(f"{out}: {report['parameters']:,} parameters, trained in {report['seconds']} s, solves {solves}")


def demo(argv: list[str]) -> int:
    from orz_async.cli_config import HELP
    from orz_async.recipes import tiny_cpu

    if not HELP.isdisjoint(argv):
        print(DEMO_USAGE)
        return 0
    base = Path(tiny_cpu().model.path).parent
    if "--dry-run" not in argv and not (base / "base.json").exists():
        _make_base(base)
    mode = [] if "--resume" in argv else ["--overwrite"]
    return run(["tiny_cpu", "--run-dir", "runs/demo", *mode, *argv])


def export(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "orz export",
        description="Write the newest checkpoint of a run as a Hugging Face directory (policy and critic).",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("--out", type=Path, help="folder to write (default: RUN/export)")
    options = parser.parse_args(argv)
    from orz_async.config_toml import load

    config = load(options.run / "config.toml")
    out = options.out or options.run / "export"
    from orz_async.learner import checkpoint
    from orz_async.learner.export import export as write
    from orz_async.learner.hf_directory import inspect
    from orz_async.learner.model import meta_models
    from orz_async.learner.parallel import World
    from orz_async.learner.trainer import Trainer

    found = checkpoint.find(options.run)
    if found is None:
        raise ConfigError(f"expected a checkpoint in {options.run}, found none; train at least checkpoint.every steps")
    for damage in found.damaged:
        print(f"left out: {damage}", file=sys.stderr)
    with_critic = config.learner.estimator == "gae"
    policy, critic = meta_models(inspect(config.model.path), seed=config.seed, with_critic=with_critic)
    world = World.start(need_group=config.model.dtype != "float32")
    try:
        trainer = Trainer(config, policy, critic, world)
        checkpoint.restore(trainer, found.path)
        write(trainer, source=Path(config.model.path), target=out)
    finally:
        world.close()
    print(f"{out}: the policy after {trainer.num_steps} steps; its critic is in {out / 'critic'}")
    return 0


def sim(argv: list[str]) -> int:
    from orz_async.sim.command import sim as simulate

    return simulate(argv)


def plan(argv: list[str]) -> int:
    from orz_async.cli_config import parse_config
    from orz_async.sim.plan_command import plan as make_plan

    return make_plan(argv, lambda words: parse_config(words, prog="orz plan"))


def keys(argv: list[str]) -> int:
    from orz_async.cli_keys import run as run_keys

    return run_keys(argv)


def evaluate(argv: list[str]) -> int:
    from orz_async.evaluate.score import Settings, summary, write
    from orz_async.evaluate.score import evaluate as score

    own = Settings()
    parser = argparse.ArgumentParser(
        "orz eval",
        description="Score a Hugging Face directory, or the export of a run, on a file of problems.",
        epilog="Reads ORZ JSON (training and evaluation form) and JSONL. Equal seeds give equal responses.",
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="model directory, or folder of a run with an export")
    parser.add_argument("--data", type=Path, required=True, help="file of problems")
    parser.add_argument("--samples", type=int, default=1, help="samples of each problem: the k of avg@k (%(default)s)")
    parser.add_argument("--limit", type=int, default=0, help="only the first N problems")
    parser.add_argument("--temperature", type=float, default=own.temperature, help="(%(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=own.max_new_tokens, help="(%(default)s)")
    parser.add_argument("--template", choices=("orz", "chat", "plain"), default=own.template, help="(%(default)s)")
    parser.add_argument("--stop", nargs="*", default=list(own.stop), help="strings that end a response (%(default)s)")
    parser.add_argument("--slots", type=int, default=own.slots, help="sequences decoded at once (%(default)s)")
    parser.add_argument("--threads", type=int, default=own.threads, help="CPU threads (%(default)s)")
    parser.add_argument("--device", default=own.device, help="cpu, cuda, cuda:1, ... (%(default)s)")
    parser.add_argument("--seed", type=int, default=own.seed, help="(%(default)s)")
    parser.add_argument("--out", type=Path, help="folder for problems.jsonl and summary.json (default: MODEL/eval)")
    options = vars(parser.parse_args(argv))
    model, data, out = options.pop("model"), options.pop("data"), options.pop("out")
    if options["samples"] < 1 or options["max_new_tokens"] < 1 or not options["temperature"] > 0:
        raise ConfigError("expected --samples, --max-new-tokens and --temperature to be positive")
    found = model / "export" if (model / "export").is_dir() else model
    settings = Settings(**options | {"stop": tuple(options["stop"])})
    with Progress() as progress:
        rows = score(found, data, settings, lambda n, all_of: progress(f"{n} of {all_of} responses", n / all_of))
    told = {"model": str(found), "data": str(data)} | summary(rows, settings.samples)
    write(out or model / "eval", rows, told)
    estimates = {f"avg@{settings.samples}": told[f"avg@{settings.samples}"]}
    estimates |= {f"pass@{k}": estimate for k, estimate in told["pass"].items()}
    for name, of in estimates.items():
        print(f"{name:8} {of['value']:.4f}  (95 % interval {of['low']:.4f} to {of['high']:.4f})")
    print(f"{told['problems']} problems, {told['length_mean']:.1f} tokens a response; {out or model / 'eval'}")
    return 0


def hard(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "orz hard",
        description="Mine the journal of a run for prompts solved in fewer than BELOW of OF samples; prompts with "
        "fewer samples are not judged. Train on the file with --data.train, from the export with --model.path.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("--below", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--of", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, help="file to write (default: RUN/hard.jsonl)")
    options = parser.parse_args(argv)
    from orz_async.broker.segments import read
    from orz_async.config_toml import load
    from orz_async.data.hard import hard_problems, tally, write

    if not 0 < options.below <= options.of:
        raise ConfigError(f"expected 0 < --below <= --of, found {options.below} and {options.of}")
    config = load(options.run / "config.toml")
    tallies = tally(read(options.run / "journal"))
    found = hard_problems(config.data.train, tallies, below=options.below, of=options.of)
    out = options.out or options.run / "hard.jsonl"
    write(out, found)
    print(f"{out}: {len(found)} of {len(tallies)} prompts were solved in fewer than {options.below} of {options.of}")
    return 0


def version(argv: list[str]) -> int:
    argparse.ArgumentParser("orz version", description="Versions for bug reports.").parse_args(argv)
    for name, number in versions().items():
        print(f"{name:12} {number}")
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "run": run,
    "make-base": make_base,
    "demo": demo,
    "summary": summary,
    "verify": verify,
    "replay": replay,
    "eval": evaluate,
    "hard": hard,
    "export": export,
    "plan": plan,
    "sim": sim,
    "keys": keys,
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
