"""The studio's frame in a real browser: its tabs, its scripts, and nothing that a request could call by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.service.ui.conftest import leaves
from topkapi.service.ui.scripts import STATIC

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def studio(serve: Callable, tiny_checkpoint: Callable[..., Path]) -> Iterator:
    with serve(tiny_checkpoint("talker", context=1024), studio=True) as running:
        yield running


def test_the_api_documentation_works_without_a_network(browser, studio) -> None:
    page = browser.new_context().new_page()
    elsewhere: list[str] = []
    page.on("request", lambda request: elsewhere.append(request.url) if leaves(request.url, studio.url) else None)
    page.goto(f"{studio.url}/docs")
    page.wait_for_selector("text=/generate")
    assert elsewhere == []
    page.context.close()


def test_nothing_can_be_uploaded(studio) -> None:
    response = studio.client.post("/gradio_api/upload", files={"files": ("a.txt", b"some text")})
    assert response.status_code >= 400


def test_nothing_can_be_called_by_name(studio) -> None:
    """What the page can do is what the API can do: Gradio has no function of ours."""
    assert studio.client.get("/config").json()["dependencies"] == []
    described = studio.client.get("/gradio_api/info").json()
    assert described["named_endpoints"] == described["unnamed_endpoints"] == {}
    for number in range(3):
        body = {"data": [], "fn_index": number, "session_hash": "x"}
        assert studio.client.post("/gradio_api/run/predict", json=body).status_code >= 400
        refused = studio.client.post("/gradio_api/queue/join", json=body)
        assert refused.status_code >= 400 and refused.json()["error"]


@pytest.mark.parametrize("path", [
    "queue/join", "queue/data?session_hash=x", "queue/status", "run/predict", "api/predict", "call/x", "call/v2/x",
    "call/x/y", "reset", "cancel", "upload", "upload_progress?upload_id=x", "component_server", "process_recording",
    "heartbeat/x", "dev/reload", "vibe-code", "vibe-edit", "file=/etc/passwd", "proxy=http://127.0.0.1/", "deep_link",
    "stream/a/b/c/playlist.m3u8", "run-history/records", "custom_component/a/b/c/d", "openapi.json",
])  # fmt: skip
def test_what_gradio_would_take_is_not_there(studio, path) -> None:
    """Some of it answers junk with an internal error, some with a stream that does not end."""
    bodies = [b"", b"{}", b'{"data": [], "fn_index": 9, "session_hash": "x"}', b'{"data": [], "trigger_id": 1e999}']
    answers = [studio.client.get(f"/gradio_api/{path}")]
    answers += [studio.client.post(f"/gradio_api/{path}", content=body, headers=JSON) for body in bodies]
    for answer in answers:
        assert answer.status_code == 404 and answer.json()["error"]["type"] == "not_found", answer.text


JSON = {"Content-Type": "application/json"}


def test_scripts_are_files_that_browsers_ask_for_again(studio) -> None:
    names = [path.name for path in STATIC.iterdir()] + ["parameters.json"]
    assert "chat.js" in names and "studio.css" in names
    for name in names:
        answer = studio.client.get(f"/studio/{name}")
        assert answer.status_code == 200, name
        assert answer.headers["cache-control"] == "no-cache"
        assert answer.headers["x-content-type-options"] == "nosniff"
        kind = {"js": "javascript", "css": "css", "json": "json"}[name.rpartition(".")[2]]
        assert kind in answer.headers["content-type"]
        same = studio.client.get(f"/studio/{name}", headers={"If-None-Match": answer.headers["etag"]})
        assert (same.status_code, same.content) == (304, b"")
        other = studio.client.get(f"/studio/{name}", headers={"If-None-Match": '"another"'})
        assert other.status_code == 200
        assert studio.client.head(f"/studio/{name}").headers["content-length"] == str(len(answer.content))
    for name in ("nothing.js", "%2e%2e/studio.py", "..%2fstudio.py", "", "a/b.js"):
        refused = studio.client.get(f"/studio/{name}")
        assert refused.status_code == 404 and refused.json()["error"]["type"] == "not_found"
    assert studio.client.post("/studio/chat.js").status_code in (404, 405)


def test_without_the_studio_there_are_no_scripts(serve, tiny_checkpoint) -> None:
    with serve(tiny_checkpoint("plain")) as running:
        assert running.client.get("/studio/chat.js").status_code == 404


def test_scripts_say_what_they_are_for_and_write_no_markup() -> None:
    for path in (*STATIC.glob("*.js"), *STATIC.glob("*.css")):
        text = path.read_text("utf-8")
        assert text.startswith(("//", "/*")), path.name
        assert text.count("\n") <= 400, path.name
        for way in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "new Function",
            "DOMParser",
        ):
            assert way not in text, (path.name, way)
        assert "://" not in text.replace("http://www.w3.org/2000/svg", "").replace("https?:", "") or path.name in (
            "markdown.js", "highlight.js", "api.js"
        ), path.name  # fmt: skip


@pytest.mark.slow
def test_the_page_keeps_to_the_server_and_says_where_it_is(browser, studio, visiting) -> None:
    with visiting(browser, studio.url) as page:
        assert page.title() == "Topkapi"
        # Dark and light, as was chosen, also after the page is loaded again.
        page.click("#look")
        dark = page.evaluate("document.body.classList.contains('dark')")
        page.reload()
        page.wait_for_selector("#message textarea")
        assert page.evaluate("document.body.classList.contains('dark')") == dark
        page.click("#header nav a")
        page.wait_for_selector(".swagger-ui .opblock")


@pytest.mark.slow
def test_tabs_by_keyboard_and_by_address(
    browser, serve: Callable, tiny_checkpoint: Callable[..., Path], visiting, monkeypatch, tmp_path: Path
) -> None:
    import gradio as gr

    import topkapi.service.ui.studio as ui

    monkeypatch.setitem(ui.TABS, "Second one", lambda models, page: gr.Textbox(label="Something"))
    with serve(tiny_checkpoint("talker", context=1024), studio=True) as running:
        with visiting(browser, f"{running.url}/#second-one", wait="#tab-second-one.shown") as page:
            assert not page.is_visible("#tab-chat")
            page.focus("#tab-second-one-button")
            page.keyboard.press("Home")
            page.wait_for_selector("#message textarea")
            assert page.evaluate("location.hash") == "#chat"
            assert page.evaluate("document.activeElement.id") == "tab-chat-button"
            page.keyboard.press("End")
            assert page.get_by_label("Something").is_visible()
            assert page.get_attribute("[aria-selected=true]", "id") == "tab-second-one-button"
        with visiting(browser, running.url) as page:
            assert page.get_attribute("[aria-selected=true]", "id") == "tab-chat-button"
            page.evaluate("location.hash = '#second-one'")
            page.wait_for_selector("#tab-second-one.shown")


@pytest.mark.slow
def test_the_drawer_has_every_parameter(browser, studio, visiting) -> None:
    from topkapi.model.decoding.parameters import PARAMETERS
    from topkapi.service.ui.scripts import NOT_OFFERED

    rows = {row["name"]: row for row in studio.client.get("/studio/parameters.json").json()}
    assert list(rows) == [parameter.name for parameter in PARAMETERS]
    assert rows["top_k"]["meaning"] in httpx.get(f"{studio.url}/openapi.json").text
    with visiting(browser, studio.url) as page:
        shown = page.eval_on_selector_all("#settings [data-parameter]", "all => all.map(e => e.dataset.parameter)")
        assert sorted(shown) == sorted(set(rows) - set(NOT_OFFERED))
        unlabelled = page.eval_on_selector_all(
            "#settings [data-parameter]", "all => all.filter(e => !document.querySelector(`label[for=${e.id}]`)).length"
        )
        assert unlabelled == 0


@pytest.mark.slow
def test_a_server_that_asks_for_a_key_is_given_it_once(browser, studio, visiting) -> None:
    asked: list[str | None] = []

    def guarded(route, request) -> None:
        key = request.headers.get("authorization")
        asked.append(key)
        if key == "Bearer sesame":
            route.continue_()
        else:
            error = {"error": {"type": "unauthorized", "message": "this server asks for an API key"}}
            route.fulfill(status=401, json=error)

    with visiting(browser, studio.url, wait="#sign-in", before=lambda page: page.route("**/models", guarded)) as page:
        assert "asks for an API key" in page.inner_text("dialog")
        page.fill("#api-key", "wrong")
        page.click("dialog >> text=Sign in")
        page.wait_for_function("document.querySelector('#api-key')?.value === ''")
        page.fill("#api-key", "sesame")
        page.press("#api-key", "Enter")
        page.wait_for_selector(".welcome")
        assert not page.query_selector("dialog")
        page.reload()
        page.wait_for_selector(".welcome")
        assert asked[-1] == "Bearer sesame" and not page.query_selector("dialog")
        assert page.evaluate("localStorage.length") <= 3 and "sesame" not in page.evaluate(
            "JSON.stringify(localStorage)"
        )
