"""Every tab for everybody: nothing serious in either theme, and enough contrast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.service.ui.chat_page import answered, refusal, send, set_parameter
from topkapi.service.ui.studio import SCRIPTS, TABS

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def studio(serve: Callable, tiny_checkpoint: Callable[..., Path]) -> Iterator:
    with serve(tiny_checkpoint("talker", context=1024), studio=True) as running:
        yield running


def faults(page: Any) -> list[str]:
    """What axe finds that is serious or critical, with the elements that it finds it at."""
    found = axe.Axe().run(page).response["violations"]
    return [
        f"{each['id']}: {node['html'][:200]}"
        for each in found
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("script", [SCRIPTS[name] for name in TABS if name in SCRIPTS])
def test_a_tab_as_it_opens(browser, studio, visiting, script: str, scheme: str) -> None:
    name = next(name for name, each in SCRIPTS.items() if each == script)
    shown = f"#tab-{name.lower()}.shown .studio-tab:not([aria-busy]):not(:empty)"
    with visiting(browser, f"{studio.url}/#{name.lower()}", wait=shown, color_scheme=scheme) as page:
        assert faults(page) == []


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_chat_with_an_answer_an_error_and_everything_open(browser, studio, visiting, scheme: str) -> None:
    with visiting(browser, studio.url, color_scheme=scheme) as page:
        set_parameter(page, "Maximum tokens", "20")
        page.eval_on_selector_all("#settings details", "all => all.forEach(each => each.open = true)")
        send(page, "Hello\u202e")
        answered(page, 1)
        page.click(".turn.assistant .more summary")
        set_parameter(page, "Seed", "lucky")
        send(page, "Again")
        refusal(page)
        assert faults(page) == []
        page.focus("#conversation")
        page.keyboard.press("?")
        page.wait_for_selector("#shortcuts")
        assert faults(page) == []


@pytest.mark.slow
def test_everything_of_the_chat_is_reached_by_keyboard(browser, studio, visiting) -> None:
    """From the message with Tab through all that can be used, and back round to it, without a trap."""
    with visiting(browser, studio.url) as page:
        set_parameter(page, "Maximum tokens", "5")
        send(page, "Hello")
        answered(page, 1)
        wanted = page.evaluate(
            """() => [...document.querySelectorAll('#header *, .studio-tab *')]
              .filter(e => e.matches('a[href], button:not(:disabled), input, select, textarea, summary'))
              .filter(e => e.tabIndex >= 0 && e.checkVisibility({visibilityProperty: true}))
              .map((e, number) => (e.dataset.wanted = number, number))"""
        )
        reached = set()
        page.focus("#message-text")
        for _ in range(2 * len(wanted) + 10):
            page.keyboard.press("Tab")
            reached.add(page.evaluate("document.activeElement?.dataset.wanted"))
            if len(reached - {None}) == len(wanted):
                break
        missing = sorted(set(map(str, wanted)) - reached)
        assert missing == [], page.evaluate(
            "all => all.map(n => document.querySelector(`[data-wanted='${n}']`).outerHTML.slice(0, 150))", missing
        )
