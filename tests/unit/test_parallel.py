"""Several gloo ranks do what one does, messages outlive long waits, and any number of ranks resumes a checkpoint."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import learner_kit as kit
import learner_ranks
import pytest
import torch
from safetensors.torch import load_file

from orz_async.learner.parallel import World

SCRIPT = Path(learner_ranks.__file__)


def spawn(script: Path, size: int, *arguments: str) -> list[subprocess.Popen[str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, str(script), *arguments],
            env=os.environ | own | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(script.parents[2])},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def start_ranks(folder: Path, size: int, *resume_from: int) -> list[dict[str, Any]]:
    """Run `size` ranks to their end and give back what each of them wrote."""
    processes = spawn(SCRIPT, size, str(folder), *map(str, resume_from))
    try:
        errors = [process.communicate(timeout=280)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(errors)
    return [json.loads((folder / f"rank{rank}of{size}.json").read_text()) for rank in range(size)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("ranks")
    kit.save_model(made / "model")
    return made


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    """What a single rank says, without a process group."""
    return {case: learner_ranks.from_start(case, folder, World.single()) for case in learner_ranks.CASES}


@pytest.fixture(scope="module")
def two(folder: Path, one: dict[str, Any]) -> list[dict[str, Any]]:
    """What each of two ranks says; they also resume what the single one saved."""
    return start_ranks(folder, 2, 1, 2)


@pytest.fixture(scope="module")
def four(folder: Path, two: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """They resume what two ranks saved."""
    return start_ranks(folder, 4, 2)


@pytest.mark.parametrize("case", learner_ranks.CASES)
@pytest.mark.parametrize("ranks", ["two", "four"])
def test_ranks_equal_one(request: pytest.FixtureRequest, one: dict[str, Any], ranks: str, case: str) -> None:
    """Losses, gradient norms, statistics and every weight, to 1e-6 of what one rank has."""
    if case == "hybrid" and ranks == "two":
        pytest.skip("two ranks that shard over two are not hybrid")
    several = request.getfixturevalue(ranks)
    for what in ("told", "weights"):
        assert all(rank[case][what] == several[0][case][what] for rank in several), "ranks disagree with each other"
        got, want = (torch.tensor(found[case][what], dtype=torch.float64) for found in (several[0], one))
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6 * want.abs().max().item(), msg=f"{case}: {what}")


@pytest.mark.parametrize("ranks", ["two", "four"])
def test_base_model_goes_straight_into_shards(request: pytest.FixtureRequest, ranks: str) -> None:
    """On four ranks there are two copies of two shards, so a rank reads half as on two."""
    several = request.getfixturevalue(ranks)
    head = several[0]["files"]["score"]
    for rank in several:
        found = rank["files"]
        assert found["equal"]
        assert found["score"] == head
        assert found["read"] <= 2 * 0.55 * found["whole"], "policy and critic, half of each, and 31 rows are not even"


def test_two_ranks_export_the_same_files(folder: Path, two: list[dict[str, Any]]) -> None:
    for exported in ("model.safetensors", "critic/model.safetensors"):
        a, b = (load_file(folder / f"uneven-export{size}" / exported) for size in (1, 2))
        assert {name: t.shape for name, t in a.items()} == {name: t.shape for name, t in b.items()}


@pytest.mark.parametrize("ranks", ["two", "four"])
def test_no_rank_holds_a_whole_tensor_to_save_or_export(request: pytest.FixtureRequest, ranks: str) -> None:
    """Beside its shards rank 0 holds one shard that arrived (and its cast, for the export), the others nothing. The
    random states, which rank 0 writes too, are no shards: they are larger than this model's."""
    several = request.getfixturevalue(ranks)
    for case in learner_ranks.CASES:
        shards = 2 if case == "hybrid" else len(several)
        for rank, told in enumerate(several):
            held = told[case]["held"]
            shard = held["tensor"] // shards
            assert held["export"] <= (1.5 * shard + 64 if rank == 0 else 64), (case, rank, held)
            assert held["save"] <= max(held["random"], 1.5 * shard) + 1024, (case, rank, held)
    assert several[0]["uneven"]["held"]["export"] > 0, "the measure sees what arrives"


def test_any_number_of_ranks_resumes(folder: Path, two: list[dict[str, Any]], four: list[dict[str, Any]]) -> None:
    want = torch.tensor(learner_ranks.resumed("uneven", folder, World.single(), 1)["told"], dtype=torch.float64)
    found = {
        "2 ranks saved, 1 resumes": learner_ranks.resumed("uneven", folder, World.single(), 2),
        "1 rank saved, 2 resume": two[0]["resumed from 1"],
        "2 ranks saved, 2 resume": two[0]["resumed from 2"],
        "2 ranks saved, 4 resume": four[0]["resumed from 2"],
    }
    whole = found["2 ranks saved, 1 resumes"]["read"]
    assert whole > 0
    assert all(rank["resumed from 2"]["read"] <= 0.55 * whole for rank in two), "each rank reads its own rows"
    assert all(rank["resumed from 2"]["read"] <= 0.3 * whole for rank in four)
    for how, other in found.items():
        got = torch.tensor(other["told"], dtype=torch.float64)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6 * want.abs().max().item(), msg=how)


def test_a_long_wait_of_rank_0_trips_no_timeout(two: list[dict[str, Any]]) -> None:
    assert two[1]["messages"] == {"waited": True, "kinds": [3, 4], "payloads": [True, True]}


ENDINGS = {
    "out of memory": ((13, 13), ("rank 1: expected a microbatch of 40 tokens to fit", "Tried to allocate 2 GiB")),
    "killed": ((7, -9), ("expected every rank to live through a step, found one gone", "the same command goes on")),
    "bug": ((7, 1), ("found one gone",)),
}


@pytest.mark.parametrize("how", ENDINGS)
def test_a_rank_that_ends_in_a_step_ends_all_with_the_reason(folder: Path, how: str) -> None:
    """Rank 1 ends between two layers; rank 0, which waits in the next collective, says what happened."""
    processes = spawn(SCRIPT.with_name("learner_endings.py"), 2, str(folder), how)
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes, words = ENDINGS[how]
    assert tuple(process.returncode for process in processes) == codes, "\n".join(errors)
    assert all(word in errors[0] for word in words), errors[0]
