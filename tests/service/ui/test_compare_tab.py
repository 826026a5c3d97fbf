"""The Compare tab in a real browser: blind votes over a list of prompts, what they say, and the export."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(180)

HOSTILE = "<img src=x onerror=\"document.title='taken'\"> \u202eevil"


@pytest.fixture(scope="module")
def studio(serve: Callable, tiny_checkpoint: Callable[..., Path]) -> Iterator:
    talker, writer = tiny_checkpoint("talker", context=256), tiny_checkpoint("writer", chat=False, seed=1, context=256)
    with serve(talker, writer, tiny_checkpoint("twin", context=256), studio=True) as running:
        yield running


def begin(page, prompts: list[str], names: tuple[str, str] = ("talker", "writer")) -> None:
    for label, name in zip(("First checkpoint", "Second checkpoint"), names, strict=True):
        page.get_by_label(label).select_option(name)
    page.get_by_label("Prompts", exact=True).fill("\n".join(prompts))
    page.get_by_role("button", name="Begin").click()


def answered(page, number: int) -> None:
    page.locator("#tab-compare [role=status]", has_text=f"Prompt {number} of").wait_for()
    page.locator("#tab-compare button[data-vote=left]:enabled").wait_for()


@pytest.mark.slow
def test_votes_are_blind_and_the_result_says_how_sure_it_is(browser, visiting, studio) -> None:
    with visiting(browser, f"{studio.url}/#compare", wait="#tab-compare textarea") as page:
        begin(page, ["one", "two", HOSTILE, "four"])
        for number, key in enumerate("1241", start=1):
            answered(page, number)
            words = page.inner_text("#tab-compare")
            assert "talker" not in words and "writer" not in words
            if number == 3:
                assert "<img src=x" in words and "\\u202e" in words and "\u202e" not in words
            page.keyboard.press(key)
        page.locator(".compare-verdict").wait_for()
        assert page.title() == "Topkapi" and page.locator("#tab-compare img").count() == 0
        with page.expect_download() as download:
            page.get_by_role("button", name="Export as JSON").click()
        found = json.loads(Path(download.value.path()).read_text())
        assert [side["model"] for side in found["sides"]] == ["talker", "writer"]
        votes = [each["vote"] for each in found["prompts"]]
        sides = [("second" if each["flipped"] else "first") for each in found["prompts"]]
        other = {"first": "second", "second": "first"}
        assert votes == [sides[0], other[sides[1]], "neither", sides[3]]
        assert found["result"]["decided"] == 3 and found["verdict"] == page.inner_text(".compare-verdict")
        # Whoever repeats the request gets the same answer.
        each = found["prompts"][1]
        again = studio.answer("/generate", model="writer", prompt="two", seed=each["seed"], **found["parameters"])
        assert again["outputs"][0]["text"] == each["answers"][1]["text"]
        with page.expect_download() as download:
            page.get_by_role("button", name="Export as CSV").click()
        rows = list(csv.DictReader(io.StringIO(Path(download.value.path()).read_bytes().decode(), newline="")))
        assert [row["vote"] for row in rows] == votes and rows[2]["prompt"] == HOSTILE


@pytest.mark.slow
def test_a_comparison_outlives_a_reload(browser, visiting, studio) -> None:
    with visiting(browser, f"{studio.url}/#compare", wait="#tab-compare textarea") as page:
        begin(page, ["one", "two"])
        answered(page, 1)
        page.get_by_role("button", name="B is better").click()
        answered(page, 2)
        page.reload()
        page.get_by_role("button", name="talker and writer,").click()
        answered(page, 2)
        page.get_by_role("button", name="See the result now").click()
        page.locator(".compare-result", has_text="One prompt has no vote yet").wait_for()
        # Names are shown now: what was judged blind stays so, and what is not judged yet is not told.
        assert page.locator(".compare-table tbody tr").count() == 1
        page.get_by_role("button", name="Go on voting").click()
        answered(page, 2)
        assert page.get_by_role("button", name="Back").is_disabled()
        page.get_by_role("button", name="As good").click()
        page.locator(".compare-result", has_text="1 as good").wait_for()
        page.get_by_role("button", name="New comparison").click()
        page.get_by_role("button", name="Delete the comparison").click()
        page.locator(".compare-before").wait_for(state="hidden")


@pytest.mark.slow
def test_what_answers_alike_is_a_tie_and_mistakes_are_explained(browser, visiting, studio) -> None:
    with visiting(browser, f"{studio.url}/#compare", wait="#tab-compare textarea") as page:
        begin(page, ["one"], ("talker", "talker"))
        page.locator("[role=alert]", has_text="Both are the same checkpoint").wait_for()
        begin(page, ["", " "])
        page.locator("[role=alert]", has_text="There are no prompts").wait_for()
        begin(page, ["one", "two"], ("talker", "twin"))
        page.locator(".compare-result", has_text="2 as good").wait_for()
        page.get_by_role("button", name="New comparison").click()
        begin(page, ["word " * 500], ("talker", "writer"))
        page.locator("[role=alert]", has_text="context").wait_for()


@pytest.mark.slow
def test_a_setting_that_is_the_default_of_one_is_sent_to_both(browser, visiting, serve, tiny_checkpoint) -> None:
    own = {"temperature": 0.5, "do_sample": True}
    first, second = tiny_checkpoint("plain", chat=False), tiny_checkpoint("tuned", chat=False, seed=1, generation=own)
    with (
        serve(first, second, studio=True) as running,
        visiting(browser, f"{running.url}/#compare", wait="#tab-compare textarea") as page,
    ):
        box = page.locator("#tab-compare input[type=text][data-parameter=temperature]")
        playwright = pytest.importorskip("playwright.sync_api")
        playwright.expect(box).to_have_value("each its own")
        box.fill("0.5")
        bodies: list[dict] = []
        page.on("request", lambda sent: bodies.append(sent.post_data_json) if "/generate" in sent.url else None)
        begin(page, ["one"], ("plain", "tuned"))
        answered(page, 1)
        assert [body["temperature"] for body in bodies] == [0.5, 0.5]
        assert {body["model"] for body in bodies} == {"plain", "tuned"} and len({body["seed"] for body in bodies}) == 1


@pytest.mark.slow
def test_prompts_come_from_files(browser, visiting, studio, tmp_path) -> None:
    with visiting(browser, f"{studio.url}/#compare", wait="#tab-compare textarea") as page:
        for name, text, expected in (
            ("a.txt", "one\n\ntwo\r\n", "one\ntwo"),
            ("b.json", '["one", {"question": "two"}]', "one\ntwo"),
            ("c.jsonl", '{"prompt": "one"}\n{"instruction": "two"}\n', "one\ntwo"),
        ):
            (tmp_path / name).write_text(text)
            page.get_by_label("Prompts", exact=True).fill("")
            page.get_by_label("Or from a file").set_input_files(tmp_path / name)
            page.wait_for_function(
                "text => document.querySelector('#tab-compare textarea').value === text", arg=expected
            )
        (tmp_path / "d.json").write_text('[{"text": "one"}]')
        page.get_by_label("Or from a file").set_input_files(tmp_path / "d.json")
        page.locator("[role=alert]", has_text="Row 1 has no text as prompt").wait_for()


@pytest.mark.slow
def test_the_statistics_are_what_textbooks_say(browser, visiting, studio) -> None:
    """Wilson's interval as in Brown, Cai, DasGupta (2001); the sign test by the binomial distribution."""
    with visiting(browser, f"{studio.url}/#compare", wait="#tab-compare textarea") as page:
        found = page.evaluate(
            """async () => {
              const { wilson, signTest } = await import('/studio/compare_result.js');
              const pairs = [[7, 10], [0, 5], [5, 5], [1, 1], [300, 500], [0, 0]];
              return pairs.map(([won, count]) => [...wilson(won, count), signTest(won, count)]);
            }"""
        )
    for (won, count), (low, high, p) in zip([(7, 10), (0, 5), (5, 5), (1, 1), (300, 500)], found, strict=False):
        z, share = 1.959964, won / count
        centre = (share + z * z / (2 * count)) / (1 + z * z / count)
        half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
        assert (low, high) == pytest.approx((max(0, centre - half), min(1, centre + half)), abs=1e-9)
        tail = sum(math.comb(count, each) for each in range(min(won, count - won) + 1)) / 2**count
        assert p == pytest.approx(min(1, 2 * tail), rel=1e-6)
    assert found[0][:2] == pytest.approx([0.3968, 0.8922], abs=1e-4) and found[-1] == [0, 1, 1]


@pytest.mark.slow
def test_nothing_sticks_out_on_a_phone(browser, visiting, studio) -> None:
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True}
    with visiting(browser, f"{studio.url}/#compare", wait="#tab-compare textarea", **phone) as page:
        begin(page, ["one"])
        answered(page, 1)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.get_by_role("button", name="A is better").click()
        page.locator(".compare-table").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
