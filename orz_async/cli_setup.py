"""Subcommands for before the first run: is the machine fit, a base model, a folder to start from."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from orz_async.config import Config
from orz_async.errors import ExitCode
from orz_async.observe.progress import Progress

BASE = Path("runs/base")


def make_base(argv: list[str]) -> int:
    from orz_async.recipes import BASES, RECIPES

    parser = argparse.ArgumentParser(
        "orz make-base", description="Train the base model of a recipe from scratch and write it with its problems."
    )
    parser.add_argument("--recipe", choices=list(BASES), default="tiny_cpu", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder to write (default: where the recipe looks for it)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, text and problems (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="training steps (default: what the recipe needs)")
    parser.add_argument("--device", help="cpu, cuda:0, ... (default: the recipe's)")
    parser.add_argument("--force", action="store_true", help="replace the folder if it exists")
    options = parser.parse_args(argv)
    config = RECIPES[options.recipe]()
    if options.device is not None:
        config = replace(config, generator=replace(config.generator, device=options.device))
    build_base(options.recipe, config, out=options.out, seed=options.seed, steps=options.steps, force=options.force)
    return 0


def build_base(
    recipe: str,
    config: Config,
    *,
    out: Path | None = None,
    seed: int = 0,
    steps: int | None = None,
    force: bool = False,
) -> None:
    """The base of `recipe`, on the device of its generators and in its compute type."""
    from orz_async.learner import base
    from orz_async.learner.base_plan import PLANS
    from orz_async.recipes import BASES

    plan = PLANS[BASES[recipe]]
    out = Path(plan.folder) if out is None else out
    with Progress() as progress:
        report = base.make_base(
            out,
            plan=plan,
            seed=seed,
            steps=steps,
            device=config.generator.device,
            dtype=config.model.dtype,
            force=force,
            progress=progress,
        )
    heldout = report["heldout"]
    solves = (
        f"{heldout['accuracy']:.0%} of {heldout['samples']} held-out problems, {heldout['length_mean']:.1f} tokens each"
    )
    print(f"{out}: {report['parameters']:,} parameters, trained in {report['seconds']} s, solves {solves}")


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
