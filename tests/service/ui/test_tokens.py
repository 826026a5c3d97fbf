"""The tab Tokens in a browser: strategies beside each other, why a token was chosen, and what else could have been."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.service.ui.visits import HOSTILE, SEEN, fits, least_contrast, slowed

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.timeout(180)

SHOWN = ".strategy:nth-child(2)"

PROMPT = "The value of the list is"
KEPT = "topkapi:1:tokens"


@pytest.fixture(scope="module")
def studio(serve: Callable, tiny_checkpoint: Callable[..., Path]) -> Iterator:
    own = {"temperature": 0.5, "top_k": 30, "do_sample": True}
    base = tiny_checkpoint("writer", chat=False, seed=1, context=4096, generation=own)
    chat = tiny_checkpoint("talker", context=1024)
    with serve(base, chat, studio=True) as running:
        network = running.models.get("writer").engine.network
        network.run, network.steps = slowed(network.run), lambda *_: []
        yield running


@pytest.fixture
def page(browser, studio, visiting) -> Iterator:
    with visiting(browser, f"{studio.url}/#tokens", wait=SHOWN) as page:
        ready(page)
        yield page


def ready(page: Any) -> None:
    page.wait_for_selector(".strategy:nth-child(2)")
    page.wait_for_function("document.querySelector('.studio-tab[data-script=lab] select option')")


def recall(page: Any, **kept: Any) -> None:
    """Load the page again with what an earlier visit left."""
    page.evaluate("([name, value]) => localStorage.setItem(name, value)", [KEPT, json.dumps(kept)])
    page.reload()
    page.wait_for_selector(".strategy")
    page.wait_for_function("document.querySelector('.studio-tab[data-script=lab] select option')")


def run(page: Any, tokens: int = 12) -> None:
    page.fill("#lab-prompt", PROMPT)
    page.fill("#lab-most", str(tokens))
    page.click("#lab-run")
    done(page)


def done(page: Any) -> None:
    """Wait until every strategy's answer is there."""
    page.wait_for_function(
        "document.querySelector('#lab-run').textContent == 'Run' && !document.querySelector('.answer[aria-busy]') &&"
        " [...document.querySelectorAll('.strategy .token')].length > 0"
    )


def texts(page: Any, strategy: int = 1) -> list[str]:
    found: list[str] = page.eval_on_selector_all(
        f".strategy:nth-child({strategy}) .token", "nodes => nodes.map((node) => node.title)"
    )
    return found


def token(strategy: int, index: int) -> str:
    return f".strategy:nth-child({strategy}) .token:nth-child({index + 1})"


def asked(studio: Any, **body: Any) -> dict[str, Any]:
    """The API's own answer to what a strategy asks."""
    common = {"model": "writer", "prompt": PROMPT, "seed": 1, "max_tokens": 12, "trace": True, "logprobs": 10}
    output: dict[str, Any] = studio.answer("/generate", **(common | body))["outputs"][0]
    return output


def same(page: Any, output: dict[str, Any], strategy: int = 1) -> None:
    """What a strategy shows is what the API answers: so many tokens, of these probabilities."""
    shown = texts(page, strategy)
    assert len(shown) == len(output["trace"])
    for words, trace in zip(shown, output["trace"], strict=True):
        if trace["text"].isascii() and trace["text"].isprintable():
            assert words.startswith(f"“{trace['text']}”")


@pytest.mark.slow
def test_strategies_answer_beside_each_other_on_one_seed(page, studio) -> None:
    run(page)
    same(page, asked(studio), 1)
    same(page, asked(studio, temperature=0), 2)
    page.get_by_text("The prompt’s tokens").click()
    assert page.inner_text(".panel .tokens") == PROMPT
    for _ in range(2):
        page.get_by_role("button", name="Add a strategy").click()
    assert not page.get_by_role("button", name="Add a strategy").is_visible()
    page.click("#lab-run")
    page.wait_for_function("document.querySelectorAll('.strategy:nth-child(4) .token').length")
    done(page)
    same(page, asked(studio, temperature=0.3, top_p=0.9, min_p=0.1), 3)
    page.get_by_role("button", name="Remove strategy C").click()
    assert page.locator(".strategy h3").all_inner_texts() == ["Strategy A", "Strategy B", "Strategy C"]
    # All of it is there after a reload.
    page.reload()
    page.wait_for_selector(".strategy:nth-child(3)")
    assert page.input_value("#lab-prompt") == PROMPT


@pytest.mark.slow
def test_a_token_says_why_and_another_one_can_be_taken(page, studio) -> None:
    run(page)
    first = asked(studio)
    page.get_by_label("Colour by").select_option("rank")
    ranks = page.eval_on_selector_all(
        ".strategy:nth-child(1) .token", "nodes => nodes.map((node) => node.dataset.level)"
    )
    limits = (2, 4, 11, 101, 1001)
    assert [int(each) for each in ranks] == [
        sum(trace["rank"] >= limit for limit in limits) for trace in first["trace"]
    ]
    # With the keyboard alone: one stop for all tokens, arrows within.
    page.focus(token(1, 0))
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.wait_for_selector(".why table")
    assert page.get_attribute(token(1, 3), "aria-pressed") == "true"
    trace = first["trace"][3]
    heads = page.locator(".why thead th").all_inner_texts()
    assert [head.split("\n")[0] for head in heads if head.strip() != "Go on from here"] == [
        "Token", "Network", "Temperature", "Top-k",
    ]  # fmt: skip
    assert f"keeps {trace['stages'][1]['kept']}" in heads[-1] and "cuts" in heads[-1]
    assert page.locator(".why tbody tr").count() >= 10
    assert page.locator(".why tbody tr.chosen").count() == 1
    others = [each for each in trace["contenders"] if each["token_id"] != trace["token_id"]]
    page.locator(".why tbody").get_by_role("button").first.click()
    done(page)
    # As if the network had drawn it: with the noise and the penalties of its place in the answer.
    begun = [*first["token_ids"][:3], others[0]["token_id"]]
    rest = asked(studio, answer_prefix=begun)
    page.wait_for_function("count => document.querySelectorAll('.strategy:nth-child(1) .token').length == count",
                           arg=len(begun) + len(rest["trace"]))  # fmt: skip
    assert "taken by hand" in texts(page)[3]
    same(page, {"trace": [*first["trace"][:3], others[0], *rest["trace"]]})
    assert page.locator(".branches button").count() == 2
    page.get_by_role("button", name="The first answer").click()
    same(page, first)
    # Also once another prompt stands there: an answer belongs to the one that it was given to.
    page.fill("#lab-prompt", "Something else")
    page.click(token(1, 3))
    page.locator(".why tbody").get_by_role("button").first.click()
    page.wait_for_function("document.querySelectorAll('.branches button').length == 3")
    done(page)
    same(page, {"trace": [*first["trace"][:3], others[0], *rest["trace"]]})


