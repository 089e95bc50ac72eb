"""The extension itself: CRC-32C, its buffers, and the choice of a backend."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import orz_async._C as core
from orz_async import crc as checksum
from orz_async.ops import backend

# RFC 3720 (iSCSI) appendix B.4, and the check value of every CRC catalogue.
VECTORS = [
    (b"123456789", 0xE3069283),
    (b"", 0),
    (bytes(32), 0x8A9136AA),
    (b"\xff" * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
    (bytes(range(31, -1, -1)), 0x113FDB5C),
]


@pytest.mark.parametrize(("data", "crc"), VECTORS)
def test_crc32c_of_known_vectors(data: bytes, crc: int) -> None:
    assert core.crc32c(data) == crc
    assert checksum.crc32c_numpy(data) == crc


# Around the 8 bytes of an instruction, the three lanes of 4,096 bytes, and the rows of the numpy fallback.
@pytest.mark.parametrize("size", [1, 7, 8, 9, 63, 1023, 1024, 1025, 2048, 4095, 4097, 12287, 12288, 12289, 100_003])
def test_crc32c_paths_agree_and_continue(size: int) -> None:
    data = np.random.default_rng(size).bytes(size)
    whole = core.crc32c(data)
    assert checksum.crc32c_numpy(data) == whole
    for cut in {0, 1, size // 3, size}:
        assert core.crc32c(data[cut:], core.crc32c(data[:cut])) == whole
        assert checksum.crc32c_numpy(data[cut:], checksum.crc32c_numpy(data[:cut])) == whole
    assert (
        core.crc32c(memoryview(data))
        == core.crc32c(bytearray(data))
        == core.crc32c(np.frombuffer(data, np.uint8))
        == whole
    )


def test_scalar_paths_agree_in_another_process() -> None:
    """ORZ_SCALAR=1 turns off every instruction set that a machine may lack."""
    code = (
        "import numpy as np, orz_async._C as c\n"
        "assert c.features() == []\n"
        "g = np.random.default_rng(0)\n"
        "z = g.standard_normal((5, 1003), dtype=np.float32) * 9; t = g.integers(0, 1003, 5)\n"
        "old = g.integers(0, 2**16, 200000, dtype=np.uint16); new = old.copy(); new[::37] += 1\n"
        "out = np.empty((4, 5), np.float32); e = np.empty_like(z); d = np.empty_like(z)\n"
        "c.softmax_forward(z, t, 0.8, e, *out, 1)\n"
        "c.softmax_backward(z, t, 0.8, out[2], out[1], out[0], out[1], d, 1)\n"
        "a = np.empty((2, 1003), np.float32)\n"
        "c.gae(z[0], z[1], np.array([0, 7, 500, 1003], np.int32), 0.99, 0.95, None, None, a[0], a[1])\n"
        "p = c.delta_encode(new, old, 2, 2); c.delta_apply(old, p, 2, 2); assert (old == new).all()\n"
        "sums = [out.sum(), np.abs(e).sum(), np.abs(d).sum(), *np.abs(a).sum(1)]\n"
        "print(c.crc32c(g.bytes(50000)), c.crc32c(p), *np.round(sums, 3))"
    )
    results = []
    for scalar in ("0", "1"):
        script = code if scalar == "1" else code.replace("assert c.features() == []", "pass")
        environment = {**os.environ, "ORZ_SCALAR": scalar}
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=60
        )
        assert done.returncode == 0, done.stderr
        results.append(done.stdout.split())
    assert results[0][:2] == results[1][:2]
    assert [float(x) for x in results[0][2:]] == pytest.approx([float(x) for x in results[1][2:]], rel=1e-5)


def test_crc32c_lets_other_threads_run() -> None:
    data = bytes(200_000_000)
    ticks = []
    done = threading.Event()

    def tick() -> None:
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.0005)

    other = threading.Thread(target=tick)
    other.start()
    ran_inside = False
    for _ in range(50):
        started = time.perf_counter()
        core.crc32c(data)
        ended = time.perf_counter()
        # A call that kept the lock would let the other thread run at its end at the earliest.
        ran_inside = any(started < t < started + 0.6 * (ended - started) for t in ticks)
        if ran_inside:
            break
    done.set()
    other.join()
    assert ran_inside


def test_buffers_of_the_wrong_size_or_kind_are_refused() -> None:
    x, cu = np.zeros(4, np.float32), np.array([0, 4], np.int32)
    with pytest.raises(ValueError, match="rewards: expected 16 bytes, found 12"):
        core.gae(x[:3], x, cu, 1.0, 1.0, None, None, x.copy(), x.copy())
    with pytest.raises(ValueError, match="cu_seqlens: expected to run from 0 to 4, found 0 to 5"):
        core.gae(x, x, np.array([0, 5], np.int32), 1.0, 1.0, None, None, x.copy(), x.copy())
    with pytest.raises(ValueError, match="cu_seqlens: expected a sequence that never falls"):
        core.gae(x, x, np.array([0, 9, 4], np.int32), 1.0, 1.0, None, None, x.copy(), x.copy())
    with pytest.raises(ValueError, match="targets: expected indices in"):
        core.softmax_forward(np.zeros((1, 4), np.float32), np.array([4]), 1.0, None, *np.zeros((4, 1), np.float32), 1)
    with pytest.raises((BufferError, ValueError, TypeError)):
        core.gae(x, x, cu, 1.0, 1.0, None, None, bytes(16), x.copy())
    with pytest.raises((BufferError, ValueError)):
        core.crc32c(np.zeros((4, 4))[:, ::2])
    with pytest.raises(TypeError):
        core.crc32c("text")


def test_the_environment_names_the_backend() -> None:
    code = "import orz_async.ops.backend as b; s = b.selected(); print(s.name, s.cpu.__name__, s.host.__name__)"
    environment = {**os.environ, "ORZ_BACKEND": "reference"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout.split() == ["reference", *["orz_async.ops.reference"] * 2]


def test_a_named_backend_is_taken() -> None:
    for name, module in (("reference", "orz_async.ops.reference"), ("cpu", "orz_async.ops.cpu")):
        selection = backend.choose(name)
        assert [m.__name__ for m in (selection.cpu, selection.gpu, selection.host)] == [module] * 3
    assert backend.choose("auto").cpu.__name__ == "orz_async.ops.cpu"


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ORZ_BACKEND: expected auto or one of \[.*'reference'.*\], found 'fast'"):
        backend.choose("fast")


def test_a_backend_that_lacks_a_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backend.MODULES, "cpu", "orz_async.ops.reference.loss")
    with pytest.raises(ImportError, match=r"backend 'cpu' does not export \['gae'"):
        backend.load("cpu")


def test_auto_falls_back_and_says_why(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(backend.MODULES, "cpu", "orz_async.ops.no_such_module")
    selection = backend.choose("auto")
    assert selection.cpu.__name__ == "orz_async.ops.reference"
    assert "backend 'cpu' is not used: No module named" in caplog.text
    with pytest.raises(ImportError):
        backend.choose("cpu")
