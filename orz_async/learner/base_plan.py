"""The base models that `orz make-base` can make: which task, which size, how long. Imports no torch.

TINY is the demo's, made on one CPU core in a minute. SMALL is for one GPU; its plan has been tried on CPU with the size
and the steps cut down, and no GPU has run it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from orz_async.data import arithmetic, digit_sum
from orz_async.data.char_tokenizer import vocabulary
from orz_async.data.task import Task
from orz_async.learner.memory import Shape


@dataclass(frozen=True, kw_only=True, slots=True)
class BasePlan:
    """A Qwen2 trained from scratch on text about a task: early text is mostly full working, late text mostly not."""

    name: str
    folder: str
    """Where it is made and looked for: model/, train.jsonl, heldout.jsonl, base.json."""
    task: Task[Any]
    hidden: int
    intermediate: int
    layers: int
    heads: int
    steps: int
    batch: int
    """Texts a step."""
    learning_rate: float
    warmup_steps: int
    clean_share: float
    """Share of the steps on clean text; the rest see text as one finds it."""
    train_problems: int
    heldout_problems: int
    max_new_tokens: int
    """Of the responses that are sampled to see what the base can do."""
    adam_betas: tuple[float, float] = (0.9, 0.98)

    @property
    def model(self) -> str:
        return f"{self.folder}/model"

    @property
    def shape(self) -> Shape:
        return Shape(
            vocab=len(vocabulary()),
            hidden=self.hidden,
            intermediate=self.intermediate,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.heads,
            head_dim=self.hidden // self.heads,
            tied=True,
            qkv_bias=True,
        )


TINY = BasePlan(
    name="tiny",
    folder="runs/base",
    task=digit_sum,
    # Head size 64 is the smallest that every engine supports.
    hidden=128,
    intermediate=256,
    layers=2,
    heads=2,
    steps=900,  # about 50 seconds on one idle core
    batch=16,
    learning_rate=2e-3,
    warmup_steps=50,
    clean_share=0.65,
    train_problems=20_000,
    heldout_problems=600,
    max_new_tokens=96,
)

SMALL = BasePlan(
    name="small",
    folder="runs/base-small",
    task=arithmetic,
    hidden=512,
    intermediate=2048,
    layers=12,
    heads=8,
    steps=2500,
    batch=128,
    learning_rate=5e-4,
    warmup_steps=200,
    clean_share=0.7,
    train_problems=50_000,
    heldout_problems=1000,
    max_new_tokens=160,
)

PLANS: dict[str, BasePlan] = {plan.name: plan for plan in (TINY, SMALL)}
