"""`slora watch` in a browser, while a run goes on."""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.browser import Browser, find_browser
from tests.support.processes import LONG, wait_until
from tests.support.recorded import write_run
from tests.support.runs import Config, arguments, make_config
from tests.support.watching import SLORA, watching

BROWSER = find_browser()
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium or Chrome is installed"
)
# What went wrong on the page, from its beginning.
RECORD = """window.wrong = [];
for (const kind of ["error", "unhandledrejection", "securitypolicyviolation"])
  addEventListener(kind, e => wrong.push(String(e.message ?? e.reason ?? e.blockedURI)), true);
console.error = (...told) => wrong.push(told.join(" "));"""  # noqa: E501
ROUNDS = "document.querySelectorAll('#events .round').length"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert BROWSER is not None
    with Browser(BROWSER, tmp_path_factory.mktemp("profile")) as browser:
        browser.call("Page.enable")
        browser.call("Page.addScriptToEvaluateOnNewDocument", source=RECORD)
        yield browser


def until(browser: Browser, condition: str) -> None:
    end = time.monotonic() + LONG
    while not browser.evaluate(condition):
        assert time.monotonic() < end, condition
        time.sleep(0.05)


def check_page(browser: Browser, width: int) -> None:
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("wrong") == []


def test_a_run_that_goes_on_is_followed(
    browser: Browser, tmp_path: Path, corpus: Path, tiny_models: dict[str, Path]
) -> None:
    path = tmp_path / "run"
    # More rounds than are waited for; the run is ended here.
    config = make_config(corpus, tiny_models["bert"], path)
    changes: Config = {"rounds": 100_000, "clients.per-round": 1}
    command = [*SLORA, *arguments(config | changes)]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdout=quiet, stderr=quiet) as run:
        try:
            events = path / "events.jsonl"
            wait_until(lambda: events.is_file() and b"\n" in events.read_bytes())
            with watching(path) as address:
                for width in (1280, 360):
                    browser.show(address, width)
                    browser.evaluate("window.mark = 1")
                    until(browser, f"{ROUNDS} > 0")
                    seen = browser.evaluate(ROUNDS)
                    until(browser, f"{ROUNDS} > {min(seen, 400)}")
                    until(browser, "!!document.querySelector('#report figure svg')")
                    assert browser.evaluate("mark") == 1  # it was not loaded again
                    state = browser.evaluate("document.body.dataset.state")
                    assert state == "running"
                    check_page(browser, width)
                run.terminate()
                until(browser, "document.body.dataset.state == 'interrupted'")
                check_page(browser, 360)
        finally:
            run.terminate()


def test_hostile_names_are_text(browser: Browser, tmp_path: Path) -> None:
    hostile = "<img src=x onerror=alert(1)><script>alert(1)</script>" + "W" * 200
    path = write_run(tmp_path / "run", failures=[hostile])
    with watching(path) as address:
        browser.show(address, 360)
        until(browser, "!!document.querySelector('#report h2')")
        browser.evaluate("document.querySelectorAll('details').forEach(d=>d.open=true)")
        text = "document.querySelector('#events .failure').textContent"
        assert hostile[:50] in browser.evaluate(text)
        assert (
            browser.evaluate("document.querySelectorAll('#report script').length") == 0
        )
        assert browser.evaluate("document.images.length") == 0
        check_page(browser, 360)
