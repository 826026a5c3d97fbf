"""What the README prints is run, as printed: only the port and the working directory are others."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = Path(sys.prefix)
TRAINING, HTTP = "Train on your own text", "Ask over HTTP"


def blocks(section: str | None = None) -> list[str]:
    """The shell blocks of the README, or of one of its sections, in order."""
    text = (ROOT / "README.md").read_text()
    if section is not None:
        text = text.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(program: str) -> list[list[str]]:
    """Every command line of the README that runs `program`, as words."""
    lines = [line for block in blocks() for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.split()[:1] == [program]]


def run(script: str, directory: Path, *, timeout: float = 100, **variables: str) -> str:
    """Run a script as a user would type it, in a directory with the environment at `.venv`; its standard output."""
    if not (directory / ".venv").exists():
        (directory / ".venv").symlink_to(ENVIRONMENT)
    environment = os.environ | {"PATH": f"{ENVIRONMENT / 'bin'}:{os.environ['PATH']}"} | variables
    # curl shows an HTTP error's body but calls it a success; here it is a failure.
    script = 'set -eo pipefail\ncurl() { command curl --fail-with-body "$@"; }\n' + script
    done = subprocess.run(
        ["bash", "-c", script], cwd=directory, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"{script}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@contextmanager
def serving(*checkpoints: Path) -> Iterator[int]:
    """A server of `checkpoints` on a free port, which is yielded."""
    process = subprocess.Popen(
        [ENVIRONMENT / "bin" / "topkapi", "serve", *checkpoints, "--port", "0"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if ready := re.search(r"http://127\.0\.0\.1:(\d+)", line):
                yield int(ready[1])
                return
        raise AssertionError("the server ended before it was ready")
    finally:
        process.terminate()
        process.communicate(timeout=20)


def test_serve_and_test_come_first() -> None:
    assert [block.strip() for block in blocks()[:2]] == ["make serve", "make test"]


def test_every_make_command_is_a_target() -> None:
    for words in commands("make"):
        targets = [word for word in words if "=" not in word]
        known = (ROOT / "Makefile").read_text()
        for target in targets:
            assert re.search(rf"^{target}:", known, re.MULTILINE), f"make {target}"


def test_every_topkapi_command_parses(monkeypatch: pytest.MonkeyPatch) -> None:
    from topkapi.service.commands.cli import build_parser
    from topkapi.training.recipes.arguments import read_arguments

    lines = commands("topkapi")
    assert {words[0] for words in lines} >= {"pretrain", "finetune", "serve", "generate"}
    for words in lines:
        arguments = build_parser().parse_args(words)
        if words[0] in ("pretrain", "finetune"):
            read_arguments(arguments)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_http_examples(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    def ask(block: str) -> str:
        return run(block.replace("http://127.0.0.1:8000", f"http://127.0.0.1:{port}"), tmp_path)

    requests = [block for block in blocks(HTTP) if block.startswith("curl")]
    with serving(tiny_checkpoint("tiny-chat"), tiny_checkpoint("topkapi-base", chat=False)) as port:
        generate, stream, beams, traced, score, models = map(ask, requests)
    answer = json.loads(generate)
    assert answer["outputs"][0]["finish_reason"] in ("stop", "length")
    assert answer["parameters"]["top_k"] == 50
    assert re.search(r"^event: done$", stream, re.MULTILINE)
    assert len(json.loads(beams)["outputs"]) == 2
    assert [stage["stage"] for stage in json.loads(traced)["outputs"][0]["trace"][0]["stages"]] == ["min_p"]
    assert json.loads(score)["results"][0]["perplexity"] > 1
    assert [model["name"] for model in json.loads(models)["models"]] == ["tiny-chat", "topkapi-base"]


def test_terminal_examples(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    (examples,) = (block for block in blocks(HTTP) if block.startswith("topkapi"))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "topkapi-base").symlink_to(tiny_checkpoint("topkapi-base", chat=False))
    printed = run(examples, tmp_path, TOPKAPI_CHECKPOINTS=str(tiny_checkpoint("tiny-chat")))
    assert "perplexity" in printed


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_training_in_three_commands(tmp_path: Path) -> None:
    prepare, train, evaluate = blocks(TRAINING)
    *training, serve = train.strip().splitlines()
    assert len(training) == 2 and serve.startswith("topkapi serve ")
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    run(prepare, tmp_path)
    told = run("\n".join(training), tmp_path, timeout=1500, HOME=str(tmp_path))
    assert "warning: " not in told and "not used" not in told, "an example should have nothing wrong with it"
    (right,) = re.findall(r"correct \(%\) +80 +([0-9.]+)", run(evaluate, tmp_path))
    assert 45 <= float(right) <= 80, "the README says some 60"
    with serving(*(tmp_path / path for path in shlex.split(serve)[2:])) as port:
        body = {"messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 40}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            (output,) = json.load(response)["outputs"]
    assert output["finish_reason"] == "stop" and "Topkapi" in output["text"]
