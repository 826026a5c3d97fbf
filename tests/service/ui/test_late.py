"""Gradio is imported after the server is ready, beside requests, and by nothing but its page."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

import topkapi.service.ui.studio as studio
from topkapi.service.ui import late

# Importing gradio is said, and put off until a line comes in.
CHILD = """
import sys
class Wait:
    def find_spec(self, name, path=None, target=None):
        if name == "gradio":
            sys.meta_path.remove(self)
            print("importing gradio", flush=True)
            sys.stdin.readline()
sys.meta_path.insert(0, Wait())
from topkapi.service.commands.cli import main
import topkapi.service.ui.late as late
late.QUIET_SECONDS = float(sys.argv.pop(1))
main(sys.argv[1:])
"""


class Child:
    """`topkapi serve`, with Gradio's import held until `go_on`."""

    def __init__(self, checkpoint: Path, quiet: float) -> None:
        command = [sys.executable, "-c", CHILD, str(quiet), "serve", str(checkpoint), "--port", "0"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.told: list[str] = []
        ready = self.read_to("Ready at ")
        self.client = httpx.Client(base_url=ready.split()[2], timeout=60)

    def read_to(self, words: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.told.append(line)
            if line.startswith(words):
                return line
        raise AssertionError(f"it ended without {words!r}: {self.told}")

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def answers(self) -> bool:
        return self.client.post("/generate", json={"prompt": "a", "max_tokens": 2}).status_code == 200

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *error: object) -> None:
        self.client.close()
        self.process.terminate()
        self.process.communicate(timeout=20)


def test_a_visit_imports_gradio_and_requests_are_answered_meanwhile(tiny_checkpoint: Callable[..., Path]) -> None:
    with Child(tiny_checkpoint("late"), quiet=1e9) as child:
        assert child.answers() and child.client.get("/ready").status_code == 200
        # What neither the API nor the studio's page knows does not wait for the studio.
        assert child.client.get("/api/tags").json()["error"]["type"] == "not_found"
        assert child.client.post("/v1/nothing", json={}).status_code == 404
        assert "importing gradio\n" not in child.told
        found: list[httpx.Response] = []
        visit = threading.Thread(target=lambda: found.append(httpx.get(child.client.base_url, timeout=60)))
        visit.start()
        child.read_to("importing gradio")
        assert child.answers() and child.client.get("/health").status_code == 200
        assert not found
        child.go_on()
        visit.join(60)
        assert found[0].status_code == 200 and "gradio" in found[0].text
        assert child.client.get("/api/tags").json()["error"]["type"] == "not_found"


@pytest.mark.slow
def test_without_a_visit_gradio_is_imported_when_nothing_else_is_to_do(tiny_checkpoint: Callable[..., Path]) -> None:
    with Child(tiny_checkpoint("quiet"), quiet=0.05) as child:
        # Which can only come after the line that says where the server is ready.
        child.read_to("importing gradio")
        assert child.answers()
    assert child.process.returncode == 0, "it can be stopped while Gradio is being imported"


def test_a_studio_that_cannot_be_made_is_told_to_its_visitors_alone(
    serve: Callable, tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    def broken(*arguments: object) -> None:
        raise ImportError("no such thing")

    working = studio.studio_app
    monkeypatch.setattr(studio, "studio_app", broken)
    monkeypatch.setattr(late, "QUIET_SECONDS", 1e9)
    with serve(tiny_checkpoint("alone"), studio=True) as running:
        visit = running.client.get("/")
        assert visit.status_code == 500 and "the studio cannot be shown" in visit.text
        assert running.answer("/generate", prompt="a", max_tokens=1)
        monkeypatch.setattr(studio, "studio_app", working)
        assert "gradio" in running.client.get("/").text, "it is tried again with the next visit"
    assert "no such thing" in caplog.text


@pytest.mark.slow
def test_what_is_done_for_editors_is_left_out() -> None:
    script = (
        "import sys\nfrom topkapi.service.ui import late\n"
        "with late._lean_gradio():\n    import gradio\n"
        "import gradio.component_meta as meta\n"
        "print(meta.create_or_modify_pyi.__module__, 'pyarrow' in sys.modules, len(sys.meta_path))\n"
        "gradio.Textbox()\nimport pyarrow\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:2] == [late.__name__, "False"]


def test_loading_and_answering_imports_no_compiler(tiny_checkpoint: Callable[..., Path]) -> None:
    script = (
        "import sys\nfrom topkapi.service.models import Models\nfrom topkapi.service.settings import Settings\n"
        "models = Models(Settings.read())\nmodels.load(sys.argv[1])\nmodels.close()\n"
        "print([name for name in ('torch._dynamo', 'sympy', 'gradio') if name in sys.modules])"
    )
    checkpoint = str(tiny_checkpoint("plain"))
    done = subprocess.run([sys.executable, "-c", script, checkpoint], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
