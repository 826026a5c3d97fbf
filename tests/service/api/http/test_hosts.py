"""By which names the server answers, and to which web pages: the API's routes and the studio's alike."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from tests.served_by_replicas import REPLICAS
from topkapi.service.api.http.middleware import AllowedHosts, host_of

FOREIGN = {"Origin": "http://evil.example"}
PREFLIGHT = FOREIGN | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
PATHS = ("/", "/health", "/models", "/generate", "/v1/chat/completions", "/docs", "/openapi.json", "/config",
         "/gradio_api/info", "/gradio_api/queue/join", "/no/such/path")  # fmt: skip


@pytest.fixture(scope="module")
def local(serve, tiny_checkpoint) -> Iterator:
    with serve(tiny_checkpoint("hosts"), studio=True) as served:
        yield served


@pytest.fixture(scope="module")
def public(serve, tiny_checkpoint) -> Iterator:
    """As on every interface, with a name of its own, and a page that may call it."""
    settings = {"host": "0.0.0.0", "allowed_hosts": "llm.example.org,*.lan", "cors_origins": "http://friend.example"}
    with serve(tiny_checkpoint("hosts"), studio=True, **settings) as served:
        yield served


@pytest.mark.parametrize("path", PATHS)
def test_a_name_that_was_turned_to_this_machine_is_refused(local, path) -> None:
    for host in ("evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.1"):
        answer = local.client.get(path, headers={"Host": host})
        assert answer.status_code == 421, (path, host)
        assert host.partition(":")[0] in answer.text and "--allowed-hosts" in answer.text


def test_it_is_refused_in_the_words_of_each_dialect(local) -> None:
    evil = {"Host": "evil.example"}
    assert local.client.post("/models", json={}, headers=evil).json()["error"]["type"] == "unknown_host"
    assert local.client.post("/v1/messages", json={}, headers=evil).json()["type"] == "error"
    assert "param" in local.client.post("/v1/completions", json={}, headers=evil).json()["error"]


def test_loopback_names_are_served_on_any_port(local) -> None:
    for host in ("localhost", "localhost:1", "LOCALHOST.", "studio.localhost", "127.0.0.1:80", "127.1.2.3", "[::1]:9"):
        assert local.client.get("/health", headers={"Host": host}).status_code == 200, host


def test_on_every_interface_addresses_and_the_allowed_names_are_served(public) -> None:
    for host in (
        "192.168.1.9:8000",
        "[fe80::1]:8000",
        "llm.example.org",
        "LLM.example.org:443",
        "box.lan",
        "localhost",
    ):
        assert public.client.get("/health", headers={"Host": host}).status_code == 200, host
        assert public.client.get("/", headers={"Host": host}).status_code == 200, host
    for host in ("evil.example", "example.org", "lan", "xlan", "llm.example.org.evil.example"):
        assert public.client.get("/gradio_api/info", headers={"Host": host}).status_code == 421, host


@pytest.mark.parametrize("path", PATHS)
def test_no_other_layer_lets_foreign_pages_in(public, path) -> None:
    """Gradio's own answers allow any origin where the host is not a loopback one."""
    for host in ("llm.example.org", "192.168.1.9:8000", "localhost"):
        asked = public.client.options(path, headers=PREFLIGHT | {"Host": host})
        assert "access-control-allow-origin" not in asked.headers, (path, host)
        for method in ("GET", "POST"):
            answer = public.client.request(method, path, headers=FOREIGN | {"Host": host}, content=b"{}")
            assert "access-control-allow-origin" not in answer.headers, (method, path, host)
            assert "access-control-allow-credentials" not in answer.headers, (method, path, host)


def test_a_page_that_may_call_it_is_told_so(public) -> None:
    friend = {"Origin": "http://friend.example", "Host": "llm.example.org"}
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    answer = public.client.options("/generate", headers=friend | asked)
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == friend["Origin"]
    done = public.client.post("/generate", json={"prompt": "a", "max_tokens": 1}, headers=friend)
    assert done.status_code == 200 and done.headers["access-control-allow-origin"] == friend["Origin"]


def test_what_browsers_send_without_asking_changes_nothing(public) -> None:
    """A form or a text needs no preflight: the page it comes from is looked at, and the JSON must be declared."""
    text = {"Content-Type": "text/plain", "Host": "llm.example.org"}
    for path in ("/models", "/generate", "/gradio_api/queue/join"):
        refused = public.client.post(path, content=b'{"path": "x"}', headers=text | FOREIGN)
        assert refused.status_code == 403 and "--cors-origins" in refused.text, path
    # Replicas refuse to load whatever is sent.
    status = 409 if REPLICAS else 415
    assert public.client.post("/models", content=b'{"path": "x"}', headers=text).status_code == status
    # A proxy may change the host; what the browser says of itself then counts.
    own = {"Origin": "https://llm.example.org", "Host": "127.0.0.1:8000", "Content-Type": "application/json"}
    body = b'{"prompt": "a", "max_tokens": 1}'
    for site, status in (("same-origin", 200), ("cross-site", 403), ("same-site", 403)):
        answer = public.client.post("/generate", content=body, headers=own | {"Sec-Fetch-Site": site})
        assert answer.status_code == status, site
    assert public.client.post("/generate", content=body, headers=own).status_code == 403
    assert public.client.post("/generate", content=body, headers=own | {"Host": "llm.example.org"}).status_code == 200


@pytest.mark.parametrize(
    ("header", "host"),
    [("a.B", "a.b"), ("a:80", "a"), ("a.:80", "a"), ("[::1]", "::1"), ("[::1]:8", "::1"), ("a:b", None), ("", None),
     ("a b", None), ("a@b", None), ("[::1", None), ("a/b", None), (":80", None)],
)  # fmt: skip
def test_hosts_are_read_from_their_header(header, host) -> None:
    assert host_of(header) == host


async def _call(allowed: AllowedHosts, kind: str, *hosts: bytes) -> list[Message]:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    await allowed({"type": kind, "headers": [(b"host", host) for host in hosts]}, receive, send)
    return sent


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_websockets_are_closed_and_probes_without_a_host_answered(anyio_backend) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "served"})

    allowed = AllowedHosts(app, "127.0.0.1", ())
    assert await _call(allowed, "websocket", b"evil.example") == [{"type": "websocket.close", "code": 1008}]
    assert await _call(allowed, "websocket", b"localhost") == [{"type": "served"}]
    assert await _call(allowed, "http") == [{"type": "served"}]
    assert await _call(allowed, "websocket", b"localhost", b"evil.example") != [{"type": "served"}]
    assert await _call(AllowedHosts(app, "127.0.0.1", ("*",)), "websocket", b"evil.example") == [{"type": "served"}]


@pytest.mark.slow
def test_the_studio_talks_in_a_browser_by_an_allowed_name(serve, tiny_checkpoint, chromium) -> None:
    """Over a name that is none of loopback's, as behind a proxy: the page, its events and an answer."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with (
        serve(tiny_checkpoint("browser"), studio=True, allowed_hosts="llm.example.org") as served,
        playwright.sync_playwright() as driver,
    ):
        arguments = ["--no-sandbox", "--host-resolver-rules=MAP llm.example.org 127.0.0.1"]
        browser = driver.chromium.launch(executable_path=chromium, args=arguments)
        page = browser.new_page()
        page.set_default_timeout(60_000)
        page.goto(f"http://llm.example.org:{httpx.URL(served.url).port}/")
        page.fill("#message textarea", "What is a list?")
        page.keyboard.press("Enter")
        page.locator("#conversation .facts", has_text="tokens/s").wait_for()
        browser.close()
