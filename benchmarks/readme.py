"""`python -m benchmarks.readme [--check]`: README's figure and tables from the committed results, by nothing else.

A block of the README between `<!-- results NAME -->` and `<!-- end -->` is what `BLOCKS[NAME]` makes of the files in
benchmarks/results (the tables are in readme_lines.py); so are the figures, demo.svg and that of the scale suite.
`--check` writes nothing and ends with 1 if any of it is not what the results say.
"""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from benchmarks import readme_lines, scale_figure
from benchmarks.newest import Absent, Results
from benchmarks.protocol import RESULTS
from orz_async.observe.summary import Evaluation, Summary
from orz_async.observe.table import rows as summary_rows

README = Path(__file__).parents[1] / "README.md"
DEMO = "seed 2"
FIGURE = RESULTS / "demo.svg"
_BLOCK = re.compile(r"(<!-- results (\w+) -->\n).*?(<!-- end -->)", re.S)
_STYLE = """
text { font: 12px system-ui, sans-serif; fill: #5d666f } .title { font-weight: 600; fill: #1d2125 }
line { stroke: #e4e6e8 } .a { stroke: #2563a8; fill: none; stroke-width: 1.8 } .b { stroke: #c05a12 }
.b, .c { fill: none; stroke-width: 1.8 } circle { stroke: none } .dot-a { fill: #2563a8 } .dot-b { fill: #c05a12 }
.i { stroke: #2563a8; opacity: .5 }
@media (prefers-color-scheme: dark) {
  text { fill: #a3acb5 } .title { fill: #e4e7ea } line { stroke: #2d3339 } .a, .i { stroke: #74aee8 }
  .b { stroke: #eb9a54 } .dot-a { fill: #74aee8 } .dot-b { fill: #eb9a54 }
}"""
_WIDTH, _HEIGHT, _TOP, _BOTTOM, _PANEL = 860, 260, 34, 220, 430


def demo_summary() -> Summary:
    return msgspec.convert(Results().rows("demo", "demo")[DEMO]["notes"]["summary"], Summary)


def demo_block() -> str:
    """The summary of the demo as `orz summary` prints it, without the line that names the run."""
    summary = demo_summary()
    return "```\n" + "\n".join(f"{name:18} {value}" for name, value in summary_rows(summary)[1:]) + "\n```\n"


def scale_block(results: Results) -> str:
    """The figure of the scale suite, once there is a result."""
    try:
        path, _ = results.file("scale")
    except Absent:
        return ""
    image = path.with_suffix(".svg").name
    return f"![Simulated strong and weak scaling, GPU rates assumed](benchmarks/results/{image})\n"


def learning_block(results: Results) -> str:
    """The figure that the suite learning draws beside its result."""
    try:
        path, _ = results.file("learning")
    except Absent:
        return ""
    image = path.with_suffix(".svg").name
    return f"![Reward and length of the demo task at S = 0 to 8, by objective](benchmarks/results/{image})\n"


def figures(results: Results) -> dict[Path, str]:
    """Every figure of the README, drawn from its rows."""
    drawn = {FIGURE: figure()}
    with contextlib.suppress(Absent):
        path, rows = results.file("scale")
        drawn[path.with_suffix(".svg")] = scale_figure.figure(rows)
    return drawn


BLOCKS: dict[str, Callable[[], str]] = {
    "demo": demo_block,
    "promises": lambda: readme_lines.promises(Results()),
    "scale": lambda: scale_block(Results()),
    "learning": lambda: learning_block(Results()),
    "measured": lambda: readme_lines.measured(Results()),
}


def filled(text: str) -> str:
    """The README with every block made anew."""
    return _BLOCK.sub(lambda match: match[1] + BLOCKS[match[2]]() + match[3], text)


def figure() -> str:
    """Held-out accuracy with its interval against time, held-out length against steps."""
    evals = demo_summary().evals
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        'aria-label="Held-out accuracy and response length of the demo">',
        f"<style>{_STYLE}</style>",
        *_panel(0, evals, [e.wall_s for e in evals], [e.accuracy for e in evals], 1.0, "a", "training time, s"),
        *_panel(_PANEL, evals, [e.version for e in evals], [e.length for e in evals], 40.0, "b", "learner steps"),
        '<text class="title" x="44" y="18">Held-out accuracy, 95 % interval</text>',
        f'<text class="title" x="{_PANEL + 44}" y="18">Held-out response length, tokens</text>',
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _panel(
    left: int, evals: Sequence[Evaluation], x: Sequence[float], y: Sequence[float], top: float, kind: str, label: str
) -> list[str]:
    far = max(x) or 1.0

    def at_x(value: float) -> float:
        return round(left + 44 + value / far * (_PANEL - 70), 1)

    def at_y(value: float) -> float:
        return round(_BOTTOM - value / top * (_BOTTOM - _TOP), 1)

    parts = []
    for n in range(5):
        tick = top * n / 4
        parts.append(f'<line x1="{at_x(0)}" x2="{at_x(far)}" y1="{at_y(tick)}" y2="{at_y(tick)}"/>')
        parts.append(f'<text x="{left + 36}" y="{at_y(tick) + 4}" text-anchor="end">{tick:g}</text>')
        parts.append(f'<text x="{at_x(far * n / 4)}" y="{_BOTTOM + 18}" text-anchor="middle">{far * n / 4:.0f}</text>')
    parts.append(f'<text x="{at_x(far / 2)}" y="{_BOTTOM + 35}" text-anchor="middle">{label}</text>')
    if kind == "a":
        for e, value in zip(evals, x, strict=True):
            low, high = at_y(e.accuracy_low), at_y(e.accuracy_high)
            parts.append(f'<line class="i" x1="{at_x(value)}" x2="{at_x(value)}" y1="{low}" y2="{high}"/>')
    points = [(at_x(a), at_y(b)) for a, b in zip(x, y, strict=True)]
    parts.append(f'<polyline class="{kind}" points="{" ".join(f"{a},{b}" for a, b in points)}"/>')
    parts += [f'<circle class="dot-{kind}" cx="{a}" cy="{b}" r="3"/>' for a, b in points]
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if README or figure are out of date")
    options = parser.parse_args()
    wanted = {README: filled(README.read_text(encoding="utf-8")), **figures(Results())}
    stale = [p for p, text in wanted.items() if not p.exists() or p.read_text(encoding="utf-8") != text]
    for path in stale:
        print(f"{path.name}: {'is not what the results say' if options.check else 'written'}")
        if not options.check:
            path.write_text(wanted[path], encoding="utf-8")
    raise SystemExit(1 if stale and options.check else 0)


if __name__ == "__main__":
    main()
