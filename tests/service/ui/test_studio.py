"""The studio in a real browser: it streams, stops, remembers, explains, and asks nothing of the internet."""

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.timeout(180)

SECONDS = 30_000


@pytest.fixture(scope="module")
def studio(serve: Callable, tiny_checkpoint: Callable[..., Path]) -> Iterator:
    chat = tiny_checkpoint("talker", context=1024)
    own = {"temperature": 0.5, "top_k": 30, "do_sample": True}
    base = tiny_checkpoint("writer", chat=False, seed=1, context=16384, generation=own)
    with serve(chat, base, studio=True) as running:
        # As fast as a real network at most: this one is through with 16,000 tokens before somebody can stop it.
        network = running.models.get("writer").engine.network
        network.run = _slowed(network.run)
        yield running


def _slowed(run: Callable) -> Callable:
    def slow(works: object) -> object:
        time.sleep(0.003)
        return run(works)

    return slow


@pytest.fixture
def page(browser, studio) -> Iterator:
    """A fresh visitor. Whatever a test does, nothing may go wrong in the console or leave for another host."""
    permissions = ["clipboard-read", "clipboard-write"]
    context = browser.new_context(viewport={"width": 1280, "height": 800}, permissions=permissions)
    page = context.new_page()
    page.set_default_timeout(SECONDS)
    elsewhere: list[str] = []
    problems: list[str] = []
    page.on("request", lambda request: elsewhere.append(request.url) if leaves(request.url, studio.url) else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(studio.url)
    page.wait_for_selector("#message textarea")
    yield page
    context.close()
    assert elsewhere == []
    assert problems == []


def leaves(url: str, home: str) -> bool:
    return not url.startswith((home, "data:", "blob:", "about:"))


def send(page, text: str) -> None:
    page.fill("#message textarea", text)
    page.keyboard.press("Enter")


def turns(page) -> list[str]:
    found = page.query_selector_all("#conversation :is([data-testid=user], [data-testid=bot])")
    return [turn.inner_text().strip() for turn in found]


def choose(page, name: str) -> None:
    page.click("#checkpoint input")
    page.get_by_role("option", name=name).click()
    status(page, f"^{name}")
    # The controls follow a moment later; a number typed before that would be overwritten.
    maximum = page.get_by_label("number input for Maximum tokens")
    playwright.expect(maximum).to_have_attribute("max", "16383")


def set_number(page, label: str, value: str) -> None:
    box = page.get_by_label(f"number input for {label}")
    box.fill(value)
    box.press("Enter")


def status(page, words: str) -> str:
    page.wait_for_function("w => document.querySelector('#status').innerText.match(w)", arg=words)
    return page.inner_text("#status")


def stored(page, length: int) -> int:
    """Wait until more than `length` characters of conversation are kept (an empty one takes some 50); how many are."""
    kept = "(localStorage.getItem('topkapi-conversation') || '').length"
    page.wait_for_function(f"n => {kept} > n", arg=length)
    return page.evaluate(kept)


def test_a_conversation_streams_and_survives_a_reload(page) -> None:
    set_number(page, "Maximum tokens", "60")
    send(page, "Hello there")
    status(page, r"^\d+ tokens")
    assert re.search(r"seed \d+", status(page, "ended by itself|cut off"))
    assert page.input_value("#message textarea") == ""
    first = turns(page)
    assert len(first) == 2 and first[0] == "Hello there"
    once = stored(page, 150)
    send(page, "And again")
    stored(page, once)
    told = turns(page)
    assert len(told) == 4 and told[:2] == first
    page.reload()
    page.wait_for_selector("#conversation [data-testid=bot]")
    assert turns(page) == told


def test_stop_ends_the_answer_in_the_engine(page, studio) -> None:
    choose(page, "writer")
    set_number(page, "Temperature", "0")
    set_number(page, "Maximum tokens", "16000")
    send(page, "Go on")
    status(page, r"^\d+ tokens")
    assert studio.models.get("writer").engine.running == 1
    page.click("#message .stop-button")
    studio.wait_until_idle(5.0)
    page.wait_for_selector("#message .submit-button")
    status(page, "stopped")
    length = len(turns(page)[1])
    send(page, "Still there?")
    page.wait_for_function("() => document.querySelectorAll('#conversation [data-testid=bot]').length == 2")
    assert len(turns(page)[1]) == length > 0


def test_closing_the_page_ends_the_answer(browser, studio) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(studio.url)
    page.wait_for_selector("#message textarea")
    choose(page, "writer")
    set_number(page, "Temperature", "0")
    set_number(page, "Maximum tokens", "16000")
    send(page, "Go on")
    status(page, r"^\d+ tokens")
    assert studio.models.get("writer").engine.running == 1
    context.close()
    studio.wait_until_idle(5.0)


def test_the_same_seed_gives_the_same_answer(page) -> None:
    set_number(page, "Maximum tokens", "30")
    page.get_by_label("Seed").fill("7")
    send(page, "Same question")
    assert "seed 7" in status(page, "ended by itself|cut off")
    first = turns(page)
    page.click("#conversation [aria-label=Clear]")
    page.wait_for_function("() => !document.querySelector('#conversation [data-testid=bot]')")
    send(page, "Same question")
    status(page, "ended by itself|cut off")
    assert turns(page) == first


def test_a_base_checkpoint_continues_texts_and_brings_its_own_defaults(page, studio) -> None:
    assert page.get_by_label("System message").is_visible()
    choose(page, "writer")
    assert "continues what you write" in page.inner_text("#conversation")
    assert not page.get_by_label("System message").is_visible()
    assert page.get_by_label("number input for Temperature").input_value() == "0.5"
    assert page.get_by_label("number input for Top-k").input_value() == "30"
    page.get_by_text("Once upon a time, there was").click()
    status(page, "ended by itself|cut off")
    assert turns(page)[0] == "Once upon a time, there was"
    assert studio.models.get("writer").metrics.prompt._value.get() > 0


def test_a_wrong_setting_is_explained_and_the_message_kept(page) -> None:
    page.get_by_label("Seed").fill("lucky")
    send(page, "Hello")
    notice = page.wait_for_selector("[data-testid=toast-body], .toast-body")
    assert "seed must be a whole number" in notice.inner_text()
    page.wait_for_function("() => document.querySelector('#message textarea').value == 'Hello'")
    page.get_by_label("Seed").fill("")
    page.focus("#message textarea")
    page.keyboard.press("Enter")
    page.wait_for_selector("#conversation [data-testid=bot]")


def test_a_message_that_does_not_fit_is_explained(page) -> None:
    send(page, "word " * 2000)
    notice = page.wait_for_selector("[data-testid=toast-body], .toast-body")
    assert "context holds 1024" in notice.inner_text()


def test_markup_is_shown_and_not_run(page) -> None:
    written = "<img src=x onerror=\"document.title='taken'\"> **bold** &lt; </div> 1<2\n    indented  twice"
    for _ in range(2):
        send(page, written)
        page.wait_for_selector("#message .submit-button")
        status(page, "ended by itself|cut off")
    assert turns(page)[0] == turns(page)[2] == written
    assert page.title() == "Topkapi"
    page.query_selector("#conversation [aria-label='Copy message']").click()
    page.wait_for_function("async text => await navigator.clipboard.readText() == text", arg=written)
    page.click("#conversation [aria-label=Undo]")
    page.wait_for_function("() => document.querySelector('#message textarea').value")
    assert page.input_value("#message textarea") == written


def test_a_phone_shows_the_chat_first_and_nothing_sticks_out(browser, studio) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True)
    page = context.new_page()
    page.goto(studio.url)
    page.wait_for_selector("#message textarea")
    box = page.query_selector("#message").bounding_box()
    assert box["y"] + box["height"] < 844 and box["x"] >= 0 and box["x"] + box["width"] <= 390
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.query_selector("#settings").bounding_box()["y"] > box["y"]
    context.close()


