"""The book as bytes for a checkpoint, and the book again from those bytes and the journal's entries since."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from orz_async.broker.book import Book
from orz_async.broker.prompt_queue import PromptQueue
from orz_async.broker.rollouts import Counts, Rollout, State
from orz_async.broker.transitions import Accepted, Ended, Entry, Granted, LedgerConfig, Restarted, Taken
from orz_async.errors import CheckpointError


class _SavedRollout(msgspec.Struct, frozen=True, array_like=True):
    number: int
    attempt: int
    state: int
    prompt: int
    failures: int
    version_first: int


class _Saved(msgspec.Struct, frozen=True):
    layout: int
    rollouts_per_step: int
    samples_per_prompt: int
    max_lag: int
    window: int
    version: int
    next_rollout: int
    taken: tuple[int, ...]
    bound: dict[int, tuple[int, ...]]
    odd_attempts: dict[int, int]
    rollouts: tuple[_SavedRollout, ...]
    prompts: PromptQueue
    counts: Counts


_LAYOUT = 1
_FIXED = ("rollouts_per_step", "samples_per_prompt", "max_lag", "window")


def save(book: Book) -> bytes:
    config = book.config
    return msgspec.msgpack.encode(
        _Saved(
            layout=_LAYOUT,
            rollouts_per_step=config.rollouts_per_step,
            samples_per_prompt=config.samples_per_prompt,
            max_lag=config.max_lag,
            window=config.window,
            version=book.version,
            next_rollout=book.next_rollout,
            taken=book.taken,
            bound=book.bound,
            odd_attempts=book.odd_attempts,
            rollouts=tuple(
                _SavedRollout(r.number, r.attempt, r.state.value, r.prompt, r.failures, r.version_first)
                for r in book.rollouts.values()
            ),
            prompts=book.prompts,
            counts=book.counts,
        )
    )


def load(data: bytes, config: LedgerConfig, prompt_id: Callable[[int], str]) -> Book:
    """The book as it was saved; attempts held then are still HELD, until `replay` or `Book.restart` ends them."""
    try:
        saved = msgspec.msgpack.decode(data, type=_Saved)
    except msgspec.DecodeError as error:
        raise CheckpointError(f"the ledger's snapshot cannot be read: {error}; use an older checkpoint") from error
    if saved.layout != _LAYOUT:
        raise CheckpointError(f"the ledger's snapshot has layout {saved.layout}, this version reads {_LAYOUT}")
    for name in _FIXED:
        found, expected = getattr(saved, name), getattr(config, name)
        if found != expected:
            raise CheckpointError(
                f"the checkpoint was made with {name} = {found}, the configuration now says {expected}; "
                "rollouts are numbered by it, so resume with the old value or start a new run"
            )
    book = Book(config, prompt_id)
    book.version = saved.version
    book.next_rollout = saved.next_rollout
    book.taken = saved.taken
    book.bound = saved.bound
    book.odd_attempts = saved.odd_attempts
    book.prompts = saved.prompts
    book.counts = saved.counts
    for r in saved.rollouts:
        sample = r.number % config.samples_per_prompt
        rollout = Rollout("train", r.number, book.floor(r.number), r.prompt, sample, r.attempt, State(r.state))
        rollout.failures, rollout.version_first = r.failures, r.version_first
        book.rollouts[r.number] = rollout
    book.reindex()
    return book


def replay(book: Book, entry: Entry) -> None:
    """Apply a decision made after the snapshot. Publications are not replayed: the weights they made are lost."""
    match entry:
        case Granted():
            for terms in entry.terms:
                if terms.rollout == book.next_rollout:
                    book.admit()
                rollout = _rollout(book, entry, terms.rollout, terms.attempt - 1)
                if rollout.attempt >= 0:
                    book.lost.remove(rollout.number)
                book.grant(rollout)
                _check(rollout.prompt == terms.prompt, entry)
        case Accepted():
            rollout = _rollout(book, entry, entry.lease.rollout, entry.lease.attempt)
            book.accept(rollout, entry.version_first)
        case Ended():
            rollout = _rollout(book, entry, entry.lease.rollout, entry.lease.attempt)
            book.end(rollout, entry.cause, entry.blamed)
        case Taken():
            if entry.step >= book.version:
                book.bound[entry.step] = entry.rollouts
        case Restarted():
            book.restart(entry.lost)


def _rollout(book: Book, entry: Entry, number: int, attempt: int) -> Rollout:
    rollout = book.rollouts.get(number)
    if rollout is None or rollout.attempt != attempt:
        _check(False, entry)
    assert rollout is not None
    return rollout


def _check(agrees: bool, entry: Entry) -> None:
    if not agrees:
        raise CheckpointError(f"journal and checkpoint tell different stories at {entry}; use another checkpoint")
