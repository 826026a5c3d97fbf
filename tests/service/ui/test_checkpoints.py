"""The studio's list of checkpoints follows what is loaded and unloaded while it is open, in a real browser."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.service.ui.test_studio import SECONDS, status

pytestmark = pytest.mark.timeout(180)


def options(page) -> list[str]:
    page.click("#checkpoint input")
    page.wait_for_timeout(700)
    found = [option.inner_text().removeprefix("✓").strip() for option in page.get_by_role("option").all()]
    page.keyboard.press("Escape")
    page.click("#conversation")
    return found


def test_the_list_follows_what_is_loaded(browser, serve: Callable, tiny_checkpoint: Callable[..., Path]) -> None:
    first = tiny_checkpoint("first", context=1024)
    with serve(first, studio=True, model_directory=first.parent) as server:
        page = browser.new_context().new_page()
        page.set_default_timeout(SECONDS)
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(server.url)
        page.wait_for_selector("#message textarea")
        assert options(page) == ["first"]

        assert server.post("/models", path="first", name="second").status_code == 201
        assert options(page) == ["first", "second"], "as soon as the list is opened"
        page.click("#checkpoint input")
        page.get_by_role("option", name="second").click()
        status(page, "^second")

        assert server.client.delete("/models/first").status_code == 204
        page.reload()
        page.wait_for_selector("#status")
        status(page, "^second")
        assert page.input_value("#checkpoint input") == "second" and options(page) == ["second"]
        page.context.close()
        assert problems == []
