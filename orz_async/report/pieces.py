"""Token ids as the pieces of text they stand for, one piece a token, without importing torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

_BROKEN = "\ufffd"
_LONGEST_CHARACTER = 4  # bytes of UTF-8


class Pieces:
    """The tokenizer of a model directory. Without one, a piece is the token's number in brackets."""

    def __init__(self, model_path: Path) -> None:
        self.missing = ""
        """Why there is no text, if there is none."""
        self._tokenizer: Any = None
        self._cache: dict[int, str] = {}
        path = model_path / "tokenizer.json"
        from tokenizers import Tokenizer

        if not path.is_file():
            self.missing = f"no tokenizer.json in {model_path}: responses are shown as token numbers"
            return
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower; a report of numbers is better than none
            self.missing = f"unreadable tokenizer.json in {model_path} ({error}): responses are shown as token numbers"
            return
        # A token alone loses the space before it with some tokenizers: each is decoded behind the same other one.
        self._anchor = self._tokenizer.encode("a", add_special_tokens=False).ids[-1:]
        self._anchor_text = self._tokenizer.decode(self._anchor, skip_special_tokens=False)

    def __call__(self, ids: Sequence[int]) -> list[str]:
        """One piece a token; joined they are the text. A character of several tokens stands in its last one."""
        pieces = [self._piece(token) for token in ids]
        if self._tokenizer is not None and any(_BROKEN in piece for piece in pieces):
            self._mend(ids, pieces)
        return pieces

    def _piece(self, token: int) -> str:
        piece = self._cache.get(token)
        if piece is None:
            piece = self._cache[token] = f"[{token}]" if self._tokenizer is None else self._decode([token])
        return piece

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode([*self._anchor, *ids], skip_special_tokens=False)
        if text.startswith(self._anchor_text):
            return text[len(self._anchor_text) :]
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def _mend(self, ids: Sequence[int], pieces: list[str]) -> None:
        start = 0
        while start < len(ids):
            if _BROKEN in pieces[start]:
                for end in range(start + 2, min(start + _LONGEST_CHARACTER, len(ids)) + 1):
                    if _BROKEN not in (text := self._decode(ids[start:end])):
                        pieces[start:end] = [""] * (end - start - 1) + [text]
                        start = end - 1
                        break
            start += 1
