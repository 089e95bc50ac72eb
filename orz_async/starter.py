"""`orz init DIR`: a recipe and two task files to begin from, with the reasons beside the settings."""

from __future__ import annotations

import json
from pathlib import Path

from orz_async.errors import ConfigError, DiskError

RECIPE = """\
# A run on your own problems. Start it with
#
#     orz run {folder}/recipe.toml
#
# `orz run --help` lists every setting; whatever is not here has its default. Paths count from where you start the run.

run_dir = "runs/{name}"    # events, journal, checkpoints and the exported model go here; the same command resumes
seed = 0
steps = {steps}            # learner steps; each trains on prompts_per_step x samples_per_prompt rollouts

[model]
path = {model}             # a Hugging Face directory: policy and critic both start from it
dtype = "float32"          # "bfloat16" on a GPU

[data]
train = {train}
heldout = {heldout}        # evaluated every eval.every steps, and kept out of training; "" for none
template = {template}      # "orz": for base models; "chat": the tokenizer's own; "plain": the text as it is
max_prompt_tokens = 256    # longer prompts are left out, and counted

[sampling]
temperature = 1.0          # what is sampled is what is trained on: leave it at 1 unless you know why
max_new_tokens = {tokens}  # a response that is cut here is graded as it stands; watch "truncated" in the report

[broker]
prompts_per_step = {prompts}
samples_per_prompt = {samples}
max_lag = 1                # S: how many versions old a token may be when it is trained on; 0 is synchronous

[generator]
engine = "transformers"    # "vllm" on a GPU, after pip install 'orz_async[vllm]'
count = 1                  # daemons on this machine; more can join later from elsewhere
slots = 64                 # responses one daemon writes at once

[learner]
lr = {lr}
critic_lr = {critic_lr}
warmup_steps = 0
critic_steps = 4           # K: optimizer steps of the critic a learner step
max_tokens = 4096          # tokens of one microbatch: raise it until memory is full

[eval]
every = 5
prompts = 100              # the first ones of the held-out file

[checkpoint]
every = 10
"""

PROBLEMS = (("a1b2=?", "3"), ("a4b3=?", "7"), ("a2b2c2=?", "6"), ("a5b4=?", "9"), ("a1b1c5=?", "7"), ("a3b5=?", "8"))
HELDOUT = (("a2b6=?", "8"), ("a1b3c4=?", "8"), ("a6b1=?", "7"), ("a0b9=?", "9"))


def write_starter(folder: Path, model: Path) -> list[Path]:
    """Write recipe.toml, train.jsonl and heldout.jsonl; nothing that is there already is touched."""
    files = {name: folder / name for name in ("recipe.toml", "train.jsonl", "heldout.jsonl")}
    if existing := [str(path) for path in files.values() if path.exists()]:
        raise ConfigError(f"expected a folder without {', '.join(existing)}; choose another one, or remove them")
    template = "chat" if _has_chat_template(model) else "orz"
    recipe = RECIPE.format(
        folder=folder,
        name=folder.absolute().name,
        steps=20,
        model=json.dumps(str(model)),
        train=json.dumps(str(files["train.jsonl"])),
        heldout=json.dumps(str(files["heldout.jsonl"])),
        template=json.dumps(template),
        tokens=96,
        prompts=4,
        samples=4,
        lr="1e-4",
        critic_lr="5e-4",
    )
    texts = {
        "recipe.toml": recipe,
        "train.jsonl": _rows(PROBLEMS),
        "heldout.jsonl": _rows(HELDOUT),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            files[name].write_text(text, encoding="utf-8")
    except OSError as error:
        raise DiskError(f"expected to write into {folder}, found {error.strerror}; choose another folder") from error
    return list(files.values())


def _rows(problems: tuple[tuple[str, str], ...]) -> str:
    return "".join(json.dumps({"prompt": prompt, "answer": answer}) + "\n" for prompt, answer in problems)


def _has_chat_template(model: Path) -> bool:
    if (model / "chat_template.jinja").exists():
        return True
    try:
        return "chat_template" in json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
