"""An environment of its own for each peer that comes from PyPI, made when it is first needed."""

from __future__ import annotations

import hashlib
import sys
import venv
from pathlib import Path

import install_torch

from .engines import HERE, PeerError
from .weights import command, said

REQUIREMENTS = HERE / "requirements"


def python(cache: Path, peer: str) -> Path:
    """The interpreter of the peer's environment below `cache`. Raises `PeerError` when it can't be made."""
    wanted = REQUIREMENTS / f"{peer}.txt"
    # Another version of Python or of a requirement is another environment.
    digest = hashlib.sha256(wanted.read_bytes() + sys.version.encode()).hexdigest()[:8]
    directory = cache / "environments" / f"{peer}-{digest}"
    interpreter, done = directory / "bin" / "python", directory / "installed"
    if not done.exists():
        said(f"environment of {peer}: {directory}")
        venv.create(directory, with_pip=True, clear=True)
        failure = PeerError("nothing was tried")
        for arguments in install_torch.choices([]):
            try:
                command(str(interpreter), "-m", "pip", "install", "-q", "-r", str(wanted), *arguments)
                break
            except PeerError as error:
                failure = error
        else:
            raise failure
        # What comes from PyPI fits PyPI's torch alone; networks of language go without.
        command(str(interpreter), "-m", "pip", "uninstall", "-q", "-y", "torchvision")
        done.touch()
    return interpreter
