"""Samples every problem k times with the embedded engine and grades the responses by the rule training uses."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orz_async.config import Config
from orz_async.data.source import load_prompts
from orz_async.data.template import Template
from orz_async.data.tokenizer import load_tokenizer
from orz_async.errors import DataError, DiskError
from orz_async.observe.estimates import average, best_of
from orz_async.records import Lease, Prompt, Sampling
from orz_async.reward.pool import GraderPool

Progress = Callable[[int, int], None]
"""Called with responses graded and responses wanted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    samples: int = 1
    temperature: float = 1.0
    max_new_tokens: int = 8000
    max_prompt_tokens: int = 2048
    template: Template = "chat"
    stop: tuple[str, ...] = Config().sampling.stop
    slots: int = 64
    threads: int = 1
    limit: int = 0
    """Problems from the start of the file; 0: all."""
    seed: int = 0
    device: str = "cpu"


def evaluate(model: Path, data: Path, settings: Settings, progress: Progress | None = None) -> list[dict[str, Any]]:
    """One row a problem, in file order: prompt_id, answer, samples and each one's response, verdict, reward, tokens."""
    import torch

    from orz_async.generator.model import load_model
    from orz_async.generator.serving import eos_tokens
    from orz_async.generator.stop import StopMatcher
    from orz_async.generator.transformers_engine import TransformersEngine

    torch.set_num_threads(settings.threads)
    tokenizer = load_tokenizer(model)
    prompts = load_prompts(data, settings.template, tokenizer, settings.max_prompt_tokens)
    prompts = prompts[: settings.limit or None]
    if not prompts:
        raise DataError(f"{data}: expected a problem of at most {settings.max_prompt_tokens} tokens, found none")
    causal_lm = load_model(str(model), device=settings.device)
    vocab = int(causal_lm.config.get_text_config().vocab_size)
    engine = TransformersEngine(
        causal_lm,
        slots=settings.slots,
        max_model_tokens=max(len(p.tokens) // 4 for p in prompts) + settings.max_new_tokens,
        stop=StopMatcher(settings.stop, tokenizer.decode, vocab),
        eos_tokens=eos_tokens(causal_lm.generation_config.eos_token_id, tokenizer.eos_token_id),
    )
    rows: list[dict[str, Any]] = [{"prompt_id": p.prompt_id, "answer": p.answer, "samples": []} for p in prompts]
    grader: GraderPool[int] = GraderPool(1)
    try:
        for lease in leases(prompts, settings):
            engine.submit(lease)
        wanted, graded = len(prompts) * settings.samples, 0
        drafts: dict[int, dict[str, Any]] = {}
        while graded < wanted:
            for sample in [] if engine.idle else engine.poll():
                text = tokenizer.decode(sample.response.tolist(), skip_special_tokens=True)
                number = sample.lease.rollout
                drafts[number] = {"response": text, "finish": sample.finish, "tokens": len(sample.response)}
                grader.submit(number, text, sample.lease.answer, sample.finish)
            for number, verdict in grader.poll(0.1 if engine.idle else 0.0):
                prompt, index = divmod(number, settings.samples)
                made = {"sample": index, "verdict": verdict.verdict, "reward": verdict.reward} | drafts.pop(number)
                rows[prompt]["samples"].append(made)
                graded += 1
                if progress is not None:
                    progress(graded, wanted)
    finally:
        grader.close()
        engine.close()
    for row in rows:
        row["samples"].sort(key=lambda made: made["sample"])
        row["correct"] = sum(made["reward"] == 1.0 for made in row["samples"])
    return rows


def leases(prompts: list[Prompt], settings: Settings) -> Iterator[Lease]:
    """Rollout p * k + i is sample i of problem p; its seed follows from that and the seed alone."""
    for number in range(len(prompts) * settings.samples):
        prompt, index = divmod(number, settings.samples)
        yield Lease(
            kind="eval",
            rollout=number,
            attempt=0,
            prompt_id=prompts[prompt].prompt_id,
            prompt=prompts[prompt].tokens,
            answer=prompts[prompt].answer,
            sample=index,
            seed=(settings.seed * 1_000_003 + number) % 2**63,
            version_floor=0,
            sampling=Sampling(settings.temperature, settings.max_new_tokens),
        )


def summary(rows: list[dict[str, Any]], samples: int) -> dict[str, Any]:
    """avg@k, pass@k for powers of two up to k, length and truncation."""
    correct = [row["correct"] for row in rows]
    made = [sample for row in rows for sample in row["samples"]]
    ks = [k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k <= samples]
    return {
        "problems": len(rows),
        "samples": samples,
        f"avg@{samples}": average(samples, correct)._asdict(),
        "pass": {str(k): best_of(samples, correct, k)._asdict() for k in ks},
        "length_mean": sum(sample["tokens"] for sample in made) / len(made),
        "truncated_fraction": sum(sample["finish"] == "length" for sample in made) / len(made),
    }


def write(out: Path, rows: list[dict[str, Any]], told: dict[str, Any]) -> None:
    """OUT/problems.jsonl, one problem a line, and OUT/summary.json."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (out / "summary.json").write_text(json.dumps(told, indent=1) + "\n")
    except OSError as error:
        raise DiskError(f"{out}: expected to write the results, found: {error.strerror}; free space") from error
