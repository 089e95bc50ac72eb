"""The house: arrows between packages point down only, and what is below learner and generators is light to import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "orz_async"

# One number per layer; a module may import its own top-level name and anything with a smaller number.
LAYERS = {
    "cli": 11,
    "cli_keys": 10,
    "cli_runs": 10,
    "cli_setup": 10,
    "launcher": 9,
    "doctor": 9,
    "starter": 9,
    "cli_config": 8,
    "recipes": 7,
    "evaluate": 7,
    "report": 6,
    "learner": 6,
    "generator": 6,
    "sim": 5,
    "broker": 5,
    "weights": 4,
    "reward": 4,
    "data": 4,
    "ops": 3,
    "observe": 3,
    "config_toml": 2,
    "keys": 2,
    "config": 1,
    "records": 1,
    "errors": 0,
    "crc": 0,
}
# The process face of a package reads the command line: `python -m orz_async.learner`.
ENTRY_POINTS = {("learner/__main__", "cli_config")}
# sim drives the real ledger.
SIBLINGS = {("sim", "broker")}


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import; write the full name"
            if node.module == "orz_async":
                names.update(alias.name for alias in node.names)
            elif node.module.startswith("orz_async."):
                names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names.update(a.name.split(".")[1] for a in node.names if a.name.startswith("orz_async."))
    return names - {"__version__", "_C"}


def test_every_module_has_a_layer() -> None:
    unknown = sorted({room(p) for p in modules()} - set(LAYERS))
    assert not unknown, f"name the layer of {unknown} in LAYERS"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows_point_down(path: Path) -> None:
    here = room(path)
    stem = str(path.relative_to(PACKAGE)).removesuffix(".py")
    for there in imported_rooms(path) - {here}:
        if (stem, there) in ENTRY_POINTS or (here, there) in SIBLINGS:
            continue
        assert LAYERS[there] < LAYERS[here], f"{stem} imports {there}: that arrow does not point down"


def test_leaves_import_nothing_of_ours() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not imported_rooms(path), f"{path} is a leaf and imports orz_async"


@pytest.mark.parametrize(
    "module",
    [
        "orz_async.records",
        "orz_async.config",
        "orz_async.recipes",
        "orz_async.cli_config",
        "orz_async.cli",
        "orz_async.launcher",
        "orz_async.observe.events",
        "orz_async.report.page",
        "orz_async.broker.server",
        "orz_async.sim.command",
        "orz_async.sim.plan_command",
        "orz_async.broker.client",
        "orz_async.data.source",
        "orz_async.reward.pool",
        "orz_async.generator.engine",
        "orz_async.evaluate.score",
        "orz_async.learner.memory",
    ],
)
def test_import_is_light(module: str) -> None:
    code = (
        f"import sys, {module};"
        "heavy = [m for m in ('torch', 'transformers', 'sympy', 'matplotlib') if m in sys.modules];"
        "sys.exit(f'{heavy} came along' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"import {module}: {done.stderr.strip()}"


def test_every_folder_says_what_it_consumes_and_produces() -> None:
    for init in PACKAGE.glob("*/__init__.py"):
        text = ast.get_docstring(ast.parse(init.read_text())) or ""
        assert "consumes" in text.lower(), f"{init.parent.name}/__init__.py: say what the folder consumes"
        assert "produces" in text.lower(), f"{init.parent.name}/__init__.py: say what the folder produces"


def test_nothing_unpickles_or_evaluates() -> None:
    banned = {"pickle", "cloudpickle", "dill", "shelve", "marshal"}
    for path in [*modules(), *(ROOT / "kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found = {a.name.split(".")[0] for a in node.names} & banned
                assert not found, f"{path}: imports {found}"
            if isinstance(node, ast.ImportFrom) and node.module:
                assert node.module.split(".")[0] not in banned, f"{path}: imports {node.module}"
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in {"eval", "exec", "torch.load"}, f"{path}:{node.lineno}: {name}"
                for keyword in node.keywords:
                    trusting = keyword.arg == "trust_remote_code" and ast.unparse(keyword.value) != "False"
                    assert not trusting, f"{path}:{node.lineno}: trust_remote_code"