def test_the_api_documentation_works_without_a_network(browser, studio) -> None:
    page = browser.new_context().new_page()
    elsewhere: list[str] = []
    page.on("request", lambda request: elsewhere.append(request.url) if leaves(request.url, studio.url) else None)
    page.goto(f"{studio.url}/docs")
    page.wait_for_selector("text=/generate")
    assert elsewhere == []
    page.context.close()


def test_nothing_can_be_uploaded(studio) -> None:
    response = studio.client.post("/gradio_api/upload", files={"files": ("a.txt", b"some text")})
    assert response.status_code >= 400


def test_structure_and_searches_are_at_hand(page) -> None:
    page.get_by_role("button", name="Texts and structure").click()
    choices = page.get_by_label("Choices")
    choices.fill("maybe\nperhaps")
    choices.blur()
    send(page, "Will it rain?")
    status(page, "ended by itself|cut off")
    assert turns(page)[-1] in ("maybe", "perhaps")
    page.get_by_role("button", name=re.compile("^More")).first.click()
    page.get_by_label("number input for Beams").fill("3")
    page.get_by_label("number input for Beams").press("Tab")
    send(page, "And tomorrow?")
    page.wait_for_function("document.querySelectorAll('#conversation [data-testid=bot]').length == 2")
    page.wait_for_selector("#message .submit-button")
    status(page, "ended by itself|cut off")
    assert turns(page)[-1] in ("maybe", "perhaps")
