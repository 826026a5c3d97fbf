"""What is pressed before the page has been told what is loaded waits for it, on every tab, and is told of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.service.ui.chat_page import answered, endless, refusal, send, set_parameter, turns

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.timeout(180)

WAITING = "Waiting for the list of checkpoints…"


@pytest.fixture(scope="module")
def studio(serve: Callable, tiny_checkpoint: Callable[..., Path]) -> Iterator:
    with serve(tiny_checkpoint("talker", context=1024), tiny_checkpoint("other", seed=1), studio=True) as running:
        yield running


class Held:
    """The page's questions for the list of checkpoints, which wait to be let through."""

    def __init__(self, page: Any) -> None:
        self._page, self._routes = page, []
        page.route("**/models", self._hold)

    def _hold(self, route: Any) -> None:
        self._routes.append(route)

    def let_through(self) -> None:
        for route in self._routes:
            route.continue_()
        self._page.unroute("**/models")


@pytest.fixture
def early(browser, studio, visiting) -> Callable:
    """`with early("#tab") as (page, held)`: a visitor who is not told yet what is loaded."""

    @contextmanager
    def visit(place: str = "", wait: str = "#message textarea", url: str | None = None) -> Iterator:
        held = []
        with visiting(
            browser, url or f"{studio.url}/{place}", wait=wait, before=lambda page: held.append(Held(page))
        ) as page:
            yield page, held[0]

    return visit


def told(page: Any, words: str) -> None:
    """Wait until the page says so where it can be seen."""
    page.wait_for_function(
        "words => document.querySelector('.studio-panel.shown').innerText.includes(words)", arg=words
    )


@pytest.mark.slow
def test_a_message_waits_for_the_list_of_checkpoints(early) -> None:
    with early() as (page, held):
        set_parameter(page, "Maximum tokens", "5")
        send(page, "Hello there")
        told(page, WAITING)
        # Who doesn't want to wait has lost nothing.
        page.keyboard.press("Escape")
        page.wait_for_selector(".send-button:not([hidden])")
        assert page.input_value("#message textarea") == "Hello there"
        page.click(".send-button")
        told(page, WAITING)
        held.let_through()
        answered(page, 1)
        assert turns(page)[0] == "Hello there" and page.input_value("#message textarea") == ""
        assert not page.query_selector(".studio-error")


@pytest.mark.slow
def test_what_there_was_is_gone_on_with_and_asked_again_early(early) -> None:
    with early() as (page, held):
        held.let_through()
        set_parameter(page, "Maximum tokens", "6")
        endless(page)
        send(page, "Tell me")
        answered(page, 1, "cut off")
        for label in ("Go on", "Retry"):
            again = Held(page)
            page.reload()
            page.wait_for_selector(".turn.assistant")
            page.click(f".turn.assistant >> text={label}")
            told(page, WAITING)
            again.let_through()
            answered(page, 1, "^12 tokens" if label == "Go on" else "^6 tokens")


@pytest.mark.slow
def test_a_link_that_is_opened_early_keeps_its_settings(early, page_of_a_link) -> None:
    with early(url=page_of_a_link, wait=".turn.user") as (page, held):
        page.click("text=Answer this")
        told(page, WAITING)
        held.let_through()
        assert "seed 77" in answered(page, 1) and "3 tokens" in page.inner_text(".facts")
        assert not page.query_selector(".studio-error") and page.input_value("#checkpoint") == "talker"


@pytest.fixture
def page_of_a_link(browser, studio, visiting) -> str:
    with visiting(browser, studio.url) as page:
        set_parameter(page, "Maximum tokens", "3")
        set_parameter(page, "Seed", "77")
        endless(page)
        send(page, "In a link")
        answered(page, 1)
        page.click(".turn.assistant .more summary")
        page.click(".turn.assistant >> text=Copy link")
        page.wait_for_selector(".turn.assistant >> text=Copied")
        return page.evaluate("navigator.clipboard.readText()")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "press", "done"),
    [
        ("#notebook", "#notebook-continue", "#notebook-status:has-text('seed')"),
        ("#notebook", ".studio-tab:visible >> text=Once upon a time", "#notebook-status:has-text('seed')"),
        ("#tokens", "#lab-run", ".strategy:nth-child(2) .token"),
        ("#score", "#score-run", "section[aria-label=Figures]"),
        ("#compare", "text=Begin", "[aria-label='Answer A'][aria-busy=false]"),
    ],
)
def test_other_tabs_wait_for_it_too(early, place, press, done) -> None:
    with early(place, wait=press) as (page, held):
        if press == "#notebook-continue":
            page.fill("#notebook-text", "It was late")
        page.click(press)
        told(page, WAITING)
        held.let_through()
        page.wait_for_selector(done)
        assert not page.query_selector(".studio-error")


@pytest.fixture(scope="module")
def empty(serve: Callable, tiny_checkpoint: Callable[..., Path]) -> Iterator:
    checkpoint = tiny_checkpoint("talker")
    with serve(checkpoint, studio=True, model_directory=checkpoint.parent) as running:
        assert running.client.delete("/models/talker").status_code < 300
        yield running


@pytest.mark.slow
def test_where_nothing_is_loaded_it_is_said_and_what_to_do(browser, empty, visiting) -> None:
    with visiting(browser, empty.url) as page:
        send(page, "Hello")
        assert "No checkpoint is loaded" in refusal(page) and "topkapi serve" in refusal(page)
        assert page.input_value("#message textarea") == "Hello"
        for place, press in {
            "#notebook": "#notebook-continue", "#tokens": "#lab-run", "#score": "#score-run", "#compare": "text=Begin",
        }.items():  # fmt: skip
            page.evaluate("place => (location.hash = place)", place)
            page.wait_for_selector(press)
            page.click(press)
            page.wait_for_selector(".studio-panel.shown .studio-error:has-text('No checkpoint is loaded')")


@pytest.mark.slow
def test_what_is_kept_is_there_before_anybody_can_write_over_it(browser, studio, visiting) -> None:
    """A browser's storage takes its time: what is typed meanwhile is not replaced by it."""
    slow = """() => {
      const open = indexedDB.open.bind(indexedDB);
      window.opened = [];
      indexedDB.open = (...given) => {
        const asked = open(...given);
        let done = null;
        Object.defineProperty(asked, 'onsuccess', {set(call) { done = call; }});
        asked.addEventListener('success', (event) => opened.push(() => done.call(asked, event)));
        return asked;
      };
    }"""
    for place, field in (("", "#message textarea"), ("#notebook", "#notebook-text")):
        with visiting(
            browser, f"{studio.url}/{place}", wait="#header", before=lambda page: page.add_init_script(f"({slow})()")
        ) as page:
            page.wait_for_function("window.opened.length > 0")
            assert page.query_selector(field) is None
            page.evaluate("opened.forEach((each) => each())")
            page.wait_for_selector(field)
