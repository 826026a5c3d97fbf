"""Visits to the studio in a browser, for the tests of its tabs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SECONDS = 30_000
HOSTILE = (
    "<img src=x onerror=\"document.title='taken'\"> <script>document.title='taken'</script> "
    "<|im_end|> a\u202eb\u200bc\x07d"
)
"""Markup, a control token's spelling, and marks that are not seen."""
SEEN = HOSTILE.replace("\u202e", r"\u202e").replace("\u200b", r"\u200b").replace("\x07", r"\u0007")
"""How that is shown."""


@contextmanager
def visiting(browser: Any, served: Any, tab: str, **options: Any) -> Iterator[Any]:
    """A fresh visitor's page, at a tab. Nothing may go wrong in the console or leave for another host meanwhile."""
    context = browser.new_context(**({"viewport": {"width": 1280, "height": 800}} | options))
    page = context.new_page()
    page.set_default_timeout(SECONDS)
    elsewhere: list[str] = []
    problems: list[str] = []

    def said(message: Any) -> None:
        # What the API refuses, and what the page itself ends, the browser reports by itself; the tab tells of it.
        if message.type == "error" and "Failed to load resource" not in message.text:
            problems.append(message.text)

    home = (served.url, "data:", "blob:", "about:")
    page.on("request", lambda request: None if request.url.startswith(home) else elsewhere.append(request.url))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", said)
    page.goto(f"{served.url}/#{tab}")
    try:
        yield page
        assert page.title() == "Topkapi"
        assert (elsewhere, problems) == ([], [])
    finally:
        context.close()


def slowed(run: Callable) -> Callable:
    """As a real network is at most: a tiny one is through before somebody could stop it."""

    def slow(works: object) -> object:
        time.sleep(0.003)
        return run(works)

    return slow


CONTRAST = """nodes => {
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const found = channels(getComputedStyle(node).backgroundColor);
      if (found.length === 3 || found[3] === 1) return found;
    }
    return [255, 255, 255];
  };
  return Math.min(...nodes.map((node) => {
    const [one, other] = [light(channels(getComputedStyle(node).color)), light(ground(node))];
    return (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
  }));
}"""


def least_contrast(page: Any, selector: str) -> float:
    """The smallest ratio of text and ground among the elements of a selector."""
    found: float = page.eval_on_selector_all(selector, CONTRAST)
    return found


def fits(page: Any) -> bool:
    """Whether nothing sticks out to the right."""
    return bool(page.evaluate("document.documentElement.scrollWidth <= innerWidth"))
