"""A browser, and what its pages are shown by: a front over a scripted engine, or a cluster of the demo model.

`make test-browser` runs these tests, `make test` does not. They take Debian's chromium; $CHROMIUM names another one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "router"))  # the fakes of the front, before benchmarks/front.py

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
DESKTOP, PHONE = (1280, 900), (400, 800)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """One browser for all tests."""
    api = pytest.importorskip("playwright.sync_api", reason="pip install -e '.[browser]'")
    assert Path(CHROMIUM).exists(), f"there is no {CHROMIUM}: apt-get install chromium, or set $CHROMIUM"
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Tab:
    """A page in a context of its own. What its console says in error, and what it throws, is kept."""

    def __init__(self, browser: Any, size: tuple[int, int], scheme: str) -> None:
        self.context = browser.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, reduced_motion="reduce"
        )
        self.context.set_default_timeout(120_000)
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.page.on("console", lambda m: m.type == "error" and self.errors.append(m.text))
        self.page.on("pageerror", lambda e: self.errors.append(str(e)))

    def expect_no_wider_than_the_window(self) -> None:
        """Nothing makes the page scroll sideways."""
        widths = self.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert widths[0] <= widths[1], widths


@pytest.fixture
def tab(chromium: Any) -> Iterator[Any]:
    """Makes tabs; none may have said anything in error that its test did not take out of `errors`."""
    tabs: list[Tab] = []

    def make(size: tuple[int, int] = DESKTOP, scheme: str = "light") -> Tab:
        tabs.append(Tab(chromium, size, scheme))
        return tabs[-1]

    yield make
    said = [error for one in tabs for error in one.errors]
    for one in tabs:
        one.context.close()
    assert said == []
