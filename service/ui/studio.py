"""The browser studio: its page and its look. Importing this imports Gradio; `service.ui.late` does so when needed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

# Read when gradio is imported: without it the page would ask the internet for news.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from topkapi.service.models import Models
from topkapi.service.settings import Settings
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


def studio_app(models: Models, settings: Settings) -> FastAPI:
    """An application whose last route is the studio's page, as it is served behind the API's routes."""
    app = FastAPI()
    # Gradio answers for all origins, unless the application around it has rules of its own.
    app.add_middleware(CORSMiddleware, allow_origins=list(settings.cors_origins))
    gr.mount_gradio_app(
        app,
        build_studio(models),
        path="/",
        root_path=settings.root_path,
        theme=gr.themes.Base(primary_hue="teal", neutral_hue="stone", font=FONT, font_mono=MONOSPACE),
        css_paths=[STYLE],
        head=f"<script>{SCRIPT.read_text('utf-8')}</script>",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        # The studio has no uploads, so none are accepted.
        max_file_size="1b",
    )
    return app
