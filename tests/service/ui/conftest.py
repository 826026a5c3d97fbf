"""A browser for the studio's tests."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield running
        running.close()
