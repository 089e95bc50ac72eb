"""Subcommands that look at a run, while it goes on or afterwards: each takes its folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from orz_async.errors import BrokenPromiseError, ConfigError
from orz_async.observe.progress import Progress


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
