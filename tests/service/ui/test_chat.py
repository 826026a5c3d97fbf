"""The chat in a real browser: it streams, stops, branches, remembers and explains."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.service.ui.chat_page import (
    answered,
    answers,
    choose,
    endless,
    kept,
    refusal,
    send,
    set_parameter,
    slowed,
    turns,
    writing,
)
from topkapi.model.decoding.parameters import CHAT_DEFAULTS

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def studio(serve: Callable, tiny_checkpoint: Callable[..., Path]) -> Iterator:
    chat = tiny_checkpoint("talker", context=1024)
    own = {"temperature": 0.5, "top_k": 30, "do_sample": True}
    base = tiny_checkpoint("writer", chat=False, seed=1, context=16384, generation=own)
    with serve(chat, base, studio=True) as running:
        network = running.models.get("writer").engine.network
        network.run, network.steps = slowed(network.run), lambda *_: []
        yield running


@pytest.fixture
def page(browser, studio, visiting) -> Iterator:
    with visiting(browser, studio.url) as page:
        yield page


@pytest.mark.slow
def test_a_conversation_streams_and_survives_a_reload(page) -> None:
    set_parameter(page, "Maximum tokens", "60")
    send(page, "Hello there")
    assert re.search(r"seed \d+", answered(page, 1))
    assert page.input_value("#message textarea") == ""
    first = turns(page)
    assert len(first) == 2 and first[0] == "Hello there"
    assert "context" in page.inner_text("#status")
    send(page, "And again")
    answered(page, 2)
    told = turns(page)
    assert len(told) == 4 and told[:2] == first
    assert page.inner_text(".turn.assistant .who >> nth=0") == "talker", "an answer names its checkpoint"
    page.reload()
    page.wait_for_function("document.querySelectorAll('#conversation .turn').length == 4")
    assert turns(page) == told
    assert page.get_by_label("Maximum tokens", exact=True).input_value() == "60"


@pytest.mark.slow
def test_an_answer_tells_how_it_stands_from_the_beginning(page, studio) -> None:
    page.evaluate(
        """() => {
          window.told = [];
          new MutationObserver(() => told.push(document.querySelector('#status').innerText))
            .observe(document.querySelector('#status'), {childList: true, characterData: true, subtree: true});
        }"""
    )
    set_parameter(page, "Maximum tokens", "20")
    send(page, "How far are you?")
    facts = answered(page, 1)
    told = page.evaluate("told")
    count = len(studio.answer("/tokenize", messages=[{"role": "user", "content": "How far are you?"}])["token_ids"])
    assert told[0] == "Sent…" and f"Reading {count} tokens…" in told
    assert re.search(r"first after \d+\.\d\d s", facts)


@pytest.mark.slow
def test_stop_ends_the_answer_in_the_engine(page, studio) -> None:
    choose(page, "writer")
    set_parameter(page, "Temperature", "0")
    set_parameter(page, "Maximum tokens", "16000")
    endless(page)
    send(page, "Go on")
    writing(page)
    assert studio.models.get("writer").engine.running == 1
    page.click("#message .stop-button")
    studio.wait_until_idle(5.0)
    page.wait_for_selector("#message .send-button")
    answered(page, 1, "stopped")
    length = len(answers(page)[0])
    send(page, "Still there?")
    writing(page)
    page.keyboard.press("Escape")
    answered(page, 2, "stopped")
    assert len(answers(page)[0]) == length > 0


@pytest.mark.slow
def test_closing_the_page_ends_the_answer(browser, studio) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(studio.url)
    page.wait_for_selector("#message textarea")
    choose(page, "writer")
    set_parameter(page, "Temperature", "0")
    set_parameter(page, "Maximum tokens", "16000")
    endless(page)
    send(page, "Go on")
    writing(page)
    assert studio.models.get("writer").engine.running == 1
    context.close()
    # Far less than the fifteen seconds that a stream is kept for others.
    studio.wait_until_idle(5.0)


@pytest.mark.slow
def test_what_was_written_when_the_page_went_away_is_kept_and_gone_on_with(page, studio) -> None:
    choose(page, "writer")
    set_parameter(page, "Maximum tokens", "400")
    set_parameter(page, "Seed", "3")
    endless(page)
    send(page, "Once there")
    writing(page)
    page.reload()
    studio.wait_until_idle(5.0)
    page.wait_for_selector(".turn.continuation .trouble:not([hidden])")
    assert "the page was closed" in page.inner_text(".turn.continuation .trouble")
    half = page.inner_text(".turn.continuation .made")
    page.click(".turn.continuation >> text=Go on")
    answered(page, 1)
    assert page.inner_text(".turn.continuation .made").startswith(half)
    assert re.search(r"gone on with after [1-9]\d*", page.inner_text(".turn.continuation .facts"))
    (conversation,) = kept(page)
    (turn,) = (turn for turn in conversation["turns"].values() if turn["role"] == "continuation")
    # What was there was read, and the whole is what an answer in one go is.
    asked = {"model": "writer", "prompt": "Once there", "seed": 3, "max_tokens": 400, "ignore_end_token": True}
    (whole,) = studio.answer("/generate", **asked)["outputs"]
    assert (turn["token_ids"], turn["text"]) == (whole["token_ids"], whole["text"])


@pytest.mark.slow
def test_a_cut_answer_goes_on_as_one_in_one_go(page, studio) -> None:
    set_parameter(page, "Maximum tokens", "12")
    set_parameter(page, "Seed", "7")
    endless(page)
    send(page, "Same question")
    answered(page, 1, "12 tokens")
    for count in (24, 36):
        page.click(".turn.assistant >> text=Go on")
        answered(page, 1, f"{count} tokens")
    assert "gone on with after 12, 24" in page.inner_text(".turn.assistant .facts")
    (conversation,) = kept(page)
    (turn,) = (turn for turn in conversation["turns"].values() if turn["role"] == "assistant")
    messages = [{"role": "user", "content": "Same question"}]
    (whole,) = studio.answer("/generate", messages=messages, seed=7, max_tokens=36, ignore_end_token=True)["outputs"]
    assert (turn["token_ids"], turn["text"]) == (whole["token_ids"], whole["text"])


@pytest.mark.slow
def test_what_has_searched_is_gone_on_with_too(page) -> None:
    set_parameter(page, "Maximum tokens", "6")
    endless(page)
    page.click("summary:has-text('Searching')")
    set_parameter(page, "Beams", "3")
    send(page, "Same question")
    answered(page, 1, "6 tokens")
    page.click(".turn.assistant >> text=Go on")
    answered(page, 1, "12 tokens")


@pytest.mark.slow
def test_the_same_seed_gives_the_same_answer(page) -> None:
    set_parameter(page, "Maximum tokens", "30")
    set_parameter(page, "Seed", "7")
    send(page, "Same question")
    assert "seed 7" in answered(page, 1)
    first = turns(page)
    page.click("#new-conversation")
    page.wait_for_selector(".welcome")
    send(page, "Same question")
    answered(page, 1)
    assert turns(page) == first


@pytest.mark.slow
def test_a_base_checkpoint_continues_texts_and_brings_its_own_defaults(page, studio) -> None:
    assert page.get_by_label("System message").is_visible()
    choose(page, "writer")
    assert "goes on with what you write" in page.inner_text("#conversation")
    assert not page.get_by_label("System message").is_visible()
    assert page.get_by_label("Temperature", exact=True).input_value() == "0.5"
    assert page.get_by_label("Top-k", exact=True).input_value() == "30"
    set_parameter(page, "Maximum tokens", "30")
    page.click(".welcome .example >> nth=0")
    answered(page, 1)
    # One text, no turns: what was given and what came stand in one another's line.
    (text,) = turns(page)
    assert text.startswith("Once upon a time") and not page.query_selector(".turn.user, .turn.assistant")
    assert studio.models.get("writer").metrics.prompt._value.get() > 0


@pytest.mark.slow
def test_a_choice_of_checkpoint_outlives_a_reload_and_each_answer_names_its_own(page) -> None:
    set_parameter(page, "Maximum tokens", "5")
    send(page, "One")
    answered(page, 1)
    choose(page, "writer")
    page.reload()
    page.wait_for_selector(".turn.assistant")
    assert page.input_value("#checkpoint") == "writer"
    send(page, "Two")
    answered(page, 2)
    names = [who.inner_text() for who in page.query_selector_all(":is(.assistant, .continuation) .who")]
    assert names == ["talker", "writer"]


@pytest.mark.slow
def test_a_wrong_setting_is_explained_where_it_arose_and_the_message_kept(page) -> None:
    set_parameter(page, "Maximum tokens", "5")
    set_parameter(page, "Seed", "lucky")
    send(page, "Hello")
    assert "seed must be a whole number, not 'lucky'" in refusal(page)
    page.wait_for_function("document.querySelector('#message textarea').value == 'Hello'")
    assert page.get_by_label("Seed", exact=True).get_attribute("aria-invalid") == "true"
    assert turns(page) == []
    set_parameter(page, "Seed", "")
    page.press("#message textarea", "Enter")
    answered(page, 1)
    assert not page.query_selector(".studio-error")


@pytest.mark.slow
def test_a_message_that_does_not_fit_is_explained(page) -> None:
    send(page, "word " * 2000)
    assert "context holds 1024" in refusal(page)
    assert len(page.input_value("#message textarea")) == 10_000
    page.click("[aria-label='Dismiss the error']")
    assert not page.query_selector(".studio-error")


@pytest.mark.slow
def test_of_a_long_conversation_the_oldest_turns_are_left_out_and_that_is_said(page, studio) -> None:
    set_parameter(page, "Maximum tokens", "5")
    for number in range(3):
        send(page, f"{number} " + "word " * 180)
        answered(page, number + 1)
    assert "the oldest 2 messages were not read" in page.inner_text(".turn.assistant >> nth=2")
    assert not page.is_visible(".turn.assistant >> nth=1 >> text=were not read")


@pytest.mark.slow
def test_markup_is_shown_and_not_run(page) -> None:
    written = "<img src=x onerror=\"document.title='taken'\"> **bold** &lt; </div> 1<2\n    indented  twice"
    set_parameter(page, "Maximum tokens", "5")
    for number in (1, 2):
        send(page, written)
        answered(page, number)
    assert turns(page)[0] == turns(page)[2] == written
    assert page.title() == "Topkapi"
    page.click("#conversation [aria-label='Copy message'] >> nth=0")
    page.wait_for_function("async text => await navigator.clipboard.readText() == text", arg=written)
    page.click(".turn.user >> nth=1 >> text=Edit")
    assert page.input_value(".edit textarea") == written


@pytest.mark.slow
def test_what_is_not_seen_is_spelled_out(page) -> None:
    set_parameter(page, "Maximum tokens", "5")
    send(page, "ab\u202ecd\u200b\x07e")
    answered(page, 1)
    assert turns(page)[0] == "ab\\u202ecd\\u200b\\u0007e"
    assert page.inner_text(".conversations .title >> nth=0").startswith("ab\\u202ecd")
    page.click("#conversation [aria-label='Copy message'] >> nth=0")
    page.wait_for_function("async text => await navigator.clipboard.readText() == text", arg="ab\u202ecd\u200b\x07e")


@pytest.mark.slow
def test_turns_are_edited_and_answers_repeated_and_nothing_is_lost(page) -> None:
    set_parameter(page, "Maximum tokens", "12")
    send(page, "First")
    answered(page, 1)
    first = answers(page)[0]
    page.click(".turn.assistant >> text=Retry")
    answered(page, 1)
    assert page.inner_text(".turn.assistant .branch .note") == "2/2"
    second = answers(page)[0]
    page.click(".turn.assistant [aria-label='Version before']")
    assert answers(page) == [first]
    send(page, "Second")
    answered(page, 2)
    page.click(".turn.user >> nth=0 >> text=Edit")
    page.fill(".edit textarea", "Changed")
    page.press(".edit textarea", "Control+Enter")
    answered(page, 1)
    assert turns(page)[0] == "Changed"
    # The other branches are as they were, also after the page is loaded again.
    page.reload()
    page.wait_for_selector(".turn.user .branch")
    page.click(".turn.user [aria-label='Version before']")
    assert turns(page)[:3] == ["First", first, "Second"]
    page.click(".turn.assistant >> nth=0 >> [aria-label='Version after']")
    assert turns(page) == ["First", second]
    # An answer that was edited is what goes on.
    page.click(".turn.assistant >> text=Edit")
    page.fill(".edit textarea", "Written by hand")
    page.click(".edit >> text=Save")
    assert answers(page) == ["Written by hand"] and "edited" in page.inner_text(".turn.assistant header")


@pytest.mark.slow
def test_conversations_are_listed_found_named_and_taken_away(page) -> None:
    def listed(*titles: str) -> None:
        page.wait_for_function(
            "titles => [...document.querySelectorAll('.conversations .title')].map(t => t.innerText).join() == titles",
            arg=",".join(titles),
        )

    set_parameter(page, "Maximum tokens", "4")
    for text in ("About lighthouses", "About towers"):
        page.click("#new-conversation")
        send(page, text)
        answered(page, 1)
    listed("About towers", "About lighthouses")
    page.fill("[type=search]", "lighthouse")
    listed("About lighthouses")
    page.click(".conversations .title")
    assert turns(page)[0] == "About lighthouses"
    page.fill("[type=search]", "")
    page.click(".conversations li >> nth=0 >> summary")
    page.click(".conversations li >> nth=0 >> text=Rename")
    page.fill(".conversations input", "The tall ones")
    page.press(".conversations input", "Enter")
    listed("The tall ones", "About lighthouses")
    page.click(".conversations li:has-text('lighthouses') >> summary")
    page.click(".conversations li:has-text('lighthouses') >> text=Delete")
    listed("The tall ones")
    page.wait_for_selector(".welcome")
    page.click("text=Undo")
    listed("The tall ones", "About lighthouses")
    assert turns(page)[0] == "About lighthouses"
    assert {each["title"] for each in kept(page)} == {"The tall ones", "About lighthouses"}


@pytest.mark.slow
def test_conversations_leave_and_come_back_as_files(page, tmp_path: Path) -> None:
    set_parameter(page, "Maximum tokens", "8")
    page.get_by_label("System message").fill("Be kind.")
    send(page, "Export me")
    answered(page, 1)
    told = turns(page)
    with page.expect_download() as downloading:
        page.click("text=Export all")
    path = tmp_path / "all.json"
    downloading.value.save_as(path)
    document = json.loads(path.read_text())
    assert (document["format"], document["version"]) == ("topkapi-conversation", 1)
    page.click(".conversations summary")
    with page.expect_download() as downloading:
        page.click("text=Export as Markdown")
    downloading.value.save_as(tmp_path / "one.md")
    written = (tmp_path / "one.md").read_text()
    assert written.startswith("# Export me\n\n## System\n\nBe kind.\n\n## You\n\nExport me\n\n## talker\n\n")
    page.set_input_files(".chat-list [type=file]", path)
    page.wait_for_function("document.querySelectorAll('.conversations .title').length == 2")
    assert turns(page) == told and page.get_by_label("System message").input_value() == "Be kind."
    for wrong, why in (
        ("{", "not JSON"),
        ("[]", "no conversations"),
        (json.dumps(document | {"version": 99}), "newer"),
    ):
        path.write_text(wrong)
        page.set_input_files(".chat-list [type=file]", path)
        page.wait_for_function(
            "why => document.querySelector('.chat-list .studio-error')?.innerText.includes(why)", arg=why
        )


@pytest.mark.slow
def test_a_request_is_taken_elsewhere_as_link_curl_and_python(page, browser, studio, visiting) -> None:
    set_parameter(page, "Maximum tokens", "20")
    set_parameter(page, "Stop texts", "zzz")
    page.get_by_label("System message").fill("Be 'kind' é 😀.")
    send(page, 'It\'s a "test"')
    answered(page, 1)
    page.click(".turn.assistant [aria-label='Copy message']")
    page.wait_for_selector(".turn.assistant >> text=Copied")
    answer = page.evaluate("navigator.clipboard.readText()")
    page.wait_for_selector(".turn.assistant >> text=Copied", state="hidden")

    def copied(label: str) -> str:
        page.click(f".turn.assistant >> text={label}")
        page.wait_for_selector(".turn.assistant >> text=Copied")
        copy = page.evaluate("navigator.clipboard.readText()")
        page.wait_for_selector(".turn.assistant >> text=Copied", state="hidden")
        return copy

    page.click(".turn.assistant .more summary")
    curl = shlex.split(copied("Copy as curl"))
    assert curl[:2] == ["curl", "-sN"] and curl[2] == f"{studio.url}/generate"
    body = json.loads(curl[curl.index("-d") + 1])
    told = studio.answer("/generate", **(body | {"stream": False}))["outputs"][0]["text"]
    assert told == answer
    script = copied("Copy as Python")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout == told + "\n", done.stderr
    link = copied("Copy link")
    with visiting(browser, link) as other:
        other.wait_for_selector(".turn.user")
        assert turns(other) == ['It\'s a "test"'], "it is shown, and sent by whoever follows the link"
        assert other.get_by_label("System message").input_value() == "Be 'kind' é 😀."
        other.click("text=Answer this")
        answered(other, 1)
        other.click(".turn.assistant [aria-label='Copy message']")
        other.wait_for_function("async text => await navigator.clipboard.readText() == text", arg=answer)
    with visiting(browser, f"{studio.url}/#chat/AAAA") as other:
        assert "The link can't be read" in refusal(other)


@pytest.mark.slow
def test_structure_and_searches_are_at_hand(page) -> None:
    page.click("summary:has-text('What may be chosen')")
    page.get_by_label("Choices", exact=True).fill("maybe\nperhaps")
    send(page, "Will it rain?")
    answered(page, 1)
    assert answers(page)[-1] in ("maybe", "perhaps")
    page.click("summary:has-text('Searching')")
    set_parameter(page, "Beams", "3")
    send(page, "And tomorrow?")
    answered(page, 2)
    assert answers(page)[-1] in ("maybe", "perhaps")


@pytest.mark.slow
def test_presets_and_resetting(page) -> None:
    temperature = page.get_by_label("Temperature", exact=True)
    before = temperature.input_value()
    # The tame defaults of a conversation, where the checkpoint has none of its own.
    shown = {name: float(page.input_value(f"[data-parameter={name}]")) for name in CHAT_DEFAULTS}
    assert shown == CHAT_DEFAULTS
    page.click("text=Deterministic")
    assert temperature.input_value() == "0"
    assert page.get_attribute("[data-preset=Deterministic]", "aria-pressed") == "true"
    page.click("text=Creative")
    assert temperature.input_value() == "1.1"
    temperature.fill("0.9")
    temperature.press("Tab")
    assert page.get_attribute("[data-preset=Creative]", "aria-pressed") == "false"
    page.click("text=Reset to the checkpoint's defaults")
    assert temperature.input_value() == before


@pytest.mark.slow
def test_shortcuts(page) -> None:
    set_parameter(page, "Maximum tokens", "4")
    send(page, "One")
    answered(page, 1)
    page.keyboard.press("Alt+r")
    page.wait_for_function("document.querySelector('.turn.assistant .branch')?.innerText.includes('2/2')")
    page.wait_for_selector("#message .send-button")
    page.focus("#conversation")
    page.keyboard.press("Alt+ArrowLeft")
    page.wait_for_function("document.querySelector('.turn.assistant .branch').innerText.includes('1/2')")
    page.keyboard.press("Alt+s")
    assert not page.is_visible("#settings")
    page.keyboard.press("Alt+s")
    assert page.is_visible("#settings")
    page.focus("#conversation")
    page.keyboard.press("?")
    assert "send the message" in page.inner_text("#shortcuts")
    page.keyboard.press("Escape")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "message-text"
    page.keyboard.press("Alt+n")
    page.wait_for_selector(".welcome")


@pytest.mark.slow
def test_a_phone_shows_the_chat_first_and_nothing_sticks_out(browser, studio, visiting) -> None:
    with visiting(browser, studio.url, viewport={"width": 390, "height": 844}, has_touch=True) as page:
        box = page.query_selector("#message").bounding_box()
        assert box["y"] + box["height"] < 844 and box["x"] >= 0 and box["x"] + box["width"] <= 390
        assert not page.is_visible("#settings") and not page.is_visible("#conversations")
        page.click("button[aria-label=Settings]")
        assert page.is_visible("#settings")
        assert -1 <= page.query_selector("#settings").bounding_box()["y"] < 844, "what was asked for is seen"
        set_parameter(page, "Maximum tokens", "8")
        send(page, "word" * 100)
        answered(page, 1)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.slow
def test_two_browsers_write_at_once_and_keep_to_themselves(browser, studio, visiting) -> None:
    with visiting(browser, studio.url) as one, visiting(browser, studio.url) as other:
        for page in (one, other):
            choose(page, "writer")
            set_parameter(page, "Maximum tokens", "16000")
            endless(page)
            send(page, "Go on")
        for page in (one, other):
            writing(page)
        assert studio.models.get("writer").engine.running == 2
        one.click(".stop-button")
        answered(one, 1, "stopped")
        end = time.monotonic() + 5
        while studio.models.get("writer").engine.running != 1:
            assert time.monotonic() < end, "the engine goes on with what nobody reads, or stopped the other one too"
            time.sleep(0.01)
        other.click(".stop-button")
        answered(other, 1, "stopped")
        assert len(kept(one)) == len(kept(other)) == 1
    studio.wait_until_idle(5.0)


@pytest.mark.slow
def test_two_tabs_of_one_browser_have_the_same_conversations(page, studio) -> None:
    other = page.context.new_page()
    other.goto(studio.url)
    other.wait_for_selector("#message textarea")
    set_parameter(page, "Maximum tokens", "5")
    send(page, "From the first tab")
    answered(page, 1)
    other.wait_for_selector(".conversations >> text=From the first tab")
    other.click(".conversations .title")
    set_parameter(other, "Maximum tokens", "5")
    send(other, "From the second")
    answered(other, 2)
    # What one has written does not overwrite what the other has.
    page.wait_for_function("document.querySelectorAll('.turn.assistant').length == 2")
    assert turns(page) == turns(other) and len(turns(page)) == 4


@pytest.mark.slow
def test_a_conversation_that_is_deleted_while_it_is_answered_stays_away(page, studio) -> None:
    choose(page, "writer")
    set_parameter(page, "Maximum tokens", "16000")
    endless(page)
    send(page, "Go on")
    writing(page)
    page.click(".conversations summary")
    page.click(".conversations >> text=Delete")
    studio.wait_until_idle(5.0)
    page.wait_for_selector(".welcome")
    page.reload()
    page.wait_for_selector(".welcome")
    assert kept(page) == []


@pytest.mark.slow
def test_who_looks_at_another_conversation_meanwhile_misses_nothing(page, studio) -> None:
    choose(page, "writer")
    set_parameter(page, "Maximum tokens", "600")
    endless(page)
    send(page, "In the first")
    writing(page)
    page.click("#new-conversation")
    page.wait_for_selector(".welcome")
    assert page.is_visible(".send-button"), "two conversations may be answered at once"
    set_parameter(page, "Maximum tokens", "5")
    send(page, "In the second")
    answered(page, 1)
    page.click(".conversations .title:has-text('In the first')")
    answered(page, 1)
    assert "600 tokens" in page.inner_text(".turn.continuation .facts")
    page.reload()
    page.wait_for_selector(".turn.continuation")
    assert "600 tokens" in page.inner_text(".turn.continuation .facts")


@pytest.mark.slow
def test_a_long_conversation_is_not_drawn_anew_for_each_message(page, tmp_path: Path) -> None:
    turns = {}
    for number in range(400):
        role = "assistant" if number % 2 else "user"
        fields = {"model": "talker", "token_ids": [1], "state": "done"} if number % 2 else {}
        parent = f"t{number - 1}" if number else ""
        text = f"{number}\n\n```python\nx = {number}\n```\n\n- **a**\n- b"
        turns[f"t{number}"] = {
            "id": f"t{number}",
            "parent": parent,
            "role": role,
            "text": text,
            "created": number,
        } | fields
    chosen = {turn["parent"]: name for name, turn in turns.items()}
    path = tmp_path / "long.json"
    conversations = [{"title": "Long", "turns": turns, "chosen": chosen}]
    path.write_text(json.dumps({"format": "topkapi-conversation", "version": 1, "conversations": conversations}))
    page.set_input_files(".chat-list [type=file]", path)
    page.wait_for_function("document.querySelectorAll('.turn').length == 400")
    page.evaluate("document.querySelectorAll('.turn').forEach((turn, number) => turn.mark = number)")
    set_parameter(page, "Maximum tokens", "5")
    send(page, "One more")
    answered(page, 201)
    kept = page.evaluate("[...document.querySelectorAll('.turn')].map(turn => turn.mark ?? null)")
    assert kept == [*range(400), None, None]
    assert "messages were not read" in page.inner_text(".turn.assistant >> nth=200")


@pytest.mark.slow
def test_stopping_before_the_first_token(page, studio) -> None:
    import threading

    network = studio.models.get("writer").engine.network
    running, held = network.run, threading.Event()

    def hold(works: object) -> object:
        held.wait(30)
        return running(works)

    choose(page, "writer")
    network.run = hold
    try:
        send(page, "Never mind")
        page.wait_for_function("document.querySelector('#status').innerText.startsWith('Reading')")
        page.click(".stop-button")
        answered(page, 1, "stopped")
    finally:
        network.run = running
        held.set()
    studio.wait_until_idle(5.0)
    page.click(".turn.continuation >> text=Retry")
    answered(page, 1)


@pytest.mark.slow
def test_what_was_thought_is_folded_above_what_is_said(page) -> None:
    page.locator("[data-parameter=grammar]").evaluate(
        """box => {
          box.value = 'start: "<think>\\\\nHm, *hm*.\\\\n</think>\\\\n\\\\nYes, **yes**."';
          box.dispatchEvent(new Event('input', {bubbles: true}));
          box.dispatchEvent(new Event('change', {bubbles: true}));
        }"""
    )
    send(page, "Hello there")
    answered(page, 1)
    thoughts = page.locator("[data-testid=answer] details.thoughts")
    assert thoughts.locator("summary").inner_text() == "What it thought" and not thoughts.evaluate("it => it.open")
    assert page.inner_text("[data-testid=answer] strong") == "yes" and "Hm" not in answers(page)[0]
    thoughts.locator("summary").click()
    assert "Hm, *hm*." in answers(page)[0]
    page.get_by_role("button", name="Raw").click()
    assert answers(page)[0].startswith("<think>")
