"""Weights through a folder: the same promises as over the wire."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from weights_support import Recorder, assert_same_bits, libuv, model, no_leaks, until

from orz_async.errors import ConfigError, DiskError, PeerLostError, WireError
from orz_async.weights.file import FileFetcher, FilePublisher
from orz_async.weights.manifest import Limits
from orz_async.weights.nccl_fetcher import NcclFetcher
from orz_async.weights.nccl_publisher import NcclPublisher
from orz_async.weights.snapshot import state_digest
from orz_async.weights.stream import StreamFetcher, StreamPublisher
from orz_async.weights.transport import connect, serve

pytestmark = pytest.mark.usefixtures("no_leaks")
__all__ = ["libuv", "no_leaks"]  # fixtures


@pytest.fixture
def stack(no_leaks: None) -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def ends(stack: ExitStack, folder: Path, limits: Limits | None = None) -> tuple[FilePublisher, FileFetcher]:
    publisher = stack.enter_context(closing(FilePublisher(f"file://{folder}", 3, Recorder())))
    fetcher = FileFetcher(publisher.address, 3, Recorder(), limits=limits)
    return publisher, stack.enter_context(closing(fetcher))


def test_versions_arrive_and_old_ones_go(stack: ExitStack, tmp_path: Path) -> None:
    publisher, fetcher = ends(stack, tmp_path)
    fetcher.want(0)
    assert fetcher.poll() is None
    for version in range(4):
        report = publisher.publish(version, model(version).items())
        fetcher.want(version)
        snapshot = until(fetcher.poll)
        assert snapshot is not None, fetcher.waiting_for()
        assert (snapshot.version, snapshot.epoch, snapshot.digest) == (version, 3, report.digest)
        assert snapshot.digest == state_digest(snapshot.tensors)
        assert_same_bits({name: snapshot.tensors[name] for name in model()}, model(version))
    publisher.close()
    assert sorted(path.name for path in (tmp_path / "epoch-3").iterdir()) == ["LATEST", "version-2", "version-3"]
    assert fetcher.waiting_for() == "no newer weights are wanted"


@pytest.mark.parametrize("name", ["weights.safetensors", "manifest.json"])
def test_damage_is_named(stack: ExitStack, tmp_path: Path, name: str) -> None:
    publisher, fetcher = ends(stack, tmp_path)
    publisher.publish(0, model().items())
    publisher.close()
    path = tmp_path / "epoch-3/version-0" / name
    data = bytearray(path.read_bytes())
    data[-10 if name.endswith("json") else len(data) // 2] ^= 1
    path.write_bytes(data)
    fetcher.want(0)
    with pytest.raises(WireError, match=name.replace(".", r"\.")):
        until(fetcher.poll)


def test_a_hostile_manifest_is_refused(stack: ExitStack, tmp_path: Path) -> None:
    publisher, fetcher = ends(stack, tmp_path, Limits(max_bytes=1000))
    publisher.publish(0, model().items())
    fetcher.want(0)
    with pytest.raises(WireError, match="over the limit of 1000 bytes"):
        until(fetcher.poll)


def test_a_file_that_is_too_long_or_of_another_format_is_refused(stack: ExitStack, tmp_path: Path) -> None:
    publisher, fetcher = ends(stack, tmp_path)
    publisher.publish(0, model().items())
    publisher.close()
    path = tmp_path / "epoch-3/version-0/manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": "pickle"}))
    fetcher.want(0)
    with pytest.raises(WireError, match="expected format 'orz-weights-1', got 'pickle'"):
        until(fetcher.poll)


def test_a_wait_in_vain_ends_with_a_sentence(stack: ExitStack, tmp_path: Path) -> None:
    address = f"file://{tmp_path}"
    fetcher = stack.enter_context(closing(FileFetcher(address, 3, Recorder(), give_up_s=0.3)))
    fetcher.want(2)
    with pytest.raises(PeerLostError, match=r"waiting for weights version 2 in .*epoch-3 for .*gave up"):
        until(fetcher.poll)


def test_a_folder_that_cannot_be_written_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="choose another folder"):
        FilePublisher(f"file://{tmp_path}/file/below", 3, Recorder())


def test_the_address_names_the_transport(stack: ExitStack, tmp_path: Path) -> None:
    kinds = {
        f"file://{tmp_path}": (FilePublisher, FileFetcher),
        "tcp://127.0.0.1:0": (StreamPublisher, StreamFetcher),
        "nccl://127.0.0.1:0": (NcclPublisher, NcclFetcher),
    }
    for bind, (publisher_kind, fetcher_kind) in kinds.items():
        publisher = stack.enter_context(closing(serve(bind, 3, Recorder())))
        assert isinstance(publisher, publisher_kind)
        publisher.publish(0, model().items())
        fetcher = stack.enter_context(closing(connect(publisher.address, 3, Recorder())))
        assert isinstance(fetcher, fetcher_kind)
        fetcher.want(0)
        snapshot = until(fetcher.poll)
        assert snapshot is not None
        assert snapshot.digest == state_digest(model())
    with pytest.raises(
        ConfigError, match="expected a weights address with tcp://, ipc://, nccl:// or file://, got 'udp://x'"
    ):
        connect("tcp://127.0.0.1:1,udp://x", 3, Recorder())
