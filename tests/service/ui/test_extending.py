"""The example of docs/extending.md: a tab of the studio, looked at in a browser."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.extending import execute
from topkapi.service.ui.studio import TABS

pytestmark = pytest.mark.timeout(180)


def test_a_new_tab_stands_beside_the_chat(
    browser, serve: Callable, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    execute("A tab", tmp_path)
    try:
        with serve(tiny_checkpoint("talker", context=1024), studio=True) as running:
            context = browser.new_context()
            page = context.new_page()
            page.set_default_timeout(30_000)
            page.goto(running.url)
            page.wait_for_selector("#message textarea")
            page.get_by_role("tab", name="Tokens").click()
            page.get_by_label("Text", exact=True).fill("ab")
            page.wait_for_function("document.querySelector('.textfield')?.innerText.includes('a')")
            context.close()
    finally:
        del TABS["Tokens"]
