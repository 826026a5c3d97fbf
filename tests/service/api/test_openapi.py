"""/openapi.json is true: whatever is sent, valid or not, every answer is one that it describes, and none is a 500.

schemathesis makes the requests from the description (of every dialect) and judges the answers by all of its checks. One
of them is told what a schema can't express: that a request whose fields are each valid may still be refused, because
fields contradict each other, or name what is not there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.served_by_replicas import REPLICAS
from tests.service.api.openai.openai_cases import TOOL_TEMPLATE
from topkapi.model.conversation.chat_template import ChatTemplate
from topkapi.model.storage.checkpoint import load_checkpoint, save_checkpoint

CONFIGURATION = """
hooks = "schemathesis_hooks"
[checks.positive_data_acceptance]
expected-statuses = ["2xx", "400", "403", "404", "408", "409", "422", "424", "429", "503"]
"""
NEVER_ANSWERED = {"GET /streams/{id}", "DELETE /streams/{id}", "POST /models", "DELETE /models/{name}"}
NEVER_ANSWERED |= {"GET /models/{name}/card", "GET /runs/{name}", "GET /runs/{name}/report", "GET /runs/{name}/{kind}"}
"""Operations about something that only other requests bring about, or that no schema can name."""
if REPLICAS:  # They keep what they have.
    NEVER_ANSWERED |= {"PATCH /models/{name}", "POST /adapters", "DELETE /adapters/{name}"}
ALIASES = {"POST /chat/completions": "POST /v1/chat/completions", "POST /embeddings": "POST /embedding"}
"""Of two paths for one thing, it is enough to get through to one."""


@pytest.fixture(scope="module")
def server(serve: Callable, tiny_checkpoint: Callable[..., Path], tmp_path_factory) -> Iterator:
    """A server that lets requests do everything, with contexts that are soon full."""
    directory = tmp_path_factory.mktemp("library")
    for name, options in (("chat", {"seed": 0}), ("base", {"seed": 1, "chat": False})):
        shutil.move(tiny_checkpoint(name, context=64, **options), directory / name)
    # A template that takes every role, and tools: else few conversations that are as described would be answered.
    plain = load_checkpoint(directory / "chat")
    chat = ChatTemplate(TOOL_TEMPLATE)
    save_checkpoint(
        directory / "tools",
        model=plain.model,
        tokenizer=plain.tokenizer,
        chat=chat,
        generation={},
        details={"note": "random weights"},
    )
    shutil.rmtree(directory / "chat")
    shutil.move(directory / "tools", directory / "chat")
    # Replicas keep their checkpoints: what would change them answers 409, as described.
    changing = {} if REPLICAS else {"model_directory": directory}
    with serve(directory / "chat", directory / "base", stream_grace=2, **changing) as running:
        yield running


def run(url: str, directory: Path, *options: str) -> dict[str, Counter[int]]:
    """Run schemathesis with all checks; how often each operation answered with which status. Fails where it fails."""
    (directory / "schemathesis.toml").write_text(CONFIGURATION)
    program = Path(sys.executable).with_name("schemathesis")
    command = [program, "--config-file", "schemathesis.toml", "run", f"{url}/openapi.json", "--checks", "all"]
    command += ["--continue-on-failure", "--generation-deterministic", "--no-color", *options]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "ANSWERS": str(directory / "answers")}
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
    told = done.stdout[-20_000:]
    assert done.returncode == 0, f"{told}\n{done.stderr[-3000:]}"
    answers: dict[str, Counter[int]] = {}
    for line in (directory / "answers").read_text().splitlines():
        operation, _, status = line.rpartition(" ")
        answers.setdefault(operation, Counter())[int(status)] += 1
    return answers


def operations(server) -> set[str]:
    paths = server.client.get("/openapi.json").json()["paths"]
    return {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}


def check(answers: dict[str, Counter[int]], server) -> None:
    print("\n".join(f"{operation}: {dict(statuses)}" for operation, statuses in sorted(answers.items())))
    assert answers.keys() >= operations(server)
    assert not any(status == 500 for statuses in answers.values() for status in statuses)
    assert sorted(server.client.get("/ready").json()["models"]) == ["base", "chat"], "nothing was unloaded on the way"
    server.wait_until_idle(10)


def test_every_operation_answers_as_described(server, tmp_path) -> None:
    check(run(server.url, tmp_path, "--phases", "fuzzing", "--max-examples", "3"), server)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_operation_answers_as_described_fifty_times(server, tmp_path) -> None:
    answers = run(server.url, tmp_path, "--phases", "examples,coverage,fuzzing,stateful", "--max-examples", "50")
    check(answers, server)
    answered = {operation for operation, statuses in answers.items() if any(status < 300 for status in statuses)}
    answered |= {operation for operation, same in ALIASES.items() if same in answered}
    assert operations(server) - answered <= NEVER_ANSWERED, "what operations do is reached, not only refusals"
