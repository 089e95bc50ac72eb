"""What the journal of a finished run says of lengths."""

from __future__ import annotations

from orz_async.broker.segments import records
from orz_async.broker.transitions import Ended, Granted, Taken
from orz_async.records import Trajectory
from tests.e2e.conftest import Run


def check_lengths(run: Run, num_rollouts: int) -> None:
    """Every rollout that was sampled to its end was trained on, once: so no length is over- or under-represented."""
    generated: dict[int, int] = {}
    trained: list[int] = []
    granted = ended = 0
    for _, record, _ in records(run.folder / "journal"):
        match record:
            case Trajectory():
                assert record.rollout not in generated, "a rollout was accepted twice"
                generated[record.rollout] = record.num_response_tokens
            case Granted():
                granted += len(record.terms)
            case Ended():
                ended += 1
            case Taken():
                trained += record.rollouts
    assert sorted(trained) == sorted(generated) == list(range(num_rollouts))
    # Nothing was sampled and thrown away: every attempt that did not fail was trained on.
    assert granted == len(trained) + ended
    assert len(set(generated.values())) > 5, "all lengths alike would prove nothing"
    assert sum(step["tokens_trained"] for step in run.steps()) == sum(generated.values())
