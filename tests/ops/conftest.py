from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from orz_async.ops import backend


@pytest.fixture(params=["reference", "cpu"])
def ops_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once for each backend that serves host memory."""
    with backend.using(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """torch.empty holds NaN, so that an element of an output that nobody wrote is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.isnan(torch.empty(3)).all()
    yield
    torch.use_deterministic_algorithms(False)
