"""Ctrl-C at any time ends a command quietly with 130, also while it is still importing what it needs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from topkapi.service.commands import cli

# The signal comes when `sys.argv[1]` is about to be imported; what raises there is lost, as in an extension module.
CHILD = """
import os, signal, sys
wanted, ignored, *arguments = sys.argv[1:]
if ignored == "ignored":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == wanted:
            sys.meta_path.remove(self)
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except KeyboardInterrupt:
                pass
sys.meta_path.insert(0, Interrupt())
from topkapi.service.commands.cli import main
sys.exit(main(arguments))
"""


def interrupted(module: str, *arguments: str, ignored: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CHILD, module, ignored, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "module,command",
    [
        ("argparse", "serve nowhere"),
        ("pydantic", "serve nowhere"),
        ("topkapi.training.cli", "runs nowhere"),
        ("topkapi.service.commands.launch", "chat nowhere"),
        ("torch", "serve {good} --port 0"),
        ("torch", "generate hello -c {good}"),
        ("torch", "evaluate {good} --perplexity {text}"),
    ],
)
def test_ctrl_c_while_something_is_imported(
    module: str, command: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    good = tiny_checkpoint("prompt")
    (tmp_path / "text.txt").write_text("Some text.")
    given = command.format(good=good, text=tmp_path / "text.txt").split()
    done = interrupted(module, *given)
    assert (done.returncode, done.stderr) == (130, "\n")


def test_a_command_that_was_started_to_ignore_ctrl_c_ignores_it() -> None:
    done = interrupted("argparse", "serve", "nowhere", ignored="ignored")
    assert done.returncode == 2 and "there is no checkpoint at nowhere" in done.stderr


def test_ctrl_c_otherwise_is_an_exception_as_always(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """So that whatever is half done is undone on the way; and the caller's own way is back afterwards."""
    undone = []

    def run(arguments: object) -> int:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            undone.append(True)
        return 0

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(cli, "_run", run)
    assert cli.main(["serve"]) == 130
    assert undone == [True] and capsys.readouterr().err == "\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_nothing_that_takes_a_moment_is_imported_with_the_command() -> None:
    """Before `main` runs, Ctrl-C ends in the interpreter's trace, so there should be nothing between."""
    script = "import sys; before = set(sys.modules); import topkapi.service.commands.cli\n"
    script += "print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    late = {
        "argparse",
        "typing",
        "difflib",
        "topkapi.model",
        "topkapi.service.commands.parser",
        "topkapi.training",
        "pydantic",
    }
    assert "topkapi.service.commands.cli" in done.stdout.split() and not late & set(done.stdout.split()), done.stdout
