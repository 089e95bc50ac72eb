"""A problem becomes the text the policy continues."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from orz_async.data.tokenizer import Tokenizer
from orz_async.errors import DataError

Template = Literal["orz", "chat", "plain"]

ORZ_CONVERSATION = (
    "Below, User poses a problem and Assistant solves it. Assistant works on the problem in private first, writing "
    "every step between <think> and </think>, and then states the outcome between <answer> and </answer>. Inside the "
    "answer tags the final result, and nothing else, is put in \\boxed{{}}.\n"
    "User: {problem}\n"
    "Assistant: <think>"
)
"""The conversation for base models without a chat template. It opens the thought, so a response begins inside one."""


def render(problems: Sequence[str], template: Template, tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of each problem's prompt."""
    if not problems:
        return []
    if template == "chat":
        # The chat template writes the special tokens itself; adding them again would double the first.
        return _encode([_chat(problem, tokenizer) for problem in problems], tokenizer, add_special_tokens=False)
    if template == "orz":
        problems = [ORZ_CONVERSATION.format(problem=problem) for problem in problems]
    return _encode(problems, tokenizer, add_special_tokens=True)


def _chat(problem: str, tokenizer: Tokenizer) -> str:
    message = {"role": "user", "content": problem}
    try:
        return str(tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False))
    except ValueError as error:
        raise DataError(
            f"expected the tokenizer to have a chat template, found none that works ({error}); "
            'set data.template to "orz" for a base model, or "plain" if the file holds complete prompts'
        ) from error


def _encode(texts: Sequence[str], tokenizer: Tokenizer, *, add_special_tokens: bool) -> list[list[int]]:
    encoded: list[list[int]] = tokenizer(list(texts), add_special_tokens=add_special_tokens)["input_ids"]
    return encoded
