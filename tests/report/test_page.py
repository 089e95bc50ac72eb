"""The page in a real browser: from a file, without network, with text that would like to be more than text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.synthetic_run import WORDS, Made, write_run
from orz_async.report.page import read_run, report
from tests.report.chromium import Chromium, find

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(find() is None, reason="no Chromium on PATH; apt-get install chromium to run these tests"),
]

HOSTILE = (
    "</script><script>window.pwned = 1</script>",
    "<img src=x onerror='window.pwned = 1'>",
    "<!--<script>",
    "&lt;b&gt;",
    '"}]</script>',
    "\u2028\u202e\u0000",
    "%%SCRIPT%%",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("profile")) as chromium:
        chromium.look(width=1280)
        yield chromium


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Made]:
    """A run of more rollouts than are shown, its page with hostile texts, and what was written."""
    run = tmp_path_factory.mktemp("runs") / "a <b>run</b>"
    facts = write_run(run, steps=40, prompts=70, samples=4, response=(3, 8), words=[*WORDS, *HOSTILE])
    report([run], run / "report.html")
    return run, run / "report.html", facts


def quiet(browser: Chromium, page: Path) -> None:
    """Nothing went wrong in the browser, and nothing but the file was asked for."""
    assert browser.problems == []
    assert set(browser.requests) == {page.absolute().as_uri()}


def test_it_loads_from_a_file_and_shows_the_journal_s_numbers(
    browser: Chromium, pages: tuple[Path, Path, Made]
) -> None:
    run, page, facts = pages
    browser.open(page)
    quiet(browser, page)
    assert browser.ask("state.runs[0].series.reward") == pytest.approx(facts.rewards, rel=1e-6)
    assert browser.ask("state.runs[0].series.length") == pytest.approx(facts.lengths, rel=1e-6)
    tiles = browser.ask("[...document.querySelectorAll('.tile')].map(tile => tile.innerText)")
    summary = read_run(run)[0]["summary"]
    assert any(f"{summary['accuracy_after']:.1%}".replace("%", " %").replace(".0 %", " %") in tile for tile in tiles)
    assert browser.ask("document.getElementById('funnel').innerText").startswith("All accounted for")
    assert "37 tokens were sampled for leases" in browser.ask("document.getElementById('funnel').innerText")
    assert f"trained\t{facts.rollouts:,}" in browser.ask("document.getElementById('funnel').innerText")
    drawn = browser.ask("charts.filter(c => !c.figure.hidden).length")
    assert drawn >= 20
    assert browser.ask("charts.every(c => c.figure.hidden || c.canvas.width > 0)")
    # Something is painted on each: a canvas that failed half way would be blank.
    blank = (
        "charts.filter(c => !c.figure.hidden && !c.canvas.getContext('2d').getImageData(0, 0, c.canvas.width, "
        "c.canvas.height).data.some(v => v)).length"
    )
    assert browser.ask(blank) == 0


def test_model_text_stays_text(browser: Chromium, pages: tuple[Path, Path, Made]) -> None:
    run, page, _ = pages
    browser.open(page)
    texts = set()
    for row in range(0, 3000, 60):
        browser.ask(f"select({row})")
        texts.update(browser.ask("[...document.querySelectorAll('.text span')].map(span => span.textContent)"))
    assert set(HOSTILE) <= texts, "the hostile pieces were shown, letter by letter"
    assert browser.ask("document.getElementById('title').textContent") == run.name
    assert browser.ask("document.querySelectorAll('img, main b b, main script').length") == 0
    assert browser.ask("typeof window.pwned") == "undefined"
    quiet(browser, page)


def test_no_other_script_runs(browser: Chromium, pages: tuple[Path, Path, Made]) -> None:
    _, page, _ = pages
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page.read_text())
    assert (
        policy is not None
        and "unsafe" not in policy[1]
        and policy[1].startswith("default-src 'none'; script-src 'sha256-")
    )
    browser.open(page)
    browser.ask(
        "(() => { const s = document.createElement('script'); s.textContent = 'window.pwned = 1'; "
        "document.body.append(s); "
        "document.body.insertAdjacentHTML('beforeend', '<p onclick=\"window.pwned = 1\" id=bait>x</p>'); "
        "document.getElementById('bait').click(); return fetch('https://example.org').then(() => 1, () => 0); })()"
    )
    assert browser.ask("typeof window.pwned") == "undefined"
    assert any("Content Security Policy" in problem for problem in browser.problems)
    browser.problems.clear()


def test_ten_thousand_rollouts_are_browsed_by_what_is_in_sight(
    browser: Chromium, pages: tuple[Path, Path, Made]
) -> None:
    _, page, _ = pages
    browser.open(page)
    assert browser.ask("index().rows.kind.length") == 10_000
    for part in (0.0, 0.31, 0.99, 1.0):
        browser.ask(
            f"(() => {{ const l = document.getElementById('list'); l.scrollTop = {part} * l.scrollHeight; "
            "l.onscroll(); })()"
        )
        assert browser.ask("document.querySelectorAll('#rows .row').length") < 60
        assert browser.ask(
            "[...browser.drawn].some(([at, row]) => row.getBoundingClientRect().top >= 0 && "
            "+row.children[0].textContent === index().rows.step[browser.chosen[at]])"
        )
    assert browser.ask("Math.max(...browser.drawn.keys())") == 9_999
    assert browser.ask("(() => { select(9999); return browser.texts.size; })()") <= 17
    quiet(browser, page)


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"verdict": "wrong"}, "r.verdict[n] === 'wrong'"),
        ({"lag": "0"}, "r.lag[n] === 0"),
        ({"reward-low": "0.5", "length-high": "5"}, "r.reward[n] >= 0.5 && r.length[n] <= 5"),
        ({"step-low": "7", "step-high": "9"}, "r.step[n] >= 7 && r.step[n] <= 9"),
        ({"kind": "eval"}, "r.kind[n] === 'eval'"),
    ],
)
def test_filters(browser: Chromium, pages: tuple[Path, Path, Made], fields: dict[str, str], wanted: str) -> None:
    _, page, _ = pages
    browser.open(page)
    for name, value in fields.items():
        browser.ask(
            f"(() => {{ const f = filters['{name}']; f.value = '{value}'; "
            "f.dispatchEvent(new Event('input', {bubbles: true})); })()"
        )
    expected = browser.ask(
        f"(() => {{ const r = index().rows; return r.kind.map((_, n) => n).filter(n => {wanted}); }})()"
    )
    assert browser.ask("browser.chosen") == expected
    assert browser.ask("document.getElementById('count').textContent").startswith(f"{len(expected):,} of 10,000")
    if not expected:
        assert "No rollout fits" in browser.ask("document.getElementById('detail').textContent")


def test_a_rollout_is_coloured_by_what_is_chosen(browser: Chromium, pages: tuple[Path, Path, Made]) -> None:
    _, page, _ = pages
    browser.open(page)
    browser.ask("(() => { filters.values.checked = true; filter(); })()")
    options = browser.ask("[...document.getElementById('paint').options].map(o => o.value)")
    assert {"value", "advantage", "ratio", "lag", "logprob"} <= set(options)
    seen = set()
    for option in ("value", "advantage", "ratio"):
        browser.ask(f"(() => {{ const p = document.getElementById('paint'); p.value = '{option}'; p.onchange(); }})()")
        seen.add(browser.ask("[...document.querySelectorAll('.text span')].map(s => s.style.backgroundColor).join()"))
    assert len(seen) == 3
    # A negative advantage is warm, a positive one cool.
    browser.ask("(() => { const p = document.getElementById('paint'); p.value = 'advantage'; p.onchange(); })()")
    agreed = browser.ask(
        "(() => { const v = unpack(body(browser.chosen[browser.selected]).channels.advantage); "
        "return [...document.querySelectorAll('.text span')].every((s, i) => "
        "s.style.backgroundColor.startsWith(v[i] < 0 ? 'rgba(224' : 'rgba(52')); })()"
    )
    assert agreed


def test_runs_are_compared_on_the_axis_that_is_chosen(
    browser: Chromium, pages: tuple[Path, Path, Made], tmp_path: Path
) -> None:
    run, _, _ = pages
    other = tmp_path / "other"
    write_run(other, steps=6, prompts=8, samples=2, seed=3)
    page = tmp_path / "two.html"
    report([run, other], page)
    browser.open(page)
    assert browser.ask("charts[0].data.series.map(s => s.label).filter(l => !l.includes('held-out'))") == [
        run.name,
        "other",
    ]
    for axis in ("tokens", "wall_s", "step"):
        browser.ask(f"document.querySelector('input[value={axis}]').click()")
        assert browser.ask("charts[0].data.series[1].x") == browser.ask(f"state.runs[1].series.{axis}")
    browser.ask("(() => { const s = document.getElementById('run'); s.value = '1'; s.onchange(); })()")
    assert browser.ask("index().rows.kind.length") == 96
    quiet(browser, page)


@pytest.mark.parametrize(("width", "dark"), [(390, False), (390, True), (1600, False), (1600, True)])
def test_it_fits_every_window_and_follows_the_colour_scheme(
    browser: Chromium, pages: tuple[Path, Path, Made], width: int, dark: bool
) -> None:
    _, page, _ = pages
    browser.look(width=width, dark=dark)
    browser.open(page)
    assert browser.ask("document.documentElement.scrollWidth") <= width
    shade = browser.ask("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]")
    assert shade < 60 if dark else shade > 200
    quiet(browser, page)
    browser.look(width=1280)