@pytest.mark.slow
def test_the_shape_follows_the_sliders(page, studio) -> None:
    run(page, tokens=2)
    sent: list[dict[str, Any]] = []
    page.on("request", lambda request: sent.append(request.post_data_json) if "generate" in request.url else None)
    page.get_by_text("What the settings do to the next token").click()
    page.wait_for_selector(".shape table")
    assert "off" in page.inner_text(".shape thead th:nth-child(5)")
    page.get_by_label("Top-k", exact=True).locator("visible=true").last.fill("1")
    page.wait_for_function("document.querySelectorAll('.shape td.cut').length > 10")
    assert sent[-1]["top_k"] == 1 and sent[-1]["temperature"] == 0.5 and sent[-1]["max_tokens"] == 1
    before = len(sent)
    for value in range(2, 12):
        page.get_by_label("Top-k", exact=True).locator("visible=true").last.fill(str(value))
    page.wait_for_function("document.querySelector('.shape thead').innerText.match(/keeps 11/)")
    assert len(sent) - before < 10, "what was asked for a moment only is not asked"
    studio.wait_until_idle(5.0)


@pytest.mark.slow
def test_stopping_ends_the_answers_in_the_engine(page, studio) -> None:
    page.fill("#lab-prompt", PROMPT)
    page.fill("#lab-most", "3000")
    page.click("#lab-run")
    page.wait_for_selector(token(2, 3))
    assert page.inner_text("#lab-run") == "Stop"
    page.click("#lab-run")
    studio.wait_until_idle(5.0)
    page.wait_for_function("document.querySelector('.strategy [role=status]').innerText.includes('stopped')")
    assert len(texts(page)) > 0
    run(page)
    same(page, asked(studio))


@pytest.mark.slow
def test_what_is_refused_is_said_where_it_arose(page, studio) -> None:
    page.fill("#lab-prompt", "")
    page.click("#lab-run")
    error = page.wait_for_selector(".studio-error")
    assert "empty" in error.inner_text()
    recall(page, prompt=PROMPT, strategies=[{"mirostat": 2, "top_p": 0.5}, {}], most=4)
    page.click("#lab-run")
    page.wait_for_selector(".strategy:nth-child(1) .studio-error")
    page.wait_for_selector(token(2, 3))
    assert page.locator(".strategy:nth-child(2) .studio-error").count() == 0
    page.get_by_role("button", name="Dismiss the error").click()
    assert page.locator(".studio-error").count() == 0


@pytest.mark.slow
def test_a_message_is_read_by_the_checkpoints_template(page, studio) -> None:
    page.select_option(".studio-tab[data-script=lab] select >> nth=0", "talker")
    assert page.input_value("#lab-reading") == "message"
    run(page, tokens=5)
    count = studio.answer("/tokenize", model="talker", messages=[{"role": "user", "content": PROMPT}])["count"]
    assert f"{count} tokens as the checkpoint’s template puts it" in page.inner_text(".studio-tab[data-script=lab]")
    output = studio.answer(
        "/generate", model="talker", messages=[{"role": "user", "content": PROMPT}], seed=1, max_tokens=5, trace=True
    )["outputs"][0]
    same(page, output)


@pytest.mark.slow
def test_hostile_texts_are_shown_and_not_run(page, studio) -> None:
    # The checkpoint, too, can only answer with such a text.
    recall(page, prompt=HOSTILE, strategies=[{"choice": [HOSTILE]}], most=400)
    page.click("#lab-run")
    done(page)
    shown = page.inner_text(".strategy .tokens")
    assert SEEN.split(" a")[0] in shown
    # What stands in several tokens is told by its bytes.
    assert not set(shown) & set("\u202e\u200b\x07") and "‹e2›‹80›‹ae›" in shown and r"\u0007" in shown
    page.click(token(1, 2))
    page.wait_for_selector(".why table")
    assert page.locator(".studio-tab[data-script=lab] :is(img, script)").count() == 0
    assert page.title() == "Topkapi"


@pytest.mark.slow
def test_colours_can_be_read_and_a_phone_shows_all(browser, studio, visiting) -> None:
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True}
    with visiting(browser, f"{studio.url}/#tokens", wait=SHOWN, **phone) as page:
        ready(page)
        run(page)
        page.tap(token(1, 2))
        page.wait_for_selector(".why table")
        assert fits(page)
        for dark in (False, True):
            page.evaluate("dark => document.body.classList.toggle('dark', dark)", dark)
            assert least_contrast(page, ".strategy .token, .token-swatch, .why td, .why th, .note") >= 4.5
