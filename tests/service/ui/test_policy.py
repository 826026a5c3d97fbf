"""The studio's Content-Security-Policy: the page works under it, and nothing else does."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from topkapi.service.ui.policy import policy_of

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def studio(serve: Callable, tiny_checkpoint: Callable[..., Path]) -> Iterator:
    with serve(tiny_checkpoint("talker"), studio=True, cors_origins=("https://lab.example",)) as running:
        yield running


def test_scripts_are_named_by_their_digests() -> None:
    page = b"<script>a()</script><script src=b.js></script ><SCRIPT data-x>\nc()</SCRIPT>"
    named = re.findall(r"'sha256-[^']+'", policy_of(page, ()))
    # From `openssl dgst -sha256 -binary | base64` of `a()` and of a new line with `c()`.
    assert sorted(named) == sorted(
        [
            "'sha256-qVpDBgj7bpq5hMAcGp3AOc79J3Y1Z4HvySTwKrWDoy4='",
            "'sha256-NDJBSXHDXnqth9mWfg5RzoDFZWaCcd6a/g5wyMimhMM='",
        ]
    )


def test_the_page_comes_with_it(studio) -> None:
    answer = studio.client.get("/", headers={"Accept-Encoding": "br, gzip"})
    policy = answer.headers["content-security-policy"]
    assert "unsafe-inline" not in re.search("script-src [^;]*", policy)[0]
    assert "frame-ancestors 'self' https://lab.example" in policy and "connect-src 'self'" in policy
    assert answer.headers["x-content-type-options"] == "nosniff" and "studio.js" in answer.text


@pytest.mark.slow
def test_what_comes_into_the_page_can_do_nothing(browser, studio) -> None:
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    page = browser.new_context().new_page()
    asked: dict[str, str | None] = {}
    page.on("request", lambda request: asked.setdefault(request.url))
    page.on("requestfailed", lambda request: asked.update({request.url: request.failure}))
    page.goto(studio.url)
    page.wait_for_selector(".welcome .example")
    done = page.evaluate(
        """async () => {
          const place = document.createElement('div');
          document.body.append(place);
          place.innerHTML = '<img src=x onerror="window.taken = 1"><img src="https://elsewhere.example/a.png">';
          const script = document.createElement('script');
          script.textContent = 'window.taken = 2';
          place.append(script);
          const other = document.createElement('script');
          other.src = 'https://elsewhere.example/a.js';
          place.append(other);
          const refused = await fetch('https://elsewhere.example/').catch((error) => error.name);
          await new Promise((done) => setTimeout(done, 300));
          return [window.taken ?? null, refused];
        }"""
    )
    assert done == [None, "TypeError"]
    foreign = {url: why for url, why in asked.items() if not url.startswith(studio.url)}
    assert len(foreign) == 2 and set(foreign.values()) == {"csp"}, foreign
    page.context.close()
