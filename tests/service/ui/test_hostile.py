"""Whatever the studio is told is shown as text: names of checkpoints, runs and files, cards, metrics, imports, links.

Nothing of it may become an element, and no character may be there that is not seen.
"""

from __future__ import annotations

import base64
import json
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.service.ui.chat_page import answered, refusal, send, set_parameter, turns
from tests.service.ui.visits import HOSTILE, SEEN

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.timeout(180)

EVIL = "<img src=x onerror=\"document.title='taken'\"><b>\u202eevil\u200b\x07"
"""As much of it as the name of a file may have."""
SHOWN = "<img src=x onerror=\"document.title='taken'\"><b>\\u202eevil\\u200b\\u0007"
RUNS = ("<img src=x onerror=\"document.title='taken'\"><b>evil", "<script>alert(1)<b>", EVIL)
"""The last one is not listed: a run's name can be printed."""

FOUND = r"""() => {
  const hidden = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]/u;
  const found = [];
  const walk = document.createTreeWalker(document.documentElement, NodeFilter.SHOW_ELEMENT | NodeFilter.SHOW_TEXT);
  for (let node = walk.currentNode; node; node = walk.nextNode()) {
    if (node.nodeType === Node.TEXT_NODE) {
      // What a text field holds is what was written; the notebook's text under it has to be the same.
      const place = node.parentElement.closest('script, style, textarea, .page-under');
      if (!place && hidden.test(node.data)) found.push(node.parentElement.outerHTML.slice(0, 300));
      continue;
    }
    if (node.matches('img[src="x"], [onerror], svg[onload]')) found.push(node.outerHTML);
    for (const { name, value } of node.attributes) {
      if (name !== 'value' && !name.startsWith('data-') && hidden.test(value)) found.push(`${name}: ${value}`);
    }
  }
  if (document.title !== 'Topkapi') found.push(document.title);
  return found;
}"""


