"""Pages in a browser: on a phone, on a dark screen and in print."""

import io
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from slora_flwr.reports.comparison_page import compare
from slora_flwr.reports.page import render
from slora_flwr.reports.run_page import report
from slora_flwr.runs.events import ClassRecord
from slora_flwr.runs.reader import read_run
from tests.support.browser import Browser, find_browser
from tests.support.recorded import write_run
from tests.support.runs import Config

BROWSER = find_browser()
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium or Chrome is installed"
)

WORD = "donaudampfschifffahrtsgesellschaft" * 3
PAGES = ("report", "many-classes", "comparison")
OPEN = "document.querySelectorAll('details').forEach(d => d.open = true)"
# The lowest contrast of a text with what is behind it, and that text.
CONTRAST = """(() => {
  const parse = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(x => x / 255)
    .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = node => {
    const layers = [];
    for (let at = node; at; at = at.parentElement) {
      const [r, g, b, a = 1] = parse(getComputedStyle(at).backgroundColor);
      layers.push([r, g, b, a]);
      if (a === 1) break;
    }
    return layers.reduceRight((below, [r, g, b, a]) =>
      [r, g, b].map((x, i) => a * x + (1 - a) * below[i]), [255, 255, 255]);
  };
  let worst = [99, ""];
  for (const node of document.querySelectorAll("body, body *")) {
    const texts = [...node.childNodes].filter(n => n.nodeType === 3);
    const text = texts.map(n => n.data).join("").trim();
    if (!text || !node.getClientRects().length) continue;
    const style = getComputedStyle(node);
    const colour = parse(node.closest("svg") ? style.fill : style.color);
    const [a, b] = [light(colour), light(behind(node))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < worst[0]) worst = [ratio, text];
  }
  return worst;
})()"""
# Texts of drawings that are not within their drawing.
CLIPPED = """[...document.querySelectorAll("svg text")].filter(text => {
  const own = text.getBoundingClientRect();
  const all = text.closest("svg").getBoundingClientRect();
  return own.left < all.left - 1 || own.right > all.right + 1 ||
    own.top < all.top - 1 || own.bottom > all.bottom + 1;
}).map(text => text.textContent)"""


