"""How soon the studio is there, and how fast it stays while an answer comes: `python benchmarks/studio_times.py URL`.

Of a running server that nobody else uses: milliseconds to the first paint and until the chat can be used, of a first
visit and of later ones; from a key to the frame that shows it, while an answer comes and while none does; and to the
first token, for one browser and for two at once. Needs playwright and a Chromium.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import time
from typing import Any

from playwright.sync_api import sync_playwright

WRITTEN = "a text of some length that is typed meanwhile, by somebody in a hurry who does not wait for what is written"
WATCH = """() => {
  window.keys = [];
  document.querySelector('#message-text').addEventListener('keydown', (event) => {
    const at = event.timeStamp;
    requestAnimationFrame(() => setTimeout(() => keys.push(performance.now() - at)));
  });
}"""


def visit(browser: Any, url: str) -> tuple[Any, float, float]:
    """A page of a fresh visitor, and the milliseconds to its first paint and until it can be used."""
    page = browser.new_context(viewport={"width": 1280, "height": 800}).new_page()
    began = time.perf_counter()
    page.goto(url, wait_until="commit")
    page.wait_for_selector(".welcome .example")
    usable = (time.perf_counter() - began) * 1000
    paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    page.evaluate(WATCH)
    return page, paint, usable


def ask(page: Any, text: str) -> None:
    """Begin an answer, as long as the context has room for."""
    page.locator("[data-parameter=max_tokens]").fill("4000")
    page.locator("[data-parameter=ignore_end_token]").evaluate("box => box.checked || box.click()")
    page.fill("#message-text", text)
    page.press("#message-text", "Enter")
    page.wait_for_function("document.querySelector('#status').innerText.match(/^Writing… [1-9]\\d* token/)")


def typed(page: Any) -> str:
    """Type, and tell how long keys took to be seen."""
    page.evaluate("keys.length = 0")
    page.type("#message-text", WRITTEN, delay=30)
    taken = sorted(page.evaluate("keys"))
    return f"median {statistics.median(taken):.0f} ms, longest {taken[-1]:.0f} ms of {len(taken)}"


def first_token(page: Any) -> str:
    """What the page says of the time to the first token of its answer."""
    page.keyboard.press("Escape")
    page.wait_for_selector(".send-button:not([hidden])")
    facts = page.locator(".facts").last.inner_text()
    return " · ".join(part for part in facts.split(" · ") if "first" in part or "/s" in part)


def main(url: str) -> None:
    """Measure and print."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for number in range(4):
            page, paint, usable = visit(browser, url)
            print(f"visit {number + 1}: painted after {paint:.0f} ms, usable after {usable:.0f} ms", flush=True)
        print("keys while nothing comes:", typed(page))
        ask(page, "Once")
        print("keys while an answer comes:", typed(page), "|", page.inner_text("#status"))
        print("one browser:", first_token(page))
        other, _, _ = visit(browser, url)
        page.fill("#message-text", "")
        ask(page, "Once more")
        ask(other, "Once more")
        print("keys beside another browser:", typed(page))
        print("two browsers:", first_token(page), "|", first_token(other))
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1])
