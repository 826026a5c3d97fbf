"""Tokens, Score and Notebook for everybody, with what they have found: nothing serious in either theme."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def studio(serve: Callable, tiny_checkpoint: Callable[..., Path]) -> Iterator:
    with serve(tiny_checkpoint("one", chat=False, seed=1, context=512), tiny_checkpoint("two"), studio=True) as running:
        yield running


def faults(page: Any) -> list[str]:
    """What axe finds that is serious or critical, light and dark, with the elements that it finds it at."""
    found = []
    for dark in (False, True):
        page.evaluate("dark => document.body.classList.toggle('dark', dark)", dark)
        found += [
            f"{each['id']}: {node['html'][:200]}"
            for each in axe.Axe().run(page).response["violations"]
            if each["impact"] in ("serious", "critical")
            for node in each["nodes"]
        ]
    return found


@pytest.mark.slow
def test_tokens_with_a_trace_branches_and_everything_open(browser, studio, visiting) -> None:
    with visiting(browser, f"{studio.url}/#tokens", wait=".strategy:nth-child(2)") as page:
        page.fill("#lab-most", "12")
        page.click("#lab-run")
        page.wait_for_selector(".strategy:nth-child(1) .token:nth-child(5)")
        page.click(".strategy:nth-child(1) .token:nth-child(3)")
        page.locator(".why tbody button").first.click()
        page.wait_for_selector(".branches button >> nth=1")
        page.eval_on_selector_all("details", "all => all.forEach(each => each.open = true)")
        page.wait_for_selector(".shape table")
        for measure in ("rank", "entropy"):
            page.get_by_label("Colour by").select_option(measure)
            assert faults(page) == []


@pytest.mark.slow
def test_score_with_each_kind_of_result(browser, studio, visiting) -> None:
    with visiting(browser, f"{studio.url}/#score", wait="#score-text") as page:
        page.wait_for_selector("#score-second option >> nth=1", state="attached")
        for mode, result in (("text", ".heat .token"), ("pair", ".heat .token"), ("choices", "table.choices")):
            page.check(f"input[value={mode}]")
            if mode == "pair":
                page.select_option("#score-second", "two")
            page.click("#score-run")
            page.wait_for_selector(result)
            if mode != "choices":
                page.click(".heat .token:nth-child(4)")
            assert faults(page) == []
        page.fill("#score-prompt", "")
        page.click("#score-run")
        page.wait_for_selector(".studio-error")
        assert faults(page) == []


@pytest.mark.slow
def test_a_notebook_with_continuations_and_marks(browser, studio, visiting) -> None:
    with visiting(browser, f"{studio.url}/#notebook", wait="#notebook-text") as page:
        page.fill("#notebook-text", "A list\u202e is")
        page.click("#notebook-continue")
        page.wait_for_function("document.querySelector('#notebook-status').innerText.includes('seed')")
        for colours in ("run", "level"):
            page.select_option("#notebook-colours", colours)
            assert faults(page) == []
