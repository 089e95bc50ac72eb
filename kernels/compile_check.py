"""Compile every GPU kernel for Hopper on a machine without a GPU, and refuse a register spill.

    python kernels/compile_check.py [--only triton|cuda] [--also FOLDER ...] [--fresh]

Triton: the ops run on small CPU tensors while `launching.recording` catches what they would launch, and each distinct
kernel and specialisation is compiled to an sm_90a cubin. With every Triton version: the installed one, and one for each
FOLDER that `pip install --no-deps --target FOLDER triton==VERSION` filled; each in a process of its own, side by side.
CUDA C++: nvcc for sm_90a with -Xptxas -v. A table of registers, shared memory and spills follows. The exit code is 1 if
a kernel spills, does not fit, or lost its matrix instructions, or if there is no Triton; without an nvcc the CUDA C++
part is left out, and says so.

Results are kept in .cache/compile_check under a hash of what they depend on, compilers and sources; --fresh ignores
what is kept.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "kernels"))
# Interpreted kernels have nothing to compile.
os.environ.pop("TRITON_INTERPRET", None)

# Shared memory that one block may use on compute capability 9.0.
MOST_SHARED = 227 * 1024
CUDA_SOURCES = ROOT / "csrc" / "cuda"
KEPT = ROOT / ".cache" / "compile_check"
# Seconds; a version of Triton takes one minute of one core.
PATIENCE = 900


@dataclass(frozen=True)
class Row:
    """One compiled kernel."""

    kernel: str
    variant: str
    registers: int
    shared: int
    spilled: int
    matrix: int
    problem: str

    def text(self) -> str:
        numbers = f"{self.registers:>5} {self.shared:>8} {self.spilled:>6} {self.matrix:>6}"
        return f"{self.kernel:<34} {self.variant:<64} {numbers}  {self.problem}".rstrip()


HEADER = f"{'kernel':<34} {'variant':<64} {'regs':>5} {'shared':>8} {'spill':>6} {'HGMMA':>6}"


def token_workloads() -> Iterator[Callable[[], object]]:
    """The ops over tokens, in every way the package launches them."""
    import torch

    from orz_kernels import gae as gae_module
    from orz_kernels import ppo_loss, value_loss, whiten

    x_N, mask_N, total = torch.randn(8192), torch.ones(8192, dtype=torch.bool), torch.tensor(8192.0)
    starts_B1, moments_3 = torch.tensor([0, 4096, 8192], dtype=torch.int32), torch.ones(3, dtype=torch.float64)
    clips = (0.2, 0.2, None, None)
    for m in (None, mask_N):
        yield partial(whiten.moments, x_N, m)
        yield partial(whiten.whiten, x_N, m, moments_3, 1e-8)
        yield partial(value_loss.value_loss, x_N, x_N, x_N, m, total, 0.2)
        yield partial(ppo_loss.ppo_loss, x_N, x_N, x_N, None, None, m, total, *clips)
        yield partial(ppo_loss.ppo_loss, x_N, x_N, x_N, x_N, x_N, m, x_N, *clips)
        for bootstrap_B in (None, x_N[:2]):
            yield partial(gae_module.gae, x_N, x_N, starts_B1, 1.0, 1.0, m, bootstrap_B)
    yield partial(gae_module.gae_moments, x_N, x_N, starts_B1, 1.0, 0.95, None, None)


def logits_workloads() -> Iterator[Callable[[], object]]:
    """The ops over logits; a vocabulary that is and one that is not a multiple of 16."""
    import torch

    from orz_kernels import head, head_logprob, logprob, ppo_head

    y_N, x_N, mask_N = torch.zeros(256, dtype=torch.int64), torch.randn(256), torch.ones(256, dtype=torch.bool)
    for dtype, vocab in ((torch.bfloat16, 2048), (torch.bfloat16, 1000), (torch.float32, 2048), (torch.float16, 2048)):
        logits_NV = torch.randn(256, vocab).to(dtype)
        yield partial(logprob.logprob_forward, logits_NV, y_N, 1.0)
        for h in (None, x_N):
            yield partial(logprob.logprob_backward, logits_NV, y_N, x_N, x_N, x_N, h, 1.0, True)
    policy: tuple[Any, ...] = (x_N, x_N, None)
    rest: tuple[Any, ...] = (torch.tensor(256.0), 0.2, 0.2, None, None, 1.0, None, True, True)
    # Widths on both sides of the choice between the fused and the library's product.
    for dtype, width in ((torch.bfloat16, 128), (torch.bfloat16, head.LIBRARY_WIDTH), (torch.float32, 128)):
        hidden_ND, weight_VD = torch.randn(256, width).to(dtype), torch.randn(2048, width).to(dtype)
        for m in (None, mask_N):
            yield partial(ppo_head.ppo_head, *[hidden_ND, weight_VD, y_N, *policy, m, *rest])
        yield partial(head_logprob.head_logprob_forward, hidden_ND, weight_VD, y_N, 1.0, None)
        for h in (None, x_N):
            yield partial(
                head_logprob.head_logprob_backward, hidden_ND, weight_VD, y_N, x_N, x_N, x_N, h, 1.0, None, True, True
            )
        for tiles in head.CANDIDATES if dtype == torch.bfloat16 and width == 128 else ():
            yield partial(ppo_head.compute, *[hidden_ND, weight_VD, y_N, *policy, None, *rest, "fused", tiles])


def constants_of(
    kernel: Any, args: tuple[Any, ...], meta: dict[str, Any]
) -> tuple[dict[str, str], dict[Any, Any], Any]:
    """Signature, constants and alignment, as the launcher itself would specialise these arguments."""
    import torch
    from triton.tools.tensor_descriptor import TensorDescriptor

    pointers = {
        torch.float32: "*fp32",
        torch.float64: "*fp64",
        torch.bfloat16: "*bf16",
        torch.float16: "*fp16",
        torch.int64: "*i64",
        torch.int32: "*i32",
        torch.uint8: "*u8",
    }
    signature: dict[str, str] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    for position, parameter in enumerate(kernel.params):
        name, at = parameter.name, (position,)
        value = args[position] if position < len(args) else meta[name]
        fixed = not parameter.do_not_specialize
        if parameter.is_constexpr or (fixed and isinstance(value, int) and value == 1):
            signature[name], constants[at] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            shape = ", ".join(str(n) for n in value.block_shape)
            signature[name] = f"tensordesc<{pointers[value.base.dtype][1:]}[{shape}]>"
        elif isinstance(value, torch.Tensor):
            signature[name] = pointers[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[at] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if fixed and value % 16 == 0:
                attributes[at] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def record() -> dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """Every distinct launch of the workloads, under a key that tells specialisations apart."""
    from orz_kernels.launching import recording

    launches: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {}

    def note(kernel: Any, args: tuple[Any, ...], meta: dict[str, Any]) -> None:
        key = repr(
            (kernel.__module__, kernel.__name__, *constants_of(kernel, args, meta), sorted(meta.items(), key=str))
        )
        launches.setdefault(key, (kernel, args, meta))

    with recording(note):
        for work in (*token_workloads(), *logits_workloads()):
            work()
    return launches


def disassembler() -> str:
    """cuobjdump of the Triton wheel, or of a CUDA toolkit."""
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = str(bundled) if bundled.exists() else shutil.which("cuobjdump")
    if not found:
        raise SystemExit(
            "compile_check: expected cuobjdump in the Triton wheel or on PATH, found none; install the CUDA toolkit"
        )
    return found


def compile_triton(kernel: Any, args: tuple[Any, ...], meta: dict[str, Any], cuobjdump: str) -> Row:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = constants_of(kernel, args, meta)
    options = {k: v for k, v in meta.items() if k in ("num_warps", "num_stages", "enable_fp_fusion")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([cuobjdump, how, file.name], capture_output=True, text=True, check=True).stdout
            for how in ("--dump-resource-usage", "--dump-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, f"cuobjdump printed no resource usage: {usage!r}"
    registers, spilled = int(found[1]), int(found[2]) + int(found[3])
    matrix, shared = sass.count("HGMMA"), compiled.metadata.shared
    problem = "SPILLS" if spilled else "TOO MUCH SHARED MEMORY" if shared > MOST_SHARED else ""
    if kernel.__name__ == "head_tiles_kernel" and not matrix:
        problem = "NO MATRIX INSTRUCTIONS"
    name = f"{kernel.__module__.split('.')[-1]}.{kernel.__name__}"
    return Row(name, variant_of(kernel, args, meta), registers, shared, spilled, matrix, problem)


def variant_of(kernel: Any, args: tuple[Any, ...], meta: dict[str, Any]) -> str:
    first = getattr(args[0], "base", args[0])
    words = [str(first.dtype).removeprefix("torch.")]
    for name, value in meta.items():
        if name not in ("enable_fp_fusion", "DTYPE", "GROUP", "PROGRAMS", "MERGE", "SPAN") and value is not False:
            short = name.removeprefix("HAS_").lower()
            words.append(short if value is True else f"{short}={value}")
    return " ".join(words)


def compile_cuda(source: Path, nvcc: str) -> list[Row]:
    """One row a kernel of the file, from what ptxas says about it."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [nvcc, "-std=c++17", "-O3", "-gencode", "arch=compute_90a,code=sm_90a", "-Xptxas", "-v"]
            + ["-cubin", "-o", f"{folder}/out.cubin", str(source)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode:
        return [Row(source.name, "does not compile", 0, 0, 0, 0, done.stderr[-2000:])]
    rows = []
    for part in done.stderr.split("Compiling entry function")[1:]:
        name = re.search(r"'(\w+)'", part)
        registers = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        frame = [int(n) for n in re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", part)]
        assert name and registers and frame, f"ptxas -v said something new: {part!r}"
        problem = "SPILLS" if sum(frame) else ""
        size = int(shared[1]) if shared else 0
        rows.append(Row(demangled(name[1]), source.name, int(registers[1]), size, sum(frame), 0, problem))
    return rows


def demangled(symbol: str) -> str:
    tool = shutil.which("c++filt")
    if not tool:
        return symbol
    text = subprocess.run([tool, symbol], capture_output=True, text=True, check=True).stdout
    found = re.match(r"(?:void )?(?:orz::)?([\w<>:]+)", text.replace("(anonymous namespace)::", ""))
    return found[1].replace("orz::", "") if found else symbol


def triton_rows() -> list[Row]:
    cuobjdump = disassembler()
    return [compile_triton(kernel, args, meta, cuobjdump) for kernel, args, meta in record().values()]


def cuda_rows(nvcc: str) -> list[Row]:
    return [row for source in sorted(CUDA_SOURCES.glob("*.cu")) for row in compile_cuda(source, nvcc)]


def kept(compiler: str, sources: list[Path], fresh: bool, rows: Callable[[], list[Row]]) -> list[Row]:
    """The rows of an earlier run with the same compiler and sources, or new ones."""
    digest = hashlib.sha256(f"{compiler} {sys.version}".encode())
    for source in sorted([*sources, Path(__file__)]):
        digest.update(f"{source.name} {source.stat().st_size} ".encode() + source.read_bytes())
    file = KEPT / f"{digest.hexdigest()[:32]}.json"
    if file.exists() and not fresh:
        print(f"{compiler}, sm_90a (nothing has changed since it was compiled)")
        return [Row(**row) for row in json.loads(file.read_text())]
    print(f"{compiler}, sm_90a", flush=True)
    made = rows()
    KEPT.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps([asdict(row) for row in made]))
    unfinished.replace(file)
    return made


def check_triton(fresh: bool) -> list[Row]:
    try:
        import triton
    except ImportError:
        raise SystemExit(
            "compile_check: expected the package triton, found none; pip install --no-deps triton"
        ) from None
    sources = list((ROOT / "kernels" / "orz_kernels").glob("*.py"))
    return kept(f"triton {triton.__version__}", sources, fresh, triton_rows)


def check_cuda(fresh: bool) -> list[Row]:
    nvcc = shutil.which("nvcc")
    if not nvcc:
        print("compile_check: no nvcc on PATH: the CUDA C++ kernels are not compiled", file=sys.stderr)
        return []
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release ([\w.]+)", said)
    compiler = f"nvcc {release[1] if release else said}"
    return kept(compiler, list(CUDA_SOURCES.iterdir()), fresh, partial(cuda_rows, nvcc))


def report(rows: list[Row]) -> int:
    """Print the table; 1 if a kernel has a problem."""
    if rows:
        print(HEADER)
    for row in rows:
        print(row.text())
    problems = sum(bool(row.problem) for row in rows)
    if rows:
        print(f"{problems} of {len(rows)} kernels with a problem" if problems else f"{len(rows)} kernels, no spills")
    return int(problems > 0)


class Child:
    """One version of Triton in a process of its own: a process imports a package once."""

    def __init__(self, folder: Path | None, fresh: bool) -> None:
        if folder is not None and not (folder / "triton").is_dir():
            raise SystemExit(
                f"compile_check: --also {folder}: expected a folder with the package triton in it, found none; "
                f"pip install --no-deps --target {folder} triton==VERSION"
            )
        self.folder = folder
        before = [str(folder)] if folder else []
        path = os.pathsep.join([*before, *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, __file__, "--only", "triton", "--here", *(["--fresh"] if fresh else [])]
        self.process = subprocess.Popen(
            command, env={**os.environ, "PYTHONPATH": path}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def finish(self) -> int:
        """Its output and its exit code, 1 if it did not end in time."""
        try:
            print(self.process.communicate(timeout=PATIENCE)[0], end="", flush=True)
        except subprocess.TimeoutExpired:
            self.process.kill()
            print(f"compile_check: triton of {self.folder or 'this environment'} took more than {PATIENCE} s")
            return 1
        return self.process.returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["triton", "cuda"])
    parser.add_argument("--also", type=Path, action="append", default=[], metavar="FOLDER")
    parser.add_argument("--fresh", action="store_true", help="compile, whatever was compiled before")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        return report(check_triton(options.fresh))
    folders = [None, *options.also] if options.only != "cuda" else []
    children = [Child(folder, options.fresh) for folder in folders]
    code = report(check_cuda(options.fresh)) if options.only != "triton" else 0
    # A child that a signal ended has a negative exit code.
    codes = [code, *(child.finish() for child in children)]
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
