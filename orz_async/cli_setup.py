"""Subcommands for before the first run: is the machine fit, a base model, a folder to start from."""

from __future__ import annotations

import argparse
from pathlib import Path

from orz_async.errors import ExitCode
from orz_async.observe.progress import Progress

BASE = Path("runs/base")


def make_base(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "orz make-base", description="Train the demo's base model from scratch and write it with its problems."
    )
    parser.add_argument("--out", type=Path, default=BASE, help="folder to write (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, text and problems (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="training steps (default: what the recipe tiny_cpu needs)")
    parser.add_argument("--force", action="store_true", help="replace the folder if it exists")
    options = parser.parse_args(argv)
    build_base(options.out, seed=options.seed, steps=options.steps, force=options.force)
    return 0


def build_base(out: Path, *, seed: int = 0, steps: int | None = None, force: bool = False) -> None:
    from orz_async.learner import base

    with Progress() as progress:
        number = base.STEPS if steps is None else steps
        report = base.make_base(out, seed=seed, steps=number, force=force, progress=progress)
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