@pytest.fixture(scope="module")
def studio(serve: Callable, tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    place = tmp_path_factory.mktemp("hostile")
    for name, chat in ((EVIL, True), (f"{EVIL}2", False)):
        shutil.copytree(tiny_checkpoint("one", chat=chat, context=1024), place / name)
        card = f"---\nlicense: {json.dumps(HOSTILE)}\n---\n# {HOSTILE}\n\n> **{HOSTILE}** {HOSTILE}\n\n{HOSTILE}\n"
        (place / name / "README.md").write_text(card, encoding="utf-8")
    runs = place / "runs"
    for name in RUNS:
        write_run(runs / name)
    with serve(place / EVIL, place / f"{EVIL}2", studio=True, runs_directory=runs, model_directory=place) as running:
        yield running


def write_run(place: Path) -> None:
    """A finished run that tells what it should not."""
    place.mkdir(parents=True)
    settings = {HOSTILE: HOSTILE, "data": [HOSTILE], "learning_rate": HOSTILE, "nested": {HOSTILE: [HOSTILE]}}
    (place / "config.yaml").write_text(json.dumps(settings), encoding="utf-8")
    lines: list[dict[str, Any]] = [
        {
            "step": step,
            "tokens": step,
            "loss": 6.0 - step / 9,
            "learning_rate": 0.1,
            HOSTILE: HOSTILE,
            "machine": HOSTILE,
        }
        for step in range(1, 20)
    ]
    lines += [
        {"step": HOSTILE, "loss": HOSTILE, "tokens": HOSTILE, "epoch": HOSTILE},
        {"step": 20, "tokens": 20, "epoch": 1.0, "train_loss": 3.0, "validation_loss": 3.0, "copied": HOSTILE},
    ]
    (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    samples = [{"step": 20, "prompt": HOSTILE, "text": HOSTILE, "copied_from_training": HOSTILE, "name": HOSTILE}]
    (place / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
    system = [{"step": 20, "time": 1.0, "gpus": [{"name": HOSTILE, "memory": HOSTILE}], HOSTILE: 1}]
    (place / "system.jsonl").write_text("".join(json.dumps(line) + "\n" for line in system))
    (place / "report.md").write_text(f"# {HOSTILE}\n\n{HOSTILE}\n\n![{HOSTILE}](x)\n", encoding="utf-8")


@pytest.fixture
def page(browser, studio, visiting) -> Iterator:
    with visiting(browser, studio.url) as page:
        yield page


def clean(page: Any) -> None:
    assert page.evaluate(FOUND) == []


def go(page: Any, place: str, wait: str) -> None:
    page.evaluate("place => (location.hash = place)", place)
    page.wait_for_selector(wait)


@pytest.mark.slow
def test_names_and_cards_of_checkpoints(page) -> None:
    page.wait_for_selector(".welcome .example")
    assert SHOWN in page.inner_text(".welcome")
    clean(page)
    # The network, too, can only answer with such a text.
    page.click("summary:has-text('What may be chosen')")
    page.get_by_label("Choices", exact=True).fill(HOSTILE)
    send(page, HOSTILE)
    answered(page, 1)
    assert turns(page) == [SEEN, SEEN], "as Markdown it is the same text"
    clean(page)
    set_parameter(page, "Seed", HOSTILE)
    send(page, "again")
    assert "<img src=x" in refusal(page)
    clean(page)
    go(page, "#models", ".checkpoint summary")
    page.click(".checkpoint summary >> nth=0")
    page.wait_for_selector(".checkpoint-card h1, .checkpoint-card h3")
    page.get_by_label("Path or hub name").fill(HOSTILE)
    page.get_by_role("button", name="Load", exact=True).click()
    page.wait_for_selector("form [role=alert]")
    page.get_by_role("button", name="Unload").first.click()
    clean(page)


@pytest.mark.slow
def test_the_tabs_that_choose_checkpoints(page, tmp_path: Path) -> None:
    go(page, "#notebook", "#notebook-continue")
    page.fill("#notebook-text", HOSTILE)
    page.click("#notebook-continue")
    page.wait_for_function("document.querySelector('#notebook-status').innerText.includes('seed')")
    clean(page)
    go(page, "#tokens", "#lab-run")
    page.fill("#lab-most", "5")
    page.fill("#lab-prompt", HOSTILE)
    page.click("#lab-run")
    page.wait_for_selector(".strategy:nth-child(2) .token")
    page.wait_for_function("document.querySelector('#lab-run').textContent == 'Run'")
    page.click(".strategy .token >> nth=0")
    page.wait_for_selector(".why table")
    clean(page)
    go(page, "#score", "#score-run")
    # A file system can't have it, a form can.
    page.set_input_files("#score-file", {"name": EVIL, "mimeType": "text/plain", "buffer": HOSTILE.encode() * 20})
    page.wait_for_function("document.querySelector('#score-text').value.length > 100")
    clean(page)
    page.check("input[value=pair]")
    page.click("#score-run")
    page.wait_for_selector("section[aria-label=Verdict]")
    page.wait_for_selector(".chart-legend button")
    clean(page)
    go(page, "#compare", "text=Begin")
    page.get_by_label("Prompts", exact=True).fill(HOSTILE)
    page.click("text=Begin")
    page.wait_for_selector("[data-vote=left]:not([disabled])")
    page.click("[data-vote=left]")
    page.wait_for_selector(".compare-result")
    clean(page)
    page.click("text=New comparison")
    page.wait_for_selector(".compare-earlier button")
    clean(page)


@pytest.mark.slow
def test_runs(page) -> None:
    go(page, "#runs", ".runs-list input")
    page.wait_for_selector(".chart-plot svg")
    for label in ("Settings", "Samples", "Report"):
        page.locator("#tab-runs summary", has_text=label).first.evaluate("it => (it.parentElement.open = true)")
    page.wait_for_selector(".runs-report")
    assert page.locator(".runs-list input").count() == 2
    assert page.locator(".runs-heading h2").inner_text() in RUNS and SEEN in page.inner_text(".runs-samples")
    clean(page)
    page.locator(".runs-list input:not(:checked)").first.click()
    page.wait_for_selector(".runs-heading:has-text('2 runs')")
    page.wait_for_selector(".chart.large .chart-legend button")
    clean(page)


def given(**fields: Any) -> dict[str, Any]:
    """An exported conversation of one question and one answer; the fields are the answer's."""
    asked = {"id": "a", "parent": "", "role": "user", "text": HOSTILE, "created": 1}
    answer = {"id": "b", "parent": "a", "role": "assistant", "text": HOSTILE, "created": 2, "state": "done"} | fields
    return {"title": HOSTILE, "named": True, "turns": {"a": asked, "b": answer}, "chosen": {"": "a", "a": "b"}}


def bring(page: Any, path: Path, conversation: Any) -> None:
    document = {"format": "topkapi-conversation", "version": 1, "conversations": [conversation]}
    path.write_text(json.dumps(document))
    page.set_input_files(".chat-list [type=file]", path)


@pytest.mark.slow
def test_an_imported_conversation(page, tmp_path: Path) -> None:
    wrong = {
        "model": HOSTILE, "finish_reason": "constructor", "trouble": HOSTILE, "state": "queued", "others": HOSTILE,
        "parameters": {"seed": HOSTILE}, "token_ids": "many", "timings": {"tokens_per_s": HOSTILE}, "joints": HOSTILE,
        "prompt_tokens": HOSTILE, "forgotten": HOSTILE, "first_token_s": HOSTILE, "speed": HOSTILE, "messages": 7,
    }  # fmt: skip
    for number, fields in enumerate(({}, wrong, {"model": {"a": 1}, "state": HOSTILE, "parameters": HOSTILE}), 1):
        bring(page, tmp_path / "one.json", given(**fields))
        page.wait_for_function(
            "count => document.querySelectorAll('.conversations .title').length === count", arg=number
        )
        page.wait_for_selector(".turn.assistant .facts:not([hidden])")
        assert turns(page) == [SEEN, SEEN]
        clean(page)
    # What would lead in a circle, or out of the conversation, is refused.
    circle = given(parent="b")
    for broken in (circle, given(parent="c"), given(parent="__proto__"), given(id=""), given(role="system"), None, 7):
        bring(page, tmp_path / "one.json", broken)
        page.wait_for_selector(".chat-list .studio-error:has-text('makes no sense')")
        page.click(".chat-list .studio-error button")
        clean(page)
    page.reload()
    page.wait_for_selector(".turn.user, .welcome")
    clean(page)


def link(studio: Any, body: Any) -> str:
    packed = zlib.compressobj(wbits=-15)
    raw = packed.compress(json.dumps(body).encode()) + packed.flush()
    return f"{studio.url}/#chat/{base64.urlsafe_b64encode(raw).decode().rstrip('=')}"


@pytest.mark.slow
def test_a_link(browser, studio, visiting) -> None:
    bodies = [
        {
            "model": HOSTILE,
            "messages": [{"role": each, "content": HOSTILE} for each in ("system", "user", "assistant")],
        },
        {"model": HOSTILE, "messages": [{"role": HOSTILE, "content": HOSTILE}], "seed": HOSTILE, HOSTILE: HOSTILE},
        {"model": HOSTILE, "prompt": HOSTILE, "stop": [HOSTILE, {}], "logit_bias": [HOSTILE], "temperature": {"a": 1}},
        {"model": HOSTILE, "prompt": HOSTILE, "json_schema": HOSTILE, "top_k": [HOSTILE], "order": HOSTILE},
    ]
    for body in bodies:
        with visiting(browser, link(studio, body)) as page:
            assert SEEN in refusal(page)
            clean(page)
            assert SEEN in turns(page)[0]
