"""The figure of the scale suite: strong and weak scaling, drawn from its rows alone, so that it can be made again."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from benchmarks.protocol import Row

_STYLE = """
text { font: 12px system-ui, sans-serif; fill: #5d666f } .title { font-weight: 600; fill: #1d2125 }
.grid { stroke: #e4e6e8 } .ideal { stroke: #9aa2aa; stroke-dasharray: 4 4 } polyline { fill: none; stroke-width: 1.8 }
.c0 { stroke: #5d666f } .c1 { stroke: #2563a8 } .c2 { stroke: #2f8f5b } .c3 { stroke: #c05a12 }
.n0 { fill: #5d666f } .n1 { fill: #2563a8 } .n2 { fill: #2f8f5b } .n3 { fill: #c05a12 }
@media (prefers-color-scheme: dark) {
  text { fill: #a3acb5 } .title { fill: #e4e7ea } .grid { stroke: #2d3339 }
  .c0 { stroke: #a3acb5 } .c1 { stroke: #74aee8 } .c2 { stroke: #6cc492 } .c3 { stroke: #eb9a54 }
  .n0 { fill: #a3acb5 } .n1 { fill: #74aee8 } .n2 { fill: #6cc492 } .n3 { fill: #eb9a54 }
}"""
_WIDTH, _PANEL, _LEFT, _TOP, _BOTTOM = 860, 430, 52, 52, 300
_COLOURS = 4
Place = Callable[[float, float], tuple[float, float]]


def figure(rows: list[Row]) -> str:
    """An SVG with a panel for each kind of scaling on GPUs; logarithmic axes, a line for each lag."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_BOTTOM + 48}" role="img" '
        'aria-label="Simulated strong and weak scaling with assumed GPU rates">',
        f"<style>{_STYLE}</style>",
    ]
    for panel, kind in enumerate(("strong scaling", "weak scaling")):
        chosen = [r for r in rows if r["name"].startswith(kind) and "assumed" in r["name"]]
        if not chosen:
            raise LookupError(f"expected rows named '{kind}, ... assumed ...' of the scale suite, found none")
        parts += _panel(panel * _PANEL, chosen)
    return "\n".join([*parts, "</svg>"]) + "\n"


def draw(rows: list[Row], path: Path) -> Path:
    """Write the figure."""
    path.write_text(figure(rows), encoding="utf-8")
    return path


def _panel(left: int, rows: list[Row]) -> list[str]:
    lines: dict[int, list[tuple[int, float]]] = {}
    for r in rows:
        lines.setdefault(r["notes"]["lag"], []).append((r["notes"]["gpus"], r["median"]))
    sizes = sorted({gpus for points in lines.values() for gpus, _ in points})
    rates = [rate for points in lines.values() for _, rate in points]
    low, high = math.floor(math.log10(min(rates))), math.ceil(math.log10(max(rates)))

    def at(gpus: float, rate: float) -> tuple[float, float]:
        across = math.log(gpus / sizes[0]) / (math.log(sizes[-1] / sizes[0]) or 1.0)
        up = (math.log10(rate) - low) / ((high - low) or 1)
        return round(left + _LEFT + across * (_PANEL - 116), 1), round(_BOTTOM - up * (_BOTTOM - _TOP), 1)

    parts = [f'<text class="title" x="{left + _LEFT}" y="18">Simulated: {rows[0]["name"]}</text>']
    parts.append(f'<text x="{left + _LEFT}" y="38">samples/s</text>')
    for power in range(low, high + 1):
        (x1, y), (x2, _) = at(sizes[0], 10.0**power), at(sizes[-1], 10.0**power)
        parts.append(f'<line class="grid" x1="{x1}" x2="{x2}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{left + _LEFT - 8}" y="{y + 4}" text-anchor="end">{10**power:,g}</text>')
    for gpus in sizes:
        parts.append(f'<text x="{at(gpus, 1.0)[0]}" y="{_BOTTOM + 18}" text-anchor="middle">{gpus:,}</text>')
    parts.append(f'<text x="{left + _PANEL / 2}" y="{_BOTTOM + 38}" text-anchor="middle">GPUs</text>')
    parts += _ideal(at, sizes, lines, high)
    names: list[float] = []
    for number, points in enumerate(lines[lag] for lag in sorted(lines)):
        drawn = " ".join("{},{}".format(*at(*point)) for point in points)
        parts.append(f'<polyline class="c{number % _COLOURS}" points="{drawn}"/>')
        names.append(at(*points[-1])[1])
    return parts + _names(left, sorted(lines), names)


def _ideal(at: Place, sizes: list[int], lines: dict[int, list[tuple[int, float]]], high: int) -> list[str]:
    """Linear from the smallest pools at the least lag, as far as the panel goes."""
    start = lines[min(lines)][0][1]
    end = min(sizes[-1], sizes[0] * 10.0**high / start)
    (x1, y1), (x2, y2) = at(sizes[0], start), at(end, start * end / sizes[0])
    return [f'<line class="ideal" x1="{x1}" x2="{x2}" y1="{y1}" y2="{y2}"/>']


def _names(left: int, lags: list[int], heights: list[float]) -> list[str]:
    """The lag at the end of its line and in its colour, none above another."""
    parts, last = [], math.inf
    for number, height in sorted(enumerate(heights), key=lambda pair: -pair[1]):
        last = min(height, last - 14)
        place = f'x="{left + _PANEL - 60}" y="{round(last + 4, 1)}"'
        parts.append(f'<text class="n{number % _COLOURS}" {place}>S = {lags[number]}</text>')
    return parts
