"""What a run needs before it starts: files that must be there, and memory of each GPU by part. Nothing is started."""

from __future__ import annotations

from pathlib import Path

import msgspec

from orz_async.config import Config
from orz_async.errors import OrzError
from orz_async.learner.base_plan import PLANS
from orz_async.learner.memory import QWEN25, Shape, generator_memory, learner_peak, lines
from orz_async.recipes import BASES


def files(config: Config) -> list[str]:
    """One line for each file or folder the run reads, with whether it is there."""
    model = Path(config.model.path)
    needed = [model / "config.json", model / "tokenizer.json", Path(config.data.train)]
    needed += [Path(config.data.heldout)] if config.data.heldout else []
    found = [f"  {path}: {'found' if path.is_file() else 'MISSING'}" for path in needed]
    weights = sorted(model.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in weights)
    told = f"{len(weights)} files, {size / (1 << 30):.2f} GiB" if weights else "MISSING"
    told_of = [*found, f"  {model}/*.safetensors: {told}"]
    own = [recipe for recipe, plan in BASES.items() if PLANS[plan].model == config.model.path]
    if own and any("MISSING" in line for line in told_of):
        told_of.append(f"  `orz make-base --recipe {own[0]}` makes them")
    return told_of


def shape_of(config: Config) -> Shape | None:
    """From the model's config.json; for one that is not there yet, from its name or its own base plan; else None."""
    path = Path(config.model.path) / "config.json"
    if path.is_file():
        try:
            return Shape.from_config(msgspec.json.decode(path.read_bytes(), type=dict[str, object]))
        except (OSError, KeyError, TypeError, ValueError, msgspec.DecodeError):
            return None
    own = {plan.model: plan.shape for plan in PLANS.values()}
    return own.get(config.model.path) or QWEN25.get(Path(config.model.path).name)


def describe(config: Config, ranks: int) -> list[str]:
    """Files and memory of a run, as lines of text."""
    told = ["Files:", *files(config)]
    shape = shape_of(config)
    if shape is None:
        return [*told, f"Memory: unknown, no readable {config.model.path}/config.json"]
    told.append(f"Model: {shape.policy:,} parameters, critic {shape.critic:,}")
    phase, parts = learner_peak(config, shape, ranks=ranks)
    told += lines(f"Memory of each of {ranks} learner ranks, at most in the {phase}", parts)
    width = 2 if config.model.dtype == "bfloat16" else 4
    told += lines("Memory of each generator (over its GPUs)", generator_memory(config, shape, width=width))
    if not (Path(config.model.path) / "config.json").is_file():
        return [*told, "Model: not there yet, counted by arithmetic from its name"]
    # Imported here: torch takes seconds, and everything above needs none of it.
    from orz_async.learner.census import census

    try:
        return told + census(Path(config.model.path), with_critic=config.learner.estimator == "gae")
    except OrzError as error:
        return [*told, f"Model directory: {error}"]
