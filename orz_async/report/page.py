"""Numbers and rollouts of one or several runs in one HTML file that needs nothing else: no network, no other file."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec

from orz_async.config_toml import config_hash, load
from orz_async.errors import ConfigError, DiskError
from orz_async.report import rollouts
from orz_async.report.numbers import Fold
from orz_async.report.stream import Stream

SCRIPTS = ("charts.js", "sections.js", "browser.js", "page.js")
CHUNK = 64
"""Rollouts whose texts stand in one block of the page: the browser parses only the block it shows."""


def read_run(run_dir: Path) -> tuple[dict[str, Any], Path]:
    """The numbers of a run, and its model's directory."""
    if not (run_dir / "config.toml").exists():
        raise ConfigError(f"expected the folder of a run, found no {run_dir}/config.toml; check the path")
    config = load(run_dir / "config.toml")
    fold, stream = Fold(), Stream(run_dir / "events")
    fold.feed_all(stream)
    numbers = fold.numbers(run_dir.name, config, config_hash(config))
    if stream.unreadable:
        numbers["notes"].append(f"{stream.unreadable:,} lines of the event logs could not be read")
    worst = max(stream.clocks.uncertainty_s.values(), default=0.0)
    if worst:
        numbers["notes"].append(f"clocks of other machines are aligned within {worst * 1e3:.1f} ms")
    return numbers, Path(config.model.path)


def report(run_dirs: Iterable[Path], out: Path | None) -> tuple[list[dict[str, Any]], list[str]]:
    """Read every run and write the page, unless `out` is None. Returns the numbers, and what to tell the user."""
    found = [(run_dir, *read_run(run_dir)) for run_dir in run_dirs]
    runs = [numbers for _, numbers, _ in found]
    _tell_apart(runs, [run_dir for run_dir, _, _ in found])
    if out is None:
        return runs, []
    share = rollouts.MOST_BYTES // len(found)
    samples = [
        rollouts.choose(run_dir, numbers["funnel"]["granted"], model, most_bytes=share)
        for run_dir, numbers, model in found
    ]
    page = render(runs, samples).encode()
    fresh = out.with_name(f".{out.name}.tmp")
    try:
        fresh.write_bytes(page)
        fresh.replace(out)
    except OSError as error:
        raise DiskError(f"expected to write {out}, found {error.strerror}; choose another place with --out") from error
    notes = [
        f"{run['name']}: {note}" for run, sample in zip(runs, samples, strict=True) for note in _notes(run, sample)
    ]
    return runs, [f"{out}: {len(page) / 1e6:.1f} MB; open it in a browser, it needs no network", *notes]


def _notes(run: dict[str, Any], sample: dict[str, Any]) -> list[str]:
    return [*run["notes"], *sample["notes"]]


def _tell_apart(runs: list[dict[str, Any]], run_dirs: list[Path]) -> None:
    """Folders of one name are told apart by the folder above."""
    names = [run["name"] for run in runs]
    for run, run_dir in zip(runs, run_dirs, strict=True):
        if names.count(run["name"]) > 1:
            run["name"] = "/".join(run_dir.absolute().parts[-2:])


def _asset(name: str) -> str:
    return (resources.files("orz_async.report") / "assets" / name).read_text(encoding="utf-8")


def _block(name: str, text: str) -> str:
    """Data the browser does not run. `<` is written as an escape: no text of a model can end the block."""
    return f'<script type="application/json" id="{name}">{_quiet(text)}</script>'


def _quiet(text: str) -> str:
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _source(text: str) -> str:
    """As a content security policy names an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def render(runs: list[dict[str, Any]], samples: list[dict[str, Any]]) -> str:
    style, script = _asset("style.css"), "\n".join(_asset(name) for name in SCRIPTS)
    policy = (
        f"default-src 'none'; script-src {_source(script)}; style-src {_source(style)}; "
        "base-uri 'none'; form-action 'none'"
    )
    blocks = [_block("runs", msgspec.json.encode(runs).decode())]
    index = [{"rows": sample["rows"], "notes": sample["notes"]} for sample in samples]
    blocks.append(_block("rollouts", msgspec.json.encode(index).decode()))
    for number, sample in enumerate(samples):
        bodies = sample["bodies"]
        blocks += [
            _block(f"texts-{number}-{start // CHUNK}", f"[{','.join(bodies[start : start + CHUNK])}]")
            for start in range(0, len(bodies), CHUNK)
        ]
    title = _text(" and ".join(run["name"] for run in runs))
    filled = {"POLICY": policy, "TITLE": title, "STYLE": style, "DATA": "\n".join(blocks), "SCRIPT": script}
    page = _asset("page.html")
    parts = page.split("%%")
    return "".join(filled[part] if index % 2 else part for index, part in enumerate(parts))


def _text(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
