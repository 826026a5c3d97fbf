"""Every example of docs/api.md runs as printed: only the port is another.

What the document's writers need to know:

- Each fenced block marked `sh`, `bash` or `python` is one example and one test, run from top to bottom on its own; what
  a block needs, it does itself. Other fences (`json`, `text`) are not run.
- The server is at http://127.0.0.1:8000 and serves `topkapi-chat` (the default one, with a chat template) and
  `topkapi-base` (without), tiny ones with random weights here: an example may not depend on what they answer.
- Every curl must be answered with success; one that is meant to be refused ends with its status, as in `… # 422`.
- Checkpoints may be loaded by `POST /models` from the directory that holds those two.
- There is one training run, `mine`, which has ended.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.served_by_replicas import REPLICAS

DOCUMENT = (Path(__file__).resolve().parents[3] / "docs" / "api.md").read_text()
EXAMPLES = re.findall(r"^```(sh|bash|python)\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)
ADDRESS = "http://127.0.0.1:8000"
CHANGES = re.compile(r"curl -sX (PATCH|DELETE) \S+/(models|adapters)|curl -s \S+/(models|adapters) -H")
"""What loads and unloads."""

# curl as a user calls it, but another status than the expected one ends the example.
PRELUDE = r"""
set -eo pipefail
curl() {
  local expected="2.." arguments=() status
  while [ $# -gt 0 ]; do
    if [ "$1" = --expect ]; then expected=$2; shift; else arguments+=("$1"); fi
    shift
  done
  command curl --dump-header headers "${arguments[@]}" || return
  status=$(grep -oE '^HTTP/[0-9.]+ [0-9]+' headers | tail -1 | cut -d' ' -f2)
  [[ $status =~ ^$expected$ ]] || { echo "curl: status $status, not $expected" >&2; return 22; }
}
"""


def tried(example: tuple[str, str]) -> object:
    """An example as pytest takes it, by the name of its first route, or its first line."""
    route = re.search(r"8000(/[\w/]+)", example[1])
    name = route[1] if route else example[1].splitlines()[0][:40]
    keep = pytest.mark.one_process("replicas keep their checkpoints and adapters, and refuse changes")
    return pytest.param(example, id=name, marks=[keep] if CHANGES.search(example[1]) else [])


@pytest.fixture(scope="module")
def server(serve: Callable, tiny_checkpoint: Callable[..., Path], tmp_path_factory) -> Iterator:
    directory = tmp_path_factory.mktemp("served")
    for name, options in (("topkapi-chat", {"seed": 0}), ("topkapi-base", {"seed": 1, "chat": False})):
        shutil.move(tiny_checkpoint(name, context=512, **options), directory / name)
    run = directory / "runs" / "mine"
    run.mkdir(parents=True)
    for name, text in (("config.yaml", "epochs: 1\n"), ("metrics.jsonl", '{"step": 0}\n'), ("report.md", "# mine\n")):
        (run / name).write_text(text)
    places = {"runs_directory": run.parent} | ({} if REPLICAS else {"model_directory": directory})
    with serve(directory / "topkapi-chat", directory / "topkapi-base", **places) as running:
        yield running


def test_there_are_examples() -> None:
    assert len(EXAMPLES) > 10
    assert DOCUMENT.count("```") % 2 == 0


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("example", [tried(example) for example in EXAMPLES])
def test_every_example_runs_as_printed(server, example, tmp_path) -> None:
    language, text = example
    script = text.replace(ADDRESS, server.url)
    if language == "python":
        command = [sys.executable, "-c", script]
    else:
        command = ["bash", "-c", PRELUDE + re.sub(r"[ \t]# (\d{3})$", r" --expect \1", script, flags=re.MULTILINE)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, f"{text}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert done.stdout.strip(), f"printed nothing:\n{text}"
