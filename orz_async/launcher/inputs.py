"""What a run reads, looked at before anything is started: a wrong path costs a sentence, not three processes."""

from __future__ import annotations

from orz_async.config import Config
from orz_async.data.files import read_problems
from orz_async.learner.hf_directory import inspect


def check_inputs(config: Config) -> None:
    """ModelError or DataError where the learner, which looks again, would end with it anyway."""
    inspect(config.model.path)
    for path in filter(None, (config.data.train, config.data.heldout)):
        read_problems(path)
