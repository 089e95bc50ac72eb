"""The demo's tokenizer: one token a character, and one for each tag of the ORZ conversation.

Written as the plain files of a Hugging Face directory, so that every reader of such directories can load it.
"""

from __future__ import annotations

import json
from pathlib import Path

from orz_async.data.digit_sum import ANSWER_CLOSE, ANSWER_OPEN, BOX_OPEN, THINK_CLOSE, THINK_OPEN

END = "<|endoftext|>"
"""End of sequence, and padding."""
UNKNOWN = "<|unknown|>"
USER, ASSISTANT = "User:", "Assistant:"
TAGS = (USER, ASSISTANT, THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE, BOX_OPEN)
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}" + USER + "{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}" + ASSISTANT + "{{ message['content'] }}" + END + "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}" + ASSISTANT + THINK_OPEN + "{% endif %}"
)
"""The assistant's turn is opened with <think>, so a response begins in the middle of a thought."""


def vocabulary() -> list[str]:
    """Token texts, in the order of their ids."""
    return [END, UNKNOWN, *TAGS, *CHARACTERS]


def write_tokenizer(directory: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja into an existing directory."""
    ids = {text: index for index, text in enumerate(vocabulary())}
    added = [
        {
            "id": ids[text],
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": text in (END, UNKNOWN),
        }
        for text in (END, UNKNOWN, *TAGS)
    ]
    # BPE without merges is exactly one token a character.
    model: dict[str, object] = {
        "type": "BPE",
        "dropout": None,
        "unk_token": UNKNOWN,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": ids,
        "merges": [],
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": model,
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": END,
        "pad_token": END,
        "unk_token": UNKNOWN,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "padding_side": "left",
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer, indent=1), encoding="ascii")
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="ascii")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="ascii")
