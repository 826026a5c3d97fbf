"""The Models tab in a real browser: what is loaded, loading and unloading, and refusals where they arose."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(180)

CARD = "---\nlicense: mit\n---\n# A card\n\n<img src=x onerror=\"document.title='taken'\"> \u202eevil\n"


@pytest.fixture
def studio(serve: Callable, tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Iterator:
    for name in ("first", "second"):
        shutil.copytree(tiny_checkpoint(name), tmp_path / name)
    (tmp_path / "first" / "README.md").write_text(CARD)
    with serve(tmp_path / "first", studio=True, model_directory=tmp_path) as running:
        yield running


@pytest.mark.slow
def test_checkpoints_come_and_go(browser, visiting, studio) -> None:
    with visiting(browser, f"{studio.url}/#models", wait=".checkpoint") as page:
        first = page.locator(".checkpoint", has_text="first")
        words = first.inner_text()
        assert "qwen3" in words and "35,040" in words and "mit" in words and "KiB of weights" in words
        page.get_by_label("Path or hub name").fill("second")
        page.get_by_role("button", name="Load", exact=True).click()
        second = page.locator(".checkpoint", has_text="second")
        second.wait_for()
        assert studio.models.names == ["first", "second"] and "not stated" in second.inner_text()
        second.get_by_role("button", name="Make it the default").click()
        second.locator(".chip", has_text="default").wait_for()
        assert studio.models.get().name == "second"
        first.get_by_role("button", name="Unload").click()
        first.get_by_role("button", name="Keep it").click()
        assert studio.models.names == ["second", "first"]
        first.get_by_role("button", name="Unload").click()
        first.get_by_role("button", name="Unload it").click()
        first.wait_for(state="detached")
        assert studio.models.names == ["second"]


@pytest.mark.slow
def test_a_refusal_stands_where_it_arose(browser, visiting, studio) -> None:
    with visiting(browser, f"{studio.url}/#models", wait=".checkpoint") as page:
        path = page.get_by_label("Path or hub name")
        path.fill("nowhere")
        page.get_by_role("button", name="Load", exact=True).click()
        alert = page.locator("form [role=alert]")
        alert.wait_for()
        assert "there is no checkpoint at" in alert.inner_text() and path.get_attribute("aria-invalid") == "true"
        path.fill("first")
        page.get_by_role("button", name="Load", exact=True).click()
        page.locator("form [role=alert]", has_text="is loaded already").wait_for()
        page.get_by_label("Dismiss the error").click()
        assert page.locator("[role=alert]").count() == 0
        page.get_by_label("Let it take the place").check()
        page.get_by_role("button", name="Load", exact=True).click()
        page.locator("form", has_text="first is loaded.").wait_for()


@pytest.mark.slow
def test_a_server_that_lets_nobody_load_says_so(browser, visiting, serve, tiny_checkpoint) -> None:
    with (
        serve(tiny_checkpoint("alone"), studio=True) as running,
        visiting(browser, f"{running.url}/#models", wait=".checkpoint") as page,
    ):
        page.get_by_role("button", name="Unload").click()
        page.get_by_role("button", name="Unload it").click()
        alert = page.locator(".checkpoint [role=alert]")
        alert.wait_for()
        assert "lets no request load or unload" in alert.inner_text() and running.models.names == ["alone"]


@pytest.mark.slow
def test_a_card_is_shown_as_text(browser, visiting, studio) -> None:
    with visiting(browser, f"{studio.url}/#models", wait=".checkpoint") as page:
        page.locator("summary", has_text="Card").click()
        card = page.locator(".checkpoint-card")
        card.locator("text=<img src=x").wait_for()
        assert card.get_by_role("heading", name="A card").is_visible()
        assert "\u202e" not in card.inner_text()
        assert page.title() == "Topkapi" and page.locator("#tab-models img").count() == 0


@pytest.mark.slow
def test_nothing_sticks_out_on_a_phone(browser, visiting, studio) -> None:
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True}
    with visiting(browser, f"{studio.url}/#models", wait=".checkpoint", **phone) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
