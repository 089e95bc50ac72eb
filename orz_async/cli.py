"""The command `orz`: one function a subcommand, each importing what it needs when it is called."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from orz_async.errors import ConfigError, ExitCode
from orz_async.observe.process import run_main
from orz_async.observe.progress import Progress
from orz_async.observe.versions import versions

BASE = Path("runs/base")

RUN_USAGE = """\
usage: orz run RECIPE_OR_TOML [options] [--setting value]...

Start the learner and the generators of a run on this machine, show them, end them with a summary.
The same command continues a run that was stopped. Ctrl-C saves and stops; a second one leaves at once.

options:
  --dry-run        print the complete configuration as TOML and what would be started; start nothing
  --resume         continue the run in run_dir with changed settings, or a finished one with more --steps
  --overwrite      delete the run in run_dir and start anew
  --ranks N        learner processes that torchrun starts (default: 1)
  --drain-s S      seconds the learner may take to save after Ctrl-C (default: 300)
  -h, --help       this text and every setting with its meaning
"""

DEMO_USAGE = """\
usage: orz demo [--seed N] [options and settings of orz run]

Make the base model in runs/base if it is not there, then run the recipe tiny_cpu in runs/demo, which is overwritten
unless --resume is given.
"""

USAGE = """\
usage: orz COMMAND [...]

Asynchronous PPO with a critic for reasoning RL.

commands:
  run RECIPE       train: learner, generators, live view, summary (orz run --help lists every setting)
  init DIR         write a commented recipe and task files for your own problems
  doctor           check the machine and the installation, and say what to do
  make-base        make the tiny base model and its task, on CPU in a minute or two
  demo             make-base if needed, then run the recipe tiny_cpu in runs/demo
  summary RUN      compute and print the summary of a run from its event logs
  keys COMMAND     open a run to other machines: make, list, revoke and rotate keys
  report RUN...    one HTML page of a run, or of several side by side: curves, lag, time, rollouts
  top RUN          watch a run in the terminal, whoever started it
  trace RUN        the timeline of a run for ui.perfetto.dev
  export RUN       write the newest checkpoint of a run as a Hugging Face directory
  plan RECIPE      which split of GPUs and which lag: predicted by simulation (orz plan --run RUN compares)
  sim              the ledger in a simulated world with faults: histories, violations
  version          versions of everything that decides a result

`orz COMMAND --help` says more. Exit codes: 0 done, 1 a bug of ours, 2 configuration, 3 data, 4 model, 5 wire,
6 port, 7 lost peer, 8 not a finite number, 9 disk, 10 checkpoint, 11 engine, 130 stopped and saved.
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

    if not HELP.isdisjoint(argv):
        print(RUN_USAGE)
    dry, resume, overwrite = (take_flag(argv, name) for name in ("--dry-run", "--resume", "--overwrite"))
    ranks, drain_s = take_number(argv, "--ranks", 1), take_number(argv, "--drain-s", 300.0)
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


def report(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "orz report",
        description="One self-contained HTML page of a run, or of several to compare them: is it learning, is it "
        "on-policy enough, where does the time go, what did it write. Also of a run that is still going on.",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument("--out", type=Path, help="file to write (default: report.html in the first RUN)")
    parser.add_argument("--json", action="store_true", help="print the numbers of the page instead of writing it")
    options = parser.parse_args(argv)
    from orz_async.report.page import report as write

    out = options.out or options.runs[0] / "report.html"
    numbers, told = write(options.runs, None if options.json else out)
    if options.json:
        import msgspec

        print(msgspec.json.format(msgspec.json.encode(numbers), indent=1).decode())
    else:
        print("\n".join(told))
    return 0


def top(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "orz top", description="Watch a run in the terminal, from its event logs. Ctrl-C ends the view, not the run."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("--once", action="store_true", help="print the present state and end")
    options = parser.parse_args(argv)
    if not (options.run / "config.toml").exists():
        raise ConfigError(f"expected the folder of a run, found no {options.run}/config.toml; check the path")
    from orz_async.config_toml import load
    from orz_async.observe.live import new_console
    from orz_async.observe.top import top as show

    show(options.run, load(options.run / "config.toml"), new_console(), once=options.once)
    return 0


def trace(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "orz trace", description="The timeline of a run as a trace for ui.perfetto.dev or chrome://tracing."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("--out", type=Path, help="file to write (default: RUN/trace.json.gz)")
    options = parser.parse_args(argv)
    from orz_async.report.trace import write_trace

    out = options.out or options.run / "trace.json.gz"
    print(f"{out}: {write_trace(options.run, out):,} events; open it in https://ui.perfetto.dev, which keeps it local")
    return 0


def doctor(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "orz doctor",
        description="Check this machine and this installation, and say what to do. Exit code 2 if "
        "something must be mended before anything can be trained.",
    )
    parser.parse_args(argv)
    from rich.table import Table
    from rich.text import Text

    from orz_async.doctor import examine
    from orz_async.observe.live import new_console

    findings = examine()
    marks = {"ok": ("ok", "green"), "note": ("note", "yellow"), "fail": ("FAIL", "bold red")}
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for finding in findings:
        word, style = marks[finding.state]
        found = Text(finding.found)
        if finding.advice:
            found.append(f"  -> {finding.advice}", style="dim")
        table.add_row(Text(word, style=style), Text(finding.name, style="cyan"), found)
    new_console().print(table)
    failed = [finding.name for finding in findings if finding.state == "fail"]
    print(f"to be mended: {', '.join(failed)}" if failed else "ready to train")
    return int(ExitCode.CONFIG) if failed else 0


def init(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "orz init",
        description="Write a commented recipe and two small task files, to be replaced by your own. It runs as it is.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder to write into")
    parser.add_argument("--model", type=Path, default=BASE / "model", help="model directory (default: %(default)s)")
    options = parser.parse_args(argv)
    from orz_async.starter import write_starter

    for path in write_starter(options.folder, options.model):
        print(path)
    if not options.model.exists():
        print(f"{options.model} is not there yet: `orz make-base` makes it, --model names another one")
    print(f"next: put your problems into train.jsonl and heldout.jsonl, then `orz run {options.folder}/recipe.toml`")
    return 0


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
    from orz_async.learner.model import build_critic, load_policy
    from orz_async.learner.parallel import World
    from orz_async.learner.trainer import Trainer

    found = checkpoint.find(options.run)
    if found is None:
        raise ConfigError(f"expected a checkpoint in {options.run}, found none; train at least checkpoint.every steps")
    for damage in found.damaged:
        print(f"left out: {damage}", file=sys.stderr)
    policy = load_policy(config.model.path)
    world = World.start(need_group=config.model.dtype != "float32")
    try:
        trainer = Trainer(config, policy, build_critic(policy, seed=config.seed), world)
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
    "export": export,
    "plan": plan,
    "sim": sim,
    "keys": keys,
    "doctor": doctor,
    "init": init,
    "report": report,
    "top": top,
    "trace": trace,
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
