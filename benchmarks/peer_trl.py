"""TRL's GRPO on our task, run by `benchmarks.peers` with the interpreter of the peers' environment (`make peers-dev`).

Everything that is not TRL is ours, so that both sides do the same work: the problem files, their order and template
(`data.source.build`), the rule that grades (`reward.grade`), the learning rate of each update, AdamW, the held-out
problems. A response ends with the token </answer> or the end of the text, as it does with us: TRL is told that both
are ends of a sequence.

The clock begins when TRL begins to train and stops while held-out problems are sampled and graded. Ours does not stop
for that, because our generators do it while they train: what evaluations cost us is in our times, and not in TRL's.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orz_async.config import DataConfig
from orz_async.data.source import build
from orz_async.data.tokenizer import Tokenizer, load_tokenizer
from orz_async.records import Prompt, as_int32
from orz_async.reward.grade import Verdict, grade

STOP = "</answer>"
BETAS = (0.9, 0.95)


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What both sides are given."""

    base: Path
    """Folder of `orz make-base`: model/, train.jsonl, heldout.jsonl."""
    steps: int
    seed: int = 0
    prompts: int = 32
    samples: int = 4
    max_new_tokens: int = 96
    lr: float = 2e-4
    lr_final: float = 0.1
    eval_every: int = 10
    """0: never."""
    eval_prompts: int = 200
    threads: int = 2
    microbatches: int = 4
    """Padded batches that one update is computed in; one of all rollouts takes a tenth longer here."""


@dataclass(slots=True)
class Clock:
    """Training seconds: time since the start, less that spent in `stopped` blocks."""

    now: Callable[[], float] = time.perf_counter
    started: float = 0.0
    left_out: float = 0.0

    def start(self) -> None:
        self.started, self.left_out = self.now(), 0.0

    def read(self) -> float:
        return self.now() - self.started - self.left_out

    def leave_out(self, work: Callable[[], Any]) -> Any:
        """The result of `work`, whose time does not count."""
        began = self.now()
        result = work()
        self.left_out += self.now() - began
        return result


@dataclass(slots=True)
class Record:
    """What the run leaves: lists by update and by evaluation."""

    steps: list[dict[str, float]] = field(default_factory=list)
    evals: list[dict[str, float]] = field(default_factory=list)


def problems(options: Options, tokenizer: Tokenizer) -> tuple[list[dict[str, str]], list[Prompt]]:
    """(one row for each prompt of each update, in the order our learner trains them; the held-out prompts)."""
    data = DataConfig(
        train=str(options.base / "train.jsonl"), heldout=str(options.base / "heldout.jsonl"), max_prompt_tokens=64
    )
    source, heldout = build(data, tokenizer, options.seed)
    rows = []
    for index in range(options.steps * options.prompts):
        prompt = source.prompt(index)
        rows.append({"prompt": text_of(prompt, tokenizer), "answer": prompt.answer})
    return rows, heldout[: options.eval_prompts]


def text_of(prompt: Prompt, tokenizer: Tokenizer) -> str:
    """The prompt as text, which TRL encodes again: it must become the same tokens."""
    tokens = as_int32(prompt.tokens).tolist()
    text = tokenizer.decode(tokens, skip_special_tokens=False)
    if tokenizer([text])["input_ids"][0] != tokens:
        raise SystemExit(f"peer_trl: expected {text!r} to become the tokens it was made of, found others")
    return text


def ends(tokenizer: Tokenizer) -> list[int]:
    """Tokens that end a response: the end of the text, and </answer> where it is one token."""
    stop = tokenizer.encode(STOP, add_special_tokens=False)
    if len(stop) != 1 or tokenizer.eos_token_id is None:
        raise SystemExit(
            f"peer_trl: expected {STOP} to be one token and an end of the text, found {stop}; use the demo"
        )
    return [tokenizer.eos_token_id, stop[0]]


def score(text: str, answer: str, tokens: Sequence[int], end_tokens: Sequence[int]) -> float:
    """Our rule. What its exact part leaves undecided is none of the task's answers, which are single digits: wrong."""
    finish = "stop" if tokens and tokens[-1] in end_tokens else "length"
    verdict = grade(text, answer, "stop" if finish == "stop" else "length")
    return verdict.reward if isinstance(verdict, Verdict) else 0.0