def confusions(count: int) -> ClassRecord:
    """Return what takes a tenth of each class for the next one."""
    pairs = [(label, (label + 1) % count, 1) for label in range(count)]
    return ClassRecord([9] * count, [10] * count, [10] * count, pairs)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("pages")
    runs = {
        name: write_run(
            place / name,
            {
                "method": "slora",
                "data.name": f"{WORD}.csv",
                "rounds": 40,
                "sparse.rounds": 39,
            },
            [0.02 * i for i in range(40)],
            failures=[f"the reply is of {WORD}"],
            energies={f"layer.{i}.{WORD}": 0.5 for i in range(30)},
            classes=confusions(count),
            facts={"classes": [f"{i} {WORD}" for i in range(count)]},
        )
        for name, count in {"report": 20, "many-classes": 300}.items()
    }
    found = {name: render(report(read_run(path))) for name, path in runs.items()}
    targets = ("query", "query,key,value,attention.output.dense,output.dense")
    compared = [
        write_run(
            place / f"lora-{i}",
            {"lora.targets": target, "lora.rank": rank, "clients.alpha": alpha},
            ended=i > 0,
        )
        for i, (target, rank, alpha) in enumerate(
            product(targets, (4, 16), (0.1, 1.0, 10.0))
        )
    ]
    names = {"lora A": "W" * 48, "lora-3": "a name of several words, near the most"}
    page = compare([read_run(path) for path in compared], (1, 10), 0.3, names)
    found["comparison"] = render(page)
    for name, html in found.items():
        (place / f"{name}.html").write_text(html)
    return {name: place / f"{name}.html" for name in found}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert BROWSER is not None
    with Browser(BROWSER, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize(
    ("width", "media"), [(360, "screen"), (1280, "screen"), (680, "print")]
)
def test_a_page_fits_its_width(
    browser: Browser, pages: dict[str, Path], name: str, width: int, media: str
) -> None:
    browser.show(pages[name], width, media=media)
    browser.evaluate(OPEN)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(CLIPPED) == []
    # On paper nothing scrolls: what is wider than its table's place is lost.
    if media == "print":
        cut = "[...document.querySelectorAll('.scroll')].filter(e => "
        cut += "e.scrollWidth > e.clientWidth).length"
        assert browser.evaluate(cut) == 0


def test_usual_tables_need_no_scrolling_and_titles_are_whole(
    browser: Browser, tmp_path: Path
) -> None:
    changes: Config = {"method": "slora", "sparse.rounds": 20, "rounds": 40}
    data: Config = {"data.name": "/home/somebody/of/a/project/texts.csv"}
    runs = [
        write_run(
            tmp_path / f"{alpha}-{seed}",
            changes | data | {"clients.alpha": alpha, "seed": seed},
            [0.02 * i for i in range(40)],
            planned=2_345_678_901,
        )
        for alpha, seed in product((0.1, 1.0), range(3))
    ]
    targets = "query,key,value,attention.output.dense,output.dense"
    tuned: dict[str, Config] = {
        "lr": {"lora.lr": 0.003, "train.batch-size": 32, "clients.per-round": 4},
        "targets": {"lora.targets": targets, "lora.rank": 16, "data.max-length": 64},
    }
    others = [
        write_run(tmp_path / name, {"clients.alpha": 10} | config)
        for name, config in tuned.items()
    ]
    path = tmp_path / "page.html"
    pages = [report(read_run(runs[0]))]
    pages += [
        compare([read_run(run) for run in some], (1, 10), 0.3)
        for some in (runs, runs[:1] + others)
    ]
    for page in pages:
        path.write_text(render(page))
        browser.show(path, 1280)
        scrolled = "[...document.querySelectorAll('main > section > .scroll')].filter("
        scrolled += "e => e.scrollWidth > e.clientWidth).map(e => e.ariaLabel)"
        assert browser.evaluate(scrolled) == []
    path.write_text(render(pages[0]))
    browser.show(path, 360)
    title = "document.querySelector('h1')"
    assert browser.evaluate(f"{title}.textContent") == "slora on texts.csv"
    lines = f"{title}.clientHeight / parseFloat(getComputedStyle({title}).lineHeight)"
    assert browser.evaluate(lines) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read(
    browser: Browser, pages: dict[str, Path], name: str, scheme: str
) -> None:
    browser.show(pages[name], 1280, scheme)
    browser.evaluate(OPEN)
    ratio, text = browser.evaluate(CONTRAST)
    assert ratio >= 4.5, text


def test_paper_is_white_whatever_the_screen(
    browser: Browser, pages: dict[str, Path]
) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    browser.show(pages["report"], 680, "dark", media="print")
    assert browser.evaluate(paper) == "rgb(255, 255, 255)"
    browser.show(pages["report"], 680, "dark")
    assert browser.evaluate(paper) == "rgb(22, 24, 26)"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_table_shows_that_it_scrolls(
    browser: Browser, pages: dict[str, Path], scheme: str
) -> None:
    browser.show(pages["comparison"], 360, scheme)
    table = "document.querySelector('.scroll')"
    browser.evaluate(f"{table}.scrollIntoView()")
    left, top, right, bottom = browser.evaluate(
        f"(b => [b.left, b.top, b.right, b.bottom])({table}.getBoundingClientRect())"
    )

    def edge() -> list[int]:
        """Return the most frequent colour just inside of the right edge."""
        pixels = np.array(Image.open(io.BytesIO(browser.picture())).convert("RGB"))
        column = pixels[max(0, int(top)) : int(bottom), int(right) - 2]
        found, times = np.unique(column, axis=0, return_counts=True)
        return [int(x) for x in found[times.argmax()]]

    paper = {"light": [255, 255, 255], "dark": [22, 24, 26]}[scheme]
    assert np.abs(np.subtract(edge(), paper)).max() > 30
    browser.evaluate(f"{table}.scrollLeft = 1e6")
    assert edge() == paper
    # The first column stays.
    first = f"{table}.querySelector('tbody th').getBoundingClientRect().left"
    assert browser.evaluate(first) == pytest.approx(left)
