"""The tab Notebook in a browser: one text that is continued in place, changed by hand, undone and kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.service.ui.visits import HOSTILE, fits, least_contrast, slowed

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.timeout(180)

SHOWN = "#notebook-text"

BEGINNING = "The value of the list is"

ANOTHER = """before => {
  const now = [...document.querySelectorAll(".page-under mark")].map((node) => node.textContent).join("");
  return now && now !== before && document.querySelector("#notebook-continue").textContent === "Continue";
}"""


@pytest.fixture(scope="module")
def studio(serve: Callable, tiny_checkpoint: Callable[..., Path]) -> Iterator:
    own = {"temperature": 0.5, "top_k": 30, "do_sample": True}
    with serve(tiny_checkpoint("writer", chat=False, seed=1, context=512, generation=own), studio=True) as running:
        network = running.models.get("writer").engine.network
        network.run, network.steps = slowed(network.run), lambda *_: []
        yield running


@pytest.fixture
def page(browser, studio, visiting) -> Iterator:
    with visiting(browser, f"{studio.url}/#notebook", wait=SHOWN) as page:
        ready(page)
        yield page


def ready(page: Any) -> None:
    page.wait_for_function("document.querySelector('#notebook-checkpoint option')")
    page.wait_for_function("!document.querySelector('.studio-tab[data-script=notebook]').ariaBusy")


def setting(page: Any, label: str, value: str) -> None:
    page.get_by_label(label, exact=True).locator("visible=true").first.fill(value)


def text(page: Any) -> str:
    found: str = page.input_value("#notebook-text")
    return found


def marked(page: Any) -> list[str]:
    """What is coloured, stretch by stretch."""
    found: list[str] = page.locator(".page-under mark").all_text_contents()
    return found


def go(page: Any) -> None:
    page.click("#notebook-continue")
    ended(page)


def ended(page: Any, words: str = "seed") -> None:
    page.wait_for_function("words => document.querySelector('#notebook-status').innerText.includes(words)", arg=words)
    page.wait_for_function("document.querySelector('#notebook-continue').textContent == 'Continue'")


def settled(page: Any) -> dict[str, Any]:
    """What the browser keeps, once that is what is shown."""
    return page.evaluate("""async () => {
      const asked = (request) => new Promise((done) => (request.onsuccess = () => done(request.result)));
      const database = await asked(indexedDB.open("topkapi", 1));
      for (;;) {
        const kept = await asked(database.transaction("notebooks").objectStore("notebooks").get("notebook"));
        if (kept?.text === document.querySelector("#notebook-text").value) return kept;
        await new Promise((done) => setTimeout(done, 50));
      }
    }""")


@pytest.mark.slow
def test_a_text_is_continued_in_place_changed_undone_and_kept(page, studio) -> None:
    setting(page, "Seed", "3")
    setting(page, "Maximum tokens", "10")
    page.fill("#notebook-text", BEGINNING)
    page.press("#notebook-text", "Control+Enter")
    ended(page)
    own = studio.answer("/generate", prompt=BEGINNING, seed=3, max_tokens=10)["outputs"][0]["text"]
    assert text(page) == BEGINNING + own
    assert marked(page) == [own]
    go(page)
    whole = text(page)
    assert whole.startswith(BEGINNING + own) and "".join(marked(page)) == whole[len(BEGINNING) :]
    assert len(marked(page)) == 2
    # What is written by hand into a stretch is not coloured and does not move its colours.
    page.focus("#notebook-text")
    page.evaluate("at => document.querySelector('#notebook-text').setSelectionRange(at, at)", len(BEGINNING) + 1)
    page.keyboard.type("XY")
    assert text(page) == f"{whole[: len(BEGINNING) + 1]}XY{whole[len(BEGINNING) + 1 :]}"
    assert [marked(page)[0], "".join(marked(page)[1:])] == [own[0], whole[len(BEGINNING) + 1 :]]
    page.keyboard.press("Control+z")
    assert text(page) == whole
    page.get_by_role("button", name="Undo").click()
    assert text(page) == BEGINNING + own and marked(page) == [own]
    page.keyboard.press("Control+Shift+z")
    assert text(page) == whole
    settled(page)
    page.reload()
    ready(page)
    page.wait_for_function("text => document.querySelector('#notebook-text').value == text", arg=whole)
    assert "".join(marked(page)) == whole[len(BEGINNING) :]


@pytest.mark.slow
def test_at_the_cursor_and_another_one(page, studio) -> None:
    setting(page, "Maximum tokens", "6")
    page.fill("#notebook-text", f"{BEGINNING} and so on")
    page.get_by_label("at the cursor").check()
    page.evaluate("at => document.querySelector('#notebook-text').setSelectionRange(at, at)", len(BEGINNING))
    go(page)
    assert text(page) == f"{BEGINNING}{''.join(marked(page))} and so on"
    before = marked(page)
    page.wait_for_function("!document.querySelector('#notebook-continue + button').disabled")
    page.get_by_role("button", name="Another").click()
    page.wait_for_function(ANOTHER, arg="".join(before))
    assert text(page) == f"{BEGINNING}{''.join(marked(page))} and so on"


@pytest.mark.slow
def test_stopping_keeps_what_there_is(page, studio) -> None:
    setting(page, "Maximum tokens", "500")
    page.get_by_text("Searching instead of drawing").first.wait_for()
    page.fill("#notebook-text", BEGINNING)
    page.click("#notebook-continue")
    page.wait_for_selector(".page-under mark")
    page.keyboard.press("Escape")
    studio.wait_until_idle(5.0)
    ended(page, "stopped")
    assert len(text(page)) > len(BEGINNING) and "".join(marked(page)) == text(page)[len(BEGINNING) :]
    page.get_by_role("button", name="Undo").click()
    assert text(page) == BEGINNING


@pytest.mark.slow
def test_an_error_is_said_and_leaves_the_text(page) -> None:
    page.click("#notebook-continue")
    assert "empty" in page.wait_for_selector(".studio-error").inner_text()
    setting(page, "Maximum tokens", "8")
    setting(page, "Temperature", "-1")
    page.fill("#notebook-text", BEGINNING)
    page.click("#notebook-continue")
    page.wait_for_function("document.querySelector('.studio-error')?.innerText.includes('temperature')")
    assert text(page) == BEGINNING and not page.get_by_role("button", name="Redo").is_enabled()
    setting(page, "Temperature", "1")
    # A text beyond the context is read from its end.
    page.fill("#notebook-text", f"{BEGINNING} " * 200)
    go(page)
    assert page.locator(".studio-error").count() == 0
    assert "read the last 504 of" in page.inner_text("#notebook-status")


@pytest.mark.slow
def test_hostile_texts_are_shown_and_not_run(page) -> None:
    setting(page, "Maximum tokens", "400")
    page.get_by_text("What may be chosen").click()
    setting(page, "Choices", HOSTILE.replace("\x07", ""))
    page.fill("#notebook-text", HOSTILE)
    go(page)
    assert text(page) == HOSTILE + HOSTILE.replace("\x07", "")
    said = page.inner_text(".hidden-marks")
    assert r"\u202e" in said and r"\u200b" in said and r"\u0007" in said
    assert page.locator(".studio-tab[data-script=notebook] :is(img, script)").count() == 0
    assert page.title() == "Topkapi"


@pytest.mark.slow
def test_colours_can_be_read_and_a_phone_shows_all(browser, studio, visiting) -> None:
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True}
    with visiting(browser, f"{studio.url}/#notebook", wait=SHOWN, **phone) as page:
        ready(page)
        assert not page.get_by_label("Temperature", exact=True).is_visible()
        page.get_by_role("button", name="Once upon a time, there was").click()
        ended(page)
        assert fits(page)
        # Over each colour lies the page's own text.
        page.evaluate(
            "document.querySelectorAll('.page-under, .page-under *').forEach((node) => node.style.color = 'inherit')"
        )
        for colours in ("run", "level"):
            page.select_option("#notebook-colours", colours)
            for dark in (False, True):
                page.evaluate("dark => document.body.classList.toggle('dark', dark)", dark)
                for level in range(4):
                    page.evaluate(
                        "level => document.querySelectorAll('mark.level').forEach((m) => m.dataset.level = level)",
                        level,
                    )
                    page.evaluate(
                        "document.querySelectorAll('mark').forEach((m) => m.style.color = 'var(--studio-text)')"
                    )
                    assert least_contrast(page, ".page-under mark, .note, #notebook-text") >= 4.5


@pytest.mark.slow
def test_a_server_that_stops_leaves_the_half_answer(browser, serve, tiny_checkpoint, visiting) -> None:
    with serve(tiny_checkpoint("leaver", chat=False, seed=1, context=4096), studio=True) as running:
        network = running.models.get().engine.network
        network.run, network.steps = slowed(network.run), lambda *_: []
        with visiting(browser, f"{running.url}/#notebook", wait=SHOWN) as page:
            ready(page)
            setting(page, "Maximum tokens", "3000")
            page.fill("#notebook-text", BEGINNING)
            page.click("#notebook-continue")
            page.wait_for_selector(".page-under mark")
            running.stop()
            page.wait_for_function("document.querySelector('#notebook-continue').textContent == 'Continue'")
            page.wait_for_function("!document.querySelector('#notebook-text').readOnly")
            assert len(text(page)) > len(BEGINNING)
