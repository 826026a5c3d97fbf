"""The example of docs/extending.md: a tab of the studio, looked at in a browser."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.extending import examples, execute
from topkapi.service.ui import scripts
from topkapi.service.ui.studio import TABS

pytestmark = pytest.mark.timeout(180)


@pytest.mark.slow
def test_a_new_tab_stands_beside_the_chat(
    browser, serve: Callable, tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch, visiting
) -> None:
    static = tmp_path / "static"
    shutil.copytree(scripts.STATIC, static)
    (static / "lengths.js").write_text(examples("A tab", "js")[0], "utf-8")
    monkeypatch.setattr(scripts, "STATIC", static)
    execute("A tab", tmp_path)
    try:
        with (
            serve(tiny_checkpoint("talker", context=1024), studio=True) as running,
            visiting(browser, running.url) as page,
        ):
            page.get_by_role("tab", name="Lengths").click()
            page.get_by_label("Text", exact=True).fill("ab ab")
            count = running.answer("/tokenize", text="ab ab")["count"]
            page.wait_for_selector(f"#tab-lengths >> text={count} tokens")
    finally:
        del TABS["Lengths"]
