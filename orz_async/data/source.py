"""Prompts in a seeded endless order, and the held-out prompts that are kept out of it."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from orz_async.config import DataConfig
from orz_async.data.files import Problem, read_problems
from orz_async.data.permutation import permuted
from orz_async.data.template import Template, render
from orz_async.data.tokenizer import Tokenizer
from orz_async.errors import DataError
from orz_async.records import Prompt, int32_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class DataCounts:
    """What became of the rows of the training file: they add up to `read`."""

    read: int = 0
    duplicate: int = 0
    """Same problem text as an earlier row."""
    held_out: int = 0
    """Same problem, up to spacing and case, as a held-out one."""
    too_long: int = 0
    """Longer than data.max_prompt_tokens."""
    kept: int = 0


@dataclass(frozen=True, slots=True)
class SeededPrompts:
    """The endless training order: a fresh permutation each epoch, prompt `index` a function of seed and index alone.

    So the only state of a data loader is how far it has come, one integer that any checkpoint can hold.
    """

    prompts: Sequence[Prompt]
    seed: int
    counts: DataCounts = field(default_factory=DataCounts)

    def __post_init__(self) -> None:
        if not self.prompts:
            raise DataError("expected at least one training prompt, found none; see data.train")

    def __len__(self) -> int:
        """Prompts in one epoch."""
        return len(self.prompts)

    def prompt(self, index: int) -> Prompt:
        epoch, position = divmod(index, len(self.prompts))
        return self.prompts[permuted(position, len(self.prompts), key=(self.seed, epoch))]


def build(config: DataConfig, tokenizer: Tokenizer, seed: int) -> tuple[SeededPrompts, list[Prompt]]:
    """Read both files of a run: the training order without the held-out problems, and the held-out prompts."""
    heldout_problems = read_problems(config.heldout) if config.heldout else []
    heldout_keys = {content_key(problem.text) for problem in heldout_problems}
    rows = read_problems(config.train)
    unique = _unique(rows)
    allowed = [problem for problem in unique if content_key(problem.text) not in heldout_keys]
    prompts = to_prompts(allowed, config.template, tokenizer, config.max_prompt_tokens)
    counts = DataCounts(
        read=len(rows),
        duplicate=len(rows) - len(unique),
        held_out=len(unique) - len(allowed),
        too_long=len(allowed) - len(prompts),
        kept=len(prompts),
    )
    if not prompts:
        raise DataError(
            f"{config.train}: expected at least one prompt to train on, found none of {counts.read} rows usable "
            f"({counts.held_out} are held out, {counts.too_long} have more than {config.max_prompt_tokens} tokens); "
            "raise data.max_prompt_tokens or use another file"
        )
    heldout = to_prompts(_unique(heldout_problems), config.template, tokenizer, config.max_prompt_tokens)
    return SeededPrompts(prompts, seed, counts), heldout


def load_prompts(path: str | Path, template: Template, tokenizer: Tokenizer, max_prompt_tokens: int) -> list[Prompt]:
    """The different prompts of one file, in file order, without those that are too long."""
    return to_prompts(_unique(read_problems(path)), template, tokenizer, max_prompt_tokens)


def to_prompts(
    problems: Sequence[Problem], template: Template, tokenizer: Tokenizer, max_prompt_tokens: int
) -> list[Prompt]:
    rendered = render([problem.text for problem in problems], template, tokenizer)
    return [
        Prompt(prompt_id=prompt_id(problem.text), tokens=int32_bytes(tokens), answer=problem.answer)
        for problem, tokens in zip(problems, rendered, strict=True)
        if 0 < len(tokens) <= max_prompt_tokens
    ]


def prompt_id(problem: str) -> str:
    """The same problem has the same name in every file, run and template."""
    return hashlib.sha256(problem.encode()).hexdigest()[:16]


def content_key(problem: str) -> str:
    """Equal for problems that differ in spacing, case or Unicode form only: those must not be trained on either."""
    return " ".join(unicodedata.normalize("NFKC", problem).split()).casefold()


def _unique(problems: Iterable[Problem]) -> list[Problem]:
    """The first row of each problem text: `prompt_id` must be unique."""
    first: dict[str, Problem] = {}
    for problem in problems:
        first.setdefault(problem.text, problem)
    return list(first.values())
