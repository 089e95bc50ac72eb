"""What a run would train, counted on the model itself: built on the meta device from config.json, no weight is read.

`--dry-run` prints it. Where the weight files are there already, the names and shapes in their headers are compared.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from torch import nn

from orz_async.learner.hf_directory import ModelDirectory, inspect
from orz_async.learner.loading import differences
from orz_async.learner.model import Critic, meta_models

_TOLD = 6
"""Names told of those that differ; the number of all is told too."""


def census(path: Path, *, with_critic: bool) -> list[str]:
    """Lines of text: parameters of policy and critic by part, and how the weight files differ. `path` holds a
    config.json; ModelError where it builds no model or the files there are broken."""
    has_weights = any(path.glob("*.safetensors"))
    directory = inspect(path) if has_weights else ModelDirectory(path, {}, {}, {})
    policy, critic = meta_models(directory, seed=0, with_critic=with_critic)
    told = [f"Policy built on the meta device: {parts(policy)}"]
    if critic is not None:
        told.append(f"Critic built on the meta device: {parts(critic)}")
    if not has_weights:
        return told
    for what, module in (("policy", policy), ("critic", critic)):
        if module is None:
            continue
        own = ("score.weight", "score.bias") if isinstance(module, Critic) else ()
        parameters = {name: p for name, p in module.named_parameters() if name not in own}
        keys, wrong, spare = differences(parameters, directory)
        if what == "critic":
            spare = [name for name in spare if name != "lm_head.weight"]  # the policy's
        wrong += [f"{name} is not of this model" for name in spare]
        listed = "".join(f"; {word}" for word in wrong[:_TOLD]) + ("; ..." if len(wrong) > _TOLD else "")
        agree = f"all {len(keys)} tensors of the {what} are in the weight files"
        told.append(f"{agree}" if not wrong else f"{what} and weight files differ in {len(wrong)} names{listed}")
    return told


def parts(module: nn.Module) -> str:
    """``50,416,640 = embedding 53,760 + 12 layers 50,362,368 + norm 512``; a head only where it is not tied."""
    counts: Counter[str] = Counter()
    layers = set()
    for name, parameter in module.named_parameters():
        _, layer, after = name.partition("layers.")
        part = "embedding" if "embed" in name else "head" if name.startswith(("lm_head", "score")) else "norm"
        if layer:
            layers.add(after.partition(".")[0])
            part = "layers"
        counts[part] += parameter.numel()
    named = {f"{len(layers)} layers" if part == "layers" else part: n for part, n in counts.items()}
    return f"{counts.total():,} = " + " + ".join(f"{part} {n:,}" for part, n in named.items())
