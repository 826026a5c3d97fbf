"""Files that need never end: devices, pipes and sparse files are refused at a stated limit by every command."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from topkapi.model import user_files
from topkapi.model.errors import DataError, SettingsError
from topkapi.service.commands import inputs, terminal
from topkapi.service.commands.cli import main
from topkapi.training.data import instructions, sources
from topkapi.training.evaluation.tasks import read_tasks
from topkapi.training.instructions.distillation import read_questions
from topkapi.training.pretrain import chat_template
from topkapi.training.recipes.arguments import read_yaml


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundredth of a megabyte instead of hundreds of them."""
    for module in (inputs, sources, instructions):
        for name in ("LONGEST_TEXT", "LONGEST_DOCUMENT"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, 1 << 20)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "hint: " in error
    return error


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/urandom"])
def test_a_device_without_end_is_refused_at_the_limit(
    device: str, small_limits: None, tiny_checkpoint: Callable[..., Path], capsys, monkeypatch
) -> None:
    good = str(tiny_checkpoint("prompt"))
    assert f"{device} has more than 1 MiB" in refused(capsys, "score", device, "-c", good)
    for command in (["score"], ["generate"]):
        with open(device, "rb") as endless:
            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(endless))
            assert "standard input has more than 1 MiB" in refused(capsys, *command, "-c", good)


def test_the_limits_themselves_hold() -> None:
    """In a process that may take no more memory than the limit needs: what is read beyond it would not fit."""
    script = """
import resource
from pathlib import Path
from topkapi.model.errors import DataError
from topkapi.model.user_files import LONGEST_TEXT, read_file
resource.setrlimit(resource.RLIMIT_AS, (LONGEST_TEXT * 5, LONGEST_TEXT * 5))
try:
    read_file(Path("/dev/zero"), LONGEST_TEXT)
except DataError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "/dev/zero has more than 256 MiB, and no more of it is read\n", done.stderr


def test_a_pipe_is_read_like_a_file(tmp_path: Path) -> None:
    """As a shell's `<(…)` gives one."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(b"A list is.",))
    writer.start()
    assert user_files.read_file(pipe, 10) == b"A list is."
    writer.join()
    writer = threading.Thread(target=pipe.write_bytes, args=(b"A list is.",))
    writer.start()
    with pytest.raises(DataError, match="has more than"):
        user_files.read_file(pipe, 9)
    writer.join()


def test_sparse_files_are_refused_by_their_size(tmp_path: Path, capsys, tiny_checkpoint: Callable[..., Path]) -> None:
    for name in ("a.txt", "a.json", "a.yaml", "a.jinja"):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, 1 << 40)
    good = str(tiny_checkpoint("prompt"))
    assert "has more than 256 MiB" in refused(capsys, "score", str(tmp_path / "a.txt"), "-c", good)
    with pytest.raises(DataError, match=r"a\.txt has more than 2 GiB"):
        list(sources.read_documents(tmp_path / "a.txt"))
    with pytest.raises(DataError, match=r"a\.json has more than 2 GiB"):
        list(instructions.read_rows(tmp_path / "a.json"))
    with pytest.raises(DataError, match=r"a\.txt has more than 256 MiB"):
        read_questions([tmp_path / "a.txt"])
    with pytest.raises(SettingsError, match=r"a\.yaml has more than 1 MiB"):
        read_yaml(tmp_path / "a.yaml")
    with pytest.raises(SettingsError, match=r"a\.yaml has more than 1 MiB"):
        read_tasks(tmp_path / "a.yaml")
    with pytest.raises(SettingsError, match=r"a\.jinja has more than 1 MiB"):
        chat_template(str(tmp_path / "a.jinja"))


def test_a_line_without_end_is_refused_where_it_stands(small_limits: None, tmp_path: Path) -> None:
    with gzip.open(tmp_path / "bomb.jsonl.gz", "wb") as file:
        file.write(b'{"text": "a"}\n' + b" " * (1 << 21))
    with pytest.raises(DataError, match=r"bomb\.jsonl\.gz, line 2 has more than 1 MiB"):
        list(sources.read_documents(tmp_path / "bomb.jsonl.gz"))


def test_what_is_nested_without_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "deep.jsonl").write_text("[" * 200_000)
    (tmp_path / "deep.json").write_text("[" * 200_000)
    (tmp_path / "deep.yaml").write_text("a: " + "[" * 3000)
    for name in ("deep.jsonl", "deep.json"):
        with pytest.raises(DataError, match="not valid JSON"):
            list(instructions.read_rows(tmp_path / name))
    for read in (read_yaml, read_tasks):
        with pytest.raises(SettingsError, match="cannot be read"):
            read(tmp_path / "deep.yaml")


def test_a_message_without_end_ends_the_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "LONGEST_LINE", 1000)
    monkeypatch.setattr("sys.stdin", io.StringIO("a" * 1000 + "\n" + "\n"))
    with pytest.raises(DataError, match="more than 1,000 characters"):
        terminal.ask()
    monkeypatch.setattr("sys.stdin", io.StringIO("a" * 999 + "\n\n"))
    assert [terminal.ask(), terminal.ask()] == ["a" * 999, ""]
    with pytest.raises(EOFError):
        terminal.ask()


@pytest.mark.parametrize(
    "command",
    [
        "serve {}.gguf --port 0",
        "serve good --draft {}.gguf --port 0",
        "serve {} --port 0",
        "generate hi -c {}",
        "chat {}",
        "bench {}",
        "pretrain --data {}.txt",
        "pretrain {}.yaml",
        "finetune --checkpoint good --data {}.jsonl",
        "finetune --checkpoint good --data rows.jsonl --chat-template {}",
        "dpo --checkpoint good --data rows.jsonl --validation-data {}.jsonl",
        "evaluate good --perplexity {}.txt",
        "evaluate good --instructions {}.jsonl",
        "instructions prepare {}.jsonl --out folder",
        "instructions answer {}.txt --checkpoint good --out answers.jsonl",
        "tokenizer train {}.txt --out folder",
        "merge good {} --out folder",
        "export gguf {} out.gguf",
    ],
)
@pytest.mark.parametrize("target", ["null", "zero", "pipe"])
def test_what_is_no_file_is_called_what_it_is(
    target: str, command: str, tmp_path: Path, tiny_checkpoint: Callable[..., Path], capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good").symlink_to(tiny_checkpoint("prompt"))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    name = command.partition("{}")[2].split(" ")[0]
    if target == "pipe":
        os.mkfifo(tmp_path / f"it{name}")
    else:
        (tmp_path / f"it{name}").symlink_to(f"/dev/{target}")
    assert "is a device, a pipe or a socket, not a" in refused(capsys, *command.format("it").split())
