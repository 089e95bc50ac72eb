"""Stop strings, matched as tokens arrive and without tokenising text again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Decode = Callable[[list[int]], str]
"""Token ids to text, special tokens included; nothing for an id without a text."""

_PARTIAL = "\ufffd"
"""What a decoder writes for bytes that are not a whole character."""

_CONTEXT = 8
"""Tokens decoded before the ones that may hold the stop string: the first of a cut may lose bytes or a space."""


class StopMatcher:
    """Decides whether the last token of a response completed a stop string.

    A token can do so only if its text holds the last character of one, or part of a character. Those ids are found
    once; for all others the answer is a table look-up. For the rest the tail of the response is decoded: a token
    stands for at least one byte, so a tail of as many tokens as the longest stop string has bytes holds it whole.
    Earlier tokens were asked about when they came, so finding a stop string in the tail means this token completed it.
    """

    def __init__(self, stop: Sequence[str], decode: Decode, vocab_size: int) -> None:
        self._stop = tuple(stop)
        self._decode = decode
        self._tail = _CONTEXT + max((len(text.encode()) for text in stop), default=0)
        self._candidates_V = np.zeros(vocab_size, np.bool_)
        self._whole: set[int] = set()
        if self._stop:
            ends = {text[-1] for text in stop} | {_PARTIAL}
            texts = _texts(decode, vocab_size)
            for token, text in enumerate(texts):
                self._candidates_V[token] = not ends.isdisjoint(text)
                if any(stop in text for stop in self._stop):
                    self._whole.add(token)

    def candidates(self, tokens_B: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of these last tokens deserve a look at the text."""
        return self._candidates_V[tokens_B]

    def candidate(self, token: int) -> bool:
        return bool(self._candidates_V[token])

    def whole(self) -> frozenset[int]:
        """Tokens that hold a stop string by themselves: they end a response whatever came before."""
        return frozenset(self._whole)

    def completed(self, response_T: NDArray[np.int32]) -> bool:
        text = self._decode(response_T[-self._tail :].tolist())
        return any(stop in text for stop in self._stop)


def _texts(decode: Decode, vocab_size: int) -> Iterator[str]:
    """Text of each token after a letter or digit: some decoders drop a space at the beginning of what they decode."""
    anchor = next((token for token in range(vocab_size) if decode([token]).isalnum()), None)
    if anchor is None:
        return (decode([token]) for token in range(vocab_size))
    before = len(decode([anchor]))
    return (decode([anchor, token])[before:] for token in range(vocab_size))
