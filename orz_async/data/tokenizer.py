"""Loads the tokenizer of a model directory, and says what this package needs of one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from orz_async.errors import ModelError


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used here."""

    eos_token_id: int | None

    def __len__(self) -> int: ...

    def __call__(self, text: list[str], *, add_special_tokens: bool = True) -> Any: ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str: ...

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, add_generation_prompt: bool, tokenize: bool
    ) -> Any: ...


def load_tokenizer(model_path: str | Path) -> Tokenizer:
    """Read the tokenizer from a local directory; no network is asked and no code of the directory is run."""
    directory = Path(model_path)
    if not directory.is_dir():
        raise ModelError(
            f"expected a model directory at {directory}, found {'a file' if directory.exists() else 'nothing'}; "
            "make the demo's with `orz make-base`, or set model.path to a downloaded Hugging Face directory"
        )
    # Imported here: it takes seconds, brings torch along, and reading prompts needs neither.
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        found = ", ".join(sorted(path.name for path in directory.iterdir())) or "an empty directory"
        raise ModelError(
            f"expected a loadable tokenizer (tokenizer.json, tokenizer_config.json) in {directory}, found {found} "
            f"({error}); copy the tokenizer files of the model there"
        ) from error
    return cast(Tokenizer, tokenizer)
