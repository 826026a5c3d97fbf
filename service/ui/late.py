"""The studio's place behind the API's routes: Gradio is imported when somebody visits, or nothing else is to do.

Importing it takes as long as all the rest of a start, and whatever is imported keeps the interpreter from requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from topkapi.model.errors import TopkapiError
from topkapi.service.api.http.errors import INTERNAL, error_response, method_not_allowed, not_found
from topkapi.service.garbage import importing, set_aside
from topkapi.service.models import Models
from topkapi.service.settings import Settings
from topkapi.service.threads import on_thread
from topkapi.service.ui.policy import policy_of
from topkapi.service.ui.scripts import HEADERS, add_scripts

logger = logging.getLogger(__name__)

QUIET_SECONDS = 0.5
"""Without visitors the studio is made once the engines have had nothing to do for so long."""

PAGE = ("", "config", "gradio_api")
"""How paths begin that a page calls before any other, also one that was left open from an earlier server."""

ASKED = re.compile(
    r"/(?:config|theme\.css|favicon\.ico|robots\.txt|manifest\.json|(?:assets|static|svelte|pwa_icon)/.+"
    r"|gradio_api/(?:info|startup-events))?"
)
"""What a page asks for, and nothing else is answered: Gradio's routes for calls, queues, files and reloads have nothing
to do here, and what a stranger sends them they meet with internal errors, or with streams without end."""


def place_studio(app: FastAPI, models: Models, settings: Settings) -> None:
    """Serve the studio at `/`, behind every route that `app` has."""

    def make() -> FastAPI:
        with importing(), _lean_gradio():
            from topkapi.service.ui.studio import studio_app
        set_aside()
        return studio_app(models, settings)

    studio = LateStudio(app, models, make, settings.cors_origins)
    add_scripts(app)
    app.mount("/", studio)
    app.router.lifespan_context = studio.life


class LateStudio:
    """An ASGI application that is made by `make()`, on a thread, when it is needed; requests wait for it.

    `make` gives an application whose last route is the studio, whose page those of `origins` may show in a frame. It
    answers in the API's error shape where the studio, which sees every path that no route of `app` took, knows none.
    """

    def __init__(self, app: FastAPI, models: Models, make: Callable[[], FastAPI], origins: Sequence[str] = ()) -> None:
        self._app, self._models, self._make, self._origins = app, models, make, origins
        self._wanted, self._made, self._closing = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._studio: ASGIApp | None = None

    @contextlib.asynccontextmanager
    async def life(self, app: FastAPI) -> AsyncIterator[None]:
        """What goes on while `app` lives: waiting until the studio is needed, and the studio's own life."""
        living = asyncio.create_task(self._live())
        try:
            yield
        finally:
            self._closing.set()
            if self._studio is None:
                living.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await living

    async def _live(self) -> None:
        quiet = asyncio.create_task(self._quiet())
        wanted = asyncio.create_task(self._wanted.wait())
        try:
            await asyncio.wait({quiet, wanted}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            quiet.cancel()
            wanted.cancel()
        while not self._closing.is_set():
            try:
                made = await on_thread(self._make, "studio")
                # Entered and left in one task, as what Gradio starts there asks for.
                async with made.router.lifespan_context(made):
                    self._studio = made.routes[-1].app  # type: ignore[attr-defined]
                    self._made.set()
                    await self._closing.wait()
            except Exception:
                logger.exception("the studio cannot be shown")
                self._studio = None
                # Whoever waits is told so; with the next visit it is tried again.
                self._made.set()
                self._made.clear()
                self._wanted.clear()
                if not self._closing.is_set():
                    await self._wanted.wait()

    async def _quiet(self) -> None:
        """Wait until no engine has had anything to do for `QUIET_SECONDS`."""
        before = None
        while True:
            engines = [model.engine for model in self._models]
            now = [(engine.counters.steps, engine.running + engine.waiting) for engine in engines]
            if now == before and not any(busy for _, busy in now):
                return
            before = now
            await asyncio.sleep(QUIET_SECONDS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request: for the page and what it calls, once the studio is there."""
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1013})
            return
        path = self._path(scope)
        asked = scope["method"] in ("GET", "HEAD") and ASKED.fullmatch(path)
        if not asked or (self._studio is None and path.split("/")[1] not in PAGE):
            # A client that tries what the API does not know neither waits for the studio nor needs it.
            await self._refusal(scope)(scope, receive, send)
            return
        self._wanted.set()
        await self._made.wait()
        if self._studio is None:
            error = TopkapiError("the studio cannot be shown", hint="the server's log has why")
            await error_response(error, self._app.state.dialects.of(scope))(scope, receive, send)
            return
        began = refused = False
        page = _Page(send, self._origins) if path == "/" else None

        async def answer(message: Message) -> None:
            nonlocal began, refused
            if message["type"] == "http.response.start":
                began = True
                if message["status"] in (404, 405) or message["status"] >= 500:
                    refused = True
                    await self._refusal(scope, message["status"])(scope, receive, send)
            if not refused:
                await (page.take if page else send)(message)

        # A copy, for Gradio's application puts itself into it.
        seen = dict(scope)
        if page:
            # What is to be read is not compressed.
            seen["headers"] = [each for each in scope["headers"] if each[0] != b"accept-encoding"]
        try:
            await self._studio(seen, receive, answer)
        except Exception:
            logger.exception("the studio failed at %s %s", scope["method"], scope["path"])
            if not began:
                await self._refusal(scope, 500)(scope, receive, send)

    @staticmethod
    def _path(scope: Scope) -> str:
        path: str = scope["path"]
        return path.removeprefix(scope.get("root_path", ""))

    def _refusal(self, scope: Scope, status: int = 404) -> ASGIApp:
        path, method = self._path(scope), scope["method"]
        if status >= 500:
            return error_response(INTERNAL, self._app.state.dialects.of(scope))
        operations: dict[str, Any] = next(
            (each for route, each in self._app.openapi()["paths"].items() if compile_path(route)[0].match(path)), {}
        )
        allowed = ", ".join(sorted(operation.upper() for operation in operations))
        dialect = self._app.state.dialects.of(scope)
        if allowed:
            return error_response(method_not_allowed(method, path, allowed), dialect, {"Allow": allowed})
        return error_response(not_found(method, path), dialect)


class _Page:
    """Holds the studio's page until it is whole, and sends it with the policy of what it holds."""

    def __init__(self, send: Send, origins: Sequence[str]) -> None:
        self._send, self._origins = send, origins
        self._start: Message = {}
        self._body = b""

    async def take(self, message: Message) -> None:
        """A message of the application that makes the page."""
        if message["type"] == "http.response.start":
            self._start = message
            return
        self._body += message.get("body", b"")
        if not message.get("more_body"):
            headers = MutableHeaders(raw=list(self._start["headers"]))
            headers.update(HEADERS | {"Content-Security-Policy": policy_of(self._body, self._origins)})
            await self._send({**self._start, "headers": headers.raw})
            await self._send({**message, "body": self._body})


@contextlib.contextmanager
def _lean_gradio() -> Iterator[None]:
    """Import Gradio without what serving a page does not need, which is half of the time.

    For editors it parses the source of each of its eighty components and writes stubs beside them; and pandas, which
    it imports, maps 35 MB of Arrow into memory where that is installed.
    """
    finder = _WithoutStubs()
    sys.meta_path.insert(0, finder)
    hidden = "pyarrow" not in sys.modules
    if hidden:
        sys.modules["pyarrow"] = None  # type: ignore[assignment]  # which makes its import fail
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        if hidden:
            del sys.modules["pyarrow"]


class _WithoutStubs:
    """Finds Gradio's module that writes stubs, and has it write none."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        found = PathFinder.find_spec(name, path) if name == "gradio.component_meta" else None
        if found is not None and found.loader is not None:
            execute = found.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                vars(module)["create_or_modify_pyi"] = lambda *ignored: None

            vars(found.loader)["exec_module"] = exec_module
        return found
