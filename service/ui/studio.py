"""The browser studio: its page, its look, and its place behind the API's routes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Read when gradio is imported: without it the page would ask the internet for news.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
from fastapi import FastAPI
from starlette.routing import Mount, compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from topkapi.service.api.http.errors import error_response, method_not_allowed, not_found
from topkapi.service.models import Models
from topkapi.service.ui.chat import chat_tab

STYLE = Path(__file__).with_name("studio.css")
SCRIPT = Path(__file__).with_name("studio.js")
# Fonts of the visitor's own system: nothing is fetched from elsewhere.
FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
MONOSPACE = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")
HEADER = """<header><h1>Topkapi</h1><nav><a href="docs">API</a></nav></header>"""


TABS: dict[str, Callable[[Models, gr.Blocks], None]] = {"Chat": chat_tab}
"""What the studio shows: each renders its components into the page that is being built."""


def build_studio(models: Models) -> gr.Blocks:
    """The studio's page. One tab needs no bar to choose it from."""
    studio: gr.Blocks
    with gr.Blocks(title="Topkapi", fill_height=True, analytics_enabled=False) as studio:
        gr.HTML(HEADER, elem_id="header", padding=False)
        if len(TABS) == 1:
            chat_tab(models, studio)
            return studio
        with gr.Tabs():
            for name, render in TABS.items():
                with gr.Tab(name):
                    render(models, studio)
    return studio


def mount_studio(app: FastAPI, models: Models, root_path: str | None = None) -> None:
    """Serve the studio at `/`, behind every route that `app` has; `root_path` is where a proxy serves all of it."""
    gr.mount_gradio_app(
        app,
        build_studio(models),
        path="/",
        root_path=root_path,
        theme=gr.themes.Base(primary_hue="teal", neutral_hue="stone", font=FONT, font_mono=MONOSPACE),
        css_paths=[STYLE],
        head=f"<script>{SCRIPT.read_text('utf-8')}</script>",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        # The studio has no uploads, so none are accepted.
        max_file_size="1b",
    )
    mount = app.routes[-1]
    assert isinstance(mount, Mount)
    mount.app = _BehindTheAPI(mount.app, app)


class _BehindTheAPI:
    """Answers in the API's error shape where the studio, which sees every path that no route took, knows none."""

    def __init__(self, studio: ASGIApp, app: FastAPI) -> None:
        self._studio = studio
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._studio(scope, receive, send)
            return
        refused = False

        async def answer(message: Message) -> None:
            nonlocal refused
            if message["type"] == "http.response.start" and message["status"] in (404, 405):
                refused = True
                response = self._refusal(scope)
                await response(scope, receive, send)
            elif not refused:
                await send(message)

        await self._studio(scope, receive, answer)

    def _refusal(self, scope: Scope) -> ASGIApp:
        path, method = scope["path"].removeprefix(scope.get("root_path", "")), scope["method"]
        operations: dict[str, Any] = next(
            (each for route, each in self._app.openapi()["paths"].items() if compile_path(route)[0].match(path)), {}
        )
        allowed = ", ".join(sorted(operation.upper() for operation in operations))
        dialect = self._app.state.dialects.of(scope)
        if allowed:
            return error_response(method_not_allowed(method, path, allowed), dialect, {"Allow": allowed})
        return error_response(not_found(method, path), dialect)