def evaluate(model: Any, tokenizer: Tokenizer, heldout: Sequence[Prompt], options: Options) -> dict[str, float]:
    """One sample of each held-out prompt at temperature 1, as our recipe evaluates; left-padded, in one batch."""
    import torch

    stop = ends(tokenizer)
    pad = stop[0]
    prompts = [as_int32(prompt.tokens).tolist() for prompt in heldout]
    longest = max(map(len, prompts))
    tokens_BT = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])
    mask_BT = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    training = model.training
    model.eval()
    with torch.no_grad():
        made_BT = model.generate(
            input_ids=tokens_BT,
            attention_mask=mask_BT,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=options.max_new_tokens,
            eos_token_id=stop,
            pad_token_id=pad,
        )[:, longest:]
    model.train(training)
    responses = [cut(row, stop) for row in made_BT.tolist()]
    scores = [
        score(tokenizer.decode(response, skip_special_tokens=True), prompt.answer, response, stop)
        for response, prompt in zip(responses, heldout, strict=True)
    ]
    return {
        "accuracy": sum(scores) / len(scores),
        "length": sum(map(len, responses)) / len(responses),
    }


def cut(tokens: Sequence[int], end_tokens: Sequence[int]) -> list[int]:
    """Up to and with the first end token."""
    for position, token in enumerate(tokens):
        if token in end_tokens:
            return list(tokens[: position + 1])
    return list(tokens)


def train(options: Options) -> Record:
    """Run TRL; everything is in memory, nothing is written or reported anywhere."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(options.threads)
    path = str(options.base / "model")
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        path, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype=torch.float32
    )
    ours = load_tokenizer(path)
    stop = ends(ours)
    model.generation_config.eos_token_id = stop
    rows, heldout = problems(options, ours)
    record, clock = Record(), Clock()
    lengths: list[int] = []

    def reward(completions: list[str], completion_ids: list[list[int]], answer: list[str], **_: Any) -> list[float]:
        lengths[:] = [len(tokens) for tokens in completion_ids]
        return [score(*row, stop) for row in zip(completions, answer, completion_ids, strict=True)]

    class Watch(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.start()
            self.look(0)

        def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            record.steps.append({"wall_s": clock.read(), "tokens": float(sum(lengths)), "longest": float(max(lengths))})
            self.look(int(state.global_step))

        def look(self, version: int) -> None:
            every = options.eval_every
            if every and (version % every == 0 or version == options.steps):
                at = clock.read()
                found = clock.leave_out(lambda: evaluate(model, ours, heldout, options))
                record.evals.append({"version": float(version), "wall_s": at} | found)

    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=BETAS, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: fraction(step, options))
    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=reward,
        train_dataset=Dataset.from_list(rows),
        args=GRPOConfig(**settings(options)),
        optimizers=(optimizer, schedule),
        callbacks=[Watch()],
    )
    trainer.train()
    return record


def fraction(step: int, options: Options) -> float:
    """Of the learning rate, at an update: as `Schedule` of the learner has it without warm-up."""
    return 1.0 - (1.0 - options.lr_final) * step / options.steps


def settings(options: Options) -> dict[str, Any]:
    """TRL's options: the objective of our recipe without a critic, and nothing that costs a CPU time for nothing: one
    generation for each update, so that no second pass for old log-probs is needed; no mixed precision (slow here), no
    checkpointing, no reference model, no reports."""
    return {
        "output_dir": "unused",
        "max_steps": options.steps,
        "seed": options.seed,
        "per_device_train_batch_size": options.prompts * options.samples // options.microbatches,
        "gradient_accumulation_steps": options.microbatches,
        "num_generations": options.samples,
        "shuffle_dataset": False,
        "max_completion_length": options.max_new_tokens,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "beta": 0.0,
        "num_iterations": 1,
        "epsilon": 0.2,
        "loss_type": "dapo",
        "scale_rewards": "group",
        "max_grad_norm": 1.0,
        "bf16": False,
        "fp16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "save_strategy": "no",
        "eval_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--options", required=True, help="a JSON object with the fields of Options")
    parser.add_argument("--out", type=Path, required=True, help="file for the record, JSON")
    arguments = parser.parse_args()
    given = json.loads(arguments.options)
    record = train(Options(**(given | {"base": Path(given["base"])})))
    arguments.out.write_text(json.dumps({"steps": record.steps, "evals": record.evals, "versions": versions()}) + "\n")


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("trl", "transformers", "torch", "accelerate")}


if __name__ == "__main__":
    main()
