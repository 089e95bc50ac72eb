from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from tests.engines.kit import Make, make_transformers, start_vllm, vllm_maker

NOT_RUN = (
    "the vLLM half was NOT run: vLLM is not in this environment. `make test-vllm` installs it into .venv-vllm "
    "(3.4 GB, CPU) and runs both halves there"
)


def has_vllm() -> bool:
    from orz_async.errors import ConfigError
    from orz_async.generator.vllm_shim import require_vllm

    try:
        require_vllm()
    except ConfigError:
        return False
    return True


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not has_vllm():
        terminalreporter.write_line(NOT_RUN, yellow=True)


@pytest.fixture(scope="session")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One vLLM for all tests that ask for it."""
    if not has_vllm():
        pytest.skip(NOT_RUN)
    loop = start_vllm(tmp_path_factory.mktemp("model"))
    yield loop
    loop.close()
    del loop
    with warnings.catch_warnings():
        # vLLM leaves its ZeroMQ contexts to the garbage collector, which must not say so when pytest is half gone.
        warnings.simplefilter("ignore")
        gc.collect()


@pytest.fixture(params=["transformers", "vllm"])
def make(request: pytest.FixtureRequest) -> Make:
    """Makes engines of each kind in turn."""
    if request.param == "transformers":
        return make_transformers
    return vllm_maker(request.getfixturevalue("vllm"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # vLLM leaves its ZeroMQ contexts to the garbage collector.
    for item in items:
        if "/engines/" in str(item.path):
            item.add_marker(pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"))
            item.add_marker(pytest.mark.filterwarnings("ignore::ResourceWarning"))
