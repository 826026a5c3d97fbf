"""The browser studio: its page and its tabs. Importing this imports Gradio; `service.ui.late` does so when needed.

Gradio is the page and its components. What stands in a tab is a script's (`service/ui/static/<name>.js`), which talks
to the public HTTP API alone: there is no function here that a request could call by its name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from functools import partial
from html import escape

# Read when gradio is imported: without it the page would ask the internet for news.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from topkapi.service.models import Models
from topkapi.service.settings import Settings
from topkapi.service.ui.scripts import PLACE, STATIC

# Fonts of the visitor's own system: nothing is fetched from elsewhere.
FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
MONOSPACE = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")

SCRIPTS = {
    "Chat": "chat",
    "Notebook": "notebook",
    "Tokens": "lab",
    "Score": "score",
    "Compare": "compare",
    "Runs": "runs",
    "Models": "checkpoints",
}
"""The tabs that scripts fill, by their names."""


def scripted_tab(script: str, models: Models, page: gr.Blocks) -> None:
    """Render the place that `static/<script>.js` fills by its `mount(root)`, the first time that it is seen."""
    name = escape(script, quote=True)
    place = f'<div class="studio-tab" data-script="{name}"></div>'
    gr.HTML(place, padding=False, apply_default_css=False, js_on_load=None)


TABS: dict[str, Callable[[Models, gr.Blocks], None]] = {
    name: partial(scripted_tab, script) for name, script in SCRIPTS.items() if (STATIC / f"{script}.js").is_file()
}
"""What the studio shows: each renders its components into the page that is being built."""


def build_studio(models: Models) -> gr.Blocks:
    """The studio's page. The bar of tabs is ours (`static/studio.js`): Gradio's hides what a phone has no room for."""
    studio: gr.Blocks
    with gr.Blocks(title="Topkapi", analytics_enabled=False) as studio:
        gr.HTML(_header(TABS), elem_id="header", padding=False, apply_default_css=False, js_on_load=None)
        for name, render in TABS.items():
            with gr.Column(elem_id=f"tab-{_slug(name)}", elem_classes="studio-panel"):
                render(models, studio)
    return studio


def _header(names: Iterable[str]) -> str:
    """The title, a button for each tab, and what else there is."""
    tabs = "".join(
        f'<button type="button" role="tab" id="tab-{_slug(name)}-button" aria-controls="tab-{_slug(name)}" '
        f'aria-selected="false" tabindex="-1">{escape(name)}</button>'
        for name in names
    )
    return (
        f'<header><h1>Topkapi</h1><div role="tablist" id="tabs" aria-label="Parts of the studio">{tabs}</div>'
        '<nav aria-label="Elsewhere"><a href="docs">API</a></nav></header>'
    )


def _slug(name: str) -> str:
    """A tab's name as ids and the page's address have it (`#chat`)."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower())


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
        head=head(settings.root_path or ""),
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        # The studio has no uploads, so none are accepted.
        max_file_size="1b",
    )
    return app


def head(root_path: str) -> str:
    """What the page's head says of the studio's scripts: what the first tab needs is fetched at once."""
    place = escape(f"{root_path}/{PLACE}", quote=True)
    first = ("dom", "api", "errors", "store", "parameters", "models", "markdown", "chat")
    preloads = "".join(
        f'<link rel="modulepreload" href="{place}/{name}.js">' for name in first if (STATIC / f"{name}.js").is_file()
    )
    style = f'<link rel="stylesheet" href="{place}/studio.css">'
    return f'{style}{preloads}<script type="module" src="{place}/studio.js"></script>'
