"""How the environment is set up: what is installed for what, when it is done again, and which torch."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import install_torch

ROOT = Path(__file__).resolve().parent.parent
INSTALLED = ["Makefile", "pyproject.toml", "requirements.lock", "requirements-dev.lock", "install_torch.py"]
# Stands for Python, and for every program of an environment: notes how it was called, and makes "environments".
STAND_IN = """#!/bin/sh
echo "$(basename "$0") $*" >> calls
if [ "$*" = "-m venv .venv" ]; then
  mkdir -p .venv/bin
  for name in python ruff mypy topkapi; do cp "$0" .venv/bin/$name; done
fi
case "$*" in */dev/stdin*) cat > given ;; esac
case "$*" in *"$BREAK"*) [ -z "$BREAK" ] ;; esac
"""


class Checkout:
    """A copy of the files that install, whose Python only notes what it was asked."""

    compiled: list[int]
    """Which of the last calls compiled the core."""

    def __init__(self, path: Path) -> None:
        self.path = path
        for name in INSTALLED:
            shutil.copy(ROOT / name, path / name)
        (path / "stand-in").write_text(STAND_IN)
        (path / "stand-in").chmod(0o755)

    def make(self, target: str, *, fails_at: str = "", goes_on: bool = False) -> list[str]:
        """Runs `make target`; returns what it installed, in order. A call that contains `fails_at` fails, and with it
        all, unless it `goes_on`."""
        calls = self.path / "calls"
        calls.write_text("")
        environment = {"PATH": os.environ["PATH"], "BREAK": fails_at}
        ran = subprocess.run(
            ["make", target, "PYTHON=./stand-in"], cwd=self.path, env=environment, capture_output=True, text=True
        )
        assert (ran.returncode == 0) == (goes_on or not fails_at), ran.stderr
        steps = {
            "-m venv": "environment",
            "--no-deps -r /dev/stdin": "serving",
            "python install_torch.py": "torch",
            "--editable .": "topkapi",
            "-r requirements-dev.lock": "tools",
        }
        called = calls.read_text().splitlines()
        self.compiled = [at for at, call in enumerate(called) if "setup.py --quiet build_ext --inplace" in call]
        for at in self.compiled:
            assert any("setuptools==" in call for call in called[:at])
            assert not any("--editable ." in call for call in called[:at])
        return [name for call in called for part, name in steps.items() if part in call]

    def change(self, name: str) -> None:
        """As an edit that comes after everything else."""
        latest = max(path.stat().st_mtime_ns for path in [*self.path.iterdir(), *self.path.glob(".venv/.*")])
        os.utime(self.path / name, ns=(latest + 1, latest + 1))


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


SERVING = ["environment", "serving", "torch", "topkapi"]


def test_serving_installs_no_tools_and_testing_adds_them(checkout: Checkout) -> None:
    assert checkout.make("serve") == SERVING
    assert checkout.make("serve") == []
    assert checkout.make("test") == ["tools"]
    assert checkout.make("test") == []
    assert checkout.make("serve") == [], "what serves is there already"


def test_the_core_is_compiled_while_packages_come(checkout: Checkout) -> None:
    assert checkout.make("install") == SERVING and len(checkout.compiled) == 1
    assert checkout.make("install") == [] and not checkout.compiled
    checkout.change("requirements.lock")
    assert checkout.make("install", fails_at="build_ext", goes_on=True) == SERVING, "the package tries again"


def test_testing_alone_installs_both(checkout: Checkout) -> None:
    assert checkout.make("lint") == [*SERVING, "tools"]


@pytest.mark.parametrize("changed", ["requirements.lock", "pyproject.toml", "install_torch.py"])
def test_what_changed_is_installed_again(checkout: Checkout, changed: str) -> None:
    checkout.make("tools")
    checkout.change(changed)
    assert checkout.make("serve") == SERVING
    assert checkout.make("tools") == ["tools"]


def test_a_change_of_the_tools_alone_leaves_serving_alone(checkout: Checkout) -> None:
    checkout.make("tools")
    checkout.change("requirements-dev.lock")
    assert checkout.make("serve") == []
    assert checkout.make("tools") == ["tools"]


@pytest.mark.parametrize("fails_at", ["/dev/stdin", "install_torch.py", "--editable"])
def test_an_interrupted_install_is_made_anew(checkout: Checkout, fails_at: str) -> None:
    checkout.make("serve", fails_at=fails_at)
    (checkout.path / ".venv" / "half").touch()
    assert checkout.make("serve") == SERVING
    assert not (checkout.path / ".venv" / "half").exists()


def test_interrupted_tools_are_made_anew_with_all_else(checkout: Checkout) -> None:
    checkout.make("serve")
    checkout.make("tools", fails_at="requirements-dev.lock")
    (checkout.path / ".venv" / "half").touch()
    assert checkout.make("serve") == SERVING
    assert not (checkout.path / ".venv" / "half").exists()
    assert checkout.make("tools") == ["tools"]


def test_an_environment_whose_python_is_gone_is_made_anew(checkout: Checkout) -> None:
    checkout.make("tools")
    (checkout.path / ".venv" / "bin" / "python").unlink()
    assert checkout.make("serve") == SERVING


def test_everything_that_the_installed_torch_asks_for_is_here() -> None:
    """What the lock leaves out, because one build of torch alone needs it, has come with that build."""
    missing = []
    for requirement in map(Requirement, requires("torch") or []):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            met = requirement.specifier.contains(version(requirement.name), prereleases=True)
        except PackageNotFoundError:
            met = False
        if not met:
            missing.append(str(requirement))
    assert missing == []


def test_torch_is_never_installed_without_its_dependencies(monkeypatch: pytest.MonkeyPatch, checkout: Checkout) -> None:
    """The default build for Linux doesn't import without the CUDA libraries that its metadata asks for."""
    calls: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: calls.append(command) or completed(0))
    assert install_torch.install("torch==1.2.3", ["--extra-index-url", "x"])
    assert calls[0][-4:] == ["install", "torch==1.2.3", "--extra-index-url", "x"]
    monkeypatch.undo()
    checkout.make("install")
    locked = (ROOT / "requirements.lock").read_text().splitlines()
    assert (checkout.path / "given").read_text().splitlines() == [line for line in locked if line[:7] != "torch=="]
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert "/bin/python install_torch.py ${TORCH_ARGS}\n" in dockerfile
    assert "torch==" not in dockerfile


