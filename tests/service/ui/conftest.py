"""A browser for the studio's tests, and visitors who notice whatever goes wrong."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest

SECONDS = 30_000
REFUSED = "Failed to load resource"
"""How Chromium's console tells of an answer that is an error, which the page shows where it arose."""


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    # Else a server's thread imports Gradio, perhaps while the next test has something of Python's replaced by its own.
    importlib.import_module("topkapi.service.ui.studio")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield running
        running.close()


def leaves(url: str, home: str) -> bool:
    """Whether a page of `home` that asks for `url` asks somebody else."""
    return not url.startswith((home, "data:", "blob:", "about:"))


@pytest.fixture(scope="session")
def visiting() -> Callable[..., AbstractContextManager[Any]]:
    """`with visiting(browser, url, **of_the_context) as page`: a fresh visitor of the studio.

    Whatever a test does, nothing may go wrong in the console or leave for another host. `before(page)` is called before
    the page is opened, which is over when there is what `wait` selects.
    """

    @contextmanager
    def visit(
        browser: Any,
        url: str,
        *,
        wait: str = "#message textarea",
        before: Callable[[Any], object] = lambda page: None,
        **options: Any,
    ) -> Iterator[Any]:
        permissions = ["clipboard-read", "clipboard-write"]
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 800}} | options))
        context.grant_permissions(permissions)
        page = context.new_page()
        page.set_default_timeout(SECONDS)
        home = url.split("#", maxsplit=1)[0].rstrip("/")
        problems: list[str] = []
        page.on("request", lambda request: problems.append(request.url) if leaves(request.url, home) else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "console",
            lambda told: problems.append(told.text) if told.type == "error" and REFUSED not in told.text else None,
        )
        before(page)
        page.goto(url)
        page.wait_for_selector(wait)
        yield page
        context.close()
        assert problems == []

    return visit
