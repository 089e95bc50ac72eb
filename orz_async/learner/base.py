"""Makes a base model: a Qwen2 trained from scratch on text of mixed quality, as if from the web.

consumes  a plan (base_plan.py: task, size, steps) and a seed
produces  a folder: model/ (Hugging Face directory with tokenizer), train.jsonl, heldout.jsonl, base.json

Early text is mostly full working, from which the single steps are learned; late text is mostly guesses. The result can
work a problem out but rarely does, so there is something for reinforcement learning to find. The number of steps is
fixed rather than the seconds, so that on CPU equal seeds and threads give equal bits.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from orz_async.data import digit_sum
from orz_async.data.char_tokenizer import vocabulary, write_tokenizer
from orz_async.data.task import Task
from orz_async.data.template import render
from orz_async.data.tokenizer import Tokenizer, load_tokenizer
from orz_async.errors import ConfigError, DiskError, NumericError
from orz_async.learner.base_plan import TINY, BasePlan
from orz_async.reward.grade import Verdict, grade

IGNORED = -100
"""Target of positions that carry no loss."""

Progress = Callable[[str, float], None]
"""Called with what is being done and the fraction of the whole that is finished."""


def make_base(
    out: Path,
    *,
    plan: BasePlan = TINY,
    seed: int = 0,
    steps: int | None = None,
    threads: int = 1,
    device: str = "cpu",
    dtype: str = "float32",
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train the base model and write it with its problems to `out`, which appears complete or not at all.

    `steps` instead of the plan's. `dtype` is what forward and backward compute in; the weights are float32.
    """
    if out.exists() and not force:
        raise ConfigError(f"expected {out} not to exist, found it; choose another folder, or replace it with --force")
    started = time.monotonic()
    fresh = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        (fresh / "model").mkdir(parents=True)
        write_tokenizer(fresh / "model")
        heldout = plan.task.draw_heldout(plan.heldout_problems, seed)
        write_problems(fresh / "heldout.jsonl", plan.task, heldout)
        train_problems = plan.task.draw_train(plan.train_problems, seed, frozenset(heldout))
        write_problems(fresh / "train.jsonl", plan.task, train_problems)
        tokenizer = load_tokenizer(fresh / "model")
        steps = plan.steps if steps is None else steps
        with _torch_state(seed, threads):
            model = new_model(plan).to(device)
            corpus = batches(tokenizer, frozenset(heldout), plan, seed=seed, steps=steps)
            train(model, corpus, plan, steps=steps, dtype=getattr(torch, dtype), progress=progress or _silent)
            report = {
                "plan": plan.name,
                "seed": seed,
                "steps": steps,
                "threads": threads,
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "torch": torch.__version__,
                "seconds": round(time.monotonic() - started, 1),
                "device": device,
                "dtype": dtype,
                "heldout": check(model, tokenizer, heldout, plan, seed=seed),
            }
        model.save_pretrained(fresh / "model")
        (fresh / "base.json").write_text(json.dumps(report, indent=2) + "\n", encoding="ascii")
        _put_in_place(fresh, out)
    except OSError as error:
        raise DiskError(
            f"{out}: expected to write the base model there, found: {error.strerror}; free space"
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return report


def new_model(plan: BasePlan = TINY) -> Any:
    """A Qwen2 of this size with random weights, on CPU."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return Qwen2ForCausalLM(  # type: ignore[no-untyped-call]
        Qwen2Config(
            vocab_size=len(vocabulary()),
            hidden_size=plan.hidden,
            intermediate_size=plan.intermediate,
            num_hidden_layers=plan.layers,
            num_attention_heads=plan.heads,
            num_key_value_heads=plan.heads,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
            dtype="float32",
        )
    )


def train(
    model: Any,
    corpus: Iterable[tuple[Tensor, Tensor]],
    plan: BasePlan,
    *,
    steps: int,
    dtype: torch.dtype,
    progress: Progress,
) -> None:
    """Next-token loss on the responses only, AdamW, cosine decay to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.learning_rate, betas=plan.adam_betas, weight_decay=0.01)
    device: torch.device = model.device
    model.train()
    for step, (tokens_BT, targets_BT) in enumerate(corpus):
        warm, decay = min(1.0, (step + 1) / plan.warmup_steps), (1 + math.cos(math.pi * step / steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate * warm * decay
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits_BTV = model(input_ids=tokens_BT.to(device), use_cache=False).logits
        loss = functional.cross_entropy(
            logits_BTV[:, :-1].flatten(0, 1).float(),
            targets_BT[:, 1:].flatten().to(device),
            ignore_index=IGNORED,
        )
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            if not math.isfinite(loss.item()):
                raise NumericError(f"expected a finite loss, found {loss.item()} at step {step}; use another seed")
            progress(f"base model: step {step} of {steps}, loss {loss.item():.3f}", step / steps)
    model.eval()
    progress("base model: checking", 1.0)


def batches(
    tokenizer: Tokenizer, heldout: frozenset[Any], plan: BasePlan, *, seed: int, steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Token and target batches, right-padded; prompts, padding and every held-out problem are left out of the loss."""
    task = plan.task
    rng = random.Random(f"{task.NAME} corpus {seed}")
    end = tokenizer.eos_token_id
    assert end is not None, "the task's own tokenizer has an end of sequence"
    for step in range(steps):
        mix = task.CLEAN_MIX if step < plan.clean_share * steps else task.WEB_MIX
        problems: list[Any] = []
        while len(problems) < plan.batch:
            if (made := task.draw_corpus(rng)) not in heldout:
                problems.append(made)
        prompts = render([task.problem(made) for made in problems], "chat", tokenizer)
        responses = [
            [*tokenizer.encode(task.respond(made, digit_sum.draw_style(mix, rng), rng)), end] for made in problems
        ]
        longest = max(len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True))
        tokens_BT = torch.full((plan.batch, longest), end)
        targets_BT = torch.full((plan.batch, longest), IGNORED)
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            total = len(prompt) + len(response)
            tokens_BT[row, :total] = torch.tensor(prompt + response)
            targets_BT[row, len(prompt) : total] = torch.tensor(response)
        yield tokens_BT, targets_BT


def check(model: Any, tokenizer: Tokenizer, heldout: list[Any], plan: BasePlan, *, seed: int) -> dict[str, Any]:
    """Sample each held-out problem once at temperature 1 and grade it by the rule that training uses."""
    generator = torch.Generator(model.device).manual_seed(seed)
    stop = tokenizer.encode(digit_sum.STOP)[-1]
    count: Counter[str] = Counter()
    correct: Counter[str] = Counter()
    tokens = truncated = 0
    rendered = render([plan.task.problem(made) for made in heldout], "chat", tokenizer)
    # One length of prompt at a time, so that none needs padding.
    for length in sorted(set(map(len, rendered))):
        problems = [made for made, prompt in zip(heldout, rendered, strict=True) if len(prompt) == length]
        prompts = [prompt for prompt in rendered if len(prompt) == length]
        responses = sample(model, prompts, stop, generator, max_new_tokens=plan.max_new_tokens)
        for made, response in zip(problems, responses, strict=True):
            text = tokenizer.decode(response)
            is_finished = response[-1] in (stop, tokenizer.eos_token_id)
            verdict = grade(text, plan.task.solution(made), "stop" if is_finished else "length")
            style = plan.task.style_of(text, made)
            count[style] += 1
            correct[style] += isinstance(verdict, Verdict) and verdict.reward == 1.0
            tokens += len(response)
            truncated += not is_finished
    total = count.total()
    return {
        "samples": total,
        "accuracy": round(correct.total() / total, 4),
        "length_mean": round(tokens / total, 2),
        "truncated_fraction": round(truncated / total, 4),
        "styles": {
            style: {"share": round(count[style] / total, 4), "accuracy": round(correct[style] / count[style], 4)}
            for style in sorted(count)
        },
    }


@torch.no_grad()
def sample(
    model: Any, prompts: list[list[int]], stop: int, generator: torch.Generator, *, max_new_tokens: int
) -> list[list[int]]:
    """Responses to prompts of one length at temperature 1, up to and with the stop token, by a plain cached loop."""
    responses: list[list[int]] = [[] for _ in prompts]
    running = list(range(len(prompts)))
    tokens_BT, cache = torch.tensor(prompts, device=model.device), None
    end = model.config.eos_token_id
    for _ in range(max_new_tokens):
        output = model(input_ids=tokens_BT, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        tokens_BT = torch.multinomial(output.logits[:, -1].float().softmax(-1), 1, generator=generator)
        for index, token in zip(running, tokens_BT[:, 0].tolist(), strict=True):
            responses[index].append(token)
        kept = [row for row, index in enumerate(running) if responses[index][-1] not in (stop, end)]
        if not kept:
            break
        if len(kept) < len(running):
            running = [running[row] for row in kept]
            tokens_BT = tokens_BT[kept]
            cache.batch_select_indices(torch.tensor(kept, device=model.device))
    return responses


def write_problems(path: Path, task: Task[Any], problems: list[Any]) -> None:
    rows = ({"prompt": task.problem(made), "answer": task.solution(made)} for made in problems)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="ascii")


@contextmanager
def _torch_state(seed: int, threads: int) -> Iterator[None]:
    """Seeded and on a fixed number of threads, on which sums depend; the caller's state is put back."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(before)


def _put_in_place(fresh: Path, out: Path) -> None:
    """Rename the finished folder; one that is replaced is moved aside first, as a folder cannot be renamed onto it."""
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists():
        out.rename(old)
    fresh.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _silent(what: str, fraction: float) -> None:
    """No progress was asked for."""
