"""The tab Score in a browser: figures, curve and tokens of a text, two checkpoints, choices, files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.service.ui.visits import HOSTILE, SEEN, fits, least_contrast, slowed

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.timeout(180)

SHOWN = "#score-text"

TEXT = "A list is a mutable sequence. Its items may be of any type, naïve or not."
STATIC = Path(__file__).parents[3] / "service" / "ui" / "static"


@pytest.fixture(scope="module")
def studio(serve: Callable, tiny_checkpoint: Callable[..., Path]) -> Iterator:
    with serve(
        tiny_checkpoint("one", chat=False, seed=1, context=256), tiny_checkpoint("two", chat=False, seed=2), studio=True
    ) as running:
        network = running.models.get("two").engine.network
        network.run, network.steps = slowed(network.run), lambda *_: []
        yield running


@pytest.fixture
def page(browser, studio, visiting) -> Iterator:
    with visiting(browser, f"{studio.url}/#score", wait=SHOWN) as page:
        ready(page)
        yield page


def ready(page: Any) -> None:
    page.wait_for_function("document.querySelectorAll('#score-checkpoint option').length == 2")


def score(page: Any, text: str = TEXT) -> None:
    page.fill("#score-text", text)
    page.click("#score-run")
    page.wait_for_selector(".heat .token")


def figures(page: Any) -> dict[str, float]:
    found = page.eval_on_selector_all(
        ".results section:first-child .facts > div", "rows => rows.map((row) => row.innerText.split('\\n'))"
    )
    return {name: float(value.replace(",", "")) for name, value in found}


def smaller(page: Any, script: str, **limits: int) -> None:
    """Have a script keep to smaller limits, so that what is long need not be."""
    text = (STATIC / f"{script}.js").read_text("utf-8")
    for name, value in limits.items():
        text, count = re.subn(rf"^const {name} = [\d_]+;$", f"const {name} = {value};", text, flags=re.M)
        assert count == 1
    page.route(f"**/studio/{script}.js", lambda route: route.fulfill(body=text, content_type="text/javascript"))


@pytest.mark.slow
def test_a_text_has_figures_a_curve_and_tokens(page, studio) -> None:
    score(page)
    (result,) = studio.answer("/score", text=TEXT, top=5)["results"]
    shown = figures(page)
    assert shown["Perplexity"] == pytest.approx(result["perplexity"], rel=1e-3)
    assert shown["Bits per byte"] == pytest.approx(result["bits_per_byte"], rel=1e-2)
    assert (shown["Tokens"], shown["Bytes"]) == (result["tokens"], result["bytes"])
    levels = page.eval_on_selector_all(".heat .token", "nodes => nodes.map((node) => node.dataset.level ?? null)")
    bits = [None if each["logprob"] is None else -each["logprob"] / 0.6931471805599453 for each in result["per_token"]]
    assert levels == [None if each is None else str(sum(each >= limit for limit in (1, 3, 5, 8, 12))) for each in bits]
    # From the list of the worst to the token in the text, and what had been expected in its place.
    worst = min(range(1, len(bits)), key=lambda at: result["per_token"][at]["logprob"])
    page.locator("ol.surprising button").first.click()
    chosen = page.locator(".heat .token[aria-pressed=true]")
    assert chosen.get_attribute("data-index") == str(worst)
    assert f"rank {result['per_token'][worst]['rank']}" in page.locator("ol.surprising button").first.inner_text()
    assert "The likeliest others" in page.inner_text(".results")
    # The curve leads to a place, too, by keyboard.
    page.focus(".chart-plot")
    page.keyboard.press("Home")
    page.keyboard.press("Enter")
    page.wait_for_selector(".heat .token[data-index='0'][aria-pressed=true]")
    assert "Nothing precedes it" in page.inner_text(".results")
    for _ in range(50):
        page.keyboard.press("ArrowRight")
    assert re.search(r"byte [\d,]+ · bits per token \d", page.inner_text(".results .chart-readout"))


@pytest.mark.slow
def test_two_checkpoints_are_compared_token_by_token(page, studio) -> None:
    page.check("input[value=pair]")
    page.select_option("#score-second", "two")
    score(page)
    one, two = (studio.answer("/score", model=name, text=TEXT)["results"][0] for name in ("one", "two"))
    better = "one" if one["nll"] < two["nll"] else "two"
    assert page.inner_text("section[aria-label=Verdict] strong") == better
    sides = page.eval_on_selector_all(".heat .token", "nodes => nodes.map((node) => Number(node.dataset.side ?? 0))")
    assert len(sides) == one["tokens"]
    for side, first, second in zip(sides, one["per_token"], two["per_token"], strict=True):
        if side:
            assert (side < 0) == (first["logprob"] > second["logprob"])
    page.click(".heat .token:nth-child(4)")
    assert "bits under the first" in page.inner_text("section[aria-label='The text by its tokens']")


@pytest.mark.slow
def test_tokens_of_different_vocabularies_meet_where_both_end(page) -> None:
    found = page.evaluate("""async () => {
      const { aligned } = await import("./studio/score_pair.js");
      const tokens = (...texts) => texts.map((text) => (
        { text, bytes: [...new TextEncoder().encode(text)], probability: text === "a" ? null : 0.5, rank: 1 }));
      return aligned(tokens("a", "bc", "def", "g"), tokens("abc", "de", "f", "g", "h"))
        .map((group) => [group.text, group.sides.map((side) => side.length), group.difference]);
    }""")
    assert found == [["abc", [2, 1], None], ["def", [1, 2], -1], ["g", [1, 1], 0], ["h", [0, 1], -1]]


@pytest.mark.slow
def test_a_key_leads_past_points_at_one_place_and_a_gap_hides_no_peak(page) -> None:
    steps, told, thinned = page.evaluate("""async () => {
      const { lines } = await import("./studio/chart.js");
      const { thinned } = await import("./studio/chart_scale.js");
      const points = [[0, NaN], [1, NaN], [1, 4], [3, 4], [3, 2], [4, 2]];
      const chart = lines([{ name: "bits", points }], { x: { label: "byte" }, height: 200 });
      document.body.append(chart);
      const plot = chart.querySelector(".chart-plot");
      while (!plot.querySelector("svg")) await new Promise(requestAnimationFrame);
      const seen = (key) => {
        plot.dispatchEvent(new KeyboardEvent("keydown", { key }));
        return chart.querySelector(".chart-readout").textContent;
      };
      const told = ["Home", ...Array(4).fill("ArrowRight"), ...Array(4).fill("ArrowLeft")].map(seen);
      chart.remove();
      const many = Array.from({ length: 100 }, (_, x) => [x, x < 15 ? NaN : x === 17 ? 9 : 1]);
      return [points.length, told, thinned(many, 10).slice(0, 3)];
    }""")
    there = ["byte 0 · bits none", "byte 1 · bits 4", "byte 3 · bits 2", "byte 4 · bits 2"]
    assert (steps, told) == (6, [*there, there[-1], *there[2::-1], there[0]])
    assert [point for point in thinned if point[1] == 9] == [[17, 9]]


@pytest.mark.slow
def test_choices_are_ranked(page, studio) -> None:
    page.check("input[value=choices]")
    choices = ["mutable", "a sequence", "x" * 30]
    page.fill("#score-prompt", "A list is")
    page.fill("#score-choices", "\n".join(choices))
    for normalize in ("byte", "none"):
        page.select_option("#score-normalize", normalize)
        page.click("#score-run")
        page.wait_for_function(
            "words => document.querySelector('table.choices thead')?.innerText.includes(words)",
            arg={"byte": "Bits per byte", "none": "Bits in all"}[normalize],
        )
        answer = studio.answer(
            "/score", prompt="A list is", choices=[f" {each}" for each in choices], normalize=normalize
        )
        shown = page.locator("table.choices tbody th .off-screen").all_text_contents()
        assert shown == [f" {choices[index]}" for index in answer["ranking"]]


@pytest.mark.slow
def test_a_file_is_read_here_and_a_long_one_in_parts(browser, studio, visiting, tmp_path) -> None:
    short, long, wrong = tmp_path / "short.txt", tmp_path / "long <b>.txt", tmp_path / "wrong.bin"
    short.write_text(TEXT, "utf-8")
    long.write_text(TEXT * 60, "utf-8")
    wrong.write_bytes(b"\xff\xfe\x00a")
    with visiting(browser, f"{studio.url}/#score", wait=SHOWN) as page:
        smaller(page, "score", EVERY_TOKEN=2000, SEGMENTS=20)
        smaller(page, "score_source", SHOWN=1000)
        page.goto(f"{studio.url}/?#score")
        ready(page)
        page.set_input_files("#score-file", wrong)
        assert "not text in UTF-8" in page.wait_for_selector(".studio-error").inner_text()
        page.set_input_files("#score-file", short)
        page.wait_for_function("text => document.querySelector('#score-text').value == text", arg=TEXT)
        assert page.locator(".studio-error").count() == 0
        page.set_input_files("#score-file", long)
        page.get_by_role("button", name="Close the file").wait_for()
        assert "long <b>.txt" in page.inner_text(".drop") and not page.is_visible("#score-text")
        page.click("#score-run")
        page.wait_for_selector(".heat .token")
        (result,) = studio.answer("/score", text=TEXT * 60, per_token=False, segments=20, surprising=1)["results"]
        assert figures(page)["Perplexity"] == pytest.approx(result["perplexity"], rel=1e-3)
        assert "Part 1 of 20" in page.inner_text(".results")
        page.locator("ol.surprising button").first.click()
        page.wait_for_selector(".heat .token[aria-pressed=true]")
        part = sum(segment["start_byte"] <= result["surprising"][0]["start_byte"] for segment in result["segments"])
        assert f"Part {part} of 20" in page.inner_text(".results")


@pytest.mark.slow
def test_a_long_text_tells_its_progress_and_can_be_stopped(page, studio) -> None:
    page.select_option("#score-checkpoint", "two")
    page.fill("#score-text", TEXT * 400)
    page.click("#score-run")
    page.wait_for_function("/two: [1-9][\\d,]* of [\\d,]+ tokens/.test(document.querySelector('.panel').innerText)")
    page.click("#score-run")
    studio.wait_until_idle(5.0)
    assert page.inner_text("#score-run") == "Score" and page.locator(".studio-error").count() == 0
    page.fill("#score-text", "")
    page.click("#score-run")
    assert "empty" in page.wait_for_selector(".studio-error").inner_text()
    score(page)
    assert page.locator(".studio-error").count() == 0


@pytest.mark.slow
def test_hostile_texts_are_shown_and_not_run(page) -> None:
    for mode in ("text", "pair"):
        page.check(f"input[value={mode}]")
        score(page, HOSTILE)
        shown = page.inner_text(".heat")
        assert SEEN.split(" a")[0] in shown and not set(shown) & set("\u202e\u200b\x07")
        page.click(".heat .token:nth-child(3)")
    page.check("input[value=choices]")
    page.fill("#score-choices", HOSTILE)
    page.click("#score-run")
    page.wait_for_selector("table.choices")
    assert page.locator(".studio-tab[data-script=score] :is(img, script)").count() == 0
    assert page.title() == "Topkapi"


@pytest.mark.slow
def test_colours_can_be_read_and_a_phone_shows_all(browser, studio, visiting) -> None:
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True}
    with visiting(browser, f"{studio.url}/#score", wait=SHOWN, **phone) as page:
        ready(page)
        for mode in ("text", "pair"):
            page.check(f"input[value={mode}]")
            score(page)
            assert fits(page)
            for dark in (False, True):
                page.evaluate("dark => document.body.classList.toggle('dark', dark)", dark)
                assert (
                    least_contrast(page, ".heat .token, .token-swatch, .facts *, .note, .results :is(p, td, th)") >= 4.5
                )
