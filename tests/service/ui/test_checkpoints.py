"""The studio's list of checkpoints follows what is loaded and unloaded while it is open, in a real browser."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.service.ui.chat_page import choose

pytestmark = pytest.mark.timeout(180)


@pytest.mark.slow
def test_the_list_follows_what_is_loaded(
    browser, serve: Callable, tiny_checkpoint: Callable[..., Path], visiting
) -> None:
    first = tiny_checkpoint("first", context=1024)

    with serve(first, studio=True, model_directory=first.parent) as server, visiting(browser, server.url) as page:

        def listed(*names: str) -> None:
            # Whoever reaches for the list is shown what is loaded now.
            page.focus("#message textarea")
            page.focus("#checkpoint")
            page.wait_for_function(
                "names => [...document.querySelectorAll('#checkpoint option')].map(o => o.innerText).join() == names",
                arg=",".join(names),
            )

        listed("first")
        assert server.post("/models", path="first", name="second").status_code == 201
        listed("first", "second")
        choose(page, "second")
        assert server.client.delete("/models/first").status_code == 204
        page.reload()
        page.wait_for_selector("#message textarea")
        page.wait_for_function("document.querySelector('#status').innerText.startsWith('second')")
        assert page.input_value("#checkpoint") == "second"
        listed("second")
        # What is unloaded while it is chosen is said to be, and what is written then is not lost.
        assert server.post("/models", path="first", name="third").status_code == 201
        assert server.client.delete("/models/second").status_code == 204
        listed("third", "second (unloaded)")
        page.fill("#message textarea", "Anybody there?")
        page.press("#message textarea", "Enter")
        page.wait_for_selector("text=second is not loaded")
        assert page.input_value("#message textarea") == "Anybody there?"
        choose(page, "third")
        listed("third")