def completed(code: int, error: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess([], code, "", error)


@pytest.mark.parametrize(
    "system,driver,index,expected",
    [
        ("Linux", False, True, [install_torch.CPU_ARGUMENTS, []]),
        ("Linux", False, False, [[]]),
        ("Linux", True, True, [[]]),
        ("Darwin", False, True, [[]]),
    ],
)
def test_the_build_suits_the_machine(
    monkeypatch: pytest.MonkeyPatch, system: str, driver: bool, index: bool, expected: list[list[str]]
) -> None:
    monkeypatch.setattr(install_torch.platform, "system", lambda: system)
    monkeypatch.setattr(install_torch, "has_nvidia_driver", lambda: driver)
    monkeypatch.setattr(install_torch, "answers", lambda address: index)
    assert install_torch.choices([]) == expected
    assert install_torch.choices(["--index-url", "x"]) == [["--index-url", "x"]]


def test_the_default_build_is_taken_where_the_cpu_build_cannot_be_installed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install_torch, "choices", lambda given: [install_torch.CPU_ARGUMENTS, []])
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: completed(0))
    tried: list[list[str]] = []
    monkeypatch.setattr(install_torch, "install", lambda _, arguments: tried.append(arguments) or not arguments)
    assert install_torch.main([]) == 0
    assert tried == [install_torch.CPU_ARGUMENTS, []]
    monkeypatch.setattr(install_torch, "install", lambda *_: False)
    assert install_torch.main([]) == 1
    assert "could not be installed" in capfd.readouterr().err


def test_a_torch_that_does_not_import_is_named(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install_torch, "choices", lambda given: [[]])
    monkeypatch.setattr(install_torch, "install", lambda *_: True)
    reason = "ImportError: libcudnn.so.9: cannot open shared object file"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: completed(1, f"Traceback\n{reason}\n"))
    assert install_torch.main([]) == 1
    error = capfd.readouterr().err
    assert f'"import torch" fails: {reason}' in error
    assert "hint: choose another build" in error


def test_an_index_answers_or_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/torch/" else 404)
            self.end_headers()

        log_message: Callable[..., None] = lambda *_: None

    with HTTPServer(("127.0.0.1", 0), Handler) as server, socket.create_server(("127.0.0.1", 0)) as silent:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert install_torch.answers(f"{address}/torch/")
        assert not install_torch.answers(f"{address}/nothing/")
        monkeypatch.setattr(install_torch, "ANSWER_SECONDS", 0.1)
        assert not install_torch.answers(f"http://127.0.0.1:{silent.getsockname()[1]}/torch/"), "it accepts, and waits"
        server.shutdown()
    assert not install_torch.answers("https://nowhere.invalid/torch/")
