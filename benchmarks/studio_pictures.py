"""The pictures of docs/studio.md, taken of a running server: `python benchmarks/studio_pictures.py URL`.

Each tab on a desktop and a phone, in light and dark; the last checkpoint is a base one. A tab's function brings it into
the state that is shown; one without is shown as it opens. Needs playwright, Pillow and a Chromium.
"""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

PLACE = Path(__file__).resolve().parents[1] / "docs" / "pictures"
SIZES = {"desktop": {"width": 1280, "height": 800}, "phone": {"width": 390, "height": 844}}
QUESTIONS = ("Who are you?", "What is 7 + 5?", "Write a short story about a lighthouse.")


def chat(page: Any) -> None:
    """A conversation of three turns."""
    page.wait_for_selector(".welcome .example")
    for number, question in enumerate(QUESTIONS, 1):
        page.fill("#message textarea", question)
        page.press("#message textarea", "Enter")
        page.wait_for_function(
            "count => document.querySelectorAll('.turn.assistant:not(.running) .actions button').length >= count",
            arg=number,
        )
        page.wait_for_selector("#message .send-button")


def last(page: Any, select: str) -> None:
    """Choose the last checkpoint, where a base one is to be served."""
    chosen = page.locator(select).first
    chosen.locator("option").first.wait_for(state="attached")
    chosen.select_option(index=chosen.locator("option").count() - 1)


def notebook(page: Any) -> None:
    """A beginning and two continuations."""
    last(page, "#notebook-checkpoint")
    page.fill("#notebook-text", "It was late in the evening when the keeper")
    for _ in range(2):
        before = page.input_value("#notebook-text")
        page.click("#notebook-continue")
        page.wait_for_function("document.querySelector('#notebook-status').innerText.includes('seed')")
        page.wait_for_function("before => document.querySelector('#notebook-text').value != before", arg=before)
        page.wait_for_timeout(300)
    page.evaluate("scrollTo(0, 0)")


def tokens(page: Any) -> None:
    """Two strategies, why one token was chosen, and a branch."""
    last(page, "#tab-tokens select")
    page.click("#lab-run")
    page.wait_for_function("document.querySelector('#lab-run').textContent == 'Run'")
    page.click(".strategy:nth-child(1) .token:nth-child(8)")
    page.locator(".why tbody button").nth(1).click()
    page.wait_for_function("!document.querySelector('.answer[aria-busy]')")
    page.locator(".colours").first.evaluate("node => scrollTo(0, node.getBoundingClientRect().top + scrollY - 8)")
    page.wait_for_timeout(500)


def score(page: Any) -> None:
    """The example's figures, curve and tokens."""
    last(page, "#score-checkpoint")
    page.click("#score-run")
    page.wait_for_selector(".heat .token")
    page.click(".heat .token:nth-child(11)")
    page.locator(".results").evaluate("node => scrollTo(0, node.getBoundingClientRect().top + scrollY - 8)")
    page.wait_for_timeout(500)


def compare(page: Any) -> None:
    """Two answers to judge."""
    page.get_by_role("button", name="Begin").click()
    page.wait_for_selector("[data-vote=left]:not([disabled])")


def runs(page: Any) -> None:
    """The curves of a run, where the server has one."""
    page.wait_for_selector(".chart.large svg, .runs-none:not([hidden])")


TABS: dict[str, Callable[[Any], None]] = {
    "chat": chat, "notebook": notebook, "tokens": tokens, "score": score, "compare": compare, "runs": runs,
}  # fmt: skip


def main(url: str) -> None:
    """Take them all."""
    PLACE.mkdir(exist_ok=True)
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for size, viewport in SIZES.items():
            for scheme in ("light", "dark"):
                context = browser.new_context(viewport=viewport, color_scheme=scheme)
                page = context.new_page()
                page.goto(url)
                page.wait_for_selector("#tabs [aria-selected=true]", state="attached")
                for tab in page.eval_on_selector_all("#tabs [role=tab]", "all => all.map(tab => tab.textContent)"):
                    name = tab.lower()
                    page.evaluate("name => { location.hash = name; }", name)
                    page.wait_for_selector(f"#tab-{name}.shown .studio-tab:not([aria-busy]):not(:empty)")
                    TABS.get(name, lambda page: page.wait_for_timeout(1000))(page)
                    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
                    # Few colours: a tenth of the size, and nothing to be seen of it.
                    picture.quantize(96).save(PLACE / f"{name}-{size}-{scheme}.png", optimize=True)
                context.close()
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1])
