"""A base model some of whose responses run long, for the peers benchmark: a few rows of a batch are ten times the rest.

The demo's base is trained a little further on its own kind of text, in which one response of `SHARE` doubts at length:
after an opening of its own it goes on with one more doubt `GO_ON` of the time, so lengths have a geometric tail, cut by
the limit. Problems and held-out problems stay the demo's.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from orz_async.data import digit_sum
from orz_async.data.digit_sum import Digits

STEPS = 200
BATCH = 16
LEARNING_RATE = 1e-3
SHARE = 0.1
GO_ON = 0.98
LONGEST = 230
"""Characters, which are tokens, of a thought in the training text."""
OPENING, DOUBT = "hmm;", "wait;"
"""Easy to learn: random digits in a doubt drowned the gradient of the choice to doubt, which then was hardly made."""


def respond(digits: Digits, rng: random.Random) -> str:
    """Text after <think>: of the base's late mix, or with probability SHARE a long doubt and a guess."""
    if rng.random() >= SHARE:
        return digit_sum.respond(digits, digit_sum.draw_style(digit_sum.WEB_MIX, rng), rng)
    answer = f"{digit_sum.THINK_CLOSE}{digit_sum.ANSWER_OPEN}{digit_sum.BOX_OPEN}{rng.randrange(10)}}}{digit_sum.STOP}"
    thought = OPENING
    while len(thought) < LONGEST and rng.random() < GO_ON:
        thought += DOUBT
    return thought + answer


def make(base: Path, out: Path, *, seed: int = 0, steps: int = STEPS) -> None:
    """Write model/, train.jsonl and heldout.jsonl into `out`, which appears complete or not at all."""
    import torch
    from transformers import AutoModelForCausalLM

    from orz_async.data.files import read_problems
    from orz_async.data.template import render
    from orz_async.data.tokenizer import load_tokenizer

    torch.manual_seed(seed)
    torch.set_num_threads(1)
    path = str(base / "model")
    tokenizer = load_tokenizer(path)
    model = AutoModelForCausalLM.from_pretrained(
        path, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype=torch.float32
    )
    heldout = {problem.text for problem in read_problems(base / "heldout.jsonl")}
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    rng, end = random.Random(f"long tail {seed}"), tokenizer.eos_token_id or 0
    for step in range(steps):
        rows: list[tuple[list[int], list[int]]] = []
        while len(rows) < BATCH:
            digits = digit_sum.draw_corpus(rng)
            if digit_sum.problem(digits) in heldout:
                continue
            [prompt] = render([digit_sum.problem(digits)], "chat", tokenizer)
            rows.append((prompt, [*tokenizer.encode(respond(digits, rng), add_special_tokens=False), end]))
        longest = max(len(prompt) + len(response) for prompt, response in rows)
        tokens_BT, labels_BT = torch.full((BATCH, longest), end), torch.full((BATCH, longest), -100)
        for row, (prompt, response) in enumerate(rows):
            whole = torch.tensor(prompt + response)
            tokens_BT[row, : len(whole)], labels_BT[row, len(prompt) : len(whole)] = whole, whole[len(prompt) :]
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 - step / steps)
        loss = model(input_ids=tokens_BT, labels=labels_BT, use_cache=False).loss
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    fresh = out.with_name(f".{out.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(base, fresh)
    model.save_pretrained(fresh / "model")
    fresh.rename(out)
