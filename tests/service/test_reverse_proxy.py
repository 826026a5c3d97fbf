"""Behind a reverse proxy that serves the server under a path: the API, its documentation and the studio."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from topkapi.model.errors import SettingsError
from topkapi.service.settings import Settings

PREFIX = "/lab/topkapi"
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "host"}


@contextmanager
def proxy(target: str, *, strips: bool) -> Iterator[str]:
    """A reverse proxy for `PREFIX`, and nothing else; its address. It passes bodies on as they come."""
    client = httpx.AsyncClient(base_url=target, timeout=60)

    async def forward(request: Request) -> StreamingResponse:
        path = request.url.path.removeprefix(PREFIX) if strips else request.url.path
        headers = {name: value for name, value in request.headers.items() if name not in HOP_BY_HOP}
        headers |= {"host": request.headers["host"], "x-forwarded-host": request.headers["host"]}
        url = httpx.URL(path=path or "/", query=request.url.query.encode())
        sent = client.build_request(request.method, url, headers=headers, content=await request.body())
        answer = await client.send(sent, stream=True)
        kept = {name: value for name, value in answer.headers.items() if name not in HOP_BY_HOP}
        return StreamingResponse(answer.aiter_raw(), answer.status_code, kept, background=BackgroundTask(answer.aclose))

    async def nothing(request: Request) -> PlainTextResponse:
        return PlainTextResponse("not under the prefix", 404)

    methods = ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"]
    paths = {f"{PREFIX}{{rest:path}}": forward, "/{rest:path}": nothing}
    routes = [Route(path, endpoint, methods=methods) for path, endpoint in paths.items()]
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(10)
    listener.close()


@pytest.fixture(scope="module")
def behind(serve, tiny_checkpoint) -> Iterator[str]:
    with serve(tiny_checkpoint("chat", context=512), root_path=PREFIX, studio=True) as served:
        yield served.url


@pytest.mark.parametrize("strips", [True, False], ids=["stripped", "left on"])
def test_the_api_and_its_documentation(behind, strips) -> None:
    with proxy(behind, strips=strips) as address, httpx.Client(base_url=address + PREFIX, timeout=60) as client:
        answer = client.post("/generate", json={"prompt": "a", "max_tokens": 3})
        assert answer.status_code == 200 and len(answer.json()["outputs"][0]["token_ids"]) <= 3
        events = client.post("/generate", json={"prompt": "a", "max_tokens": 3, "stream": True}).text
        identifier = re.search("^id: (.*):1$", events, re.MULTILINE)[1]
        assert client.get(f"/streams/{identifier}").text == events
        assert client.get("/v1/models").json()["data"][0]["id"] == "chat"
        assert client.get("/models/chat").json()["name"] == "chat"
        assert client.post("/v1/chat/completions", json={"n": 0}).json()["error"]["type"] == "invalid_request_error"
        refused = client.put("/models")
        assert (refused.status_code, refused.headers["allow"]) == (405, "GET, POST")
        assert client.get("/nothing").json()["error"]["type"] == "not_found"
        document = client.get("/openapi.json").json()
        assert [server["url"] for server in document["servers"]] == [PREFIX]
        page = client.get("/docs").text
        addresses = re.findall(r'(?:src|href)="([^"]+)"', page) + re.findall(r"url: '([^']+)'", page)
        assert len(addresses) >= 3
        for each in addresses:
            assert each.startswith(PREFIX) and httpx.get(address + each).status_code == 200, each


def test_names_are_checked_under_the_prefix_too(behind) -> None:
    """In the shape of each path's clients, whether the proxy takes the prefix off or not."""
    evil = {"Host": "evil.example"}
    for prefix in ("", PREFIX):
        for path in ("/", "/health", "/docs", "/gradio_api/info", "/v1/models", "/no/such/path"):
            assert httpx.get(f"{behind}{prefix}{path}", headers=evil).status_code == 421, (prefix, path)
        told = httpx.post(f"{behind}{prefix}/v1/messages", json={}, headers=evil).json()
        assert (told["type"], "evil.example" in told["error"]["message"]) == ("error", True)
        foreign = {"Origin": "http://evil.example"}
        assert httpx.post(f"{behind}{prefix}/generate", json={}, headers=foreign).status_code == 403


def test_a_name_of_the_proxy_is_allowed_under_the_prefix(serve, tiny_checkpoint) -> None:
    settings = {"root_path": PREFIX, "allowed_hosts": "llm.example.org"}
    own = {"Host": "llm.example.org", "Origin": "http://llm.example.org"}
    with serve(tiny_checkpoint("chat"), **settings) as served:
        for prefix in ("", PREFIX):
            answer = httpx.post(f"{served.url}{prefix}/generate", json={"prompt": "a", "max_tokens": 1}, headers=own)
            assert answer.status_code == 200
            assert httpx.get(f"{served.url}{prefix}/health", headers={"Host": "x.example"}).status_code == 421


def test_without_a_proxy_it_answers_too(behind) -> None:
    for prefix in ("", PREFIX):
        assert httpx.get(f"{behind}{prefix}/health").json()["status"] == "ok"


@pytest.mark.parametrize("wrong", ["topkapi", "http://host/topkapi", "/a b", "/../x/", "/a//b"])
def test_what_is_no_path_is_refused(wrong) -> None:
    with pytest.raises(SettingsError, match="must be a path such as /topkapi"):
        Settings.read(root_path=wrong)


@pytest.mark.slow
def test_the_studio_answers_in_a_browser(behind, chromium: str) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with proxy(behind, strips=True) as address, playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(30_000)
        failed: list[str] = []
        page.on("response", lambda response: failed.append(response.url) if response.status >= 400 else None)
        page.goto(f"{address}{PREFIX}/")
        page.fill("#message textarea", "What is a list?")
        page.keyboard.press("Enter")
        playwright.expect(page.locator("#conversation .facts")).to_contain_text(re.compile("tokens/s"), timeout=60_000)
        page.click("nav a")
        page.wait_for_selector(".swagger-ui .opblock")
        browser.close()
        assert [url for url in failed if not url.endswith("favicon.ico")] == []


def test_a_slash_at_the_end_means_nothing() -> None:
    assert Settings.read(root_path="/topkapi/").root_path == "/topkapi"
    assert not Settings.read(root_path="/").root_path
